"""Attention of rows of any length, forward: keys are streamed past a block of queries.

For every sequence and head, with q (length, d), k and v (key_length, d), c = scale log2(e), and
key blocks j = 0, 1, ...::

    S_j = q k_j^T                          m_j = max(m_(j-1), c rowmax(S_j)),  m_(-1) = -inf
    W_j = exp2(c S_j - m_j)                a_j = exp2(m_(j-1) - m_j)
    l_j = a_j l_(j-1) + rowsum(W_j)        O_j = a_j O_(j-1) + (W_j M_j) v_j
    output = O / (l (1 - p))               lse = ln(2) (m + log2(l))

M are the elements that dropout keeps. Only the last block of keys is masked. A program serves one
block of queries of one head of one sequence; the programs past the last sequence write the rows
that follow it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aam_kernels._runtime.configurations import (
    Configuration,
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
    whole_key_row,
    whole_row,
)
from aam_kernels.attention.triton.long_tiles import (
    at,
    fill_rows,
    fill_scalars,
    left_over,
    load_factors,
    load_tile,
    place,
    slot,
    span,
    store_tile,
)

LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["blocks"])
def long_key_factors(factors_ptr, offsets_ptr, lengths_ptr, seed_ptr, blocks, BLOCK: tl.constexpr):
    """Dropout's factor of every key row: hashed where it is used, it would cost more than a key."""
    sequence = tl.program_id(0) // blocks
    first, length = span(offsets_ptr, lengths_ptr, sequence)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    place = whole_key_row(seed_ptr, first)
    factors = column_factors(place + row).to(tl.int32, bitcast=True)
    tl.store(factors_ptr + slot(first, sequence) + row, factors, mask=row < length)


