"""Attention through the compiled CPU kernels (`aam_kernels/native/attention.hpp`).

One head of one sequence at a time, in cache. float16 and bfloat16 are converted here, computed in
float32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aam_kernels._runtime import native
from aam_kernels._runtime.grouping import Sequences, has_gaps
from aam_kernels._runtime.on_cpu import capsule, dense, like, rounded, rows, seed_of, where


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output (total, heads, head_dim) and logsumexp (total, heads)."""
    gaps = has_gaps(sequences.offsets, sequences.lengths, query.shape[0])
    output, lse = like(query, gaps), query.new_empty(query.shape[:2], dtype=torch.float32)
    if gaps:
        lse.fill_(float("-inf"))
    native.kernels().attention_forward(
        *(capsule(rows(x)) for x in (query, key, value)), capsule(output), capsule(lse),
        *where(sequences), scale, dropout_p, *seed_of(seed, dropout_p), torch.get_num_threads(),
    )  # fmt: skip
    return rounded(output, query.dtype), lse


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    sequences: Sequences,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    gaps = has_gaps(sequences.offsets, sequences.lengths, query.shape[0])
    key_gaps = has_gaps(*sequences.key_side(), key.shape[0])
    grads = like(query, gaps), like(key, key_gaps), like(value, key_gaps)
    inputs = (grad_output, query, key, value, output)
    native.kernels().attention_backward(
        *(capsule(rows(x)) for x in inputs), capsule(dense(lse)), *map(capsule, grads),
        *where(sequences), scale, dropout_p, *seed_of(seed, dropout_p), torch.get_num_threads(),
    )  # fmt: skip
    grad_query, grad_key, grad_value = (rounded(grad, query.dtype) for grad in grads)
    return grad_query, grad_key, grad_value
