"""Attention forward for sequences of few keys: all of them resident, one pass, exact softmax.

For one sequence and head, with q (length, d), k and v (key_length, d), c = scale log2(e)::

    S = q k^T      m = max(c S, keys)      P = exp2(c S - m)      l = rowsum(P)
    O = (P M) v / (l (1 - p))              lse = ln(2) (m + log2(l))        (M: kept by dropout)

Queries pass by in blocks of BLOCK_M. Keys past the sequence are masked by -inf in the accumulator
that S starts from, in the last tile only.
"""

import triton
import triton.language as tl

from aam_kernels._runtime.kernel_functions import (
    column_factors,
    dropped,
    narrow,
    row_factors_from,
    rows_base,
    seed_word,
    whole_key_row,
)
from aam_kernels.attention.triton.short_rows import (
    fill_rows,
    head_rows,
    left_over,
    load_rows,
    load_tiles,
    narrowest,
    program_place,
    span,
    store_rows,
    tile_size,
    tile_start,
    unknown_zero,
)


@triton.jit
def _narrower(x, WIDTH: tl.constexpr):
    """(rows, keys) as (rows, keys / WIDTH, WIDTH): what is reduced over first costs no exchange."""
    return tl.reshape(x, [x.shape[0], x.shape[1] // WIDTH, WIDTH])


@triton.jit
def _attend(
    tensors,
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
    query, key, value, output, lse_ptr, seed_ptr = tensors
    first, length, key_first, key_length, head, heads = place
    scale_log2, drop_below, keep_scale = numbers
    WIDTH: tl.constexpr = narrowest(TILES, COUNT)
    dtype: tl.constexpr = query[0].dtype.element_ty
    queries = head_rows(query, first, head)
    outputs = head_rows(output, first, head)
    keys = load_tiles(head_rows(key, key_first, head), key_length, TILES, COUNT, HEAD_DIM, D)
    values = load_tiles(head_rows(value, key_first, head), key_length, TILES, COUNT, HEAD_DIM, D)
    last_rows = tile_start(TILES, COUNT - 1) + tl.arange(0, tile_size(TILES, COUNT - 1))
    bias = tl.where(last_rows < key_length, 0.0, float("-inf"))[None, :]
    bias = tl.full([BLOCK_M, tile_size(TILES, COUNT - 1)], 0.0, tl.float32) + bias
    columns = ()
    if DROPOUT:
        word = seed_word(seed_ptr)
        base = rows_base(seed_ptr, first, head)
        key_place = whole_key_row(seed_ptr, key_first)
        zero = unknown_zero(keep_scale)
        for tile in tl.static_range(COUNT):
            rows = tile_start(TILES, tile) + tl.arange(0, tile_size(TILES, tile))
            columns += (column_factors(key_place + rows),)
    block = tl.arange(0, BLOCK_M)
    for start in tl.range(0, length, BLOCK_M):
        left = length - start
        begin = tl.full([], 0, tl.int64) + start
        q = load_rows(queries, begin, block, left, True, HEAD_DIM, D)
        if NEGATIVE:
            q = -q
        scores = ()
        for tile in tl.static_range(COUNT):
            if tile == COUNT - 1:
                s = tl.dot(q, tl.trans(keys[tile]), bias, input_precision=PRECISION)
            else:
                s = tl.dot(q, tl.trans(keys[tile]), input_precision=PRECISION)
            scores += (s,)
        top = tl.max(_narrower(scores[COUNT - 1], WIDTH), 1)
        for tile in tl.static_range(COUNT - 1):
            top = tl.maximum(top, tl.max(_narrower(scores[tile], WIDTH), 1))
        top = tl.max(top, 1) * scale_log2
        weight = tl.full([BLOCK_M, WIDTH], 0.0, tl.float32)
        accumulator = tl.full([BLOCK_M, D], 0.0, tl.float32)
        if DROPOUT:
            row = row_factors_from(word, base, start + block)[:, None]
        for tile in tl.static_range(COUNT):
            p = tl.exp2(scores[tile] * scale_log2 - top[:, None])
            weight += tl.sum(_narrower(p, WIDTH), 1)
            if DROPOUT:
                p = tl.where(dropped(row, columns[tile][None, :], drop_below), zero, p)
            p = narrow(p, dtype, ROUND_HALF_UP)
            accumulator = tl.dot(p, values[tile], accumulator, input_precision=PRECISION)
        weight = tl.sum(weight, 1)
        o = narrow(accumulator * (keep_scale / weight)[:, None], dtype, ROUND_HALF_UP)
        store_rows(outputs, begin, o, block, left, True, HEAD_DIM, D)
        lse = (top + tl.log2(weight)) * 0.6931471805599453
        row_ptr = lse_ptr + (begin + first) * heads + head
        tl.store(row_ptr + block * heads, lse, mask=block < left)


@triton.jit(do_not_specialize=["count", "total", "heads", "drop_below"])
def short_forward(
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    lse_ptr,
    offsets_ptr,
    lengths_ptr,
    key_offsets_ptr,
    key_lengths_ptr,
    seed_ptr,
    count,
    total,
    heads,
    stride_query,
    stride_query_head,
    stride_key,
    stride_key_head,
    stride_value,
    stride_value_head,
    stride_output,
    stride_output_head,
    scale_log2,
    drop_below,
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
    """Output and logsumexp of one (sequence, head); the programs left over clear the tail."""
    TILES: tl.constexpr = (TILE_0, TILE_1, TILE_2)
    sequence, head = program_place(heads, GROUP)
    output = (output_ptr, stride_output, stride_output_head)
    first, length, slots = span(offsets_ptr, lengths_ptr, sequence, count)
    key_first, key_length = first, length
    if key_offsets_ptr is not None:
        key_first, key_length, _ = span(key_offsets_ptr, key_lengths_ptr, sequence, count)
    tensors = (
        (query_ptr, stride_query, stride_query_head),
        (key_ptr, stride_key, stride_key_head),
        (value_ptr, stride_value, stride_value_head),
        output,
        lse_ptr,
        seed_ptr,
    )
    place = (first, length, key_first, key_length, head, heads)
    numbers = (scale_log2, drop_below, keep_scale)
    if (key_length > 0) & (key_length <= TILE_0):
        _attend(
            tensors,
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
            _attend(
                tensors,
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
    elif (key_length > TILE_0 + TILE_1) & (  # noqa: SIM102 (the inner one is decided by the compiler)
        key_length <= TILE_0 + TILE_1 + TILE_2
    ):
        if TILE_2 > 0:
            _attend(
                tensors,
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
    # The gap behind; all rows where there are no keys, or more than promised: then NaN. Where they
    # lie is read again: kept meanwhile it would take registers that the keys need.
    first, length, slots = span(offsets_ptr, lengths_ptr, sequence, count)
    key_length = length
    if key_offsets_ptr is not None:
        _, key_length, _ = span(key_offsets_ptr, key_lengths_ptr, sequence, count)
    too_long = key_length > TILE_0 + TILE_1 + TILE_2
    used = tl.where((key_length == 0) | too_long, 0, length)
    empty, last, step = left_over(first, used, slots, total, sequence, count, BLOCK_M, GROUP)
    blank = tl.where(too_long, float("nan"), 0.0)
    fill_rows(output, head, empty, last, step, blank, HEAD_DIM, D, BLOCK_M)
    blank = tl.where(too_long, float("nan"), float("-inf"))
    fill_rows((lse_ptr, heads, 1), head, empty, last, step, blank, 1, 1, BLOCK_M)
