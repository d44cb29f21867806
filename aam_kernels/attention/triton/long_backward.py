"""Attention of rows of any length, backward: one kernel a side, no atomics.

With W = exp2(scale log2(e) q k^T - log2(e) lse), M the elements that dropout keeps, and
D = rowsum(dO O) (1 - p)::

    dS = W (M (dO v^T) - D)                 dQ = scale / (1 - p) dS k
    dV = (W M)^T dO / (1 - p)               dK = scale / (1 - p) dS^T q

`long_backward_queries` streams keys past a block of queries for dQ; it also writes what the other
kernel needs of each query, `terms` (2 to 4, heads, total): -log2(e) lse, D, dropout's factor of
the row (as bits), and for float32 log2(rowsum(W)), which is 0 but for the rounding of lse.
`long_backward_keys` then streams queries past a block of keys for dK and dV. Blocks, masks and the
rows past the last sequence are treated as in `long_forward`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aam_kernels._runtime.configurations import (
    dot_precision,
    launch,
    round_half_up,
)
from aam_kernels._runtime.dropout import drop_below
from aam_kernels._runtime.grouping import Sequences
from aam_kernels.attention.triton.long_backward_keys import long_backward_keys
from aam_kernels.attention.triton.long_backward_queries import long_backward_queries
from aam_kernels.attention.triton.long_forward import (
    LOG2_E,
    block_of,
    blocks_of,
    configured,
    key_factors,
    tail_programs,
)


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    sequences: Sequences,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    max_length: int,
    max_key_length: int,
) -> None:
    """Writes every row of ``grads``, those of query, key and value; arguments as in `forward`."""
    total, heads, head_dim = query.shape
    count = sequences.offsets.shape[0] - 1
    grad_query, grad_key, grad_value = grads
    key_offsets, key_lengths = sequences.key_side()
    tail = tail_programs(total, sequences.lengths)
    tail_key = tail_programs(key.shape[0], key_lengths)
    if not tail:
        grad_query.zero_()
    if not tail_key:
        grad_key.zero_()
        grad_value.zero_()
    dropout = dropout_p > 0
    seed = seed if dropout else None
    planes = 4 if query.dtype == torch.float32 else 3 if dropout else 2
    terms = lse.new_empty(planes, heads, total)
    where = (sequences.offsets, key_offsets, sequences.lengths, key_lengths)
    inputs = (grad_output, query, key, value)
    strides = [stride for x in inputs for stride in x.stride()[:2]]
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_of(head_dim),
        "DROPOUT": dropout,
        "EXACT": query.dtype == torch.float32,
        "ROUND_HALF_UP": round_half_up(query.dtype),
        "PRECISION": dot_precision(query.dtype),
    }
    grad_scale = scale / (1.0 - dropout_p)

    chosen = configured("long_backward_queries", query, max_key_length)
    blocks = blocks_of(max_length, chosen.meta["BLOCK_M"])
    launch(
        long_backward_queries,
        count * heads * blocks + tail,
        *inputs,
        output,
        lse,
        grad_query,
        terms,
        key_factors(key, sequences, max_key_length, seed),
        *where,
        seed,
        count,
        total,
        blocks,
        heads,
        scale * LOG2_E,
        grad_scale,
        1.0 - dropout_p,
        drop_below(dropout_p),
        *strides,
        *output.stride()[:2],
        *lse.stride(),
        *grad_query.stride()[:2],
        configuration=chosen,
        **constants,
    )

    chosen = configured("long_backward_keys", query, max_length)
    blocks = blocks_of(max_key_length, chosen.meta["BLOCK_N"])
    launch(
        long_backward_keys,
        count * heads * blocks + tail_key,
        *inputs,
        terms,
        grad_key,
        grad_value,
        *where,
        seed,
        count,
        total,
        key.shape[0],
        blocks,
        heads,
        scale * LOG2_E,
        grad_scale,
        1.0 / (1.0 - dropout_p),
        drop_below(dropout_p),
        *strides,
        *grad_key.stride()[:2],
        *grad_value.stride()[:2],
        configuration=chosen,
        **constants,
    )
