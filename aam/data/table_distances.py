"""Distances between samples that need nothing but their counts: Jaccard, Bray-Curtis, Aitchison.

``counts`` and ``other`` are ``(n, features)`` and ``(m, features)`` reads of samples; distances are
``(n, m)`` float64, within ``counts`` where ``other`` is None. Two empty samples are at distance 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from aam.data.table import FeatureTable

_BLOCK_SAMPLES = 128
"""Samples of ``other`` whose shares are held dense at once."""


def jaccard(counts: csr_array, other: csr_array | None = None) -> NDArray[np.float64]:
    """Share of the features of two samples that they do not share."""
    one = _presence(counts)
    two = one if other is None else _presence(other)
    shared = (one @ two.T).toarray().astype(np.float64)
    either = np.diff(one.indptr)[:, None] + np.diff(two.indptr) - shared
    return 1.0 - np.divide(shared, either, out=np.ones_like(shared), where=either > 0)


def bray_curtis(counts: csr_array, other: csr_array | None = None) -> NDArray[np.float64]:
    """1 - sum of the smaller shares of reads; whole depths do not count."""
    one = _shares(counts)
    two = one if other is None else _shares(other)
    used = np.intersect1d(one.indices, two.indices)
    smaller = np.empty((one.shape[0], two.shape[0]))
    mine, theirs = one[:, used], two[:, used]
    for low in range(0, two.shape[0], _BLOCK_SAMPLES):
        dense = theirs[low : low + _BLOCK_SAMPLES].T.toarray()  # (used, samples)
        for row in range(one.shape[0]):
            entries = slice(mine.indptr[row], mine.indptr[row + 1])
            least = np.minimum(dense[mine.indices[entries]], mine.data[entries, None])
            smaller[row, low : low + _BLOCK_SAMPLES] = least.sum(axis=0)
    smaller[np.ix_(np.diff(one.indptr) == 0, np.diff(two.indptr) == 0)] = 1.0
    return np.maximum(1.0 - smaller, 0.0)


def aitchison(counts: csr_array, other: csr_array | None = None) -> NDArray[np.float64]:
    """Euclidean distance of centred log-ratios of (reads + 1) over all features."""
    one = counts.astype(np.float64).log1p()
    two = one if other is None else other.astype(np.float64).log1p()
    squares = [np.asarray(part.power(2).sum(axis=1)).ravel() for part in (one, two)]
    means = [np.asarray(part.mean(axis=1)).ravel() for part in (one, two)]
    found = squares[0][:, None] + squares[1] - 2 * (one @ two.T).toarray()
    found -= one.shape[1] * (means[0][:, None] - means[1]) ** 2
    return np.sqrt(np.maximum(found, 0.0))


def _presence(counts: csr_array) -> csr_array:
    counts = csr_array(counts, dtype=np.float32, copy=True)
    counts.eliminate_zeros()
    counts.data[:] = 1.0
    return counts


def _shares(counts: csr_array) -> csr_array:
    counts = csr_array(counts, dtype=np.float64, copy=True)
    counts.eliminate_zeros()
    depth = np.asarray(counts.sum(axis=1)).ravel()
    counts.data /= np.repeat(depth, np.diff(counts.indptr))
    return counts


METRICS: dict[str, Callable[..., NDArray[np.float64]]] = {
    "jaccard": jaccard,
    "bray-curtis": bray_curtis,
    "aitchison": aitchison,
}


@dataclass(frozen=True, eq=False)
class TableDistances:
    """Distances between the samples of a table, computed for the rows that are asked for.

    Attributes:
        sample_ids: the samples that the rows number.
        counts: ``(samples, features)`` reads.
        metric: ``jaccard``, ``bray-curtis`` or ``aitchison``.
    """

    sample_ids: Sequence[str]
    counts: csr_array
    metric: str

    @classmethod
    def of(cls, table: FeatureTable, metric: str) -> TableDistances:
        """Distances of a table's samples."""
        return cls(table.sample_ids, table.counts, metric)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.sample_ids)

    def pairwise(self, rows: ArrayLike) -> NDArray[np.float64]:
        """Distances between the samples ``rows`` (n,): (n, n), 0 on the diagonal."""
        return self.cross(rows, rows)

    def cross(self, rows_a: ArrayLike, rows_b: ArrayLike) -> NDArray[np.float64]:
        """Distances from the samples ``rows_a`` (n,) to ``rows_b`` (m,): (n, m) float64."""
        a, b = np.asarray(rows_a, dtype=np.int64), np.asarray(rows_b, dtype=np.int64)
        found = METRICS[self.metric](self.counts[a], self.counts[b])
        found[a[:, None] == b] = 0.0
        return found
