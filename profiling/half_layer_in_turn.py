"""Experiment: half an encoder layer, or a whole one, in one kernel, one head after the other.

The form for NVIDIA's asynchronous products, which take keys and values from shared memory: what
`profiling.half_layer` keeps in 512 registers of 64 lanes does not fit 255 of 32. A program takes a
sequence in TILES of BLOCK_ROWS rows; LN1(x) of all tiles and one head's keys and values lie in
shared memory, queries never leave the registers, weights are read once a sequence. Attended values
wait in the output's own rows for the projection. Of the last tile LAST keys count.
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
from profiling.layer_pieces import finish_rows, normalised


@triton.jit
def first_rows(x, ROWS: tl.constexpr):
    """The first rows of a tile: all of them, or half."""
    if x.shape[0] == ROWS:
        return x
    else:
        halves = tl.reshape(x, [2, ROWS, x.shape[1]])
        first, _ = tl.split(tl.trans(halves, (1, 2, 0)))
        return first


@triton.jit
def attend_head(
    query,
    keys,
    values,
    first,
    tokens,
    length,
    head,
    scale_log2,
    word,
    drop_below,
    keep_scale,
    DROPOUT: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
):
    """Exact softmax attention of (rows, head_dim) queries of one head, narrowed."""
    DTYPE: tl.constexpr = query.dtype
    BLOCK: tl.constexpr = keys[0].shape[0]
    scores = ()
    for tile in tl.static_range(len(keys)):
        score = tl.dot(query, tl.trans(keys[tile]), input_precision="ieee")
        inside = tl.arange(0, keys[tile].shape[0]) + tile * BLOCK < length
        scores += (tl.where(inside[None, :], score, float("-inf")),)
    top = tl.max(scores[0], 1)
    for tile in tl.static_range(1, len(keys)):
        top = tl.maximum(top, tl.max(scores[tile], 1))
    top = top * scale_log2
    accumulator = tl.zeros([query.shape[0], query.shape[1]], tl.float32)
    total = tl.zeros([query.shape[0]], tl.float32)
    if DROPOUT:
        rows = row_factors(word, first + tokens, head)[:, None]
    for tile in tl.static_range(len(keys)):
        p = tl.exp2(scores[tile] * scale_log2 - top[:, None])
        total += tl.sum(p, 1)
        if DROPOUT:
            columns = tl.arange(0, keys[tile].shape[0]) + (first + tile * BLOCK)
            drop = dropped(rows, column_factors(columns)[None, :], drop_below)
            p = tl.where(drop, 0.0, p)
        p = narrow(p, DTYPE, ROUND_HALF_UP)
        accumulator = tl.dot(p, values[tile], accumulator, input_precision="ieee")
    return narrow(accumulator * (keep_scale / total)[:, None], DTYPE, ROUND_HALF_UP)


@triton.jit
def heads_in_turn(
    x_ptr,
    out_ptr,
    first,
    length,
    norm,
    qkv,
    word,
    scale_log2,
    drop_below,
    keep_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILES: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
):
    """Attended values into the output's rows; LN1(x), keys and values in shared memory."""
    D: tl.constexpr = HEADS * HEAD_DIM
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    features = tl.arange(0, D)
    columns = tl.arange(0, HEAD_DIM)
    normed = ()
    for tile in tl.static_range(TILES):
        tokens = tl.minimum(tl.arange(0, BLOCK_ROWS) + tile * BLOCK_ROWS, length - 1)
        x = tl.load(x_ptr + tokens[:, None] * D + features[None, :]).to(tl.float32)
        normed += (normalised(x, norm[0], norm[1], DTYPE, ROUND_HALF_UP),)
    for number in range(HEADS):
        head = tl.full([], 0, tl.int32) + number
        places = (head * HEAD_DIM + columns)[:, None] * D + features[None, :]
        query_weight = tl.trans(tl.load(qkv[0] + places))
        key_weight = tl.trans(tl.load(qkv[0] + D * D + places))
        value_weight = tl.trans(tl.load(qkv[0] + 2 * D * D + places))
        bias = qkv[1] + head * HEAD_DIM + columns
        query_bias = tl.load(bias).to(tl.float32)[None, :]
        key_bias = tl.load(bias + D).to(tl.float32)[None, :]
        value_bias = tl.load(bias + 2 * D).to(tl.float32)[None, :]
        keys = ()
        values = ()
        for tile in tl.static_range(TILES):
            key = tl.dot(normed[tile], key_weight, input_precision="ieee") + key_bias
            value = tl.dot(normed[tile], value_weight, input_precision="ieee") + value_bias
            key = narrow(key, DTYPE, ROUND_HALF_UP)
            value = narrow(value, DTYPE, ROUND_HALF_UP)
            if tile == TILES - 1:
                keys += (first_rows(key, LAST),)
                values += (first_rows(value, LAST),)
            else:
                keys += (key,)
                values += (value,)
        for tile in tl.static_range(TILES):
            tokens = tl.minimum(tl.arange(0, BLOCK_ROWS) + tile * BLOCK_ROWS, length - 1)
            query = tl.dot(normed[tile], query_weight, input_precision="ieee") + query_bias
            attended = attend_head(
                narrow(query, DTYPE, ROUND_HALF_UP), keys, values, first, tokens, length, head,
                scale_log2, word, drop_below, keep_scale, DROPOUT, ROUND_HALF_UP,
            )  # fmt: skip
            place = tokens[:, None] * D + (head * HEAD_DIM + columns)[None, :]
            tl.store(out_ptr + place, attended)


@triton.jit(do_not_specialize=["drop_below"])
def half_layer_in_turn(
    x_ptr,
    out_ptr,
    offsets_ptr,
    norm1_weight_ptr,
    norm1_bias_ptr,
    qkv_weight_ptr,
    qkv_bias_ptr,
    out_weight_ptr,
    out_bias_ptr,
    norm2_weight_ptr,
    norm2_bias_ptr,
    ffn_in_weight_ptr,
    ffn_in_bias_ptr,
    ffn_out_weight_ptr,
    ffn_out_bias_ptr,
    seed_ptr,
    scale_log2,
    drop_below,
    keep_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    TILES: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """The attention half of one sequence a program (HIDDEN = 0), or the whole layer."""
    D: tl.constexpr = HEADS * HEAD_DIM
    word = tl.full([], 0, tl.uint32)
    if DROPOUT:
        word = seed_word(seed_ptr)
    first = tl.load(offsets_ptr + tl.program_id(0))
    length = tl.load(offsets_ptr + tl.program_id(0) + 1) - first
    if length > 0:
        x_ptr += first.to(tl.int64) * D
        out_ptr += first.to(tl.int64) * D
        heads_in_turn(
            x_ptr, out_ptr, first, length, (norm1_weight_ptr, norm1_bias_ptr),
            (qkv_weight_ptr, qkv_bias_ptr), word, scale_log2, drop_below, keep_scale,
            HEADS, HEAD_DIM, TILES, LAST, BLOCK_ROWS, DROPOUT, ROUND_HALF_UP,
        )  # fmt: skip
        tl.debug_barrier()
        finish_rows(
            x_ptr, out_ptr, first, length, out_weight_ptr, out_bias_ptr,
            (norm2_weight_ptr, norm2_bias_ptr),
            (ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr),
            word, drop_below, keep_scale,
            D, HIDDEN, BLOCK_HIDDEN, BLOCK_ROWS, DROPOUT, ROUND_HALF_UP,
        )  # fmt: skip
