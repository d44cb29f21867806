"""Gradients of the layer's norms, weights and biases, in two stages each and without atomics.

Sums over tokens are taken by many programs, each over a share of the tokens in order, and
`layer_add_partials` adds the shares in order: the same bits on every run.

Norm, with y = (x - mean) / deviation w + b and g = dY w::

    dx = (g - mean(g) - y' mean(g y')) / deviation      y' = (x - mean) / deviation
    dw = sum dY y'      db = sum dY                     (sums over tokens)

Weight of a product A W^T, where dY is kept as it was before its dropout::

    dW = drop(dY)^T A      db = sum drop(dY)
"""

from __future__ import annotations

import triton
import triton.language as tl

from aam_kernels._runtime.kernel_functions import narrow
from aam_kernels.encoder_layer.triton.tiles import (
    centred_rows,
    drop_features,
    load_features,
    load_tile,
    store_tile,
)


@triton.jit(do_not_specialize=["count", "total", "programs"])
def layer_norm_backward(
    grad_ptr,
    x_ptr,
    residual_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    grad_x_ptr,
    normed_ptr,
    partials_ptr,
    offsets_ptr,
    count,
    total,
    programs,
    D: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Every ``programs``-th block of rows: gradient of x plus the residual, and partial sums.

    Also writes the norm's output once more: the next product's weight gradient needs it.
    """
    block, columns = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_D)
    end = tl.load(offsets_ptr + count)
    weight = load_features(norm_weight_ptr, columns, D)
    grad_weight = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_ROWS, total, programs * BLOCK_ROWS):
        first = tl.full([], 0, tl.int64) + start
        rows_left = end - start
        grad = load_tile(grad_ptr, first, block, rows_left, columns, D)
        x = load_tile(x_ptr, first, block, rows_left, columns, D)
        centred, rstd = centred_rows(x, columns, D)
        normed = centred * rstd[:, None]
        grad_weight += grad * normed
        grad_bias += grad
        grad *= weight[None, :]
        along = tl.sum(grad * normed, 1) / D
        level = tl.sum(grad, 1) / D
        grad = (grad - level[:, None] - normed * along[:, None]) * rstd[:, None]
        grad += load_tile(residual_ptr, first, block, rows_left, columns, D)
        store_tile(grad_x_ptr, grad, first, block, total - start, columns, D, ROUND_HALF_UP)
        if normed_ptr is not None:
            bias = load_features(norm_bias_ptr, columns, D)
            normed = normed * weight[None, :] + bias[None, :]
            store_tile(normed_ptr, normed, first, block, rows_left, columns, D, ROUND_HALF_UP)
    partials_ptr += tl.program_id(0) * (2 * D)
    tl.store(partials_ptr + columns, tl.sum(grad_weight, 0), mask=columns < D)
    tl.store(partials_ptr + D + columns, tl.sum(grad_bias, 0), mask=columns < D)


@triton.jit(do_not_specialize=["count", "rows_a_share", "drop_below"])
def layer_weight_gradient(
    grad_ptr,
    input_ptr,
    partials_ptr,
    offsets_ptr,
    seed_ptr,
    count,
    rows_a_share,
    drop_below,
    keep_scale,
    N: tl.constexpr,
    K: tl.constexpr,
    SITE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_N, BLOCK_K) of one share's (N, K) weight gradient, and its (N,) bias gradient."""
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    share = tl.program_id(0) // (N_BLOCKS * K_BLOCKS)
    place = tl.program_id(0) % (N_BLOCKS * K_BLOCKS)
    outputs = place // K_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = place % K_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    block = tl.arange(0, BLOCK_ROWS)
    start = share.to(tl.int64) * rows_a_share
    end = tl.minimum(tl.load(offsets_ptr + count), start + rows_a_share)
    accumulator = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    ones = tl.full([BLOCK_ROWS, 16], 1.0, tl.float32).to(dtype)  # 16 is the least of a product
    grad_bias = tl.zeros([BLOCK_N, 16], tl.float32)
    for first in range(start, end, BLOCK_ROWS):
        rows_left = end - first
        grad = load_tile(grad_ptr, first, block, rows_left, outputs, N)
        if SITE:
            grad = drop_features(grad, seed_ptr, first, block, outputs, drop_below, SITE)
        x = load_tile(input_ptr, first, block, rows_left, inputs, K)
        grad = tl.trans(narrow(grad, dtype, ROUND_HALF_UP))
        x = narrow(x, dtype, ROUND_HALF_UP)
        accumulator = tl.dot(grad, x, accumulator, input_precision=PRECISION)
        grad_bias = tl.dot(grad, ones, grad_bias, input_precision=PRECISION)
    partials_ptr += share.to(tl.int64) * (N * K + N)
    if SITE:
        accumulator *= keep_scale
        grad_bias *= keep_scale
    mask = (outputs < N)[:, None] & (inputs < K)[None, :]
    tl.store(partials_ptr + outputs[:, None] * K + inputs[None, :], accumulator, mask=mask)
    if place % K_BLOCKS == 0:
        tl.store(partials_ptr + N * K + outputs, tl.max(grad_bias, 1), mask=outputs < N)


@triton.jit(do_not_specialize=["shares", "group", "size", "bias_size"])
def layer_add_partials(
    partials_ptr, weight_ptr, bias_ptr, shares, group, size, bias_size, BLOCK: tl.constexpr
):
    """Adds each ``group`` of (shares, size + bias_size) in order; ``size`` are the weight's."""
    blocks = tl.cdiv(size + bias_size, BLOCK)
    places = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) // blocks * group
    partials_ptr += first.to(tl.int64) * (size + bias_size)
    weight_ptr += (tl.program_id(0) // blocks).to(tl.int64) * size
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(first, tl.minimum(first + group, shares)):
        total += tl.load(partials_ptr + places, mask=places < size + bias_size, other=0.0)
        partials_ptr += size + bias_size
    weight = total.to(weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + places, weight, mask=places < size)
    bias = total.to(bias_ptr.dtype.element_ty)
    in_bias = (places >= size) & (places < size + bias_size)
    tl.store(bias_ptr + places - size, bias, mask=in_bias)
