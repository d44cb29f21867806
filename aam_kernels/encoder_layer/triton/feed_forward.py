"""Everything of the layer after attention in one kernel, for widths that fit a block.

    mid    = x + drop1(attended Wout' + bout)
    output = mid + drop3(drop2(gelu(LN2(mid) Win' + bin)) Wffn' + bffn)

One program takes BLOCK_M rows through both halves, with the hidden features BLOCK_F at a time:
neither mid nor the hidden features are ever written. The weights come from the L2 cache, once a
program. Mid stays in float32 here, where the separate products (and backward) round it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aam_kernels._runtime.kernel_functions import narrow
from aam_kernels.encoder_layer.triton.product import load_weight
from aam_kernels.encoder_layer.triton.tiles import (
    centred_rows,
    drop_features,
    load_features,
    load_tile,
    normal_cdf,
    store_tile,
)


@triton.jit(do_not_specialize=["count", "total", "drop_below"])
def layer_feed_forward(
    attended_ptr,
    x_ptr,
    out_weight_ptr,
    out_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    ffn_in_weight_ptr,
    ffn_in_bias_ptr,
    ffn_out_weight_ptr,
    ffn_out_bias_ptr,
    output_ptr,
    offsets_ptr,
    seed_ptr,
    count,
    total,
    drop_below,
    keep_scale,
    D: tl.constexpr,
    F: tl.constexpr,
    BRANCH_SITE: tl.constexpr,
    HIDDEN_SITE: tl.constexpr,
    OUTPUT_SITE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """BLOCK_M rows of the output; sites of 0 drop nothing."""
    dtype: tl.constexpr = out_weight_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    block, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    rows_total = total - first
    rows_left = tl.load(offsets_ptr + count) - first
    if rows_left <= 0:
        zeros = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        store_tile(output_ptr, zeros, first, block, rows_total, columns, D, ROUND_HALF_UP)
        return
    attended = load_tile(attended_ptr, first, block, rows_left, columns, D).to(dtype)
    weight = load_weight(out_weight_ptr, columns, columns, D, 1, D, D)
    mid = tl.dot(attended, weight, input_precision=PRECISION)
    mid += load_features(out_bias_ptr, columns, D)[None, :]
    if BRANCH_SITE:
        mid = drop_features(
            mid * keep_scale, seed_ptr, first, block, columns, drop_below, BRANCH_SITE
        )
    mid += load_tile(x_ptr, first, block, rows_left, columns, D)
    normed, rstd = centred_rows(mid, columns, D)
    normed = normed * rstd[:, None] * load_features(norm_weight_ptr, columns, D)[None, :]
    normed += load_features(norm_bias_ptr, columns, D)[None, :]
    normed = narrow(normed, dtype, ROUND_HALF_UP)
    output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, F, BLOCK_F):
        features = start + tl.arange(0, BLOCK_F)
        ffn_in = load_weight(ffn_in_weight_ptr, features, columns, D, 1, F, D)
        hidden = tl.dot(normed, ffn_in, input_precision=PRECISION)
        hidden += load_features(ffn_in_bias_ptr, features, F)[None, :]
        hidden *= normal_cdf(hidden, dtype == tl.float32)
        if HIDDEN_SITE:
            hidden = drop_features(
                hidden * keep_scale, seed_ptr, first, block, features, drop_below, HIDDEN_SITE
            )
        hidden = narrow(hidden, dtype, ROUND_HALF_UP)
        ffn_out = load_weight(ffn_out_weight_ptr, columns, features, F, 1, D, F)
        output = tl.dot(hidden, ffn_out, output, input_precision=PRECISION)
    output += load_features(ffn_out_bias_ptr, columns, D)[None, :]
    if OUTPUT_SITE:
        output = drop_features(
            output * keep_scale, seed_ptr, first, block, columns, drop_below, OUTPUT_SITE
        )
    output = tl.where((block < rows_left)[:, None], output + mid, 0.0)
    store_tile(output_ptr, output, first, block, rows_total, columns, D, ROUND_HALF_UP)
