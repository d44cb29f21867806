"""The nearest known sequences of any sequences, by shared 8-mers and then by edit distance.

1. Candidates: the known sequences that hold most of a query's distinct 8-mers, counted along an
   inverted index (8-mer -> sequences). The shared 8-mers also say on which diagonal the two lie.
2. Edit distance of each candidate in a band around that diagonal, with free ends on both sides: a
   query that is trimmed, longer or shifted pays nothing for what overhangs. The row-by-row
   recurrence runs over all pairs at once. Its cost is of the order of a compiled one-pair aligner
   (edlib, Sosic and Sikic 2017) without a further dependency.
3. The nearest candidates are kept; the nearest one's alignment gives the query's bases in the
   coordinates of that known sequence.

Distances are in edits over a whole query: edits in the overlap, scaled by the query's length over
the overlap's, plus half the share of 8-mers that are missing, which breaks ties.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from aam.data.texts import Texts

WORD = 8  # bases of the words that candidates are found by
CANDIDATES = 40  # known sequences whose edit distance is computed, a query
NEAREST = 10  # known sequences that vote, a query
MOST_INDEXED_WHOLE = 200_000  # known sequences of which all words are indexed
BAND = 12  # diagonals on either side of the one that shared words vote for
FOREIGN = 0.3  # edits a base from which a query counts as one of another region

_CODES = 4**WORD
_COMPLEMENT = str.maketrans("ACGTUacgtu", "TGCAATGCAA")
_BLOCK_PAIRS = 8192
_BLOCK_SEQUENCES = 16_384
_BLOCK_ALIGNED = 4096

_BASE_OF_BYTE = np.zeros(256, dtype=np.uint8)  # A1 C2 G3 T4, as the model's tokens; 0: any other
for _base, _letters in enumerate((b"Aa", b"Cc", b"Gg", b"TtUu"), start=1):
    _BASE_OF_BYTE[list(_letters)] = _base


@dataclass(frozen=True, eq=False)
class Found:
    """The nearest known sequences of n queries."""

    index: np.ndarray  # (n, candidates) int64, nearest first; -1: no more were found
    distance: np.ndarray  # (n, candidates) float64, edits; infinite where index is -1
    # (n, longest known) uint8, the query's base (A1 C2 G3 T4) at each position of the nearest known
    # sequence; 0 where it has none. Insertions are left out.
    aligned: np.ndarray
    reverse: np.ndarray  # (n,) bool, the query's reverse complement is far nearer
    foreign: np.ndarray  # (n,) bool, nothing known is near enough to be of the same region

    def take(self, rows: Any) -> Found:
        """Some of the queries, by numbers, a mask or a slice."""
        return Found(**{name: values[rows] for name, values in vars(self).items()})

    @property
    def weights(self) -> np.ndarray:
        """``(n, NEAREST)`` votes of the nearest, exp(least - distance), of sum 1 or 0."""
        distance = self.distance[:, :NEAREST]
        least = np.where(np.isfinite(distance[:, :1]), distance[:, :1], 0.0)
        votes = np.exp(least - distance)
        return votes / np.maximum(votes.sum(axis=1, keepdims=True), 1e-12)


class Neighbours:
    """An index of known sequences, asked for the nearest of any others.

    It holds 4 bytes for each distinct 8-mer of each sequence, and the bases: about 50 MB for
    100,000 sequences of 100 bases.
    """

    def __init__(self, known: Sequence[str]) -> None:
        self.bases = bases_of(known)
        self.lengths = self.bases.shape[1] - (self.bases[:, ::-1] > 0).argmax(axis=1)
        # Of very many sequences a quarter of the words, drawn by a hash, finds candidates too.
        code = np.arange(_CODES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self._indexed = (code >> np.uint64(62) == 0) | (len(self.bases) <= MOST_INDEXED_WHOLE)
        self._indexed[_CODES] = False
        blocks, counts = [], []
        for low in range(0, len(self.bases), _BLOCK_SEQUENCES):
            block = np.sort(_words(self.bases[low : low + _BLOCK_SEQUENCES]), axis=1)
            is_first = self._indexed[block]
            is_first[:, 1:] &= block[:, 1:] != block[:, :-1]
            blocks.append(block[is_first])
            counts.append(is_first.sum(axis=1))
        held, words = np.concatenate(counts), np.concatenate(blocks)
        blocks.clear()
        starts, ones = np.append(0, np.cumsum(held)), np.ones(len(words), dtype=bool)
        by_word = csr_array((ones, words, starts), shape=(len(held), _CODES)).tocsc()
        self._holders, self._starts = by_word.indices, by_word.indptr
        self._words = np.maximum(held, 1).astype(np.float32)

    def find(self, queries: Sequence[str], *, leave_out: np.ndarray | None = None) -> Found:
        """The nearest of n queries; `leave_out` ``(n,)``: one that each may not find; -1: none."""
        bases = bases_of(queries)
        leave_out = np.full(len(bases), -1) if leave_out is None else leave_out
        index, distance, diagonal = self._nearest(bases, leave_out)
        lengths = np.maximum((bases > 0).sum(axis=1), 1)
        far = np.flatnonzero(distance[:, 0] > FOREIGN / 2 * lengths)
        reverse = np.zeros(len(bases), dtype=bool)
        if len(far):
            turned = bases_of([queries[int(at)].translate(_COMPLEMENT)[::-1] for at in far])
            least = self._nearest(turned, leave_out[far])[1][:, 0]
            reverse[far] = least < np.minimum(distance[far, 0] / 2, FOREIGN * lengths[far])
        foreign = (distance[:, 0] > FOREIGN * lengths) & ~reverse
        aligned = self._align(bases, index[:, 0], diagonal[:, 0])
        return Found(index, distance, aligned, reverse, foreign)

    def _nearest(
        self, bases: np.ndarray, leave_out: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Index, distance and diagonal of the candidates, each ``(n, candidates)``."""
        index = np.full((len(bases), min(CANDIDATES, len(self.bases))), -1)
        distance, diagonal = np.full(index.shape, np.inf), np.zeros_like(index)
        block = max(_BLOCK_PAIRS // CANDIDATES, 1)
        for low in range(0, len(bases), block):
            part = slice(low, low + block)
            found, missing = self._candidates(bases[part], leave_out[part])
            rows, columns = np.nonzero(found >= 0)
            held, query = found[rows, columns], bases[part][rows]
            on, overlap = self._diagonals(bases[part], rows, held)
            for row in _edits(query.T, self._windows(held, on, bases.shape[1])):
                last = row
            edits = last.min(axis=0) * (query > 0).sum(axis=1) / overlap
            index[part] = found
            distance[part][rows, columns] = edits + missing[rows, columns] / 2
            diagonal[part][rows, columns] = on
        best = np.argsort(distance, axis=1, kind="stable")
        index, distance = (np.take_along_axis(one, best, axis=1) for one in (index, distance))
        return index, distance, np.take_along_axis(diagonal, best, axis=1)

    def _candidates(
        self, bases: np.ndarray, leave_out: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The known sequences that hold most words of each query, and the share that they miss.

        Both ``(n, candidates)``: -1 where there are no more; of the words of the shorter one.
        """
        wanted = min(CANDIDATES, len(self.bases))
        found = np.full((len(bases), wanted), -1)
        missing = np.zeros(found.shape, dtype=np.float32)
        for row, words in enumerate(_words(bases)):
            words = np.unique(words[self._indexed[words]])
            lists = [self._holders[self._starts[word] : self._starts[word + 1]] for word in words]
            if not lists:
                continue
            shared = np.bincount(np.concatenate(lists), minlength=len(self.bases))
            share = shared.astype(np.float32) / np.minimum(self._words, len(words))
            if leave_out[row] >= 0:
                share[leave_out[row]] = 0
            best = np.argpartition(-share, wanted - 1)[:wanted]
            found[row] = np.where(share[best] > 0, best, -1)
            missing[row] = 1 - np.minimum(share[best], 1)
        return found, missing

    def _diagonals(
        self, bases: np.ndarray, rows: np.ndarray, held: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where each known sequence ``held[p]`` lies along the query ``bases[rows[p]]``.

        ``(pairs,)`` place in the known sequence less place in the query, by the vote of their
        shared words, and ``(pairs,)`` bases in the overlap: at least half the shorter one.
        """
        width, known_width = bases.shape[1], self.bases.shape[1]
        words = _words(bases)
        place = np.full((len(bases), _CODES + 1), -1, dtype=np.int16)
        place[np.arange(len(bases))[:, None], words] = np.arange(words.shape[1])
        place[:, _CODES] = -1
        ours = place[rows[:, None], _words(self.bases[held])]
        pair, at = np.nonzero(ours >= 0)
        shift = at - ours[pair, at] + width
        span = width + known_width
        votes = np.bincount(pair * span + shift, minlength=len(rows) * span)
        votes = votes.reshape(len(rows), span)
        shifts = np.arange(-width, known_width)
        size = (bases > 0).sum(axis=1)[rows, None]
        known_size = self.lengths[held, None]
        overlap = np.minimum(size, known_size - shifts) - np.maximum(0, -shifts)
        votes[overlap < np.minimum(size, known_size) / 2] = -1
        best = votes.argmax(axis=1)
        return shifts[best], overlap[np.arange(len(rows)), best]

    def _windows(self, held: np.ndarray, diagonal: np.ndarray, width: int) -> np.ndarray:
        """``(width + 2 BAND, pairs)`` known bases along the band, 0 outside the sequence."""
        at = np.arange(-BAND, width + BAND)[:, None] + diagonal
        inside = (at >= 0) & (at < self.bases.shape[1])
        return np.where(inside, self.bases[held, np.where(inside, at, 0)], 0)

    def _align(self, bases: np.ndarray, held: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
        """``(n, longest known)`` the queries' bases at the places of known sequences ``held``."""
        aligned = np.zeros((len(bases), self.bases.shape[1]), dtype=np.uint8)
        present = np.flatnonzero(held >= 0)
        for low in range(0, len(present), _BLOCK_ALIGNED):
            rows = present[low : low + _BLOCK_ALIGNED]
            query = bases[rows].T
            matched = _matched(query, self._windows(held[rows], diagonal[rows], len(query)))
            place = matched + diagonal[rows] - BAND
            inside = (matched >= 0) & (place >= 0) & (place < self.lengths[held[rows]])
            step, pair = np.nonzero(inside)
            aligned[rows[pair], place[step, pair]] = query[step, pair]
        return aligned


def _edits(query: np.ndarray, window: np.ndarray) -> Iterator[np.ndarray]:
    """Rows ``(2 BAND + 1, pairs)`` of edit distances in the band: before each base, and at the end.

    Of bases ``(length, pairs)`` and those of the other sequences ``(length + 2 BAND, pairs)`` along
    the band. Where either has no base (0) they match for nothing, so overhanging ends are free.
    """
    row = np.zeros((2 * BAND + 1, query.shape[1]), dtype=np.int16)
    yield row
    for at, base in enumerate(query):
        known = window[at : at + len(row)]
        after = row + ((known != base) & (known > 0) & (base > 0))
        np.minimum(after[:-1], row[1:] + 1, out=after[:-1])  # the query's base is an insertion
        for diagonal in range(1, len(after)):  # known bases are left out
            np.minimum(after[diagonal], after[diagonal - 1] + 1, out=after[diagonal])
        row = after
        yield row


def _matched(query: np.ndarray, window: np.ndarray) -> np.ndarray:
    """``(length, pairs)`` row of `_edits`' window that a base is matched with; -1: an insertion."""
    width = 2 * BAND + 1
    rows = list(_edits(query, window))
    # Among equal ends the middle of the band is taken: no gap is opened for nothing.
    ends = rows[-1] * width + np.abs(np.arange(width) - BAND)[:, None]
    diagonal = ends.argmin(axis=0)
    matched = np.full(query.shape, -1)
    for at in range(len(query) - 1, -1, -1):
        before, after = rows[at], rows[at + 1]
        left = np.arange(query.shape[1])
        while len(left):
            on, base = diagonal[left], query[at, left]
            known, now = window[at + on, left], after[on, left]
            mismatch = (known != base) & (known > 0) & (base > 0)
            match = now == before[on, left] + mismatch
            matched[at, left[match]] = (at + on)[match]
            up = np.minimum(on + 1, width - 1)
            insert = ~match & (up > on) & (now == before[up, left] + 1)
            skip = ~match & ~insert
            diagonal[left] = on + insert - skip
            left = left[skip]
    return matched


def bases_of(sequences: Sequence[str]) -> np.ndarray:
    """``(n, longest)`` bases of sequences as numbers, 0 past the end and for other letters."""
    return _BASE_OF_BYTE[Texts.of(sequences).padded()]


def _words(bases: np.ndarray) -> np.ndarray:
    """``(n, length - 7)`` codes of the 8-mers at each position; ``_CODES`` where one has a gap."""
    places = max(bases.shape[1] - WORD + 1, 0)
    code = np.zeros((len(bases), places), dtype=np.int32)
    gap = np.zeros(code.shape, dtype=bool)
    for offset in range(WORD):
        part = bases[:, offset : offset + places]
        code = code * 4 + np.maximum(part, 1) - 1
        gap |= part == 0
    code[gap] = _CODES
    return code
