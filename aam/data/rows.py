"""Rows of different lengths that lie one after the other in one array."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK_ENTRIES = 2**20


def ranges(starts: NDArray[Any], lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Return starts[0]..starts[0]+lengths[0], then the same for 1, 2, ... in one array."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def row_blocks(row_starts: NDArray[Any]) -> Iterator[slice]:
    """Rows in parts of about a million entries, one row at the least.

    Args:
        row_starts: ``(rows + 1,)`` where each row starts, and where the last one ends.
    """
    low = 0
    while low < len(row_starts) - 1:
        fits = int(np.searchsorted(row_starts, row_starts[low] + _BLOCK_ENTRIES, side="right")) - 1
        high = max(fits, low + 1)
        yield slice(low, high)
        low = high


def offsets_of(lengths: NDArray[Any]) -> Tensor:
    """Return ``(n + 1,)`` int32 offsets of rows of these lengths."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return torch.from_numpy(offsets)
