"""Distances between samples that need nothing but their counts: Jaccard, Bray-Curtis, Aitchison.

``counts`` and ``other`` are ``(n, features)`` and ``(m, features)`` reads of samples, each with
some; distances are ``(n, m)`` float64, within ``counts`` where ``other`` is None.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_array

from aam.data.table import FeatureTable
from aam.errors import DataFact

_BLOCK_SAMPLES = 128  # of ``other`` whose shares are held dense at once


def jaccard(counts: csr_array, other: csr_array | None = None) -> np.ndarray:
    """Share of the features of two samples that they do not share."""
    one = (counts != 0).astype(np.float32)
    two = one if other is None else (other != 0).astype(np.float32)
    shared = (one @ two.T).toarray().astype(np.float64)
    either = np.diff(one.indptr)[:, None] + np.diff(two.indptr) - shared
    return 1.0 - np.divide(shared, either, out=np.ones_like(shared), where=either > 0)


def bray_curtis(counts: csr_array, other: csr_array | None = None) -> np.ndarray:
    """1 - sum of the smaller shares of reads; whole depths do not count."""
    one = _shares(counts)
    two = one if other is None else _shares(other)
    blocks = range(0, two.shape[0], _BLOCK_SAMPLES)
    parts = [overlap(one, two[low : low + _BLOCK_SAMPLES]) for low in blocks]
    shared = np.concatenate([np.empty((one.shape[0], 0)), *parts], axis=1)
    return np.maximum(1.0 - shared, 0.0)


def aitchison(counts: csr_array, other: csr_array | None = None) -> np.ndarray:
    """Euclidean distance of centred log-ratios of (reads + 1) over all features."""
    one = counts.astype(np.float64).log1p()
    two = one if other is None else other.astype(np.float64).log1p()
    squares = [part.power(2).sum(axis=1) for part in (one, two)]
    means = [part.mean(axis=1) for part in (one, two)]
    found = squares[0][:, None] + squares[1] - 2 * (one @ two.T).toarray()
    found -= one.shape[1] * (means[0][:, None] - means[1]) ** 2
    return np.sqrt(np.maximum(found, 0.0))


def _shares(counts: csr_array) -> csr_array:
    counts = counts.astype(np.float64)
    counts.data /= np.repeat(counts.sum(axis=1), np.diff(counts.indptr))
    return counts


def overlap(
    a: csr_array,  # (n, columns) float64
    b: csr_array,  # (m, columns) float64, few enough rows for (columns, m) to be held dense
    *,
    unweighted: bool = False,  # whether all values of a column are equal where there are any
) -> np.ndarray:
    """``(n, m)`` sums over the columns of the smaller of the values of two rows."""
    # Only columns that a row of b has can overlap; the dense block holds no others.
    used = np.zeros(b.shape[1], dtype=bool)
    used[b.indices] = True
    slot = np.cumsum(used) - 1
    dense = np.zeros((np.count_nonzero(used), b.shape[0]))
    rows_of_b = np.repeat(np.arange(b.shape[0]), np.diff(b.indptr))
    dense[slot[b.indices], rows_of_b] = 1.0 if unweighted else b.data
    kept = used[a.indices]
    starts = np.append(0, np.cumsum(kept))[a.indptr]
    columns, values = slot[a.indices[kept]], a.data[kept]
    if unweighted:  # min(l, l) = l where both are present: a product
        return csr_array((values, columns, starts), (a.shape[0], len(dense))) @ dense
    found = np.empty((a.shape[0], b.shape[0]))
    buffer = np.empty((int(np.diff(starts).max(initial=0)), b.shape[0]))
    for row, (low, high) in enumerate(itertools.pairwise(starts)):
        smaller = buffer[: high - low]
        # mode="clip" writes into the buffer directly; the default would go through a copy.
        np.take(dense, columns[low:high], axis=0, out=smaller, mode="clip")
        np.minimum(smaller, values[low:high, None], out=smaller)
        np.sum(smaller, axis=0, out=found[row])
    return found


class TableDistances(NamedTuple):
    """Distances between the samples of a table, computed for the rows that are asked for."""

    table: FeatureTable
    metric: str  # jaccard, bray-curtis or aitchison

    def pairwise(self, rows: ArrayLike) -> np.ndarray:
        """``(n, n)`` distances between the samples ``rows`` ``(n,)``, 0 on the diagonal."""
        return self.cross(rows, rows)

    def cross(self, rows_a: ArrayLike, rows_b: ArrayLike) -> np.ndarray:
        """``(n, m)`` distances from the samples ``rows_a`` ``(n,)`` to ``rows_b`` ``(m,)``."""
        a, b = np.asarray(rows_a, dtype=np.int64), np.asarray(rows_b, dtype=np.int64)
        metrics = {"jaccard": jaccard, "bray-curtis": bray_curtis, "aitchison": aitchison}
        found = metrics[self.metric](self.table.counts[a], self.table.counts[b])
        found[a[:, None] == b] = 0.0
        return found


class PrecomputedDistances(NamedTuple):
    """Distances between samples as a file gives them."""

    sample_ids: Sequence[str]  # whose rows these are
    matrix: np.ndarray  # (samples, samples) float32 or float64
    facts: list[DataFact]  # what was left out, as counted facts

    def pairwise(self, rows: ArrayLike) -> np.ndarray:
        """``(n, n)`` distances between the samples ``rows`` ``(n,)``."""
        return self.cross(rows, rows)

    def cross(self, rows_a: ArrayLike, rows_b: ArrayLike) -> np.ndarray:
        """``(n, m)`` distances from the samples ``rows_a`` ``(n,)`` to ``rows_b`` ``(m,)``."""
        a, b = np.asarray(rows_a, dtype=np.int64), np.asarray(rows_b, dtype=np.int64)
        return self.matrix[np.ix_(a, b)].astype(np.float64)
