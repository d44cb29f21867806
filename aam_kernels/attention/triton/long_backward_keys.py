"""Gradients of keys and values: queries are streamed past a block of keys; see `long_backward`."""

import triton
import triton.language as tl

from aam_kernels._runtime.kernel_functions import column_factors, dropped, narrow, whole_key_row
from aam_kernels.attention.triton.long_tiles import (
    at,
    fill_rows,
    left_over,
    load_factors,
    load_terms,
    load_tile,
    place,
    span,
    store_tile,
)


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

    A key past the row's end gets anything, and is not stored; a query past it is read as zeros, as
    is its gradient, and adds nothing.
    """
    query = load_tile(query_ptr, stride_query, remaining, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED)
    grad = load_tile(grad_ptr, stride_grad, remaining, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED)
    offset = load_terms(terms_ptr, remaining, BLOCK_M, MASKED)
    delta = load_terms(terms_ptr + plane, remaining, BLOCK_M, MASKED)
    scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
    exponents = tl.fma(scores, scale_log2, offset[None, :])
    if EXACT:
        exponents -= load_terms(terms_ptr + 3 * plane, remaining, BLOCK_M, MASKED)[None, :]
    weights = tl.exp2(exponents)
    grad_weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
    if DROPOUT:
        row_factor = load_factors(terms_ptr + 2 * plane, remaining, BLOCK_M, MASKED)
        drop = dropped(row_factor[None, :], column_factor[:, None], drop_limit)
        kept = tl.where(drop, 0.0 * scale_log2, weights)  # a constant 0 would be slower
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
    seed_ptr,
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
                key_place = whole_key_row(seed_ptr, here)
                column_factor = column_factors(key_place + column_factor)
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
