"""Device functions that every Triton kernel shares: the dropout hash and rounding on the way down.

The hash is the one that `aam_kernels._runtime.dropout` defines; the names are the same there.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def constexpr_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of compile-time constants callable in kernels, for every Triton from 3.3.

    (`triton.constexpr_function` came with 3.5.)
    """
    if hasattr(triton, "constexpr_function"):
        return triton.constexpr_function(function)

    def plain(x: Any) -> Any:
        if isinstance(x, tl.constexpr):
            return plain(x.value)
        return tuple(plain(part) for part in x) if isinstance(x, (tuple, list, tl.tuple)) else x

    def call(*args: Any, _builder: Any = None, _semantic: Any = None) -> Any:
        return tl.constexpr(function(*(plain(x) for x in args)))

    call.__triton_builtin__ = True  # type: ignore[attr-defined]
    return call


@triton.jit
def mix(x):
    """The 32-bit mixer, on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def seed_word(seed_ptr):
    """The seed as one uint32. ``seed_ptr``: (3,) int64, see `resolve_seed` in `dropout`."""
    seed = tl.load(seed_ptr)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return mix(low ^ mix(high))


@triton.jit
def whole_row(seed_ptr, row):
    """A query or token row of the call as one of the whole packed batch, uint32."""
    return (tl.load(seed_ptr + 1) + row).to(tl.uint32)


@triton.jit
def whole_key_row(seed_ptr, row):
    """The same of a key row."""
    return (tl.load(seed_ptr + 2) + row).to(tl.uint32)


@triton.jit
def row_factors(word, rows, head):
    """Of query rows of one head, or token rows and a dropout site: < 2**24, odd."""
    place = rows.to(tl.uint32) * 0x9E3779B1 + head.to(tl.uint32) * 0x85EBCA77
    return (mix(place ^ word) >> 8) | 0x800001


@triton.jit
def rows_base(seed_ptr, first, head):
    """What the places of a head's rows have in common: one register in a loop instead of two."""
    return whole_row(seed_ptr, first) * 0x9E3779B1 + head.to(tl.uint32) * 0x85EBCA77


@triton.jit
def row_factors_from(word, base, rows):
    """`row_factors` of rows that are counted from the first one of `rows_base`."""
    place = rows.to(tl.uint32) * 0x9E3779B1 + base
    return (mix(place ^ word) >> 8) | 0x800001


@triton.jit
def column_factors(columns):
    """Of key rows, or feature indices: < 2**24, odd."""
    x = (columns.to(tl.uint32) & 0xFFFFFF) * 0x9E3779
    x = ((x ^ (x >> 15)) & 0xFFFFFF) * 0xB5297B
    return (x >> 8) | 0x800001


@triton.jit
def dropped(rows, columns, drop_below):
    """Whether to drop, from broadcastable factors; both are below 2**24, so one 24-bit product."""
    return (rows * columns).to(tl.int32, bitcast=True) < drop_below


@triton.jit
def narrow(x, DTYPE: tl.constexpr, ROUND_HALF_UP: tl.constexpr):
    """float32 to DTYPE; to bfloat16 by round-half-up where the processor has no convert."""
    if ROUND_HALF_UP and DTYPE == tl.bfloat16:  # noqa: SIM300 (a constexpr compares on the left only)
        bits = (x.to(tl.uint32, bitcast=True) + 0x8000) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)
