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
    whole_key_row,
    whole_row,
)
from aam_kernels.attention.triton.short_rows import (
    fill_rows,
    head_rows,
    left_over,
    load_rows,
    load_tiles,
    program_place,
    span,
    store_rows,
    tile_size,
    tile_start,
    unknown_zero,
)


@triton.jit
def _differentiate(
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
    grad_output, query, key, value, output, grad_query, grad_key, grad_value = tensors[:8]
    lse_ptr, seed_ptr = tensors[8:]
    first, length, key_first, key_length, head, heads = place
    scale_log2, grad_query_scale, grad_key_scale, drop_below, keep, keep_scale = numbers
    dtype: tl.constexpr = query[0].dtype.element_ty
    keys = load_tiles(head_rows(key, key_first, head), key_length, TILES, COUNT, HEAD_DIM, D)
    values = load_tiles(head_rows(value, key_first, head), key_length, TILES, COUNT, HEAD_DIM, D)
    last_rows = tile_start(TILES, COUNT - 1) + tl.arange(0, tile_size(TILES, COUNT - 1))
    bias = tl.where(last_rows < key_length, 0.0, float("-inf"))[:, None]
    bias = tl.full([tile_size(TILES, COUNT - 1), BLOCK_M], 0.0, tl.float32) + bias
    columns = ()
    grad_keys = ()
    grad_values = ()
    for tile in tl.static_range(COUNT):
        grad_keys += (tl.full([tile_size(TILES, tile), D], 0.0, tl.float32),)
        grad_values += (tl.full([tile_size(TILES, tile), D], 0.0, tl.float32),)
    if DROPOUT:
        word = seed_word(seed_ptr)
        query_place = whole_row(seed_ptr, first)
        key_place = whole_key_row(seed_ptr, key_first)
        zero = unknown_zero(keep_scale)
        for tile in tl.static_range(COUNT):
            rows = tile_start(TILES, tile) + tl.arange(0, tile_size(TILES, tile))
            columns += (column_factors(key_place + rows),)
    queries = head_rows(query, first, head)
    outputs = head_rows(output, first, head)
    grad_outputs = head_rows(grad_output, first, head)
    grad_queries = head_rows(grad_query, first, head)
    block = tl.arange(0, BLOCK_M)
    for start in tl.range(0, length, BLOCK_M):
        left = length - start
        begin = tl.full([], 0, tl.int64) + start
        q = load_rows(queries, begin, block, left, True, HEAD_DIM, D)
        do = load_rows(grad_outputs, begin, block, left, True, HEAD_DIM, D)
        o = load_rows(outputs, begin, block, left, True, HEAD_DIM, D)
        row_ptr = lse_ptr + (begin + first) * heads + head
        lse = tl.load(row_ptr + block * heads, mask=block < left, other=float("inf"))
        lse = lse * 1.4426950408889634
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        if NEGATIVE:
            q = -q
        if DROPOUT:
            delta = delta * keep
            row = _once(row_factors(word, query_place + start + block, head))[None, :]
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
                kept = tl.where(dropped(row, columns[tile][:, None], drop_below), zero, p)
                ds = kept * dp - p * delta[None, :]
            else:
                ds = p * (dp - delta[None, :])
            kept = narrow(kept, dtype, ROUND_HALF_UP)
            ds = narrow(ds, dtype, ROUND_HALF_UP)
            dv = tl.dot(kept, do, grad_values[tile], input_precision=PRECISION)
            dk = tl.dot(ds, q, grad_keys[tile], input_precision=PRECISION)
            dq = tl.dot(tl.trans(ds), keys[tile], dq, input_precision=PRECISION)
            new_grad_values += (dv,)
            new_grad_keys += (dk,)
        grad_keys = new_grad_keys
        grad_values = new_grad_values
        dq = narrow(dq * grad_query_scale, dtype, ROUND_HALF_UP)
        store_rows(grad_queries, begin, dq, block, left, True, HEAD_DIM, D)
    grad_key_rows = head_rows(grad_key, key_first, head)
    grad_value_rows = head_rows(grad_value, key_first, head)
    for tile in tl.static_range(COUNT):
        rows = tile_start(TILES, tile) + tl.arange(0, tile_size(TILES, tile))
        dk = narrow(grad_keys[tile] * grad_key_scale, dtype, ROUND_HALF_UP)
        store_rows(grad_key_rows, 0, dk, rows, key_length, tile == COUNT - 1, HEAD_DIM, D)
        dv = grad_values[tile]
        if DROPOUT:
            dv = dv * keep_scale
        dv = narrow(dv, dtype, ROUND_HALF_UP)
        store_rows(grad_value_rows, 0, dv, rows, key_length, tile == COUNT - 1, HEAD_DIM, D)


@triton.jit
def _once(factors):
    """Row factors, computed by one thread a row and handed round.

    Without a reduction the compiler would hash in every thread that needs a row. What it forgets
    on the way, that they have 24 bits and fit fast multipliers, is said again.
    """
    pairs = tl.broadcast_to(factors.to(tl.int32)[:, None], [factors.shape[0], 2])
    return tl.max(pairs, 1).to(tl.uint32) & 0xFFFFFF


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
    grad_query = (grad_query_ptr, stride_grad_query, stride_grad_query_head)
    grad_key = (grad_key_ptr, stride_grad_key, stride_grad_key_head)
    grad_value = (grad_value_ptr, stride_grad_value, stride_grad_value_head)
    first, length, slots = span(offsets_ptr, lengths_ptr, sequence, count)
    key_first, key_length, key_slots = first, length, slots
    if key_offsets_ptr is not None:
        key_first, key_length, key_slots = span(key_offsets_ptr, key_lengths_ptr, sequence, count)
    tensors = (
        (grad_output_ptr, stride_grad_output, stride_grad_output_head),
        (query_ptr, stride_query, stride_query_head),
        (key_ptr, stride_key, stride_key_head),
        (value_ptr, stride_value, stride_value_head),
        (output_ptr, stride_output, stride_output_head),
        grad_query,
        grad_key,
        grad_value,
        lse_ptr,
        seed_ptr,
    )
    place = (first, length, key_first, key_length, head, heads)
    numbers = (scale_log2, grad_query_scale, grad_key_scale, drop_below, keep, keep_scale)
    if (key_length > 0) & (key_length <= TILE_0):
        _differentiate(
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
            _differentiate(
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
            _differentiate(
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
    key_first, key_length, key_slots = first, length, slots
    if key_offsets_ptr is not None:
        key_first, key_length, key_slots = span(key_offsets_ptr, key_lengths_ptr, sequence, count)
    too_long = key_length > TILE_0 + TILE_1 + TILE_2
    used = tl.where((key_length == 0) | too_long, 0, length)
    blank = tl.where(too_long, float("nan"), 0.0)
    empty, last, step = left_over(first, used, slots, total, sequence, count, BLOCK_M, GROUP)
    fill_rows(grad_query, head, empty, last, step, blank, HEAD_DIM, D, BLOCK_M)
    used = tl.where(too_long, 0, key_length)
    empty, last, step = left_over(
        key_first, used, key_slots, total_key, sequence, count, BLOCK_M, GROUP
    )
    fill_rows(grad_key, head, empty, last, step, blank, HEAD_DIM, D, BLOCK_M)
    fill_rows(grad_value, head, empty, last, step, blank, HEAD_DIM, D, BLOCK_M)
