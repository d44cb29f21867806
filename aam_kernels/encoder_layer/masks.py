"""Dropout factors (0 or 1 / (1 - p)) made in cache-sized blocks without temporaries.

The same masks as `aam_kernels._runtime.dropout` defines; a factor tensor instead of a mask because
it is used twice (forward, then on the gradient) and a product is five times as fast as a fill.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aam_kernels._runtime.dropout import (
    column_factors,
    drop_below,
    key_factors,
    row_factors,
    token_factors,
)

_BLOCK = 1 << 16  # elements at a time: products and factors stay in a core's L2


def feature_factors(
    like: Tensor, rows: Tensor, site: int, dropout_p: float, seed: Tensor
) -> Tensor:
    """Factors of (tokens, features) at one site, in the dtype and on the device of ``like``."""
    columns = column_factors(torch.arange(like.shape[1], device=like.device))
    return _factors(torch.empty_like(like), token_factors(seed, rows, site), columns, dropout_p)


def attention_factors(
    like: Tensor, rows: Tensor, num_heads: int, dropout_p: float, seed: Tensor
) -> Tensor:
    """Factors of the probabilities of sequences of one length.

    Args:
        like: (sequences x heads, length, length), gives dtype and device.
        rows: (sequences, length) rows in the packed tensor.
        num_heads: heads.
        dropout_p: probability of dropping.
        seed: (3,) int64, see `aam_kernels._runtime.dropout`.
    """
    row_parts = row_factors(seed, rows, num_heads).transpose(1, 2).contiguous()
    columns = key_factors(seed, rows)
    factors = torch.empty_like(like).unflatten(0, (rows.shape[0], num_heads))
    for part, row_part, column_part in zip(factors, row_parts, columns, strict=True):
        _factors(part.flatten(0, 1), row_part.flatten(), column_part, dropout_p)
    return factors.flatten(0, 1)


def _factors(factors: Tensor, rows: Tensor, columns: Tensor, dropout_p: float) -> Tensor:
    step = max(1, _BLOCK // max(1, len(columns)))
    if factors.device.type != "cpu":
        step = max(1, factors.shape[0])
    products = torch.empty(
        min(step, len(rows)), len(columns), dtype=torch.int32, device=factors.device
    )
    threshold, scale = drop_below(dropout_p), 1.0 / (1.0 - dropout_p)
    for start in range(0, len(rows), step):
        part = factors[start : start + step]
        block = products[: len(part)]
        torch.mul(rows[start : start + step, None], columns, out=block)
        torch.ge(block, threshold, out=part).mul_(scale)
    return factors
