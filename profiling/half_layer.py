"""Experiment: half an encoder layer, or a whole one, in one Triton kernel, for rows of few tokens.

Compiled ahead of time and interpreted, never imported by the packages; `profiling.whole_layer`
prints what comes of it. Per sequence x (length, D), with D = heads head_dim::

    mid = x + drop1(attention(LN1(x) Wqkv' + bqkv) Wout' + bout)            (attention half)
    out = mid + drop3(drop2(gelu(LN2(mid) Win' + bin)) Wffn' + bffn)        (feed-forward half)

One program takes a sequence; heads are the batch dimension of every product, so that a warp has a
head of its own and nothing but the norm, the projection and the weights crosses warps. Keys are
chunks of CHUNK. Two forms (a third is `profiling.half_layer_in_turn`):

* resident: keys and values never leave the registers. What the matrix unit returns for them
  has the layout in which it takes them back. For AMD's 512 registers of 64 lanes.
* through a scratch of 2 LONGEST D elements a program, which stays in L2; keys and values come
  back into shared memory. Programs are as many as fit on the device and take sequences in turn.

Rows past the end of a sequence are clamped to its last one, so nothing but the scores needs a mask,
and the repeated stores write the same bits. The output's own rows hold LN1(x) or the queries, then
the attended values, until the projection replaces them.
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
from profiling.layer_pieces import (
    feed_forward,
    finish_rows,
    normalised,
    packed,
)


@triton.jit
def head_weight(weight_ptr, part, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Part 0, 1, 2 (query, key, value) of the qkv weight as (heads, D, head_dim)."""
    D: tl.constexpr = HEADS * HEAD_DIM
    outputs = tl.arange(0, HEADS)[:, None, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :, None]
    weight = tl.load(weight_ptr + part * D * D + outputs * D + tl.arange(0, D)[None, None, :])
    return tl.trans(weight, (0, 2, 1))


