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
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from aam.data.table import FeatureTable
from aam.data.table_distances import overlap
from aam.data.texts import Texts, match_names, row_blocks
from aam.data.tree import Phylogeny, read_tree
from aam.errors import DataFact, InputError, name_some

METRICS = ("unweighted", "weighted", "weighted-normalized")

_BLOCK_BYTES = 64 * 2**20  # of one dense block of samples x branches
_BLOCK_SAMPLES = 128  # of a block: measured fastest for both kinds of overlap (64 to 428)
_FAITH_ROWS = 1024  # samples whose Faith PD is computed together


class TreeWalk:
    """A tree made ready for walks from its tips to the root."""

    def __init__(self, tree: Phylogeny) -> None:
        """Find each node's next branch with a length; branches without one are passed over."""
        self.tree, self.up = tree, tree.parent.copy()
        skipped = tree.length == 0  # the root is one of them
        while len(again := np.flatnonzero((self.up >= 0) & skipped[self.up])):
            self.up[again] = self.up[self.up[again]]
        own = tree.tip_nodes
        self.first = np.where(skipped[own], self.up[own], own)  # of each tip

    def branches(
        self, counts: csr_array, tip_of_column: NDArray[np.int64], weighted: bool = False
    ) -> csr_array:
        """The branches that samples reach.

        Args:
            counts: ``(samples, features)`` positive reads.
            tip_of_column: ``(features,)`` the tip of each feature; -1: none.
            weighted: whether branches are weighted with the share of the sample's reads below.

        Returns:
            ``(samples, branches)`` float64 length of each branch that a sample reaches, or its
            length times that share; columns rise in each row.
        """
        tips = len(self.tree.tip_names)
        keys = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr)) * tips
        tip = tip_of_column[counts.indices]
        keys += tip
        order = np.argsort(keys, kind="stable")
        order = order[tip[order] >= 0]
        keys = keys[order]  # sample * tips + tip, rising
        sample, tip = np.divmod(keys, tips)
        # From each entry up, as long as the branch does not hold the sample's next tip.
        following = np.append(np.where(sample[1:] == sample[:-1], tip[1:], tips), tips)
        walking, at = np.arange(len(tip)), self.first[tip]
        steps = np.zeros(len(tip), dtype=np.int64)
        found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        while len(walking):
            own = (at >= 0) & (self.tree.tip_stop[at] <= following[walking])
            walking, at = walking[own], at[own]
            found.append((walking, at))
            steps[walking] += 1
            at = self.up[at]
        entry, first = np.repeat(np.arange(len(tip)), steps), np.cumsum(steps) - steps
        branches = np.empty(len(entry), dtype=np.int64)
        for step, (walking, at) in enumerate(found):
            branches[first[walking] + step] = at
        values, own = self.tree.length[branches], sample[entry]
        if weighted:
            reads = np.concatenate(([0], np.cumsum(counts.data[order])))
            first = np.searchsorted(keys, own * tips + self.tree.tip_start[branches])
            depth = np.diff(reads[np.searchsorted(sample, np.arange(counts.shape[0] + 1))])
            values *= (reads[entry + 1] - reads[first]) / depth[own]
        starts = np.searchsorted(own, np.arange(counts.shape[0] + 1))
        reached = csr_array((values, branches, starts), (counts.shape[0], len(self.up)))
        reached.has_sorted_indices = reached.has_canonical_format = True
        return reached


