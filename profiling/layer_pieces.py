"""Device functions of the one-kernel experiments: norm, dropout, GELU, feed-forward, last steps.

See `profiling.half_layer`.
"""

import triton
import triton.language as tl

from aam_kernels._runtime.kernel_functions import (
    column_factors,
    dropped,
    narrow,
    row_factors,
)

EPSILON = tl.constexpr(1e-5)
FEATURE_HEAD = tl.constexpr(0x10000)
BRANCH_SITE, HIDDEN_SITE, OUTPUT_SITE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def normalised(x, weight_ptr, bias_ptr, DTYPE: tl.constexpr, ROUND_HALF_UP: tl.constexpr):
    """LayerNorm of float32 (rows, D), narrowed."""
    D: tl.constexpr = x.shape[1]
    features = tl.arange(0, D)
    weight = tl.load(weight_ptr + features).to(tl.float32)
    bias = tl.load(bias_ptr + features).to(tl.float32)
    x = x - (tl.sum(x, 1) / D)[:, None]
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + EPSILON)
    return narrow(x * rstd[:, None] * weight[None, :] + bias[None, :], DTYPE, ROUND_HALF_UP)


@triton.jit
def dropped_features(x, word, rows, columns, drop_below, keep_scale, SITE: tl.constexpr):
    """Dropout of (rows, columns) at a site."""
    head = tl.full([], FEATURE_HEAD + SITE, tl.int32)
    drop = dropped(
        row_factors(word, rows, head)[:, None], column_factors(columns)[None, :], drop_below
    )
    return tl.where(drop, 0.0, x * keep_scale)


@triton.jit
def packed(x, PIN: tl.constexpr):
    """Makes the compiler pack bfloat16 pairs here, and not where they are used, on AMD.

    It would keep float32 until then: twice the registers for all keys and values.
    """
    if PIN:
        return tl.inline_asm_elementwise(
            "; packed $0", "=v,0", [x], dtype=x.dtype, is_pure=False, pack=2
        )
    else:
        return x


@triton.jit
def gelu(x):
    """max(x, 0) - |x| Q(|x|), with Q, 1 minus the normal distribution, off by 7.5e-8 at most.

    Q is 7.1.26 of Abramowitz & Stegun (1964); the compiler's own erf takes twice the instructions.
    The reciprocal is a squared rsqrt: one instruction where a division takes ten.
    """
    size = tl.abs(x)
    t = tl.rsqrt(size * (0.3275911 * 0.7071067811865476) + 1.0)
    t = t * t
    q = t * 0.5307027145 - 0.726576014
    q = q * t + 0.7107068705
    q = q * t - 0.142248368
    q = (q * t + 0.127414796) * t
    q = q * tl.exp2(x * x * -0.7213475204444817)
    return tl.maximum(x, 0.0) - size * q


@triton.jit
def feed_forward(
    mid,
    first,
    tokens,
    norm,
    ffn,
    word,
    drop_below,
    keep_scale,
    HIDDEN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    DTYPE: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
):
    """The feed-forward half of float32 (rows, D), hidden features in blocks; float32."""
    ROWS: tl.constexpr = mid.shape[0]
    D: tl.constexpr = mid.shape[1]
    features = tl.arange(0, D)
    x = normalised(mid, norm[0], norm[1], DTYPE, ROUND_HALF_UP)
    bias = tl.load(ffn[3] + features).to(tl.float32)
    branch = tl.broadcast_to(bias[None, :], [ROWS, D])
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        hidden = start + tl.arange(0, BLOCK_HIDDEN)
        weight_in = tl.load(ffn[0] + hidden[:, None] * D + features[None, :])
        y = tl.load(ffn[1] + hidden).to(tl.float32)[None, :]
        y = tl.broadcast_to(y, [ROWS, BLOCK_HIDDEN])
        y = tl.dot(x, tl.trans(weight_in), y, input_precision="ieee")
        y = gelu(y)
        if DROPOUT:
            y = dropped_features(
                y, word, first + tokens, hidden, drop_below, keep_scale, HIDDEN_SITE
            )
        weight_out = tl.load(ffn[2] + features[:, None] * HIDDEN + hidden[None, :])
        y = narrow(y, DTYPE, ROUND_HALF_UP)
        branch = tl.dot(y, tl.trans(weight_out), branch, input_precision="ieee")
    if DROPOUT:
        branch = dropped_features(
            branch, word, first + tokens, features, drop_below, keep_scale, OUTPUT_SITE
        )
    return mid + branch


@triton.jit
def finish_rows(
    x_ptr,
    out_ptr,
    first,
    length,
    out_weight_ptr,
    out_bias_ptr,
    norm2,
    ffn,
    word,
    drop_below,
    keep_scale,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
):
    """Projects the attended values in the output's rows, adds x; then the other half if HIDDEN."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    features = tl.arange(0, D)
    weight = tl.trans(tl.load(out_weight_ptr + features[:, None] * D + features[None, :]))
    bias = tl.load(out_bias_ptr + features).to(tl.float32)
    for start in range(0, length, BLOCK_ROWS):
        tokens = tl.minimum(start + tl.arange(0, BLOCK_ROWS), length - 1)
        tile = tokens[:, None] * D + features[None, :]
        attended = tl.load(out_ptr + tile)
        y = tl.broadcast_to(bias[None, :], [BLOCK_ROWS, D])
        y = tl.dot(attended, weight, y, input_precision="ieee")
        if DROPOUT:
            y = dropped_features(
                y, word, first + tokens, features, drop_below, keep_scale, BRANCH_SITE
            )
        y += tl.load(x_ptr + tile).to(tl.float32)
        if HIDDEN:
            y = feed_forward(
                y, first, tokens, norm2, ffn, word, drop_below, keep_scale,
                HIDDEN, BLOCK_HIDDEN, DTYPE, DROPOUT, ROUND_HALF_UP,
            )  # fmt: skip
        tl.store(out_ptr + tile, narrow(y, DTYPE, ROUND_HALF_UP))