@triton.jit
def attend(
    query,
    accumulator,
    running_max,
    running_sum,
    key_ptr,
    value_ptr,
    stride_key,
    stride_value,
    remaining,
    scale_log2,
    row_factor,
    factors_ptr,
    drop_limit,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys; the new accumulator (BLOCK_M, BLOCK_D), maximum and sum (BLOCK_M,)."""
    column = tl.arange(0, BLOCK_N)
    key = load_tile(key_ptr, stride_key, remaining, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    if MASKED:
        scores = tl.where((column < remaining)[None, :], scores, float("-inf"))
    new_max = tl.maximum(running_max, tl.max(scores, 1) * scale_log2)
    shrink = tl.exp2(running_max - new_max)
    weights = tl.exp2(tl.fma(scores, scale_log2, -new_max[:, None]))
    if MASKED:
        weights = tl.where((column < remaining)[None, :], weights, 0.0)  # also where scale is 0
    running_sum = running_sum * shrink + tl.sum(weights, 1)
    if DROPOUT:
        column_factor = load_factors(factors_ptr, remaining, BLOCK_N, MASKED)
        drop = dropped(row_factor[:, None], column_factor[None, :], drop_limit)
        weights = tl.where(drop, 0.0 * scale_log2, weights)  # a constant 0 would be slower
    value = load_tile(value_ptr, stride_value, remaining, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
    accumulator = tl.dot(
        narrow(weights, value.dtype, ROUND_HALF_UP),
        value,
        accumulator * shrink[:, None],
        input_precision=PRECISION,
    )
    return accumulator, new_max, running_sum


@triton.jit(do_not_specialize=["count", "total", "blocks", "drop_limit"])
def long_forward(
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    lse_ptr,
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
    keep_scale,
    drop_limit,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See the module; ``blocks`` programs a head and sequence, then programs for the tail."""
    block, head, sequence = place(blocks, heads)
    start = block * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    if sequence < count:
        first, length = span(offsets_ptr, lengths_ptr, sequence)
        first_key, key_length = span(key_offsets_ptr, key_lengths_ptr, sequence)
        key_base = at(key_ptr, first_key, head, stride_key, stride_key_head)
        value_base = at(value_ptr, first_key, head, stride_value, stride_value_head)
        factors_base = factors_ptr + slot(first_key, sequence)
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
            row_factor = row
            if DROPOUT:
                query_place = whole_row(seed_ptr, here)
                row_factor = row_factors(seed_word(seed_ptr), query_place + row, head)
            running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
            running_sum = tl.zeros([BLOCK_M], tl.float32)
            accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for PART in tl.static_range(2):  # the full blocks of keys, then the last
                begin, end = full * PART, key_length if PART else full
                for start_key in tl.range(begin, end, BLOCK_N, num_stages=1 if PART else None):
                    accumulator, running_max, running_sum = attend(
                        query,
                        accumulator,
                        running_max,
                        running_sum,
                        key_base + tl.cast(start_key, tl.int64) * stride_key,
                        value_base + tl.cast(start_key, tl.int64) * stride_value,
                        stride_key,
                        stride_value,
                        key_length - start_key,
                        scale_log2,
                        row_factor,
                        factors_base + start_key,
                        drop_limit,
                        HEAD_DIM,
                        BLOCK_D,
                        BLOCK_N,
                        PART == 1,
                        DROPOUT,
                        ROUND_HALF_UP,
                        PRECISION,
                    )
            # Without keys the maximum is -inf and so is the lse; the accumulator is 0.
            running_sum = tl.where(key_length > 0, running_sum, 1.0)
            store_tile(
                at(output_ptr, here, head, stride_output, stride_output_head),
                stride_output,
                rows,
                accumulator * (keep_scale / running_sum)[:, None],
                BLOCK_M,
                HEAD_DIM,
                BLOCK_D,
            )
            lse = (running_max + tl.log2(running_sum)) * 0.6931471805599453
            lse_base = at(lse_ptr, here, head, stride_lse, stride_lse_head)
            tl.store(lse_base + row * stride_lse, lse, mask=row < rows)
    begin, end, step, head, last_head, fill = left_over(
        offsets_ptr, lengths_ptr, count, total, blocks, heads, BLOCK_M
    )
    fill_rows(
        output_ptr,
        stride_output,
        stride_output_head,
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
    fill = tl.where(fill == 0.0, float("-inf"), fill)
    fill_scalars(
        lse_ptr, stride_lse, stride_lse_head, begin, end, step, head, last_head, fill, BLOCK_M
    )


def configured(kernel: str, query: Tensor, length: int) -> Configuration:
    """The configuration of a kernel, which serves every case.

    Raises:
        RuntimeError: the table in use has none.
    """
    chosen = configuration(kernel, query.dtype, query.shape[-1], length)
    if chosen is None:
        raise RuntimeError(f"no configuration of {kernel} for {query.dtype}, {query.shape[-1]}")
    return chosen


def key_factors(
    key: Tensor, sequences: Sequences, max_key_length: int, seed: Tensor | None
) -> Tensor:
    """Dropout factors of the keys, int32, at their `slot`; without dropout any int32 tensor."""
    if seed is None:
        return sequences.offsets
    offsets, lengths = sequences.key_side()
    count = offsets.shape[0] - 1
    factors = key.new_empty(slots_of(key.shape[0], count), dtype=torch.int32)
    chosen = Configuration({"BLOCK": 256}, {"num_warps": 4})
    blocks = blocks_of(max_key_length, 256)
    launch(
        long_key_factors,
        count * blocks,
        factors,
        offsets,
        lengths,
        seed,
        blocks,
        configuration=chosen,
    )
    return factors


def tail_programs(total: int, lengths: Tensor | None) -> int:
    """Programs that clear what follows the last sequence, at most all rows; 0 if there are gaps."""
    return 0 if lengths is not None else min(triton.cdiv(total, 1024), 128)


def slots_of(total: int, count: int) -> int:
    """Numbers in a workspace of ``total`` rows of ``count`` sequences, a multiple of 16."""
    return (total // 16 + count + 1) * 16


def block_of(head_dim: int) -> int:
    """Columns of a tile that holds a head: a power of two that a matrix product takes."""
    return max(16, triton.next_power_of_2(head_dim))


def blocks_of(max_length: int, block: int) -> int:
    """Programs a sequence and head."""
    return max(1, triton.cdiv(max_length, block))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    sequences: Sequences,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    max_length: int,
    max_key_length: int,
) -> None:
    """Writes output (total, heads, head_dim) and lse (total, heads), of any row and head strides.

    Args:
        query: (total, heads, head_dim), as key and value of any strides but a dense last one.
        key: (total_key, heads, head_dim).
        value: (total_key, heads, head_dim).
        output: written, every row.
        lse: written, float32.
        sequences: where rows lie.
        scale: factor on the scores.
        dropout_p: probability of dropping.
        seed: (3,) int64; None without dropout.
        max_length: length of the longest row; what is longer ends in NaN.
        max_key_length: the same for keys.
    """
    total, heads, head_dim = query.shape
    count = sequences.offsets.shape[0] - 1
    seed = seed if dropout_p > 0 else None
    if scale < 0:  # the maximum is taken before scaling
        query, scale = -query, -scale
    tail = tail_programs(total, sequences.lengths)
    if not tail:
        output.zero_()
        lse.fill_(float("-inf"))
    key_offsets, key_lengths = sequences.key_side()
    chosen = configured("long_forward", query, max_key_length)
    blocks = blocks_of(max_length, chosen.meta["BLOCK_M"])
    launch(
        long_forward,
        count * heads * blocks + tail,
        query,
        key,
        value,
        output,
        lse,
        key_factors(key, sequences, max_key_length, seed),
        sequences.offsets,
        key_offsets,
        sequences.lengths,
        key_lengths,
        seed,
        count,
        total,
        blocks,
        heads,
        scale * LOG2_E,
        1.0 / (1.0 - dropout_p),
        drop_below(dropout_p),
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *output.stride()[:2],
        *lse.stride(),
        configuration=chosen,
        HEAD_DIM=head_dim,
        BLOCK_D=block_of(head_dim),
        DROPOUT=dropout_p > 0,
        ROUND_HALF_UP=round_half_up(query.dtype),
        PRECISION=dot_precision(query.dtype),
    )
