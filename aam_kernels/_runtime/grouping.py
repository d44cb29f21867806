"""Cuts packed sequences into cache-sized chunks of equal length.

Fused kernels for rectangular input serve ragged input best when sequences of one length run
together: no padding, no mask. `equal_length_chunks` sorts sequences by length (stably), and cuts
each group into chunks. It reads nothing but offsets, so chunk boundaries, and with them every
rounding, are the same on every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Where the sequences of a packed batch lie.

    Attributes:
        offsets: (n + 1,) int32: query sequence ``i`` starts at row ``offsets[i]``.
        key_offsets: (n + 1,) int32, the same for keys; None: the same rows as the queries.
        lengths: (n,) int32 real rows of each query sequence; None: up to the next offset. Rows
            between a sequence's end and the next offset are gaps: never read, output 0.
        key_lengths: (n,) int32, the same for keys. Used only together with ``key_offsets``.
        max_length: bound on the query lengths, -1 when unknown.
        max_key_length: bound on the key lengths, -1 when unknown.
    """

    offsets: Tensor
    key_offsets: Tensor | None = None
    lengths: Tensor | None = None
    key_lengths: Tensor | None = None
    max_length: int = -1
    max_key_length: int = -1

    @property
    def cross(self) -> bool:
        """Whether keys have rows of their own."""
        return self.key_offsets is not None

    def key_side(self) -> tuple[Tensor, Tensor | None]:
        """Offsets and lengths of the keys, resolved for self-attention."""
        if self.key_offsets is None:
            return self.offsets, self.lengths
        return self.key_offsets, self.key_lengths


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of ``count`` sequences of one length: a slice of the packed tensor or an index.

    Attributes:
        count: sequences.
        length: rows of each.
        start: first row when the sequences follow each other without gaps, else -1.
        index: (count * length,) int64 rows when they do not, else None.
    """

    count: int
    length: int
    start: int
    index: Tensor | None

    def take(self, packed: Tensor) -> Tensor:
        """(total, ...) -> (count, length, ...): a view when the rows are consecutive."""
        size = self.count * self.length
        rows = (
            packed.narrow(0, self.start, size)
            if self.index is None
            else packed.index_select(0, self.index.to(packed.device))
        )
        return rows.unflatten(0, (self.count, self.length))

    def put(self, packed: Tensor, rows: Tensor) -> None:
        """Writes (count, length, ...) back into the packed tensor, rounding to its dtype."""
        flat = rows.reshape(-1, *packed.shape[1:])
        if self.index is None:
            packed.narrow(0, self.start, self.count * self.length).copy_(flat)
        else:
            packed.index_copy_(0, self.index.to(packed.device), flat.to(packed.dtype))

    def numbers(self) -> Tensor:
        """(count, length) int64 rows in the packed tensor: the coordinates of dropout."""
        size = self.count * self.length
        rows = torch.arange(self.start, self.start + size) if self.index is None else self.index
        return rows.view(self.count, self.length)


class Chunk(NamedTuple):
    """Sequences with one query length and one key length.

    Attributes:
        query: rows of the queries.
        key: rows of the keys; the same object for self-attention.
        numbers: (count,) which sequences of the batch these are.
    """

    query: Rows
    key: Rows
    numbers: np.ndarray

    def take_sequences(self, x: Tensor) -> Tensor:
        """(n, ...) -> (count, ...): what belongs to these sequences."""
        first = int(self.numbers[0])
        if int(self.numbers[-1]) - first == len(self.numbers) - 1:  # numbers never decrease
            return x.narrow(0, first, len(self.numbers))
        return x.index_select(0, torch.from_numpy(self.numbers).to(x.device))

    def put_sequences(self, x: Tensor, part: Tensor) -> None:
        """Writes (count, ...) into (n, ...), rounding to its dtype."""
        index = torch.from_numpy(self.numbers).to(x.device)
        x.index_copy_(0, index, part.to(x.dtype))


def equal_length_chunks(
    sequences: Sequences, elements_a_row: int, budget: int, *, pairs: bool = False
) -> Iterator[Chunk]:
    """Yields chunks that cover every sequence with at least one query row.

    Args:
        sequences: offsets and lengths on any device (a GPU is waited for).
        elements_a_row: elements that one row (or one query-key pair) takes.
        budget: elements of a chunk; a chunk has at least one sequence.
        pairs: count query-key pairs instead of rows.

    Yields:
        `Chunk`; its key length may be 0.
    """
    starts, lengths = _spans(sequences.offsets, sequences.lengths)
    key_starts, key_lengths = starts, lengths
    if sequences.cross:
        key_starts, key_lengths = _spans(*sequences.key_side())
    order, bounds = _equal_runs(lengths, key_lengths)
    starts, key_starts = starts[order], key_starts[order]
    for first, last in bounds:
        length, key_length = int(lengths[order[first]]), int(key_lengths[order[first]])
        if length == 0:
            continue
        cost = length * key_length if pairs else max(length, key_length)
        step = max(1, budget // max(1, cost * elements_a_row))
        for begin in range(first, last, step):
            part = slice(begin, min(begin + step, last))
            query = _rows(starts[part], length)
            key = _rows(key_starts[part], key_length) if sequences.cross else query
            yield Chunk(query, key, order[part])


def has_gaps(offsets: Tensor, lengths: Tensor | None, total: int) -> bool:
    """Whether some of the ``total`` rows belong to no sequence (host offsets)."""
    if lengths is None:
        return int(offsets[-1]) != total
    return int(lengths.sum()) != total


def _spans(offsets: Tensor, lengths: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    bounds = offsets.detach().cpu().numpy().astype(np.int64)
    if lengths is None:
        return bounds[:-1], np.diff(bounds)
    return bounds[:-1], lengths.detach().cpu().numpy().astype(np.int64)


def _equal_runs(
    lengths: np.ndarray, key_lengths: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Stable order by (length, key length), and the runs of equal pairs in it."""
    if len(lengths) == 0:
        return np.zeros(0, dtype=np.int64), []
    pair = lengths * (int(key_lengths.max()) + 1) + key_lengths
    order = np.argsort(pair, kind="stable")
    cuts = np.flatnonzero(np.diff(pair[order])) + 1
    edges = [0, *cuts.tolist(), len(pair)]
    return order, list(pairwise(edges))


