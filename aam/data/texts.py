"""Rows of different lengths in one array: strings in an array of bytes, and entries of samples.

A million names take no million Python objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 16_384
"""Strings looked at together; their bytes, padded to the longest, stay in the cache."""

_WORD = 8
"""Bytes compared at once when sorting."""

_BLOCK_ENTRIES = 2**20


class Texts(Sequence[str]):
    """Strings as slices of one array of bytes, which may be a memory-mapped file.

    A string is made when it is asked for; nothing else takes memory but 16 bytes a string.

    Attributes:
        buffer: ``(bytes,)`` uint8, UTF-8.
        starts: ``(n,)`` int64, where each string starts in ``buffer``.
        stops: ``(n,)`` int64, where it ends.
    """

    def __init__(
        self, buffer: NDArray[np.uint8], starts: NDArray[np.int64], stops: NDArray[np.int64]
    ) -> None:
        """Look at slices of ``buffer``; nothing is copied."""
        self.buffer, self.starts, self.stops = buffer, starts, stops

    @classmethod
    def of(cls, names: Sequence[str]) -> Texts:
        """The same strings; ``names`` itself if it is a ``Texts``."""
        if isinstance(names, Texts):
            return names
        encoded = [name.encode() for name in names]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        stops = np.cumsum(lengths)
        buffer = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        return cls(buffer, stops - lengths, stops)

    def __len__(self) -> int:
        """Number of strings."""
        return len(self.starts)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Texts: ...
    def __getitem__(self, at: int | slice) -> str | Texts:
        """One string, or some as ``Texts``."""
        if isinstance(at, slice):
            return Texts(self.buffer, self.starts[at], self.stops[at])
        return self.buffer[self.starts[at] : self.stops[at]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        """The strings in order."""
        for at in range(len(self)):
            yield self[at]

    def __eq__(self, other: object) -> bool:
        """Whether another sequence holds the same strings."""
        if not isinstance(other, Sequence) or len(other) != len(self):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``(n,)`` int64, bytes of each string."""
        return self.stops - self.starts

    def take(self, index: NDArray[Any]) -> Texts:
        """The strings at ``index`` (numbers or a mask), as ``Texts`` of the same bytes."""
        return Texts(self.buffer, self.starts[index], self.stops[index])

    def cut(self, most: int) -> Texts:
        """The first ``most`` bytes of each string."""
        return Texts(self.buffer, self.starts, np.minimum(self.stops, self.starts + most))

    def packed(self) -> Texts:
        """The same strings one after the other in bytes of their own."""
        buffer = self.buffer[ranges(self.starts, self.lengths)]
        stops = np.cumsum(self.lengths)
        return Texts(buffer, stops - self.lengths, stops)

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
        buffer = self.buffer.copy()
        buffer[(buffer >= ord("a")) & (buffer <= ord("z"))] -= ord("a") - ord("A")
        return Texts(buffer, self.starts, self.stops)

    def padded(self, index: NDArray[Any], skip: int = 0, width: int = 0) -> NDArray[np.uint8]:
        """Bytes ``skip`` to ``skip + width`` of some strings: ``(n, width)``, 0 past the end.

        Args:
            index: which strings.
            skip: bytes left out at the start of each.
            width: bytes wanted of each; 0: as many as the longest has.
        """
        starts = self.starts[index] + skip
        lengths = np.maximum(self.stops[index] - starts, 0)
        width = width or int(lengths.max(initial=0))
        inside = starts + width <= len(self.buffer)
        result: NDArray[np.uint8]
        if width and len(self.buffer) >= width:
            windows = np.lib.stride_tricks.sliding_window_view(self.buffer, width)
            result = windows[np.where(inside, starts, 0)]
        else:
            result = np.zeros((len(starts), width), dtype=np.uint8)
        for row in np.flatnonzero(~inside):  # at the end of the buffer
            rest = self.buffer[starts[row] : starts[row] + min(lengths[row], width)]
            result[row, : len(rest)] = rest
        result[np.arange(width) >= lengths[:, None]] = 0
        return result

    def hashes(self) -> NDArray[np.uint64]:
        """``(n,)`` 64 bits of each string, the same for the same bytes."""
        result = np.zeros(len(self), dtype=np.uint64)
        for low in range(0, len(self), _BLOCK):
            block = np.arange(low, min(low + _BLOCK, len(self)))
            bytes_ = self.padded(block)
            words = np.zeros((len(block), -(-bytes_.shape[1] // 8) * 8), dtype=np.uint8)
            words[:, : bytes_.shape[1]] = bytes_
            state = self.lengths[block].astype(np.uint64)
            for word in np.ascontiguousarray(words.view("<u8").T):
                # Words past the end are 0 for one string and not there for another's block:
                # they must not change the state.
                mixed = (state ^ word) * np.uint64(0x9E3779B97F4A7C15)
                state = np.where(word == 0, state, mixed ^ (mixed >> np.uint64(32)))
            result[block] = state
        return result

    def order(self) -> tuple[NDArray[np.int64], int]:
        """How the strings stand when sorted as Python sorts them, and how many repeat another.

        Sorts by the first eight bytes, then only what is tied by the next eight, and so on.
        """
        order = np.arange(len(self))
        group = np.zeros(len(self), dtype=np.int64)  # of a place in `order`: where its ties start
        active = np.arange(len(self))  # places that are still tied
        repeats = skip = 0
        while len(active):
            own = order[active]
            words = np.empty(len(own), dtype=np.uint64)
            for low in range(0, len(own), _BLOCK):
                part = self.padded(own[low : low + _BLOCK], skip, _WORD)
                words[low : low + _BLOCK] = part.view(">u8")[:, 0]
            by = np.lexsort((words, group[active]))
            order[active], words = own[by], words[by]
            opens = np.ones(len(active), dtype=bool)
            ties = group[active]
            opens[1:] = (ties[1:] != ties[:-1]) | (words[1:] != words[:-1])
            group[active] = active[np.flatnonzero(opens)][np.cumsum(opens) - 1]
            ended = words & np.uint64(0xFF) == 0
            repeats += int((~opens & ended).sum())
            tied = ~opens
            tied[:-1] |= ~opens[1:]
            active = active[tied & ~ended]
            skip += _WORD
        return order, repeats


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
        equal = _equal(wanted, left, among, order[place[left]])
        found[left[equal]] = order[place[left[equal]]]
        left = left[~equal]
        place[left] += 1
    return found


def _equal(
    one: Texts, rows: NDArray[np.int64], other: Texts, theirs: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether string ``rows[i]`` of one equals ``theirs[i]`` of the other."""
    equal = one.lengths[rows] == other.lengths[theirs]
    for low in range(0, len(rows), _BLOCK):
        part = slice(low, low + _BLOCK)
        width = int(one.lengths[rows[part]].max(initial=0))
        a, b = one.padded(rows[part], 0, width), other.padded(theirs[part], 0, width)
        equal[part] &= (a == b).all(axis=1)
    return equal


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
