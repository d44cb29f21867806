"""Distances between samples that need nothing but their counts: Jaccard, Bray-Curtis, Aitchison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse
from numpy.typing import ArrayLike, NDArray

from aam.data.table import FeatureTable


@dataclass(frozen=True, eq=False)
class TableDistances:
    """Distances between the samples of a table, computed for the rows that are asked for.

    * ``jaccard``: share of the features of two samples that they do not share.
    * ``bray-curtis``: 1 - sum of the smaller shares of reads.
    * ``aitchison``: Euclidean distance of centred log-ratios of (reads + 1) over all features.

    Attributes:
        sample_ids: the samples that the rows number.
        counts: ``(samples, features)`` reads, no explicit zeros.
        metric: which distance.
    """

    sample_ids: Sequence[str]
    counts: sparse.csr_array
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
        one, other = self.counts[a].astype(np.float64), self.counts[b].astype(np.float64)
        if self.metric == "jaccard":
            found = _jaccard(one, other)
        elif self.metric == "bray-curtis":
            found = _bray_curtis(one, other)
        else:
            found = _aitchison(one, other)
        found[a[:, None] == b] = 0.0
        return found


def _jaccard(one: sparse.csr_array, other: sparse.csr_array) -> NDArray[np.float64]:
    richness, theirs = np.diff(one.indptr), np.diff(other.indptr)
    one, other = one.sign(), other.sign()
    shared = (one @ other.T).toarray()
    either = richness[:, None] + theirs - shared
    return 1.0 - np.divide(shared, either, out=np.ones_like(shared), where=either > 0)


def _bray_curtis(one: sparse.csr_array, other: sparse.csr_array) -> NDArray[np.float64]:
    used = np.intersect1d(one.indices, other.indices)
    shares, theirs = _shares(one)[:, used], _shares(other)[:, used].toarray()
    found = np.ones((one.shape[0], other.shape[0]))
    for row in range(one.shape[0]):
        entries = slice(shares.indptr[row], shares.indptr[row + 1])
        smaller = np.minimum(theirs[:, shares.indices[entries]], shares.data[entries])
        found[row] -= smaller.sum(axis=1)
    return np.maximum(found, 0.0)


def _shares(counts: sparse.csr_array) -> sparse.csr_array:
    depth = np.asarray(counts.sum(axis=1)).ravel()
    data = counts.data / np.repeat(depth, np.diff(counts.indptr))
    return sparse.csr_array((data, counts.indices, counts.indptr), counts.shape)


def _aitchison(one: sparse.csr_array, other: sparse.csr_array) -> NDArray[np.float64]:
    features = one.shape[1]
    one, other = one.log1p(), other.log1p()
    mean = np.asarray(one.sum(axis=1)).ravel() / features
    their_mean = np.asarray(other.sum(axis=1)).ravel() / features
    square = np.asarray(one.power(2).sum(axis=1)).ravel()
    their_square = np.asarray(other.power(2).sum(axis=1)).ravel()
    found = square[:, None] + their_square - 2 * (one @ other.T).toarray()
    found -= features * (mean[:, None] - their_mean) ** 2
    return np.sqrt(np.maximum(found, 0.0))
