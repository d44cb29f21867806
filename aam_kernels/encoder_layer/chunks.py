"""Cuts packed sequences into chunks that go through the whole layer while they are in cache.

A chunk is whole sequences. Sequences are taken in (stable) order of length, so that a chunk has
few different lengths and its attention few products. The cuts are a function of the offsets
alone: every rounding is the same on every call, in forward, backward and recomputation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aam_kernels._runtime.grouping import Sequences


class Group(NamedTuple):
    """Sequences of one length that follow each other inside a chunk."""

    start: int  # first row, counted from the chunk's first
    count: int
    length: int

    def take(self, rows: Tensor) -> Tensor:
        """(chunk rows, ...) -> (count, length, ...), a view."""
        return rows.narrow(0, self.start, self.count * self.length).unflatten(
            0, (self.count, self.length)
        )


class Chunk(NamedTuple):
    """Rows of the packed tensor, and the groups of equal length that they form."""

    size: int
    start: int  # first row when the rows are consecutive, else -1
    index: Tensor | None  # (size,) int64 rows when they are not
    groups: tuple[Group, ...]
    packed: Sequences | None = None  # instead of groups: all sequences at once, on a GPU

    def take(self, packed: Tensor) -> Tensor:
        """(total, ...) -> (size, ...), a view when the rows are consecutive."""
        if self.index is None:
            return packed.narrow(0, self.start, self.size)
        return packed.index_select(0, self.index)

    def put(self, packed: Tensor, rows: Tensor) -> None:
        """Writes the chunk's rows, rounding to the dtype of ``packed``."""
        if self.index is None:
            packed.narrow(0, self.start, self.size).copy_(rows)
        else:
            packed.index_copy_(0, self.index, rows.to(packed.dtype))

    def numbers(self, device: torch.device) -> Tensor:
        """(size,) int64 rows in the packed tensor: the coordinates of dropout."""
        if self.index is None:
            return torch.arange(self.start, self.start + self.size, device=device)
        return self.index


def layer_chunks(offsets: Tensor, budget: int) -> Iterator[Chunk]:
    """Yields chunks of at most ``budget`` rows (or one longer sequence) that cover every row.

    Args:
        offsets: (n + 1,) int32 on the CPU.
        budget: rows of a chunk.
    """
    bounds = offsets.numpy().astype(np.int64)
    lengths = np.diff(bounds)
    order = np.argsort(lengths, kind="stable")
    order = order[np.searchsorted(lengths[order], 1) :]  # sequences without rows need no work
    starts, lengths = bounds[:-1][order], lengths[order]
    ends = np.cumsum(lengths)
    first = done = 0
    while first < len(lengths):
        last = max(first + 1, int(np.searchsorted(ends, done + budget, side="right")))
        yield _chunk(starts[first:last], lengths[first:last])
        first, done = last, int(ends[last - 1])


def _chunk(starts: np.ndarray, lengths: np.ndarray) -> Chunk:
    size = int(lengths.sum())
    groups, row = [], 0
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values.tolist(), counts.tolist(), strict=True):
        groups.append(Group(row, count, length))
        row += count * length
    if bool((starts[1:] == (starts + lengths)[:-1]).all()):
        return Chunk(size, int(starts[0]), None, tuple(groups))
    inside = np.cumsum(lengths) - lengths
    index = np.repeat(starts - inside, lengths) + np.arange(size)
    return Chunk(size, -1, torch.from_numpy(index), tuple(groups))
