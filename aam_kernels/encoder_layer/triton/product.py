"""Products of the layer with everything around them that works on rows or elements.

    Y = X + drop(act(norm(drop(A)) W^T + b))      A (total, K), W (N, K), Y (total, N)

Every part but the product may be absent: LayerNorm, or dropout, on the way in; bias, GELU,
dropout and the residual X on the way out. ``W`` is read through strides, so the backward pass
multiplies by the same weights untransposed. One program makes BLOCK_M rows and BLOCK_N columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aam_kernels._runtime.kernel_functions import narrow
from aam_kernels.encoder_layer.triton.tiles import (
    centred_rows,
    drop_features,
    gelu_derivative,
    load_features,
    load_tile,
    normal_cdf,
    row_statistics,
    store_tile,
)


@triton.jit
def load_weight(
    pointer,
    outputs,
    inputs,
    stride_output,
    stride_input,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """(inputs, outputs) of a weight, ready to multiply by; 0 outside."""
    mask = (inputs < K)[:, None] & (outputs < N)[None, :]
    places = pointer + inputs[:, None] * stride_input + outputs[None, :] * stride_output
    return tl.load(places, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["count", "total", "drop_below"])
def layer_product(
    input_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    residual_ptr,
    output_ptr,
    offsets_ptr,
    seed_ptr,
    count,
    total,
    stride_output,
    stride_input,
    drop_below,
    keep_scale,
    N: tl.constexpr,
    K: tl.constexpr,
    INPUT_SITE: tl.constexpr,
    OUTPUT_SITE: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M rows and BLOCK_N columns of the output; a site of 0 is none."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    COLUMN_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = (tl.program_id(0) // COLUMN_BLOCKS).to(tl.int64) * BLOCK_M
    columns = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.arange(0, BLOCK_M)
    rows_total = total - first
    rows_left = tl.load(offsets_ptr + count) - first
    if rows_left <= 0:
        zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        store_tile(output_ptr, zeros, first, block, rows_total, columns, N, ROUND_HALF_UP)
        return
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if norm_weight_ptr is not None and K <= BLOCK_K:
        inner = tl.arange(0, BLOCK_K)
        x = load_tile(input_ptr, first, block, rows_left, inner, K)
        x, rstd = centred_rows(x, inner, K)
        x = x * rstd[:, None] * load_features(norm_weight_ptr, inner, K)[None, :]
        x += load_features(norm_bias_ptr, inner, K)[None, :]
        weight = load_weight(weight_ptr, columns, inner, stride_output, stride_input, N, K)
        x = narrow(x, dtype, ROUND_HALF_UP)
        accumulator = tl.dot(x, weight, accumulator, input_precision=PRECISION)
    else:
        mean = tl.zeros([BLOCK_M], tl.float32)
        rstd = mean
        if norm_weight_ptr is not None:
            mean, rstd = row_statistics(input_ptr, first, block, rows_left, K, BLOCK_K)
        for start in range(0, K, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            x = load_tile(input_ptr, first, block, rows_left, inner, K)
            if norm_weight_ptr is not None:
                x = (x - mean[:, None]) * rstd[:, None]
                x = x * load_features(norm_weight_ptr, inner, K)[None, :]
                x += load_features(norm_bias_ptr, inner, K)[None, :]
            if INPUT_SITE:
                x = drop_features(x, seed_ptr, first, block, inner, drop_below, INPUT_SITE)
            weight = load_weight(weight_ptr, columns, inner, stride_output, stride_input, N, K)
            if input_ptr.dtype.element_ty == tl.float32:
                x = x.to(dtype)  # as attention rounds where it stores a half type
            else:
                x = narrow(x, dtype, ROUND_HALF_UP)
            accumulator = tl.dot(x, weight, accumulator, input_precision=PRECISION)
    if bias_ptr is not None:
        accumulator += load_features(bias_ptr, columns, N)[None, :]
    if GELU:
        accumulator = accumulator * normal_cdf(accumulator, dtype == tl.float32)
    if INPUT_SITE or OUTPUT_SITE:
        accumulator *= keep_scale
    if OUTPUT_SITE:
        accumulator = drop_features(
            accumulator, seed_ptr, first, block, columns, drop_below, OUTPUT_SITE
        )
    if residual_ptr is not None:
        accumulator += load_tile(residual_ptr, first, block, rows_left, columns, N)
    accumulator = tl.where((block < rows_left)[:, None], accumulator, 0.0)
    store_tile(output_ptr, accumulator, first, block, rows_total, columns, N, ROUND_HALF_UP)


@triton.jit(do_not_specialize=["count", "drop_below"])
def layer_hidden_backward(
    grad_output_ptr,
    mid_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    ffn_in_weight_ptr,
    ffn_in_bias_ptr,
    ffn_out_weight_ptr,
    hidden_ptr,
    grad_hidden_input_ptr,
    offsets_ptr,
    seed_ptr,
    count,
    drop_below,
    keep_scale,
    N: tl.constexpr,
    K: tl.constexpr,
    HIDDEN_SITE: tl.constexpr,
    OUTPUT_SITE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The feed-forward part's hidden features once more, and the gradient before their GELU.

    With u = norm(mid) Win^T + b: hidden = drop2(gelu(u)), and the gradient of u is
    drop2(drop3(grad_output) Wout) gelu'(u); N hidden features, K model features. Nothing is
    written past the last sequence: what comes next does not read there.
    """
    dtype: tl.constexpr = ffn_in_weight_ptr.dtype.element_ty
    COLUMN_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = (tl.program_id(0) // COLUMN_BLOCKS).to(tl.int64) * BLOCK_M
    columns = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.arange(0, BLOCK_M)
    rows_left = tl.load(offsets_ptr + count) - first
    hidden_input = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    grad_hidden = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if rows_left > 0:
        mean, rstd = row_statistics(mid_ptr, first, block, rows_left, K, BLOCK_K)
        for start in range(0, K, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            x = load_tile(mid_ptr, first, block, rows_left, inner, K)
            x = (x - mean[:, None]) * rstd[:, None]
            x = x * load_features(norm_weight_ptr, inner, K)[None, :]
            x += load_features(norm_bias_ptr, inner, K)[None, :]
            x = narrow(x, dtype, ROUND_HALF_UP)
            weight = load_weight(ffn_in_weight_ptr, columns, inner, K, 1, N, K)
            hidden_input = tl.dot(x, weight, hidden_input, input_precision=PRECISION)
            grad = load_tile(grad_output_ptr, first, block, rows_left, inner, K)
            if OUTPUT_SITE:
                grad = drop_features(grad, seed_ptr, first, block, inner, drop_below, OUTPUT_SITE)
            grad = narrow(grad, dtype, ROUND_HALF_UP)
            weight = load_weight(ffn_out_weight_ptr, columns, inner, 1, N, N, K)
            grad_hidden = tl.dot(grad, weight, grad_hidden, input_precision=PRECISION)
        hidden_input += load_features(ffn_in_bias_ptr, columns, N)[None, :]
    cdf = normal_cdf(hidden_input, dtype == tl.float32)
    grad_hidden = grad_hidden * gelu_derivative(hidden_input, cdf)
    hidden = hidden_input * cdf
    if HIDDEN_SITE:
        hidden = drop_features(
            hidden * keep_scale, seed_ptr, first, block, columns, drop_below, HIDDEN_SITE
        )
        grad_hidden = drop_features(
            grad_hidden * (keep_scale * keep_scale),
            seed_ptr, first, block, columns, drop_below, HIDDEN_SITE,
        )  # fmt: skip
    store_tile(hidden_ptr, hidden, first, block, rows_left, columns, N, ROUND_HALF_UP)
    store_tile(
        grad_hidden_input_ptr, grad_hidden, first, block, rows_left, columns, N, ROUND_HALF_UP
    )