@triton.jit
def head_places(HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(heads, 1, head_dim) places within D features."""
    heads = tl.arange(0, HEADS)[:, None, None] * HEAD_DIM
    return heads + tl.arange(0, HEAD_DIM)[None, None, :]


@triton.jit
def project_heads(x, weight, bias, DTYPE: tl.constexpr, ROUND_HALF_UP: tl.constexpr):
    """(rows, D) times (heads, D, head_dim) plus (heads, 1, head_dim), narrowed."""
    HEADS: tl.constexpr = weight.shape[0]
    x = tl.broadcast_to(x[None, :, :], [HEADS, x.shape[0], x.shape[1]])
    bias = tl.broadcast_to(bias, [HEADS, x.shape[1], weight.shape[2]])
    return narrow(tl.dot(x, weight, bias, input_precision="ieee"), DTYPE, ROUND_HALF_UP)


@triton.jit
def keys_in_registers(
    x_ptr,
    normed_ptr,
    length,
    norm,
    qkv,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    PIN: tl.constexpr,
):
    """Keys (heads, head_dim, CHUNK) and values (heads, CHUNK, head_dim); stores LN1(x)."""
    D: tl.constexpr = HEADS * HEAD_DIM
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    places = head_places(HEADS, HEAD_DIM)
    key_weight = head_weight(qkv[0], 1, HEADS, HEAD_DIM)
    value_weight = head_weight(qkv[0], 2, HEADS, HEAD_DIM)
    key_bias = tl.load(qkv[1] + D + places).to(tl.float32)
    value_bias = tl.load(qkv[1] + 2 * D + places).to(tl.float32)
    keys = ()
    values = ()
    for chunk in tl.static_range(CHUNKS):
        tokens = tl.minimum(tl.arange(0, CHUNK) + chunk * CHUNK, length - 1)
        tile = tokens[:, None] * D + tl.arange(0, D)[None, :]
        x = tl.load(x_ptr + tile).to(tl.float32)
        x = normalised(x, norm[0], norm[1], DTYPE, ROUND_HALF_UP)
        tl.store(normed_ptr + tile, x)
        key = project_heads(x, key_weight, key_bias, DTYPE, ROUND_HALF_UP)
        value = project_heads(x, value_weight, value_bias, DTYPE, ROUND_HALF_UP)
        keys += (tl.trans(packed(key, PIN), (0, 2, 1)),)
        values += (packed(value, PIN),)
    return keys, values


@triton.jit
def project_rows(
    x_ptr,
    query_ptr,
    scratch_ptr,
    length,
    norm,
    qkv,
    D: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
):
    """Queries into the output's rows, keys and values into the scratch."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    features = tl.arange(0, D)
    for first in range(0, length, BLOCK_ROWS):
        tokens = tl.minimum(first + tl.arange(0, BLOCK_ROWS), length - 1)
        tile = tokens[:, None] * D + features[None, :]
        x = tl.load(x_ptr + tile).to(tl.float32)
        x = normalised(x, norm[0], norm[1], DTYPE, ROUND_HALF_UP)
        for part in tl.static_range(3):
            weight = tl.load(qkv[0] + part * D * D + features[:, None] * D + features[None, :])
            bias = tl.load(qkv[1] + part * D + features).to(tl.float32)
            bias = tl.broadcast_to(bias[None, :], [BLOCK_ROWS, D])
            y = tl.dot(x, tl.trans(weight), bias, input_precision="ieee")
            y = narrow(y, DTYPE, ROUND_HALF_UP)
            if part == 0:
                tl.store(query_ptr + tile, y)
            else:
                tl.store(scratch_ptr + (part - 1) * LONGEST * D + tile, y)


@triton.jit
def keys_from_scratch(
    scratch_ptr,
    length,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LONGEST: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Keys (heads, head_dim, CHUNK) and values (heads, CHUNK, head_dim)."""
    D: tl.constexpr = HEADS * HEAD_DIM
    places = head_places(HEADS, HEAD_DIM)
    keys = ()
    values = ()
    for chunk in tl.static_range(CHUNKS):
        tokens = tl.minimum(tl.arange(0, CHUNK) + chunk * CHUNK, length - 1)
        tile = tokens[None, :, None] * D + places
        keys += (tl.trans(tl.load(scratch_ptr + tile), (0, 2, 1)),)
        values += (tl.load(scratch_ptr + LONGEST * D + tile),)
    return keys, values


@triton.jit
def attend(
    query,
    keys,
    values,
    first,
    tokens,
    length,
    scale_log2,
    word,
    drop_below,
    keep_scale,
    CHUNKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
):
    """Exact softmax attention of (heads, rows, head_dim) queries, narrowed."""
    HEADS: tl.constexpr = query.shape[0]
    ROWS: tl.constexpr = query.shape[1]
    CHUNK: tl.constexpr = values[0].shape[1]
    DTYPE: tl.constexpr = query.dtype
    block = tl.arange(0, CHUNK)
    scores = ()
    for chunk in tl.static_range(CHUNKS):
        score = tl.dot(query, keys[chunk], input_precision="ieee")
        inside = (block + chunk * CHUNK < length)[None, None, :]
        scores += (tl.where(inside, score, float("-inf")),)
    highest = scores[0]
    for chunk in tl.static_range(1, CHUNKS):
        highest = tl.maximum(highest, scores[chunk])
    top = tl.max(highest, 2) * scale_log2
    accumulator = tl.zeros([HEADS, ROWS, values[0].shape[2]], tl.float32)
    total = tl.zeros([HEADS, ROWS, CHUNK], tl.float32)
    if DROPOUT:
        heads = tl.arange(0, HEADS)[:, None]
        rows = row_factors(word, (first + tokens)[None, :], heads)[:, :, None]
    for chunk in tl.static_range(CHUNKS):
        p = tl.exp2(scores[chunk] * scale_log2 - top[:, :, None])
        total += p
        if DROPOUT:
            columns = column_factors(first + chunk * CHUNK + block)[None, None, :]
            p = tl.where(dropped(rows, columns, drop_below), 0.0, p)
        accumulator = tl.dot(
            narrow(p, DTYPE, ROUND_HALF_UP), values[chunk], accumulator, input_precision="ieee"
        )
    total = tl.sum(total, 2)
    return narrow(accumulator * (keep_scale / total)[:, :, None], DTYPE, ROUND_HALF_UP)


@triton.jit
def one_sequence(
    x_ptr,
    out_ptr,
    scratch_ptr,
    first,
    length,
    norm1,
    qkv,
    out_projection,
    norm2,
    ffn,
    word,
    scale_log2,
    drop_below,
    keep_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    RESIDENT: tl.constexpr,
    PIN: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    LONGEST: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """The attention half of one sequence of at least one token (HIDDEN = 0), or the whole layer."""
    D: tl.constexpr = HEADS * HEAD_DIM
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    places = head_places(HEADS, HEAD_DIM)
    x_ptr += first.to(tl.int64) * D
    out_ptr += first.to(tl.int64) * D
    if RESIDENT:
        keys, values = keys_in_registers(
            x_ptr, out_ptr, length, norm1, qkv, HEADS, HEAD_DIM, CHUNKS, CHUNK, ROUND_HALF_UP, PIN
        )
        query_weight = head_weight(qkv[0], 0, HEADS, HEAD_DIM)
        query_bias = tl.load(qkv[1] + places).to(tl.float32)
        tl.debug_barrier()
    else:
        project_rows(
            x_ptr, out_ptr, scratch_ptr, length, norm1, qkv, D, LONGEST, BLOCK_ROWS, ROUND_HALF_UP
        )
        tl.debug_barrier()
        keys, values = keys_from_scratch(
            scratch_ptr, length, HEADS, HEAD_DIM, LONGEST, CHUNKS, CHUNK
        )
    for start in range(0, length, BLOCK_M):
        tokens = tl.minimum(start + tl.arange(0, BLOCK_M), length - 1)
        tile = tokens[None, :, None] * D + places
        if RESIDENT:
            normed = tl.load(out_ptr + tokens[:, None] * D + tl.arange(0, D)[None, :])
            query = project_heads(normed, query_weight, query_bias, DTYPE, ROUND_HALF_UP)
        else:
            query = tl.load(out_ptr + tile)
        attended = attend(
            query, keys, values, first, tokens, length, scale_log2,
            word, drop_below, keep_scale, CHUNKS, DROPOUT, ROUND_HALF_UP,
        )  # fmt: skip
        tl.store(out_ptr + tile, attended)
    tl.debug_barrier()
    finish_rows(
        x_ptr, out_ptr, first, length, out_projection[0], out_projection[1], norm2, ffn,
        word, drop_below, keep_scale,
        D, HIDDEN, BLOCK_HIDDEN, BLOCK_ROWS, DROPOUT, ROUND_HALF_UP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "drop_below"])
def half_layer(
    x_ptr,
    out_ptr,
    scratch_ptr,
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
    count,
    scale_log2,
    drop_below,
    keep_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    RESIDENT: tl.constexpr,
    PIN: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    LONGEST: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """The attention half of whole sequences (HIDDEN = 0), or the whole layer."""
    norm1 = (norm1_weight_ptr, norm1_bias_ptr)
    norm2 = (norm2_weight_ptr, norm2_bias_ptr)
    qkv = (qkv_weight_ptr, qkv_bias_ptr)
    out_projection = (out_weight_ptr, out_bias_ptr)
    ffn = (ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr)
    word = tl.full([], 0, tl.uint32)
    if DROPOUT:
        word = seed_word(seed_ptr)
    if RESIDENT:
        first = tl.load(offsets_ptr + tl.program_id(0))
        length = tl.load(offsets_ptr + tl.program_id(0) + 1) - first
        if length > 0:
            one_sequence(
                x_ptr, out_ptr, None, first, length, norm1, qkv, out_projection, norm2, ffn,
                word, scale_log2, drop_below, keep_scale,
                HEADS, HEAD_DIM, HIDDEN, RESIDENT, PIN, DROPOUT, ROUND_HALF_UP,
                LONGEST, CHUNKS, CHUNK, BLOCK_M, BLOCK_ROWS, BLOCK_HIDDEN,
            )  # fmt: skip
    else:
        scratch_ptr += tl.program_id(0).to(tl.int64) * (2 * LONGEST * HEADS * HEAD_DIM)
        for sequence in range(tl.program_id(0), count, tl.num_programs(0)):
            first = tl.load(offsets_ptr + sequence)
            length = tl.load(offsets_ptr + sequence + 1) - first
            if length > 0:
                one_sequence(
                    x_ptr, out_ptr, scratch_ptr, first, length, norm1, qkv, out_projection,
                    norm2, ffn, word, scale_log2, drop_below, keep_scale,
                    HEADS, HEAD_DIM, HIDDEN, RESIDENT, PIN, DROPOUT, ROUND_HALF_UP,
                    LONGEST, CHUNKS, CHUNK, BLOCK_M, BLOCK_ROWS, BLOCK_HIDDEN,
                )  # fmt: skip


@triton.jit(do_not_specialize=["count", "drop_below"])
def feed_forward_half(
    mid_ptr,
    out_ptr,
    offsets_ptr,
    norm2_weight_ptr,
    norm2_bias_ptr,
    ffn_in_weight_ptr,
    ffn_in_bias_ptr,
    ffn_out_weight_ptr,
    ffn_out_bias_ptr,
    seed_ptr,
    count,
    drop_below,
    keep_scale,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """The feed-forward half of BLOCK_ROWS rows of the packed batch."""
    DTYPE: tl.constexpr = mid_ptr.dtype.element_ty
    start = tl.program_id(0) * BLOCK_ROWS
    end = tl.load(offsets_ptr + count)
    word = tl.full([], 0, tl.uint32)
    if DROPOUT:
        word = seed_word(seed_ptr)
    if start < end:
        tokens = tl.minimum(start + tl.arange(0, BLOCK_ROWS), end - 1)
        tile = tokens.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
        norm2 = (norm2_weight_ptr, norm2_bias_ptr)
        ffn = (ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr)
        y = feed_forward(
            tl.load(mid_ptr + tile).to(tl.float32), 0, tokens, norm2, ffn,
            word, drop_below, keep_scale,
            HIDDEN, BLOCK_HIDDEN, DTYPE, DROPOUT, ROUND_HALF_UP,
        )  # fmt: skip
        tl.store(out_ptr + tile, narrow(y, DTYPE, ROUND_HALF_UP))
