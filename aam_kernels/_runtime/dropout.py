"""Counter-based dropout: the mask is a pure function of (seed, query row, key row, head).

Every implementation of every operation draws the same mask, forward and backward, because the
mask is a hash of where an element stands and of nothing else. An element costs one product: a
row's and a column's factors are hashed once, and multiplied. All arithmetic is modulo 2**32::

    mix(x):  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    word = mix(low32(seed) ^ mix(high32(seed)))
    row(q, head) = (mix((q * 0x9E3779B1 + head * 0x85EBCA77) ^ word) >> 8) | 0x800001
    x = (k & 0xFFFFFF) * 0x9E3779;   x = ((x ^ (x >> 15)) & 0xFFFFFF) * 0xB5297B
    column(k) = (x >> 8) | 0x800001
    drop iff int32(row * column) < floor(p * 2**32) - 2**31;  a kept value is scaled by 1 / (1 - p)

Both factors are odd and lie in [2**23, 2**24): their product fits GPUs' fast 24-bit multipliers,
covers the 32-bit numbers evenly, and for two rows (or columns) is two sequences whose ratio is a
fixed odd number of 24 random bits, as independent as those of two multiplicative generators. Means,
variances and correlations of rows, columns and rectangles are those of independent draws (tests).

``q`` and ``k`` are rows of a packed batch, counted from ``first_row`` (keys: ``first_key_row``),
the row that a call's first one is: a part of a batch has the masks of the whole. Dropout on token
features uses the same hash with ``head = 0x10000 + site``, ``q`` the token row and ``k`` the
feature index. The mixer is lowbias32 of Chris Wellons' hash-prospector (public domain).

Every ``seed`` below is what `resolve_seed` makes, (3,) int64: the seed, ``first_row`` and
``first_key_row``. Rows are handed in as those of the call's tensors, and counted on from there.

torch has no unsigned 32-bit arithmetic worth the name, so signed int32 is used, whose products
and sums wrap to the same bits; logical shifts are arithmetic ones with the sign bits masked off.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_FACTOR = 0x9E3779B1
HEAD_FACTOR = 0x85EBCA77
FEATURE_HEAD = 0x10000
"""Heads from here on are the sites of dropout on token features."""
_COLUMN_FIRST = 0x9E3779
_COLUMN_SECOND = 0xB5297B
_LOW_24 = 0xFFFFFF
_ODD_24 = 0x800001
_MIX_FIRST = 0x7FEB352D
_MIX_SECOND = 0x846CA68B
_MASK_BLOCK = 1 << 16  # elements at a time: products and values stay in a core's L2


def signed32(value: int) -> int:
    """The int32 that has the same 32 bits as ``value`` modulo 2**32."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def mix_(x: Tensor) -> Tensor:
    """Applies the 32-bit mixer to an int32 tensor in place and returns it."""
    x.bitwise_xor_((x >> 16) & 0xFFFF).mul_(_MIX_FIRST)
    x.bitwise_xor_((x >> 15) & 0x1FFFF).mul_(signed32(_MIX_SECOND))
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


