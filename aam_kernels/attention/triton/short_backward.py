"""Attention backward for sequences of few keys: dQ, dK and dV of one (sequence, head) at once.

With c = scale log2(e), P recomputed from the logsumexp, all of it transposed (keys, queries)::

    P^T = exp2(c k q^T - lse / ln(2))           D = rowsum(dO O) (1 - p)
    dV = (P M)^T dO / (1 - p)                   dS = P (dO v^T M - D)           (M: kept by dropout)
    dQ = scale / (1 - p) dS k                   dK = scale / (1 - p) dS^T q

The keys, the values and their gradients stay in registers while queries pass by in blocks of
BLOCK_M, in order: the result is the same bits on every run, without atomics or a second pass.
"""

import triton
import triton.language as tl

from aam_kernels._runtime.kernel_functions import (
    column_factors,
    dropped,
    narrow,
    row_factors,
    seed_word,
)
from aam_kernels.attention.triton.short_rows import (
    fill_rows,
    head_base,
    load_rows,
    load_tiles,
    program_place,
    span,
    store_rows,
    tile_start,
)


@triton.jit
def _differentiate(
    pointers,
    strides,
    place,
    numbers,
    TILES: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
):
    """One sequence and head whose keys fill COUNT tiles."""
    grad_output_ptr, query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr = pointers[:6]
    grad_query_ptr, grad_key_ptr, grad_value_ptr, seed_ptr = pointers[6:]
    stride_grad_output, stride_query, stride_key, stride_value, stride_output = strides[:5]
    stride_grad_query, stride_grad_key, stride_grad_value = strides[5:]
    first, length, key_first, key_length, head, heads = place
    scale_log2, grad_query_scale, grad_key_scale, drop_below, keep, keep_scale = numbers
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    keys = load_tiles(key_ptr, key_length, stride_key, TILES, COUNT, HEAD_DIM, D)
    values = load_tiles(value_ptr, key_length, stride_value, TILES, COUNT, HEAD_DIM, D)
    last_rows = tile_start(TILES, COUNT - 1) + tl.arange(0, TILES[COUNT - 1])
    bias = tl.where(last_rows < key_length, 0.0, float("-inf"))[:, None]
    bias = tl.full([TILES[COUNT - 1], BLOCK_M], 0.0, tl.float32) + bias
    word = tl.full([], 0, tl.uint32)
    columns = ()
    grad_keys = ()
    grad_values = ()
    for tile in tl.static_range(COUNT):
        grad_keys += (tl.full([TILES[tile], D], 0.0, tl.float32),)
        grad_values += (tl.full([TILES[tile], D], 0.0, tl.float32),)
    if DROPOUT:
        word = seed_word(seed_ptr)
        for tile in tl.static_range(COUNT):
            rows = key_first + tile_start(TILES, tile) + tl.arange(0, TILES[tile])
            columns += (column_factors(rows),)
    block = tl.arange(0, BLOCK_M)
    for start in tl.range(0, length, BLOCK_M):
        left = length - start
        begin = tl.full([], 0, tl.int64) + start
        q_block = query_ptr + begin * stride_query
        do_block = grad_output_ptr + begin * stride_grad_output
        o_block = output_ptr + begin * stride_output
        dq_block = grad_query_ptr + begin * stride_grad_query
        q = load_rows(q_block, block, left, stride_query, True, HEAD_DIM, D)
        do = load_rows(do_block, block, left, stride_grad_output, True, HEAD_DIM, D)
        o = load_rows(o_block, block, left, stride_output, True, HEAD_DIM, D)
        lse = tl.load(lse_ptr + (begin + block) * heads, mask=block < left, other=float("inf"))
        lse = lse * 1.4426950408889634
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        if NEGATIVE:
            q = -q
        if DROPOUT:
            delta = delta * keep
            row = row_factors(word, first + start + block, head)[None, :]
        dq = tl.full([BLOCK_M, D], 0.0, tl.float32)
        new_grad_keys = ()
        new_grad_values = ()
        for tile in tl.static_range(COUNT):
            if tile == COUNT - 1:
                s = tl.dot(keys[tile], tl.trans(q), bias, input_precision=PRECISION)
            else:
                s = tl.dot(keys[tile], tl.trans(q), input_precision=PRECISION)
            p = tl.exp2(s * scale_log2 - lse[None, :])
            dp = tl.dot(values[tile], tl.trans(do), input_precision=PRECISION)
            kept = p
            if DROPOUT:
                drop = dropped(row, columns[tile][:, None], drop_below)
                kept = tl.where(drop, 0.0, p)
                dp = tl.where(drop, 0.0, dp)
            kept = narrow(kept, dtype, ROUND_HALF_UP)
            ds = narrow(p * (dp - delta[None, :]), dtype, ROUND_HALF_UP)
            dv = tl.dot(kept, do, grad_values[tile], input_precision=PRECISION)
            dk = tl.dot(ds, q, grad_keys[tile], input_precision=PRECISION)
            dq = tl.dot(tl.trans(ds), keys[tile], dq, input_precision=PRECISION)
            new_grad_values += (dv,)
            new_grad_keys += (dk,)
        grad_keys = new_grad_keys
        grad_values = new_grad_values
        dq = narrow(dq * grad_query_scale, dtype, ROUND_HALF_UP)
        store_rows(dq_block, dq, block, left, stride_grad_query, True, HEAD_DIM, D)
    for tile in tl.static_range(COUNT):
        rows = tile_start(TILES, tile) + tl.arange(0, TILES[tile])
        dk = narrow(grad_keys[tile] * grad_key_scale, dtype, ROUND_HALF_UP)
        dv = grad_values[tile]
        if DROPOUT:
            dv = dv * keep_scale
        dv = narrow(dv, dtype, ROUND_HALF_UP)
        store_rows(
            grad_key_ptr, dk, rows, key_length, stride_grad_key, tile == COUNT - 1, HEAD_DIM, D
        )
        store_rows(
            grad_value_ptr, dv, rows, key_length, stride_grad_value, tile == COUNT - 1, HEAD_DIM, D
        )