class UniFrac:
    """UniFrac distances between the samples of a table, exact in float64.

    Construction shears the tree to the table's features. The branches that samples reach are found
    when their distances are asked for: nothing of the size samples x branches is ever held, and
    dense work is done in blocks of at most 64 MB. Row numbers are those of the table's samples.

    Attributes:
        tree: the sheared phylogeny.
        tip_of_column: ``(features,)`` int64, each feature's tip in it; -1 where it has none.
        facts: what was left out, as counted facts.
    """

    def __init__(
        self,
        table: FeatureTable,
        tree: Phylogeny | str | Path,
        metric: str = "unweighted",
        drop_missing: bool = False,
    ) -> None:
        """Shear the tree to the features of the table.

        Args:
            table: the feature table.
            tree: the phylogeny, or the path of its Newick file.
            metric: one of ``METRICS``.
            drop_missing: leave out features that are not tips of the tree (counted in ``facts``)
                instead of raising.

        Raises:
            InputError: unknown metric, features missing in the tree, samples without reads.
        """
        if metric not in METRICS:
            raise InputError(f"unknown UniFrac metric {metric!r}; choose {', '.join(METRICS)}")
        if not isinstance(tree, Phylogeny):
            tree = read_tree(tree)
        self.metric, self.sample_ids = metric, tuple(table.sample_ids)
        self._counts = table.counts
        tips = match_names(table.feature_ids, tree.tip_names)
        if (tips < 0).any():  # sequences may be written in lower case in the tree
            lower = match_names(table.feature_ids, Texts.of(tree.tip_names).upper())
            tips = np.where(tips < 0, lower, tips)
        _check_features(table, tree, tips, drop_missing)
        self.facts = _count_reads(table, tips)
        kept = np.zeros(len(tree.tip_names), dtype=bool)
        kept[tips[tips >= 0]] = True
        self.tree = tree.shear(kept)
        self.tip_of_column = np.where(tips >= 0, np.cumsum(kept)[tips] - 1, -1)
        self._walk = TreeWalk(self.tree)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.sample_ids)

    def by(self, metric: str) -> UniFrac:
        """The same samples on the same tree by another metric."""
        other = copy.copy(self)
        other.metric = metric
        return other

    def pairwise(self, rows: ArrayLike | None = None) -> NDArray[np.float64]:
        """``(n, n)`` float64 distances between some samples ``(n,)``, or all; 0 on the diagonal."""
        reached = self._branches(self._rows(rows), self.metric != "unweighted")
        count = reached.shape[0]
        distances = np.empty((count, count))
        for low, high in _blocks(count, reached.shape[1]):
            # Columns low to high - 1 against all rows from low on: the lower triangle.
            below = self._distances(reached[low:], reached[low:high])
            distances[low:, low:high] = below
            distances[low:high, low:] = below.T
        np.fill_diagonal(distances, 0.0)
        return distances

    def cross(self, rows_a: ArrayLike, rows_b: ArrayLike) -> NDArray[np.float64]:
        """``(n, m)`` float64 distances from the samples ``rows_a`` ``(n,)`` to ``rows_b``."""
        a, b = self._rows(rows_a), self._rows(rows_b)
        reached = self._branches(np.concatenate((a, b)), self.metric != "unweighted")
        ours, theirs = reached[: len(a)], reached[len(a) :]
        found = np.empty((len(a), len(b)))
        for low, high in _blocks(len(b), reached.shape[1]):
            found[:, low:high] = self._distances(ours, theirs[low:high])
        found[a[:, None] == b] = 0.0
        return found

    def faith_pd(self, rows: ArrayLike | None = None) -> NDArray[np.float64]:
        """``(n,)`` float64 Faith's phylogenetic diversity of some samples ``(n,)``, or all.

        In units of the tree's branch lengths; the path to the root is included.
        """
        rows = self._rows(rows)
        parts = np.array_split(rows, len(rows) // _FAITH_ROWS + 1)
        return np.concatenate([self._branches(part, False).sum(axis=1) for part in parts])

    def _rows(self, rows: ArrayLike | None) -> NDArray[np.int64]:
        numbers = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(
                f"sample rows must be in 0..{len(self) - 1}, got {numbers.min()}..{numbers.max()}"
            )
        return numbers

    def _distances(self, a: csr_array, b: csr_array) -> NDArray[np.float64]:
        """``(n, m)`` distances by the branches of n and m samples; the m fit one dense block."""
        shared = overlap(a, b, unweighted=self.metric == "unweighted")
        whole = a.sum(axis=1)[:, None] + b.sum(axis=1)
        if self.metric == "weighted":
            return np.maximum(whole - 2.0 * shared, 0.0)
        if self.metric == "unweighted":
            whole -= shared
        else:
            shared *= 2.0
        # Where no branch has a length nothing separates two samples: the distance is 0.
        shared_part = np.divide(shared, whole, out=np.ones_like(whole), where=whole > 0)
        return np.maximum(1.0 - shared_part, 0.0)

    def _branches(self, rows: NDArray[np.int64], weighted: bool) -> csr_array:
        """The branches of some samples, without those of no sample where these are most."""
        reached = self._walk.branches(self._counts[rows], self.tip_of_column, weighted)
        if reached.shape[1] <= 4 * reached.nnz:
            return reached
        distinct, columns = np.unique(reached.indices, return_inverse=True)
        return csr_array((reached.data, columns, reached.indptr), (len(rows), len(distinct)))


def _check_features(
    table: FeatureTable, tree: Phylogeny, tips: NDArray[np.int64], drop_missing: bool
) -> None:
    missing, count = np.flatnonzero(tips < 0), len(tips)
    names = name_some([table.feature_ids[int(column)] for column in missing[:4]])
    if len(missing) == count:
        raise InputError(
            f"{tree.source}: none of the {count} features of {table.source} is a tip of the tree "
            f"(features: {names}; tips: {name_some(tree.tip_names)}); use the tree that was made "
            "for this table"
        )
    if len(missing) and not drop_missing:
        raise InputError(
            f"{tree.source}: {len(missing)} of {count} features of {table.source} are not tips of "
            f"the tree ({names}); use a tree that holds them, or leave them out with "
            "--drop-missing-tips"
        )


def _count_reads(table: FeatureTable, tips: NDArray[np.int64]) -> list[DataFact]:
    """Features that are not in the tree as a fact; samples without reads on it are an error."""
    counts, missing = table.counts, np.flatnonzero(tips < 0)
    on_tree = (tips >= 0).astype(np.int64)
    reads = np.concatenate([counts[part] @ on_tree for part in row_blocks(counts.indptr)])
    empty = np.flatnonzero(reads == 0)
    if len(empty):
        names = name_some([table.sample_ids[row] for row in empty[:4]])
        where = " on tips of the tree" if len(missing) else ""
        raise InputError(
            f"{table.source}: {len(empty)} of {len(reads)} samples have no reads{where} ({names}); "
            "UniFrac is not defined for them: remove them from the table"
        )
    if not len(missing):
        return []
    names = name_some([table.feature_ids[int(column)] for column in missing[:4]])
    detail = f"of {len(tips)}, {1 - reads.sum() / counts.sum():.2%} of the reads: {names}"
    what = "features left out of UniFrac: not in the tree"
    return [DataFact(what, len(missing), detail, "dropped")]


def _blocks(samples: int, branches: int) -> Iterator[tuple[int, int]]:
    """Ranges of samples whose dense block stays within the memory budget."""
    width = max(1, min(_BLOCK_SAMPLES, _BLOCK_BYTES // (8 * (branches + 1))))
    for low in range(0, samples, width):
        yield low, min(low + width, samples)
