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
import triton
import triton.language as tl
from torch import Tensor

from aam_kernels._runtime.configurations import (
    configuration,
    dot_precision,
    launch,
    round_half_up,
)
from aam_kernels._runtime.dropout import drop_below
from aam_kernels._runtime.grouping import Sequences
from aam_kernels._runtime.kernel_functions import (
    column_factors,
    dropped,
    narrow,
    row_factors,
    seed_word,
)
from aam_kernels.attention.triton.long_forward import (
    LOG2_E,
    TAIL_PROGRAMS,
    block_of,
    blocks_of,
    key_factors,
)
from aam_kernels.attention.triton.long_tiles import (
    at,
    fill_rows,
    fill_scalars,
    left_over,
    load_factors,
    load_terms,
    load_tile,
    place,
    span,
    store_tile,
)


@triton.jit
def grad_of_queries(
    grad_query,
    row_sum,
    query,
    grad,
    offset,
    delta,
    row_factor,
    key_ptr,
    value_ptr,
    stride_key,
    stride_value,
    remaining,
    factors_ptr,
    scale_log2,
    drop_limit,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what one block of keys gives to the queries' gradient (BLOCK_M, BLOCK_D)."""
    column = tl.arange(0, BLOCK_N)
    key = load_tile(key_ptr, stride_key, remaining, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
    value = load_tile(value_ptr, stride_value, remaining, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    weights = tl.exp2(tl.fma(scores, scale_log2, offset[:, None]))
    if MASKED:
        weights = tl.where((column < remaining)[None, :], weights, 0.0)
    if EXACT:
        row_sum += tl.sum(weights, 1)
    grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    if DROPOUT:
        column_factor = load_factors(factors_ptr, remaining, BLOCK_N, MASKED)
        drop = dropped(row_factor[:, None], column_factor[None, :], drop_limit)
        grad_weights = tl.where(drop, 0.0, grad_weights)
    grad_scores = narrow(weights * (grad_weights - delta[:, None]), key.dtype, ROUND_HALF_UP)
    return tl.dot(grad_scores, key, grad_query, input_precision=PRECISION), row_sum


@triton.jit(do_not_specialize=["count", "total", "blocks", "drop_limit"])
def long_backward_queries(
    grad_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    lse_ptr,
    grad_query_ptr,
    terms_ptr,
    factors_ptr,
    offsets_ptr,
    key_offsets_ptr,
    lengths_ptr,
    key_lengths_ptr,
    seed_ptr,
    count,
    total,
    blocks,
    heads,
    scale_log2,
    grad_scale,
    keep,
    drop_limit,
    stride_grad,
    stride_grad_head,
    stride_query,
    stride_query_head,
    stride_key,
    stride_key_head,
    stride_value,
    stride_value_head,
    stride_output,
    stride_output_head,
    stride_lse,
    stride_lse_head,
    stride_grad_query,
    stride_grad_query_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """DQ and ``terms``; ``blocks`` programs a head and sequence, then programs for the tail."""
    block, head, sequence = place(blocks, heads)
    start = block * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    if sequence < count:
        first, length = span(offsets_ptr, lengths_ptr, sequence)
        first_key, key_length = span(key_offsets_ptr, key_lengths_ptr, sequence)
        key_base = at(key_ptr, first_key, head, stride_key, stride_key_head)
        value_base = at(value_ptr, first_key, head, stride_value, stride_value_head)
        full = key_length // BLOCK_N * BLOCK_N
        if start < length:
            rows = length - start
            here = first + start
            query = load_tile(
                at(query_ptr, here, head, stride_query, stride_query_head),
                stride_query,
                rows,
                BLOCK_M,
                HEAD_DIM,
                BLOCK_D,
                True,
            )
            grad = load_tile(
                at(grad_ptr, here, head, stride_grad, stride_grad_head),
                stride_grad,
                rows,
                BLOCK_M,
                HEAD_DIM,
                BLOCK_D,
                True,
            )
            output = load_tile(
                at(output_ptr, here, head, stride_output, stride_output_head),
                stride_output,
                rows,
                BLOCK_M,
                HEAD_DIM,
                BLOCK_D,
                True,
            )
            delta = tl.sum(grad.to(tl.float32) * output.to(tl.float32), 1) * keep
            lse_base = at(lse_ptr, here, head, stride_lse, stride_lse_head)
            lse = tl.load(lse_base + row * stride_lse, mask=row < rows, other=float("inf"))
            offset = lse * -1.4426950408889634
            terms_base = terms_ptr + head.to(tl.int64) * total + here + row
            plane = tl.cast(heads, tl.int64) * total
            tl.store(terms_base, offset, mask=row < rows)
            tl.store(terms_base + plane, delta, mask=row < rows)
            row_factor = row
            if DROPOUT:
                row_factor = row_factors(seed_word(seed_ptr), here + row, head)
                bits = row_factor.to(tl.float32, bitcast=True)
                tl.store(terms_base + 2 * plane, bits, mask=row < rows)
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            grad_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for PART in tl.static_range(2):  # the full blocks of keys, then the last
                begin, end = full * PART, key_length if PART else full
                for start_key in tl.range(begin, end, BLOCK_N, num_stages=1 if PART else None):
                    factors = factors_ptr
                    if DROPOUT:
                        factors += first_key + start_key
                    grad_query, row_sum = grad_of_queries(
                        grad_query,
                        row_sum,
                        query,
                        grad,
                        offset,
                        delta,
                        row_factor,
                        key_base + tl.cast(start_key, tl.int64) * stride_key,
                        value_base + tl.cast(start_key, tl.int64) * stride_value,
                        stride_key,
                        stride_value,
                        key_length - start_key,
                        factors,
                        scale_log2,
                        drop_limit,
                        HEAD_DIM,
                        BLOCK_D,
                        BLOCK_N,
                        PART == 1,
                        DROPOUT,
                        EXACT,
                        ROUND_HALF_UP,
                        PRECISION,
                    )
            if EXACT:
                row_sum = tl.where(key_length > 0, row_sum, 1.0)
                grad_query = grad_query / row_sum[:, None]
                tl.store(terms_base + 3 * plane, tl.log2(row_sum), mask=row < rows)
            store_tile(
                at(grad_query_ptr, here, head, stride_grad_query, stride_grad_query_head),
                stride_grad_query,
                rows,
                grad_query * grad_scale,
                BLOCK_M,
                HEAD_DIM,
                BLOCK_D,
            )
    begin, end, step, head, last_head, fill = left_over(
        offsets_ptr, lengths_ptr, count, total, blocks, heads, BLOCK_M
    )
    fill_rows(
        grad_query_ptr,
        stride_grad_query,
        stride_grad_query_head,
        begin,
        end,
        step,
        head,
        last_head,
        fill,
        BLOCK_M,
        HEAD_DIM,
        BLOCK_D,
    )
    fill_scalars(terms_ptr, 1, total, begin, end, step, head, last_head, fill, BLOCK_M)


@triton.jit
def grad_of_keys(
    grad_key,
    grad_value,
    key,
    value,
    column_factor,
    query_ptr,
    grad_ptr,
    terms_ptr,
    stride_query,
    stride_grad,
    plane,
    remaining,
    scale_log2,
    drop_limit,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what one block of queries gives to the gradients (BLOCK_N, BLOCK_D) of the keys.

    A key past the row's end gets anything, and is not stored; a query past it has a weight of 0,
    because its offset is read as -inf.
    """
    query = load_tile(query_ptr, stride_query, remaining, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED)
    grad = load_tile(grad_ptr, stride_grad, remaining, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED)
    offset = load_terms(terms_ptr, remaining, float("-inf"), BLOCK_M, MASKED)
    delta = load_terms(terms_ptr + plane, remaining, 0.0, BLOCK_M, MASKED)
    scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
    exponents = tl.fma(scores, scale_log2, offset[None, :])
    if EXACT:
        exponents -= load_terms(terms_ptr + 3 * plane, remaining, 0.0, BLOCK_M, MASKED)[None, :]
    weights = tl.exp2(exponents)
    grad_weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
    if DROPOUT:
        row_factor = load_factors(terms_ptr + 2 * plane, remaining, BLOCK_M, MASKED)
        drop = dropped(row_factor[None, :], column_factor[:, None], drop_limit)
        kept = tl.where(drop, 0.0, weights)
        grad_scores = kept * grad_weights - weights * delta[None, :]
    else:
        kept = weights
        grad_scores = weights * (grad_weights - delta[None, :])
    kept = narrow(kept, grad.dtype, ROUND_HALF_UP)
    grad_value = tl.dot(kept, grad, grad_value, input_precision=PRECISION)
    grad_scores = narrow(grad_scores, query.dtype, ROUND_HALF_UP)
    grad_key = tl.dot(grad_scores, query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["count", "total", "total_key", "blocks", "drop_limit"])
def long_backward_keys(
    grad_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    terms_ptr,
    grad_key_ptr,
    grad_value_ptr,
    offsets_ptr,
    key_offsets_ptr,
    lengths_ptr,
    key_lengths_ptr,
    count,
    total,
    total_key,
    blocks,
    heads,
    scale_log2,
    grad_scale,
    keep_scale,
    drop_limit,
    stride_grad,
    stride_grad_head,
    stride_query,
    stride_query_head,
    stride_key,
    stride_key_head,
    stride_value,
    stride_value_head,
    stride_grad_key,
    stride_grad_key_head,
    stride_grad_value,
    stride_grad_value_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """DK and dV; ``blocks`` programs a head and sequence, then programs for the tail."""
    block, head, sequence = place(blocks, heads)
    start = block * BLOCK_N
    if sequence < count:
        first, length = span(offsets_ptr, lengths_ptr, sequence)
        first_key, key_length = span(key_offsets_ptr, key_lengths_ptr, sequence)
        query_base = at(query_ptr, first, head, stride_query, stride_query_head)
        grad_base = at(grad_ptr, first, head, stride_grad, stride_grad_head)
        terms_base = terms_ptr + head.to(tl.int64) * total + first
        plane = tl.cast(heads, tl.int64) * total
        full = length // BLOCK_M * BLOCK_M
        if start < key_length:
            rows = key_length - start
            here = first_key + start
            key = load_tile(
                at(key_ptr, here, head, stride_key, stride_key_head),
                stride_key,
                rows,
                BLOCK_N,
                HEAD_DIM,
                BLOCK_D,
                True,
            )
            value = load_tile(
                at(value_ptr, here, head, stride_value, stride_value_head),
                stride_value,
                rows,
                BLOCK_N,
                HEAD_DIM,
                BLOCK_D,
                True,
            )
            column_factor = tl.arange(0, BLOCK_N)
            if DROPOUT:
                column_factor = column_factors(here + column_factor)
            grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            grad_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for PART in tl.static_range(2):  # the full blocks of queries, then the last
                begin, end = full * PART, length if PART else full
                for start_query in tl.range(begin, end, BLOCK_M, num_stages=1 if PART else None):
                    grad_key, grad_value = grad_of_keys(
                        grad_key,
                        grad_value,
                        key,
                        value,
                        column_factor,
                        query_base + tl.cast(start_query, tl.int64) * stride_query,
                        grad_base + tl.cast(start_query, tl.int64) * stride_grad,
                        terms_base + start_query,
                        stride_query,
                        stride_grad,
                        plane,
                        length - start_query,
                        scale_log2,
                        drop_limit,
                        HEAD_DIM,
                        BLOCK_D,
                        BLOCK_M,
                        PART == 1,
                        DROPOUT,
                        EXACT,
                        ROUND_HALF_UP,
                        PRECISION,
                    )
            store_tile(
                at(grad_key_ptr, here, head, stride_grad_key, stride_grad_key_head),
                stride_grad_key,
                rows,
                grad_key * grad_scale,
                BLOCK_N,
                HEAD_DIM,
                BLOCK_D,
            )
            store_tile(
                at(grad_value_ptr, here, head, stride_grad_value, stride_grad_value_head),
                stride_grad_value,
                rows,
                grad_value * keep_scale,
                BLOCK_N,
                HEAD_DIM,
                BLOCK_D,
            )
    begin, end, step, head, last_head, fill = left_over(
        key_offsets_ptr, key_lengths_ptr, count, total_key, blocks, heads, BLOCK_N
    )
    fill_rows(
        grad_key_ptr,
        stride_grad_key,
        stride_grad_key_head,
        begin,
        end,
        step,
        head,
        last_head,
        fill,
        BLOCK_N,
        HEAD_DIM,
        BLOCK_D,
    )
    fill_rows(
        grad_value_ptr,
        stride_grad_value,
        stride_grad_value_head,
        begin,
        end,
        step,
        head,
        last_head,
        fill,
        BLOCK_N,
        HEAD_DIM,
        BLOCK_D,
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
    tail = TAIL_PROGRAMS if sequences.lengths is None else 0
    tail_key = TAIL_PROGRAMS if key_lengths is None else 0
    if not tail:
        grad_query.zero_()
    if not tail_key:
        grad_key.zero_()
        grad_value.zero_()
    dropout = dropout_p > 0
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

    chosen = configuration("long_backward_queries", query.dtype, head_dim, max_key_length)
    assert chosen is not None
    blocks = blocks_of(max_length, chosen.meta["BLOCK_M"])
    launch(
        long_backward_queries,
        count * heads * blocks + tail,
        *inputs,
        output,
        lse,
        grad_query,
        terms,
        key_factors(key, sequences.offsets, dropout_p),
        *where,
        seed if dropout else None,
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

    chosen = configuration("long_backward_keys", query.dtype, head_dim, max_length)
    assert chosen is not None
    blocks = blocks_of(max_key_length, chosen.meta["BLOCK_N"])
    launch(
        long_backward_keys,
        count * heads * blocks + tail_key,
        *inputs,
        terms,
        grad_key,
        grad_value,
        *where,
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