@triton.jit(do_not_specialize=["count", "total", "total_key", "heads", "drop_below"])
def short_backward(
    grad_output_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    lse_ptr,
    grad_query_ptr,
    grad_key_ptr,
    grad_value_ptr,
    offsets_ptr,
    lengths_ptr,
    key_offsets_ptr,
    key_lengths_ptr,
    seed_ptr,
    count,
    total,
    total_key,
    heads,
    stride_grad_output,
    stride_grad_output_head,
    stride_query,
    stride_query_head,
    stride_key,
    stride_key_head,
    stride_value,
    stride_value_head,
    stride_output,
    stride_output_head,
    stride_grad_query,
    stride_grad_query_head,
    stride_grad_key,
    stride_grad_key_head,
    stride_grad_value,
    stride_grad_value_head,
    scale_log2,
    grad_query_scale,
    grad_key_scale,
    drop_below,
    keep,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_0: tl.constexpr,
    TILE_1: tl.constexpr,
    TILE_2: tl.constexpr,
):
    """Gradients of one (sequence, head); the programs left over clear the tail."""
    TILES: tl.constexpr = (TILE_0, TILE_1, TILE_2)
    sequence, head = program_place(heads, GROUP)
    grad_query_ptr = grad_query_ptr + head.to(tl.int64) * stride_grad_query_head
    grad_key_ptr = grad_key_ptr + head.to(tl.int64) * stride_grad_key_head
    grad_value_ptr = grad_value_ptr + head.to(tl.int64) * stride_grad_value_head
    if sequence >= count:
        part = (sequence - count) * BLOCK_M
        step = (GROUP - count % GROUP) * BLOCK_M
        first = tl.load(offsets_ptr + count)
        key_first = first
        if key_offsets_ptr is not None:
            key_first = tl.load(key_offsets_ptr + count)
        first, key_first = first + part, key_first + part
        fill_rows(grad_query_ptr, first, total, step, stride_grad_query, 0.0, HEAD_DIM, D, BLOCK_M)
        fill_rows(
            grad_key_ptr, key_first, total_key, step, stride_grad_key, 0.0, HEAD_DIM, D, BLOCK_M
        )
        fill_rows(
            grad_value_ptr, key_first, total_key, step, stride_grad_value, 0.0, HEAD_DIM, D, BLOCK_M
        )
        return
    first, length, slots = span(offsets_ptr, lengths_ptr, sequence)
    key_first, key_length, key_slots = first, length, slots
    if key_offsets_ptr is not None:
        key_first, key_length, key_slots = span(key_offsets_ptr, key_lengths_ptr, sequence)
    grad_output_ptr = head_base(
        grad_output_ptr, first, head, stride_grad_output, stride_grad_output_head
    )
    query_ptr = head_base(query_ptr, first, head, stride_query, stride_query_head)
    key_ptr = head_base(key_ptr, key_first, head, stride_key, stride_key_head)
    value_ptr = head_base(value_ptr, key_first, head, stride_value, stride_value_head)
    output_ptr = head_base(output_ptr, first, head, stride_output, stride_output_head)
    lse_ptr = head_base(lse_ptr, first, head, heads, 1)
    grad_query_ptr = grad_query_ptr + first.to(tl.int64) * stride_grad_query
    grad_key_ptr = grad_key_ptr + key_first.to(tl.int64) * stride_grad_key
    grad_value_ptr = grad_value_ptr + key_first.to(tl.int64) * stride_grad_value
    pointers = (
        grad_output_ptr,
        query_ptr,
        key_ptr,
        value_ptr,
        output_ptr,
        lse_ptr,
        grad_query_ptr,
        grad_key_ptr,
        grad_value_ptr,
        seed_ptr,
    )
    strides = (
        stride_grad_output,
        stride_query,
        stride_key,
        stride_value,
        stride_output,
        stride_grad_query,
        stride_grad_key,
        stride_grad_value,
    )
    place = (first, length, key_first, key_length, head, heads)
    numbers = (scale_log2, grad_query_scale, grad_key_scale, drop_below, keep, keep_scale)
    if (key_length > 0) & (key_length <= TILE_0):
        _differentiate(
            pointers,
            strides,
            place,
            numbers,
            TILES,
            1,
            BLOCK_M,
            HEAD_DIM,
            D,
            DROPOUT,
            NEGATIVE,
            PRECISION,
            ROUND_HALF_UP,
        )
    elif (key_length > TILE_0) & (key_length <= TILE_0 + TILE_1):
        if TILE_1 > 0:
            _differentiate(
                pointers,
                strides,
                place,
                numbers,
                TILES,
                2,
                BLOCK_M,
                HEAD_DIM,
                D,
                DROPOUT,
                NEGATIVE,
                PRECISION,
                ROUND_HALF_UP,
            )
    elif (key_length > TILE_0 + TILE_1) & (key_length <= TILE_0 + TILE_1 + TILE_2):
        if TILE_2 > 0:  # noqa: SIM102  (a constant: no kernel without the tile)
            _differentiate(
                pointers,
                strides,
                place,
                numbers,
                TILES,
                3,
                BLOCK_M,
                HEAD_DIM,
                D,
                DROPOUT,
                NEGATIVE,
                PRECISION,
                ROUND_HALF_UP,
            )
    # A gap behind the sequence; no keys: 0; more keys than promised: NaN, never a wrong number.
    empty, key_empty, blank = length, key_length, 0.0
    if key_length == 0:
        empty = 0
    if key_length > tile_start(TILES, 3):
        empty, key_empty, blank = 0, 0, float("nan")
    fill_rows(grad_query_ptr, empty, slots, BLOCK_M, stride_grad_query, blank, HEAD_DIM, D, BLOCK_M)
    fill_rows(
        grad_key_ptr, key_empty, key_slots, BLOCK_M, stride_grad_key, blank, HEAD_DIM, D, BLOCK_M
    )
    fill_rows(
        grad_value_ptr,
        key_empty,
        key_slots,
        BLOCK_M,
        stride_grad_value,
        blank,
        HEAD_DIM,
        D,
        BLOCK_M,
    )
