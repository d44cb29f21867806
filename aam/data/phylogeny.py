"""UniFrac between the samples of a feature table, and their Faith PD, on a phylogeny.

The nodes of the tree stand in post-order, so the tips below any branch are one contiguous
range of tips, and the reads of a sample below a branch are a difference of two cumulative
sums. That gives every sample a sparse row over the branches that it reaches; a sample of 100
to 400 ASVs reaches about 1,000 branches, whatever the size of the tree.

Every UniFrac metric follows from one overlap. Branch b has the length l_b, sample i has the
value v_ib = l_b [reads below b > 0] (unweighted) or l_b (share of reads below b) (weighted),
S_i = sum_b v_ib, and M_ij = sum_b min(v_ib, v_jb):

    unweighted            1 - M_ij / (S_i + S_j - M_ij)
    weighted              S_i + S_j - 2 M_ij
    weighted-normalized   1 - 2 M_ij / (S_i + S_j)
    Faith PD              S_i of the unweighted values

The last two use |x - y| = x + y - 2 min(x, y) and sum_b v_ib = sum of the tip-to-root distances
weighted with the shares. Only branches that a sample reaches can add to M, so its cost follows
the sparse rows and not the tree. Sources: Lozupone and Knight 2005 (unweighted), Lozupone et
al. 2007 (weighted), Faith 1992 (PD).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from aam.data.facts import DataFact, name_some
from aam.data.tree import Phylogeny, read_tree
from aam.errors import InputError

if TYPE_CHECKING:
    from aam.data.table import FeatureTable

__all__ = ["METRICS", "Phylogeny", "UniFrac", "read_tree"]

METRICS = ("unweighted", "weighted", "weighted-normalized")

_BLOCK_BYTES = 64 * 2**20
"""Bytes of one dense block of samples x branches; the only dense memory over the branches."""

_BLOCK_SAMPLES = 128
"""Widest dense block: 128 columns measured fastest for both kinds of overlap (64 to 428)."""


class UniFrac:
    """UniFrac distances between the samples of a table, exact in float64.

    Construction shears the tree to the table's features and keeps, for every sample, the
    branches that it reaches: 12 bytes for each (sample, branch), i.e. about 12 KB a sample of
    100 to 400 ASVs (ibd: 428 samples, 442,000 pairs, 5.3 MB). Nothing of the size samples x
    branches is ever held: dense work is done in blocks of at most 64 MB.

    Args:
        table: the feature table; rows of the methods below number its samples.
        tree: the phylogeny, or the path of its Newick file.
        metric: ``"unweighted"``, ``"weighted"`` or ``"weighted-normalized"``.
        drop_missing: leave out features that are not tips of the tree (counted in ``facts``)
            instead of raising.

    Attributes:
        facts: what was left out, as counted facts.
        sample_ids: the ids of the samples, in the order of the rows.
        tree: the sheared phylogeny.

    Raises:
        InputError: unknown metric, features missing in the tree, samples without reads.
    """

    def __init__(
        self,
        table: FeatureTable,
        tree: Phylogeny | str | Path,
        metric: str = "unweighted",
        drop_missing: bool = False,
    ) -> None:
        """Shear the tree and find the branches that every sample reaches."""
        if metric not in METRICS:
            raise InputError(f"unknown UniFrac metric {metric!r}; choose {', '.join(METRICS)}")
        if not isinstance(tree, Phylogeny):
            tree = read_tree(tree)
        self.metric = metric
        self.sample_ids = tuple(table.sample_ids)
        self.facts: list[DataFact] = []
        self.tree, counts = self._match(table, tree, drop_missing)
        self._check_reads(table, counts)
        self._reach(counts)

    def _reach(self, counts: scipy.sparse.csr_array) -> None:
        """Find the branches of every sample; counts (samples, tips)."""
        used = self.tree.length > 0
        self._branches, self._faith_pd = _branch_rows(
            counts,
            self.tree.tip_start[used],
            self.tree.tip_stop[used],
            self.tree.length[used],
            weighted=self.metric != "unweighted",
        )
        self._total = self._branches.sum(axis=1)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.sample_ids)

    def pairwise(self, rows: ArrayLike) -> NDArray[np.float64]:
        """Distances between the samples ``rows`` (n,): (n, n) float64, 0 on the diagonal."""
        rows = self._row_numbers(rows)
        distances = np.empty((len(rows), len(rows)))
        for low, high in self._blocks(rows):
            # Columns low to high - 1 against all rows from low on: the lower triangle.
            distances[low:, low:high] = self._distances(rows[low:], rows[low:high])
            distances[low:high, low:] = distances[low:, low:high].T
        np.fill_diagonal(distances, 0.0)
        return distances

    def cross(self, rows_a: ArrayLike, rows_b: ArrayLike) -> NDArray[np.float64]:
        """Distances from the samples ``rows_a`` (n,) to ``rows_b`` (m,): (n, m) float64."""
        rows_a, rows_b = self._row_numbers(rows_a), self._row_numbers(rows_b)
        distances = np.empty((len(rows_a), len(rows_b)))
        for low, high in self._blocks(rows_b):
            distances[:, low:high] = self._distances(rows_a, rows_b[low:high])
        distances[rows_a[:, None] == rows_b] = 0.0
        return distances

    def of(self, counts: scipy.sparse.csr_array) -> UniFrac:
        """The same metric on the same tree for other samples of the table's features.

        Args:
            counts: (n, features of the table) reads, no explicit zeros; every row needs a read.
        """
        other = copy.copy(self)
        other.sample_ids = tuple(map(str, range(counts.shape[0])))
        other._reach(scipy.sparse.csr_array(counts[:, self._columns]))
        return other

    def all_pairs(self) -> NDArray[np.float64]:
        """Distances between all samples of the table, (samples, samples) float64."""
        return self.pairwise(np.arange(len(self)))

    def faith_pd(self, rows: ArrayLike) -> NDArray[np.float64]:
        """Faith's phylogenetic diversity of the samples ``rows`` (n,): (n,) float64.

        In units of the tree's branch lengths; the path to the root is included.
        """
        return self._faith_pd[self._row_numbers(rows)]

    def _match(
        self, table: FeatureTable, tree: Phylogeny, drop_missing: bool
    ) -> tuple[Phylogeny, scipy.sparse.csr_array]:
        """The sheared tree, and the table's counts with its columns in the order of the tips."""
        tip_of_name = {name: tip for tip, name in enumerate(tree.tip_names)}
        tips = np.array([tip_of_name.get(name, -1) for name in table.feature_ids], dtype=np.int64)
        if (tips < 0).any():  # sequences may be written in lower case in the tree
            tip_of_name = {name.upper(): tip for name, tip in tip_of_name.items()}
            for column in np.flatnonzero(tips < 0):
                tips[column] = tip_of_name.get(table.feature_ids[column], -1)
        missing = np.flatnonzero(tips < 0)
        if len(missing):
            self._report_missing(table, tree, missing, drop_missing)
        present = np.flatnonzero(tips >= 0)
        kept = np.zeros(len(tree.tip_names), dtype=bool)
        kept[tips[present]] = True
        self._columns = present[np.argsort(tips[present])]
        return tree.shear(kept), scipy.sparse.csr_array(table.counts[:, self._columns])

    def _report_missing(
        self, table: FeatureTable, tree: Phylogeny, missing: NDArray[np.int64], drop_missing: bool
    ) -> None:
        names = [table.feature_ids[column] for column in missing[:4]]
        if len(missing) == len(table.feature_ids):
            raise InputError(
                f"{tree.source}: none of the {len(missing)} features of {table.source} is a tip "
                f"of the tree (features: {name_some(names)}; tips: "
                f"{name_some(tree.tip_names)}); use the tree that was made for this table"
            )
        if not drop_missing:
            raise InputError(
                f"{tree.source}: {len(missing)} of {len(table.feature_ids)} features of "
                f"{table.source} are not tips of the tree ({name_some(names)}); use a tree "
                "that holds them, or leave them out with --drop-missing-tips"
            )
        total = float(table.counts.sum())
        share = float(table.counts[:, missing].sum()) / total if total else 0.0
        self.facts.append(
            DataFact(
                what="features left out of UniFrac: not in the tree",
                count=len(missing),
                detail=f"of {len(table.feature_ids)}, {share:.2%} of the reads: {name_some(names)}",
                kind="dropped",
            )
        )

    def _check_reads(self, table: FeatureTable, counts: scipy.sparse.csr_array) -> None:
        empty = np.flatnonzero(np.diff(counts.indptr) == 0)
        if len(empty):
            names = [table.sample_ids[row] for row in empty[:4]]
            where = " on tips of the tree" if self.facts else ""
            raise InputError(
                f"{table.source}: {len(empty)} of {len(table.sample_ids)} samples have no "
                f"reads{where} ({name_some(names)}); UniFrac is not defined for them: remove "
                "them from the table"
            )

    def _row_numbers(self, rows: ArrayLike) -> NDArray[np.int64]:
        numbers = np.asarray(rows, dtype=np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(
                f"sample rows must be in 0..{len(self) - 1}, got {numbers.min()}..{numbers.max()}"
            )
        return numbers

    def _blocks(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Ranges of ``rows`` whose dense block stays within the memory budget."""
        width = max(1, min(_BLOCK_SAMPLES, _BLOCK_BYTES // (8 * (self._branches.shape[1] + 1))))
        for low in range(0, len(rows), width):
            yield low, min(low + width, len(rows))

    def _distances(
        self, rows_a: NDArray[np.int64], rows_b: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Distances (n, m) where the m samples ``rows_b`` fit one dense block."""
        overlap = self._overlap(rows_a, rows_b)
        total = self._total[rows_a][:, None] + self._total[rows_b]
        if self.metric == "weighted":
            return np.maximum(total - 2.0 * overlap, 0.0)
        shared, whole = (
            (overlap, total - overlap) if self.metric == "unweighted" else (2.0 * overlap, total)
        )
        # Where no branch has a length nothing separates two samples: the distance is 0.
        shared_part = np.divide(shared, whole, out=np.ones_like(whole), where=whole > 0)
        return np.maximum(1.0 - shared_part, 0.0)

    def _overlap(self, rows_a: NDArray[np.int64], rows_b: NDArray[np.int64]) -> NDArray[np.float64]:
        """M (n, m): the sum over the branches of the smaller of the two samples' values."""
        a, b = self._branches[rows_a], self._branches[rows_b]
        # Only branches that a sample of b reaches can overlap; the dense block holds no others.
        reached = np.zeros(b.shape[1], dtype=bool)
        reached[b.indices] = True
        slot = np.cumsum(reached) - 1
        dense = np.zeros((int(slot[-1]) + 1 if len(slot) else 0, len(rows_b)))
        columns = np.repeat(np.arange(len(rows_b)), np.diff(b.indptr))
        dense[slot[b.indices], columns] = 1.0 if self.metric == "unweighted" else b.data
        kept = reached[a.indices]
        starts = np.concatenate(([0], np.cumsum(kept)))[a.indptr]
        branches, values = slot[a.indices[kept]], a.data[kept]
        if self.metric == "unweighted":  # min(l, l) = l where both are present: a product
            rows = scipy.sparse.csr_array((values, branches, starts), (len(rows_a), len(dense)))
            return rows @ dense
        return _sum_of_minima(starts, branches, values, dense)


def _sum_of_minima(
    starts: NDArray[np.int64],
    branches: NDArray[np.int64],
    values: NDArray[np.float64],
    dense: NDArray[np.float64],
) -> NDArray[np.float64]:
    """sum_b min(v_ib, dense_bj) for sparse rows v (n) and a dense block (branches, m): (n, m)."""
    result = np.empty((len(starts) - 1, dense.shape[1]))
    buffer = np.empty((int(np.diff(starts).max(initial=0)), dense.shape[1]))
    for row, (low, high) in enumerate(itertools.pairwise(starts)):
        smaller = buffer[: high - low]
        # mode="clip" writes into the buffer directly; the default would go through a copy.
        np.take(dense, branches[low:high], axis=0, out=smaller, mode="clip")
        np.minimum(smaller, values[low:high, None], out=smaller)
        np.sum(smaller, axis=0, out=result[row])
    return result


def _branch_rows(
    counts: scipy.sparse.csr_array,
    tip_start: NDArray[np.int64],
    tip_stop: NDArray[np.int64],
    length: NDArray[np.float64],
    *,
    weighted: bool,
) -> tuple[scipy.sparse.csr_array, NDArray[np.float64]]:
    """The values v (samples, branches) of every sample, and its Faith PD (samples,).

    Works on dense blocks of few samples: they stay in the processor's cache.
    """
    samples, tips = counts.shape
    width = max(1, min(16, _BLOCK_BYTES // (8 * (2 * len(length) + tips + 1))))
    starts = np.zeros(samples + 1, dtype=np.int64)
    all_branches: list[NDArray[np.int32]] = []
    all_values: list[NDArray[np.float64]] = []
    faith_pd = np.zeros(samples)
    for low in range(0, samples, width):
        block = counts[low : low + width].toarray()
        reads_before = np.zeros((len(block), tips + 1), dtype=np.int64)
        np.cumsum(block, axis=1, out=reads_before[:, 1:])
        for row, before in enumerate(reads_before, start=low):
            reads = before[tip_stop] - before[tip_start]
            branches = np.flatnonzero(reads)
            lengths = length[branches]
            faith_pd[row] = lengths.sum()
            starts[row + 1] = starts[row] + len(branches)
            all_branches.append(branches.astype(np.int32))
            all_values.append(lengths * (reads[branches] / before[-1]) if weighted else lengths)
    data = np.concatenate(all_values) if all_values else np.empty(0)
    indices = np.concatenate(all_branches) if all_branches else np.empty(0, dtype=np.int32)
    rows = scipy.sparse.csr_array((data, indices, starts), shape=(samples, len(length)))
    return rows, faith_pd
