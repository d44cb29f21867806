"""Gradient of the queries: keys are streamed past a block of queries; see `long_backward`."""

import triton
import triton.language as tl

from aam_kernels._runtime.kernel_functions import dropped, narrow, row_factors, seed_word, whole_row
from aam_kernels.attention.triton.long_tiles import (
    at,
    fill_rows,
    left_over,
    load_factors,
    load_tile,
    place,
    slot,
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
        factors_base = factors_ptr + slot(first_key, sequence)
        terms_base = terms_ptr + head.to(tl.int64) * total + first + row
        plane = tl.cast(heads, tl.int64) * total
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
            terms = terms_base + start
            tl.store(terms, offset, mask=row < rows)
            tl.store(terms + plane, delta, mask=row < rows)
            row_factor = row
            if DROPOUT:
                query_place = whole_row(seed_ptr, here)
                row_factor = row_factors(seed_word(seed_ptr), query_place + row, head)
                bits = row_factor.to(tl.float32, bitcast=True)
                tl.store(terms + 2 * plane, bits, mask=row < rows)
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            grad_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for PART in tl.static_range(2):  # the full blocks of keys, then the last
                begin, end = full * PART, key_length if PART else full
                for start_key in tl.range(begin, end, BLOCK_N, num_stages=1 if PART else None):
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
                        factors_base + start_key,
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
                tl.store(terms + 3 * plane, tl.log2(row_sum), mask=row < rows)
            store_tile(
                at(grad_query_ptr, here, head, stride_grad_query, stride_grad_query_head),
                stride_grad_query,
                rows,
                grad_query * grad_scale,
                BLOCK_M,
                HEAD_DIM,
                BLOCK_D,
            )
        beyond = tl.where(block == blocks - 1, length, 0)
        for late in range(start + BLOCK_M, beyond, BLOCK_M):  # no block's: see `left_over`
            tl.store(terms_base + late, float("nan"), mask=row < length - late)
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
