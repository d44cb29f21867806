"""UniFrac between the samples of a feature table, and their Faith PD, on a phylogeny.

The nodes of the tree stand in post-order, so the tips below any branch are one contiguous
range of tips, and the reads of a sample below a branch are a difference of two cumulative
sums. A sample's branches are found by walking up from its own tips: the walk from a tip ends
where the branch also holds the sample's next tip, whose walk goes on. That gives every sample a
sparse row over the branches that it reaches, each found once and in order; a sample of 100 to
400 ASVs reaches about 1,000 branches, and neither the time nor the memory follows the tree.

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

from aam.data.texts import Texts, match_names, ranges, row_blocks
from aam.data.tree import Phylogeny, read_tree
from aam.data.tree_walk import Reached, TreeWalk
from aam.errors import DataFact, InputError, name_some

if TYPE_CHECKING:
    from aam.data.table import FeatureTable

__all__ = ["METRICS", "Phylogeny", "UniFrac", "read_tree"]

METRICS = ("unweighted", "weighted", "weighted-normalized")

_BLOCK_BYTES = 64 * 2**20
"""Bytes of one dense block of samples x branches; the only dense memory over the branches."""

_BLOCK_SAMPLES = 128
"""Widest dense block: 128 columns measured fastest for both kinds of overlap (64 to 428)."""

_FAITH_ROWS = 1024
"""Samples whose Faith PD is computed together."""

_KEPT_ENTRIES = 2**17
"""Tables of at most so many entries keep their samples' branches: 10 MB then."""


