"""Strings in one array of bytes, and other rows of different lengths that lie in one array.

A million names take no million Python objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WORD = 8  # bytes compared or hashed at once
_BLOCK = 16_384  # strings whose bytes, padded to the longest, are looked at together
_BLOCK_ENTRIES = 2**20


@dataclass(eq=False)
class Texts(Sequence[str]):
    """Strings ``buffer[starts[i]:stops[i]]``, made when they are asked for."""

    buffer: NDArray[np.uint8]  # (bytes,) of UTF-8, which may be a memory-mapped file
    starts: NDArray[np.int64]  # (n,)
    stops: NDArray[np.int64]  # (n,)

    @classmethod
    def of(cls, names: Sequence[str]) -> Texts:
        """The same strings; ``names`` itself if it is a ``Texts``."""
        if isinstance(names, Texts):
            return names
        encoded = [name.encode() for name in names]
        lengths = np.array([len(one) for one in encoded], dtype=np.int64)
        stops = np.cumsum(lengths)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), stops - lengths, stops)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, at: Any) -> Any:
        """One string, or of a slice ``Texts``."""
        if isinstance(at, slice):
            return self.take(at)
        return self.buffer[self.starts[at] : self.stops[at]].tobytes().decode()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(other) == len(self) and all(map(str.__eq__, self, other))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``(n,)`` bytes of each string."""
        return self.stops - self.starts

    def take(self, index: NDArray[Any] | slice) -> Texts:
        """The strings at ``index`` (numbers, a mask or a slice), of the same bytes."""
        return Texts(self.buffer, self.starts[index], self.stops[index])

    def cut(self, most: int) -> Texts:
        """The first ``most`` bytes of each string."""
        return Texts(self.buffer, self.starts, np.minimum(self.stops, self.starts + most))

    def packed(self) -> Texts:
        """The same strings one after the other in bytes of their own."""
        stops = np.cumsum(self.lengths)
        return Texts(self.buffer[ranges(self.starts, self.lengths)], stops - self.lengths, stops)

    def joined(self, other: Texts) -> Texts:
        """These strings and then another's; the bytes are copied."""
        shift = len(self.buffer)
        return Texts(
            np.concatenate((self.buffer, other.buffer)),
            np.concatenate((self.starts, other.starts + shift)),
            np.concatenate((self.stops, other.stops + shift)),
        )

    def upper(self) -> Texts:
        """The strings with a to z in upper case; the bytes are copied."""
        is_lower = (self.buffer >= ord("a")) & (self.buffer <= ord("z"))
        return Texts(np.where(is_lower, self.buffer - 32, self.buffer), self.starts, self.stops)

    def padded(self, skip: int = 0, width: int | None = None) -> NDArray[np.uint8]:
        """``(n, width)`` bytes from ``skip`` on, 0 past a string's end; None: the longest's."""
        lengths = np.maximum(self.lengths - skip, 0)
        width = int(lengths.max(initial=0)) if width is None else width
        buffer = self.buffer if len(self.buffer) >= width else np.pad(self.buffer, (0, width))
        starts, last = self.starts + skip, len(buffer) - width
        # Copying whole windows is several times faster than gathering single bytes.
        windows = np.lib.stride_tricks.sliding_window_view(buffer, width)
        found: NDArray[np.uint8] = windows[np.minimum(starts, last)]
        for row in np.flatnonzero((starts > last) & (lengths > 0)):
            found[row, : len(buffer) - starts[row]] = buffer[starts[row] :]
        found[np.arange(width) >= lengths[:, None]] = 0
        return found

    def hashes(self) -> NDArray[np.uint64]:
        """``(n,)`` 64 bits of each string, the same for the same bytes."""
        result = np.empty(len(self), dtype=np.uint64)
        for low in range(0, len(self), _BLOCK):
            block = self[low : low + _BLOCK]
            state = block.lengths.astype(np.uint64)
            width = -(-int(block.lengths.max()) // _WORD) * _WORD
            for word in np.ascontiguousarray(block.padded(width=width).view("<u8").T):
                # Words past the end, which depend on the block's longest, must change nothing.
                mixed = (state ^ word) * np.uint64(0x9E3779B97F4A7C15)
                state = np.where(word == 0, state, mixed ^ (mixed >> np.uint64(32)))
            result[low : low + _BLOCK] = state
        return result

    def order(self) -> NDArray[np.int64]:
        """``(n,)`` places of the strings when sorted as Python sorts them; equal ones in turn."""
        order = np.arange(len(self))
        # By the last eight bytes, then, stably, by the eight before, and so on.
        for skip in reversed(range(0, int(self.lengths.max(initial=0)), _WORD)):
            longer = self.lengths[order] > skip  # the others have ended and come first
            words = self.take(order[longer]).padded(skip, _WORD).view(">u8")[:, 0]
            by_word = order[longer][np.argsort(words, kind="stable")]
            order = np.concatenate((order[~longer], by_word))
        return order

    def repeats(self, order: NDArray[np.int64]) -> int:
        """How many strings equal an earlier one; ``order`` is that of :meth:`order`."""
        return int(self.take(order[1:]).equal(self.take(order[:-1])).sum())

    def equal(self, other: Texts) -> NDArray[np.bool_]:
        """``(n,)`` whether each string equals the one at its place in another of this length."""
        equal = self.lengths == other.lengths
        for low in range(0, len(self), _BLOCK):
            block = slice(low, low + _BLOCK)
            width = int(self.lengths[block].max())
            mine, theirs = self[block].padded(0, width), other[block].padded(0, width)
            equal[block] &= (mine == theirs).all(axis=1)
        return equal


def match_names(wanted: Sequence[str], among: Sequence[str]) -> NDArray[np.int64]:
    """Where each of ``wanted`` (n,) stands in ``among``: (n,) int64, -1 where it does not.

    By hash, then byte by byte: two names of the same hash are told apart.
    """
    wanted, among = Texts.of(wanted), Texts.of(among)
    hashes, own = among.hashes(), wanted.hashes()
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    place = np.searchsorted(hashes, own)
    found = np.full(len(wanted), -1, dtype=np.int64)
    left = np.arange(len(wanted))
    while len(left):
        left = left[place[left] < len(hashes)]
        left = left[hashes[place[left]] == own[left]]
        there = order[place[left]]
        equal = wanted.take(left).equal(among.take(there))
        found[left[equal]] = there[equal]
        left = left[~equal]
        place[left] += 1
    return found


def ranges(starts: NDArray[Any], lengths: NDArray[Any]) -> NDArray[np.int64]:
    """``starts[0]`` to ``starts[0] + lengths[0]``, then the same for 1, 2, ... in one array."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(np.sum(lengths))


def row_blocks(row_starts: NDArray[Any]) -> Iterator[slice]:
    """Parts of about a million entries, one row at the least, of ``row_starts`` (rows + 1,)."""
    low = 0
    while low < len(row_starts) - 1:
        fits = int(np.searchsorted(row_starts, row_starts[low] + _BLOCK_ENTRIES, side="right")) - 1
        yield slice(low, max(fits, low + 1))
        low = max(fits, low + 1)
