"""Everything of the layer after attention in one kernel each way, for widths that fit a block.

    mid    = x + drop1(attended Wout' + bout)
    output = mid + drop3(drop2(gelu(LN2(mid) Win' + bin)) Wffn' + bffn)

One program takes BLOCK_M rows all the way, with the hidden features BLOCK_F at a time: mid stays
in registers, in float32, and forward writes no hidden features. The weights come from the L2
cache, once a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aam_kernels._runtime.kernel_functions import narrow
from aam_kernels.encoder_layer.triton.product import load_weight
from aam_kernels.encoder_layer.triton.tiles import (
    centred_rows,
    drop_features,
    gelu_derivative,
    load_features,
    load_tile,
    normal_cdf,
    store_tile,
)


@triton.jit
def middle(
    attended_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    first,
    block,
    rows_left,
    columns,
    drop_below,
    keep_scale,
    D: tl.constexpr,
    SITE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The input with the attention branch added: float32 (rows, D)."""
    attended = load_tile(attended_ptr, first, block, rows_left, columns, D)
    # Rounded as attention rounds where it stores a half type: the same bits from either.
    attended = attended.to(weight_ptr.dtype.element_ty)
    weight = load_weight(weight_ptr, columns, columns, D, 1, D, D)
    mid = tl.dot(attended, weight, input_precision=PRECISION)
    mid += load_features(bias_ptr, columns, D)[None, :]
    if SITE:
        mid = drop_features(mid * keep_scale, seed_ptr, first, block, columns, drop_below, SITE)
    return mid + load_tile(x_ptr, first, block, rows_left, columns, D)


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
    mid = middle(
        attended_ptr, x_ptr, out_weight_ptr, out_bias_ptr, seed_ptr, first, block, rows_left,
        columns, drop_below, keep_scale, D, BRANCH_SITE, PRECISION,
    )  # fmt: skip
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


@triton.jit(do_not_specialize=["count", "total", "drop_below"])
def layer_feed_backward(
    grad_output_ptr,
    attended_ptr,
    x_ptr,
    out_weight_ptr,
    out_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    ffn_in_weight_ptr,
    ffn_in_bias_ptr,
    ffn_out_weight_ptr,
    grad_mid_ptr,
    normed_ptr,
    hidden_ptr,
    grad_hidden_ptr,
    partials_ptr,
    offsets_ptr,
    seed_ptr,
    count,
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
    """Gradient of mid for BLOCK_M rows, and what the weight gradients are made of.

    That is the norm's output, the hidden features and the gradient before their GELU, and of the
    norm's weight and bias this program's sums over its rows. Rows past the end are not written.
    """
    dtype: tl.constexpr = out_weight_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    block, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    rows_left = tl.load(offsets_ptr + count) - first
    mid = middle(
        attended_ptr, x_ptr, out_weight_ptr, out_bias_ptr, seed_ptr, first, block, rows_left,
        columns, drop_below, keep_scale, D, BRANCH_SITE, PRECISION,
    )  # fmt: skip
    mid, rstd = centred_rows(mid, columns, D)
    mid *= rstd[:, None]
    norm_weight = load_features(norm_weight_ptr, columns, D)
    normed = mid * norm_weight[None, :] + load_features(norm_bias_ptr, columns, D)[None, :]
    store_tile(normed_ptr, normed, first, block, rows_left, columns, D, ROUND_HALF_UP)
    normed = narrow(normed, dtype, ROUND_HALF_UP)
    grad_output = load_tile(grad_output_ptr, first, block, rows_left, columns, D)
    if OUTPUT_SITE:
        grad_output = drop_features(
            grad_output, seed_ptr, first, block, columns, drop_below, OUTPUT_SITE
        )
    grad_output = narrow(grad_output, dtype, ROUND_HALF_UP)
    grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, F, BLOCK_F):
        features = start + tl.arange(0, BLOCK_F)
        ffn_in = load_weight(ffn_in_weight_ptr, features, columns, D, 1, F, D)
        hidden = tl.dot(normed, ffn_in, input_precision=PRECISION)
        hidden += load_features(ffn_in_bias_ptr, features, F)[None, :]
        ffn_out = load_weight(ffn_out_weight_ptr, features, columns, 1, F, F, D)
        grad_hidden = tl.dot(grad_output, ffn_out, input_precision=PRECISION)
        cdf = normal_cdf(hidden, dtype == tl.float32)
        grad_hidden *= gelu_derivative(hidden, cdf)
        hidden *= cdf
        if HIDDEN_SITE:
            hidden = drop_features(
                hidden * keep_scale, seed_ptr, first, block, features, drop_below, HIDDEN_SITE
            )
            grad_hidden = drop_features(
                grad_hidden * (keep_scale * keep_scale),
                seed_ptr, first, block, features, drop_below, HIDDEN_SITE,
            )  # fmt: skip
        store_tile(hidden_ptr, hidden, first, block, rows_left, features, F, ROUND_HALF_UP)
        store_tile(
            grad_hidden_ptr, grad_hidden, first, block, rows_left, features, F, ROUND_HALF_UP
        )
        grad_hidden = narrow(grad_hidden, dtype, ROUND_HALF_UP)
        grad = tl.dot(grad_hidden, tl.trans(ffn_in), grad, input_precision=PRECISION)
    partials_ptr += tl.program_id(0).to(tl.int64) * (2 * D)
    grad = tl.where((block < rows_left)[:, None], grad, 0.0)
    tl.store(partials_ptr + columns, tl.sum(grad * mid, 0), mask=columns < D)
    tl.store(partials_ptr + D + columns, tl.sum(grad, 0), mask=columns < D)
    grad *= norm_weight[None, :]
    along, level = tl.sum(grad * mid, 1) / D, tl.sum(grad, 1) / D
    grad = (grad - level[:, None] - mid * along[:, None]) * rstd[:, None]
    grad += load_tile(grad_output_ptr, first, block, rows_left, columns, D)
    store_tile(grad_mid_ptr, grad, first, block, rows_left, columns, D, ROUND_HALF_UP)