def _rows(starts: np.ndarray, length: int) -> Rows:
    count = len(starts)
    if count == 1 or bool((np.diff(starts) == length).all()):
        return Rows(count, length, int(starts[0]), None)
    index = (starts[:, None] + np.arange(length)).reshape(-1)
    return Rows(count, length, -1, torch.from_numpy(index))


def check_sequences(sequences: Sequences, total: int, total_key: int) -> None:
    """Checks offsets, lengths and bounds against each other, on a CPU only.

    Raises:
        ValueError: with the received and the expected value.
    """
    if sequences.offsets.device.type != "cpu":
        return
    _check_side("", sequences.offsets, sequences.lengths, sequences.max_length, total)
    if sequences.cross:
        offsets, lengths = sequences.key_side()
        _check_side("key_", offsets, lengths, sequences.max_key_length, total_key)


def _check_side(
    prefix: str, offsets: Tensor, lengths: Tensor | None, max_length: int, total: int
) -> None:
    bounds = offsets.numpy()
    rows = np.diff(bounds)
    if bounds[0] != 0:
        raise ValueError(f"{prefix}offsets must start at 0, got {bounds[0]}")
    if len(rows) and rows.min() < 0:
        where = int(rows.argmin())
        raise ValueError(
            f"{prefix}offsets must never decrease, got {bounds[where]} then {bounds[where + 1]} "
            f"at position {where}"
        )
    if bounds[-1] > total:
        raise ValueError(f"{prefix}offsets end at {bounds[-1]}, but there are {total} rows")
    if lengths is not None:
        real = lengths.numpy()
        if len(rows) and (real.min() < 0 or (real > rows).any()):
            where = int(np.flatnonzero((real < 0) | (real > rows))[0])
            raise ValueError(
                f"{prefix}lengths[{where}] must lie in 0..{rows[where]}, got {real[where]}"
            )
        rows = real
    longest = int(rows.max()) if len(rows) else 0
    if 0 <= max_length < longest:
        raise ValueError(
            f"max_{prefix}length must be at least the longest sequence ({longest}), "
            f"got {max_length}"
        )
