"""UniFrac between the samples of a feature table, and their Faith PD, on a phylogeny.

The nodes of the tree stand in post-order, so the tips below any branch are one contiguous
range of tips, and the reads of a sample below a branch are a difference of two cumulative
sums. A sample's branches are found by walking up from its own tips: the walk from a tip ends
where the branch also holds the sample's next tip, whose walk goes on. That gives every sample a
sparse row over the branches that it reaches, each found once and in order; a sample of 100 to
400 ASVs reaches about 1,000 branches, and neither the time nor the memory follows the tree.

Every UniFrac metric follows from one overlap. Branch b has the length l_b, sample i has the
value v_ib = l_b [reads below b > 0] (unweighted) or l_b (share of reads below b) (weighted),
S_i = sum_b v_ib, and M_ij = sum_b min(v_ib, v_jb), as |x - y| = x + y - 2 min(x, y):

    unweighted            1 - M_ij / (S_i + S_j - M_ij)     Lozupone and Knight 2005
    weighted              S_i + S_j - 2 M_ij                Lozupone et al. 2007
    weighted-normalized   1 - 2 M_ij / (S_i + S_j)
    Faith PD              S_i of the unweighted values      Faith 1992
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_array

from aam.data.table import FeatureTable
from aam.data.table_distances import PrecomputedDistances, TableDistances, overlap
from aam.data.texts import Texts, match_names, row_blocks
from aam.data.tree import Phylogeny
from aam.errors import DataFact, InputError, name_some

METRICS = ("unweighted", "weighted", "weighted-normalized")

_BLOCK_BYTES = 64 * 2**20  # of one dense block of samples x branches
_BLOCK_SAMPLES = 128  # of a block: measured fastest for both kinds of overlap (64 to 428)
_FAITH_ROWS = 1024  # samples whose Faith PD is computed together


class TreeWalk:
    """A tree made ready for walks from its tips to the root."""

    def __init__(self, tree: Phylogeny) -> None:
        self.tree, self.up = tree, tree.parent.copy()  # of each node, its next branch on the way
        skipped = tree.length == 0  # are passed over; the root is one of them
        while len(again := np.flatnonzero((self.up >= 0) & skipped[self.up])):
            self.up[again] = self.up[self.up[again]]
        own = tree.tip_nodes
        self.first = np.where(skipped[own], self.up[own], own)  # of each tip

    def branches(
        self,
        counts: csr_array,  # (samples, features) positive reads
        tip_of_column: np.ndarray,  # (features,) the tip of each; -1: none
        weighted: bool = False,  # multiply with the share of the sample's reads below
    ) -> csr_array:
        """``(samples, branches)`` float64 length of each branch that a sample reaches, sorted."""
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
        found = [(walking[:0], at[:0])]
        while len(walking):
            own = (at >= 0) & (self.tree.tip_stop[at] <= following[walking])
            walking, at = walking[own], at[own]
            found.append((walking, at))
            at = self.up[at]
        entry, branches = (np.concatenate(part) for part in zip(*found, strict=True))
        by_entry = np.argsort(entry, kind="stable")
        entry, branches = entry[by_entry], branches[by_entry]
        values, own = self.tree.length[branches], sample[entry]
        if weighted:
            reads = np.append(0, np.cumsum(counts.data[order]))
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

    Features that are not tips of the tree are left out with `drop_missing`, as a counted fact;
    without it they are an InputError, and always if they are all. So are samples without reads.
    """

    def __init__(self, table: FeatureTable, tree: Phylogeny, drop_missing: bool = False) -> None:
        self.sample_ids, self._counts = tuple(table.sample_ids), table.counts
        tips = match_names(table.feature_ids, tree.tip_names)
        if (tips < 0).any():  # sequences may be written in lower case in the tree
            lower = match_names(table.feature_ids, Texts.of(tree.tip_names).upper())
            tips = np.where(tips < 0, lower, tips)
        self.facts = _check_features(table, tree, tips, drop_missing)
        kept = np.zeros(len(tree.tip_names), dtype=bool)
        kept[tips[tips >= 0]] = True
        self.tree = tree.shear(kept)
        self.tip_of_column = np.where(tips >= 0, np.cumsum(kept)[tips] - 1, -1)  # (features,)
        self._walk = TreeWalk(self.tree)

    def pairwise(self, rows: ArrayLike | None = None, metric: str = "unweighted") -> np.ndarray:
        """``(n, n)`` float64 distances between some samples ``(n,)``, or all; 0 on the diagonal."""
        unweighted = metric == "unweighted"
        reached = self._branches(rows, not unweighted)
        count, branches = reached.shape
        width = max(1, min(_BLOCK_SAMPLES, _BLOCK_BYTES // (8 * (branches + 1))))
        found, sums = np.empty((count, count)), reached.sum(axis=1)
        for low in range(0, count, width):
            # A block of columns against all rows from its first on: the lower triangle.
            columns = slice(low, low + width)
            shared = overlap(reached[low:], reached[columns], unweighted=unweighted)
            whole = sums[low:, None] + sums[columns]
            if metric == "weighted":
                below = whole - 2.0 * shared
            else:
                part, of = (shared, whole - shared) if unweighted else (2.0 * shared, whole)
                # Where no branch has a length nothing separates two samples: the distance is 0.
                below = 1.0 - np.divide(part, of, out=np.ones_like(of), where=of > 0)
            found[low:, columns] = np.maximum(below, 0.0)
            found[columns, low:] = found[low:, columns].T
        np.fill_diagonal(found, 0.0)
        return found

    def faith_pd(self, rows: ArrayLike | None = None) -> np.ndarray:
        """``(n,)`` float64 Faith's phylogenetic diversity of some samples ``(n,)``, or all.

        In units of the tree's branch lengths; the path to the root is included.
        """
        numbers = np.arange(len(self.sample_ids)) if rows is None else np.asarray(rows)
        parts = np.array_split(numbers, len(numbers) // _FAITH_ROWS + 1)
        return np.concatenate([self._branches(part, False).sum(axis=1) for part in parts])

    def _branches(self, rows: ArrayLike | None, weighted: bool) -> csr_array:
        """The branches of some samples, without those of no sample where these are most."""
        counts = self._counts if rows is None else self._counts[np.asarray(rows, dtype=np.int64)]
        reached = self._walk.branches(counts, self.tip_of_column, weighted)
        if reached.shape[1] <= 4 * reached.nnz:
            return reached
        distinct, columns = np.unique(reached.indices, return_inverse=True)
        return csr_array((reached.data, columns, reached.indptr), (reached.shape[0], len(distinct)))


Distances = UniFrac | TableDistances | PrecomputedDistances


def _check_features(
    table: FeatureTable, tree: Phylogeny, tips: np.ndarray, drop_missing: bool
) -> list[DataFact]:
    """Missing features as a fact, or an error; samples without reads on the tree are an error."""
    counts, missing, count = table.counts, np.flatnonzero(tips < 0), len(tips)
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
    on_tree = (tips >= 0).astype(np.int64)
    reads = np.concatenate([counts[part] @ on_tree for part in row_blocks(counts.indptr)])
    empty = np.flatnonzero(reads == 0)
    if len(empty):
        samples = name_some([table.sample_ids[row] for row in empty[:4]])
        where = " on tips of the tree" if len(missing) else ""
        raise InputError(
            f"{table.source}: {len(empty)} of {len(reads)} samples have no reads{where} "
            f"({samples}); UniFrac is not defined for them: remove them from the table"
        )
    if not len(missing):
        return []
    detail = f"of {count}, {1 - reads.sum() / counts.sum():.2%} of the reads: {names}"
    what = "features left out of UniFrac: not in the tree"
    return [DataFact(what, len(missing), detail, "dropped")]