class UniFrac:
    """UniFrac distances between the samples of a table, exact in float64.

    Construction shears the tree to the table's features. The branches that a sample reaches are
    found when its distances are asked for, and kept where the table is small: 12 bytes for each
    (sample, branch), i.e. about 12 KB a sample of 100 to 400 ASVs. Nothing of the size samples x
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
        tip_of_column: (features,) int64, each feature's tip in it; -1 where it has none.

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
        """Shear the tree to the features of the table."""
        if metric not in METRICS:
            raise InputError(f"unknown UniFrac metric {metric!r}; choose {', '.join(METRICS)}")
        if not isinstance(tree, Phylogeny):
            tree = read_tree(tree)
        self.metric = metric
        self.sample_ids = tuple(table.sample_ids)
        self.facts: list[DataFact] = []
        self._counts = table.counts
        self.tip_of_column = self._match(table, tree, drop_missing)
        self._check_reads(table)
        self._walk = TreeWalk(self.tree)
        self._kept: Reached | None = None

    def _reached(self, rows: NDArray[np.int64]) -> Reached:
        """The branches of some samples."""
        if self._counts.nnz > _KEPT_ENTRIES:
            return self._find(rows)
        if self._kept is None:
            self._kept = self._find(np.arange(len(self)))
        return self._kept.take(rows)

    def _find(self, rows: NDArray[np.int64]) -> Reached:
        """Walk up the tree from the tips of some samples."""
        starts = self._counts.indptr[rows].astype(np.int64)
        lengths = self._counts.indptr[rows + 1] - starts
        entries = ranges(starts, lengths)
        tips = self.tip_of_column[self._counts.indices[entries]]
        sample = np.repeat(np.arange(len(rows)), lengths)
        keys = sample * self._walk.tips + tips
        order = np.argsort(keys, kind="stable")
        order = order[tips[order] >= 0]
        reads = self._counts.data[entries[order]]
        return self._walk.reach(keys[order], reads, len(rows), self.metric != "unweighted")

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.sample_ids)

    def pairwise(self, rows: ArrayLike) -> NDArray[np.float64]:
        """Distances between the samples ``rows`` (n,): (n, n) float64, 0 on the diagonal."""
        rows = self._row_numbers(rows)
        reached = self._reached(rows).compressed()
        distances = np.empty((len(rows), len(rows)))
        for low, high in _blocks(len(rows), reached.branches.shape[1]):
            # Columns low to high - 1 against all rows from low on: the lower triangle.
            below = self._distances(reached.part(low, len(rows)), reached.part(low, high))
            distances[low:, low:high] = below
            distances[low:high, low:] = below.T
        np.fill_diagonal(distances, 0.0)
        return distances

    def cross(self, rows_a: ArrayLike, rows_b: ArrayLike) -> NDArray[np.float64]:
        """Distances from the samples ``rows_a`` (n,) to ``rows_b`` (m,): (n, m) float64."""
        rows_a, rows_b = self._row_numbers(rows_a), self._row_numbers(rows_b)
        reached = self._reached(np.concatenate((rows_a, rows_b))).compressed()
        a, b = reached.part(0, len(rows_a)), reached.part(len(rows_a), len(reached))
        distances = np.empty((len(rows_a), len(rows_b)))
        for low, high in _blocks(len(rows_b), reached.branches.shape[1]):
            distances[:, low:high] = self._distances(a, b.part(low, high))
        distances[rows_a[:, None] == rows_b] = 0.0
        return distances

    def by(self, metric: str) -> UniFrac:
        """The same samples on the same tree by another metric."""
        other = copy.copy(self)
        other.metric, other._kept = metric, None
        return other

    def all_pairs(self) -> NDArray[np.float64]:
        """Distances between all samples of the table, (samples, samples) float64."""
        return self.pairwise(np.arange(len(self)))

    def faith_pd(self, rows: ArrayLike) -> NDArray[np.float64]:
        """Faith's phylogenetic diversity of the samples ``rows`` (n,): (n,) float64.

        In units of the tree's branch lengths; the path to the root is included.
        """
        rows = self._row_numbers(rows)
        parts = [self._reached(part) for part in np.array_split(rows, len(rows) // _FAITH_ROWS + 1)]
        return np.concatenate([part.faith_pd for part in parts])

    def _match(self, table: FeatureTable, tree: Phylogeny, drop_missing: bool) -> NDArray[np.int64]:
        """Shear the tree; return each feature's tip in it, -1 where it has none."""
        tips = match_names(table.feature_ids, tree.tip_names)
        missing = np.flatnonzero(tips < 0)
        if len(missing):  # sequences may be written in lower case in the tree
            wanted = Texts.of(table.feature_ids).take(missing)
            tips[missing] = match_names(wanted, Texts.of(tree.tip_names).upper())
            missing = np.flatnonzero(tips < 0)
        if len(missing):
            self._report_missing(table, tree, missing, drop_missing)
        kept = np.zeros(len(tree.tip_names), dtype=bool)
        kept[tips[tips >= 0]] = True
        self.tree = tree.shear(kept)
        return np.where(tips >= 0, np.cumsum(kept)[tips] - 1, -1)

    def _report_missing(
        self, table: FeatureTable, tree: Phylogeny, missing: NDArray[np.int64], drop_missing: bool
    ) -> None:
        names = [table.feature_ids[int(column)] for column in missing[:4]]
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
        is_missing = np.zeros(table.counts.shape[1], dtype=bool)
        is_missing[missing] = True
        lost = table.counts.data[is_missing[table.counts.indices]].sum()
        share = float(lost) / total if total else 0.0
        self.facts.append(
            DataFact(
                what="features left out of UniFrac: not in the tree",
                count=len(missing),
                detail=f"of {len(table.feature_ids)}, {share:.2%} of the reads: {name_some(names)}",
                kind="dropped",
            )
        )

    def _check_reads(self, table: FeatureTable) -> None:
        counts = table.counts
        on_tree = np.diff(counts.indptr)
        if self.facts:
            for part in row_blocks(counts.indptr):
                low, high = counts.indptr[part.start], counts.indptr[part.stop]
                missing = self.tip_of_column[counts.indices[low:high]] < 0
                rows = np.repeat(np.arange(part.start, part.stop), on_tree[part])
                on_tree -= np.bincount(rows[missing], minlength=len(on_tree))
        empty = np.flatnonzero(on_tree == 0)
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

    def _distances(self, a: Reached, b: Reached) -> NDArray[np.float64]:
        """Distances (n, m) where the m samples of b fit one dense block."""
        overlap = self._overlap(a.branches, b.branches)
        total = a.total[:, None] + b.total
        if self.metric == "weighted":
            return np.maximum(total - 2.0 * overlap, 0.0)
        shared, whole = (
            (overlap, total - overlap) if self.metric == "unweighted" else (2.0 * overlap, total)
        )
        # Where no branch has a length nothing separates two samples: the distance is 0.
        shared_part = np.divide(shared, whole, out=np.ones_like(whole), where=whole > 0)
        return np.maximum(1.0 - shared_part, 0.0)

    def _overlap(self, a: scipy.sparse.csr_array, b: scipy.sparse.csr_array) -> NDArray[np.float64]:
        """M (n, m): the sum over the branches of the smaller of the two samples' values."""
        # Only branches that a sample of b reaches can overlap; the dense block holds no others.
        reached = np.zeros(b.shape[1], dtype=bool)
        reached[b.indices] = True
        slot = np.cumsum(reached) - 1
        dense = np.zeros((int(slot[-1]) + 1 if len(slot) else 0, b.shape[0]))
        columns = np.repeat(np.arange(b.shape[0]), np.diff(b.indptr))
        dense[slot[b.indices], columns] = 1.0 if self.metric == "unweighted" else b.data
        kept = reached[a.indices]
        starts = np.concatenate(([0], np.cumsum(kept)))[a.indptr]
        branches, values = slot[a.indices[kept]], a.data[kept]
        if self.metric == "unweighted":  # min(l, l) = l where both are present: a product
            rows = scipy.sparse.csr_array((values, branches, starts), (a.shape[0], len(dense)))
            return rows @ dense
        return _sum_of_minima(starts, branches, values, dense)


def _blocks(samples: int, branches: int) -> Iterator[tuple[int, int]]:
    """Ranges of samples whose dense block stays within the memory budget."""
    width = max(1, min(_BLOCK_SAMPLES, _BLOCK_BYTES // (8 * (branches + 1))))
    for low in range(0, samples, width):
        yield low, min(low + width, samples)


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
