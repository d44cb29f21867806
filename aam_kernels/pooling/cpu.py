"""Attention pooling through the compiled CPU kernels (`aam_kernels/native/pooling.hpp`).

Values are read once each way. float16 and bfloat16 are converted here, computed in float32 and
rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aam_kernels._runtime import native
from aam_kernels._runtime.grouping import Sequences, has_gaps
from aam_kernels._runtime.on_cpu import capsule, dense, like, rounded, rows, where


def forward(values: Tensor, scores: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Pooled values (n, dim) and logsumexp (n,)."""
    count = sequences.offsets.shape[0] - 1
    pooled = values.new_empty(count, values.shape[1], dtype=torch.float32)
    lse = values.new_empty(count, dtype=torch.float32)
    native.kernels().pooling_forward(
        capsule(rows(values)), capsule(scores.float()), capsule(pooled), capsule(lse),
        *where(sequences)[:2], torch.get_num_threads(),
    )  # fmt: skip
    return rounded(pooled, values.dtype), lse


def backward(
    grad_pooled: Tensor,
    values: Tensor,
    scores: Tensor,
    pooled: Tensor,
    lse: Tensor,
    sequences: Sequences,
) -> tuple[Tensor, Tensor]:
    """Gradients of values and scores."""
    gaps = has_gaps(sequences.offsets, sequences.lengths, values.shape[0])
    grad_values, grad_scores = like(values, gaps), like(scores, gaps)
    native.kernels().pooling_backward(
        capsule(dense(grad_pooled)), capsule(rows(values)), capsule(scores.float()),
        capsule(dense(pooled)), capsule(dense(lse)), capsule(grad_values), capsule(grad_scores),
        *where(sequences)[:2], torch.get_num_threads(),
    )  # fmt: skip
    return rounded(grad_values, values.dtype), rounded(grad_scores, scores.dtype)
