"""Device functions that the kernels of the layer share: tiles of rows, norms, dropout, GELU.

Rows are packed token rows; ``end`` is the last sequence's end, past which nothing is read and
zeros are written. A tile's rows count from its first (int64), so offsets inside it are int32.
"""

import triton
import triton.language as tl

from aam_kernels._runtime.kernel_functions import (
    column_factors,
    dropped,
    narrow,
    row_factors,
    seed_word,
    whole_row,
)
from aam_kernels.encoder_layer.weights import NORM_EPS

EPSILON = tl.constexpr(NORM_EPS)
FEATURE_HEAD = tl.constexpr(0x10000)  # `aam_kernels._runtime.dropout` counts the sites from here


@triton.jit
def load_tile(pointer, first, block, rows_left, columns, WIDTH: tl.constexpr):
    """float32 (rows, columns) of a dense (total, WIDTH) tensor; 0 outside."""
    mask = (block < rows_left)[:, None] & (columns < WIDTH)[None, :]
    places = pointer + first * WIDTH + block[:, None] * WIDTH + columns[None, :]
    return tl.load(places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(
    pointer,
    x,
    first,
    block,
    rows_left,
    columns,
    WIDTH: tl.constexpr,
    ROUND_HALF_UP: tl.constexpr,
):
    """Stores float32 (rows, columns) into a dense (total, WIDTH) tensor."""
    mask = (block < rows_left)[:, None] & (columns < WIDTH)[None, :]
    places = pointer + first * WIDTH + block[:, None] * WIDTH + columns[None, :]
    tl.store(places, narrow(x, pointer.dtype.element_ty, ROUND_HALF_UP), mask=mask)


@triton.jit
def load_features(pointer, columns, WIDTH: tl.constexpr):
    """float32 (columns,) of a vector; 0 past its end."""
    return tl.load(pointer + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def centred_rows(x, columns, WIDTH: tl.constexpr):
    """Whole rows minus their mean, and 1 / their deviation."""
    mean = tl.sum(x, 1) / WIDTH
    x = tl.where((columns < WIDTH)[None, :], x - mean[:, None], 0.0)
    return x, 1.0 / tl.sqrt(tl.sum(x * x, 1) / WIDTH + EPSILON)


@triton.jit
def row_statistics(pointer, first, block, rows_left, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and 1 / deviation of rows that are read in blocks of columns, twice."""
    total = tl.sum(load_tile(pointer, first, block, rows_left, tl.arange(0, BLOCK), WIDTH), 1)
    for start in range(BLOCK, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        total += tl.sum(load_tile(pointer, first, block, rows_left, columns, WIDTH), 1)
    mean = total / WIDTH
    squares = tl.zeros_like(mean)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = load_tile(pointer, first, block, rows_left, columns, WIDTH) - mean[:, None]
        squares += tl.sum(tl.where((columns < WIDTH)[None, :], x * x, 0.0), 1)
    return mean, 1.0 / tl.sqrt(squares / WIDTH + EPSILON)


@triton.jit
def drop_features(x, seed_ptr, first, block, columns, drop_below, SITE: tl.constexpr):
    """Zeros where a site drops (row, feature); the caller scales what is kept."""
    head = tl.full([], FEATURE_HEAD + SITE, tl.int32)
    place = whole_row(seed_ptr, first)
    rows = row_factors(seed_word(seed_ptr), place + block, head)
    drop = dropped(rows[:, None], column_factors(columns)[None, :], drop_below)
    return tl.where(drop, 0.0, x)


@triton.jit
def normal_cdf(x, EXACT: tl.constexpr):
    """Of the standard normal distribution; GELU is x times it.

    EXACT is the error function. Else, for results that are rounded to a half type, 2 to a
    polynomial that was fitted to log2 of the cdf in [-5, 0]: a relative error of 1.4e-5, a
    seventeenth of what rounding to float16 makes, for a quarter of the instructions.
    """
    if EXACT:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    size = tl.minimum(tl.abs(x), 5.0)
    power = 2.945816049759742e-05 * size - 0.0007087829289957881
    power = power * size + 0.00774601474404335
    power = power * size - 0.05260629579424858
    power = power * size - 0.4596254527568817
    power = power * size - 1.150867223739624
    power = power * size - 1.0000176429748535
    tail = tl.exp2(power)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def gelu_derivative(x, cdf):
    """Of x times the cdf."""
    return cdf + x * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)