def resolve_seed(
    seed: int | Tensor | None,
    dropout_p: float,
    device: torch.device,
    first_row: int = 0,
    first_key_row: int | None = None,
) -> Tensor | None:
    """Seed, first row and first key row as (3,) int64 on ``device``; None when nothing is dropped.

    A missing seed is drawn from torch's default generator, so ``torch.manual_seed`` reproduces it.
    One tensor, because a compiled graph then takes another first row without being made again.

    Args:
        seed: an int, an integer tensor of one element or None.
        dropout_p: probability of dropping.
        device: where the tensors of the call are.
        first_row: the row of a larger packed batch that the call's row 0 is.
        first_key_row: the same of the keys; None: ``first_row``.

    Raises:
        TypeError: the seed is neither an int, an integer tensor nor None.
        ValueError: ``dropout_p`` is outside [0, 1), a seed tensor has more than one element, or
            a first row is negative.
    """
    for name, row in (("first_row", first_row), ("first_key_row", first_key_row or 0)):
        if row < 0:
            raise ValueError(f"{name} must be at least 0, got {row}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if isinstance(seed, Tensor):
        if seed.is_floating_point() or seed.is_complex() or seed.dtype == torch.bool:
            raise TypeError(f"seed must be an integer tensor, got {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed must have one element, got shape {tuple(seed.shape)}")
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an int, a 0-d int64 tensor or None, got {type(seed)}")
    if dropout_p == 0.0:
        return None
    if seed is None:
        drawn = torch.randint(0, 1 << 62, (1,), dtype=torch.int64)
        # A small copy from pageable memory is staged at once: safe, and nothing waits.
        return _with_rows(drawn, first_row, first_key_row).to(device, non_blocking=True)
    if isinstance(seed, Tensor):
        seed = seed.reshape(1).to(device=device, dtype=torch.int64)
    else:
        seed &= (1 << 64) - 1
        signed = seed - (1 << 64) if seed >= 1 << 63 else seed
        seed = torch.full((1,), signed, dtype=torch.int64, device=device)
    return _with_rows(seed, first_row, first_key_row)


def _with_rows(seed: Tensor, first_row: int, first_key_row: int | None) -> Tensor:
    row = torch.full_like(seed, first_row)
    key_row = row if first_key_row is None else torch.full_like(seed, first_key_row)
    return torch.cat([seed, row, key_row])


def drop_below(dropout_p: float) -> int:
    """``floor(p * 2**32) - 2**31``: products of factors below it, as int32, are dropped."""
    return int(dropout_p * 4294967296.0) - (1 << 31)


def row_factors(seed: Tensor, query_rows: Tensor, num_heads: int, first_head: int = 0) -> Tensor:
    """Factor of every (row, head).

    Args:
        seed: (3,) int64.
        query_rows: (...,) integer rows of the packed query tensor.
        num_heads: number of heads.
        first_head: number of the first one.

    Returns:
        (..., num_heads) int32, odd, in [2**23, 2**24).
    """
    low, first_row, _ = (seed & 0xFFFFFFFF).to(torch.int32).unbind()
    high = (seed[0] >> 32).to(torch.int32)
    word = mix_(low.bitwise_xor(mix_(high)))
    heads = torch.arange(first_head, first_head + num_heads, dtype=torch.int32, device=seed.device)
    rows = (query_rows.to(torch.int32) + first_row).mul_(signed32(QUERY_FACTOR)).unsqueeze(-1)
    mixed = mix_((rows + heads.mul_(signed32(HEAD_FACTOR))).bitwise_xor_(word))
    return mixed.bitwise_right_shift_(8).bitwise_and_(_LOW_24).bitwise_or_(_ODD_24)


def token_factors(seed: Tensor, token_rows: Tensor, site: int) -> Tensor:
    """Factor of every token row at one dropout site: (tokens,) -> (tokens,) int32."""
    return row_factors(seed, token_rows, 1, FEATURE_HEAD + site).squeeze(-1)


def key_factors(seed: Tensor, key_rows: Tensor) -> Tensor:
    """Factor of every row of the packed key tensor: (...,) -> (...,) int32, odd, < 2**24."""
    return column_factors(key_rows + (seed[2] & _LOW_24))


def column_factors(columns: Tensor) -> Tensor:
    """Factor of every key row or feature index: (...,) -> (...,) int32, odd, < 2**24."""
    x = (columns & _LOW_24).to(torch.int32).mul_(_COLUMN_FIRST)
    x.bitwise_xor_((x >> 15) & 0x1FFFF).bitwise_and_(_LOW_24).mul_(_COLUMN_SECOND)
    return x.bitwise_right_shift_(8).bitwise_and_(_LOW_24).bitwise_or_(_ODD_24)


def dropped(rows: Tensor, columns: Tensor, dropout_p: float) -> Tensor:
    """The elements to drop, from broadcastable `row_factors` and `column_factors` (bool)."""
    return rows * columns < drop_below(dropout_p)


def kept(
    rows: Tensor, columns: Tensor, dropout_p: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The complement of `dropped` as a factor: 1 where kept, else 0.

    Multiplying by it is vectorised; `masked_fill_` with a random mask is a branch an element
    (measured 0.2 against 4 ns).
    """
    products = rows * columns
    factor = torch.empty(products.shape, dtype=dtype, device=products.device)
    return torch.ge(products, drop_below(dropout_p), out=factor)


def attention_dropped(
    seed: Tensor, query_rows: Tensor, key_rows: Tensor, num_heads: int, dropout_p: float
) -> Tensor:
    """The attention probabilities to drop.

    Args:
        seed: (3,) int64.
        query_rows: (..., query_length) rows of the packed query tensor.
        key_rows: (..., key_length) rows of the packed key tensor.
        num_heads: number of heads.
        dropout_p: probability of dropping.

    Returns:
        (..., num_heads, query_length, key_length) bool, True where dropped.
    """
    rows = row_factors(seed, query_rows, num_heads).movedim(-1, -2).unsqueeze(-1)
    columns = key_factors(seed, key_rows).unsqueeze(-2).unsqueeze(-2)
    return dropped(rows, columns, dropout_p)


def feature_dropped(
    seed: Tensor, token_rows: Tensor, num_features: int, site: int, dropout_p: float
) -> Tensor:
    """The (token, feature) elements to drop at a site: (tokens, features) bool."""
    features = torch.arange(num_features, dtype=torch.int32, device=token_rows.device)
    rows = token_factors(seed, token_rows, site).unsqueeze(-1)
    return dropped(rows, column_factors(features), dropout_p)


def feature_dropout_(
    x: Tensor, token_rows: Tensor, site: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Drops and rescales features in place; its own backward when applied to the gradient.

    Args:
        x: (tokens, features), changed in place.
        token_rows: (tokens,) rows in the packed tensor that the op was called with.
        site: number of the dropout site within the operation.
        dropout_p: probability of dropping; 0 leaves ``x`` alone.
        seed: (3,) int64, see `resolve_seed`.

    Returns:
        ``x``.
    """
    if dropout_p == 0.0 or x.numel() == 0:
        return x
    assert seed is not None
    features = column_factors(torch.arange(x.shape[1], dtype=torch.int32, device=x.device))
    rows = token_factors(seed, token_rows, site).unsqueeze(-1)
    step = x.shape[0] if x.device.type != "cpu" else max(1, _MASK_BLOCK // x.shape[1])
    scale = 1.0 / (1.0 - dropout_p)
    for start in range(0, x.shape[0], step):
        block = x[start : start + step]
        factor = kept(rows[start : start + step], features, dropout_p, x.dtype)
        block.mul_(factor.mul_(scale))
    return x
