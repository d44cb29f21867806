"""Which branches of a tree samples reach, by walking up from their own tips."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from aam.data.tree import Phylogeny


@dataclass(frozen=True, eq=False)
class Reached:
    """The branches that some samples reach.

    Attributes:
        branches: (samples, branches) value of each branch that a sample reaches: its length, or
            its length times the share of the sample's reads below it. Columns rise in each row.
        total: (samples,) float64, sum of the values.
        faith_pd: (samples,) float64, sum of the lengths.
    """

    branches: scipy.sparse.csr_array
    total: NDArray[np.float64]
    faith_pd: NDArray[np.float64]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.total)

    def take(self, rows: NDArray[np.int64]) -> Reached:
        """Some of the samples."""
        return Reached(self.branches[rows], self.total[rows], self.faith_pd[rows])

    def part(self, low: int, high: int) -> Reached:
        """Samples ``low`` to ``high - 1``."""
        return Reached(self.branches[low:high], self.total[low:high], self.faith_pd[low:high])

    def compressed(self) -> Reached:
        """The same, without columns that no sample reaches where these are most of them."""
        indices = self.branches.indices
        if self.branches.shape[1] <= 4 * len(indices):
            return self
        distinct, columns = np.unique(indices, return_inverse=True)
        branches = scipy.sparse.csr_array(
            (self.branches.data, columns, self.branches.indptr), (len(self), len(distinct))
        )
        return Reached(branches, self.total, self.faith_pd)


class TreeWalk:
    """A tree made ready for walks from its tips to the root."""

    def __init__(self, tree: Phylogeny) -> None:
        """Find each node's next branch with a length; branches without one are passed over."""
        self.tips = len(tree.tip_names)
        self.length, self.tip_start, self.tip_stop = tree.length, tree.tip_start, tree.tip_stop
        self.up = tree.parent.copy()
        skipped = tree.length == 0  # the root is one of them
        while True:
            again = np.flatnonzero((self.up >= 0) & skipped[self.up])
            if not len(again):
                break
            self.up[again] = self.up[self.up[again]]
        own = tree.tip_nodes
        self.first = np.where(skipped[own], self.up[own], own)  # of each tip

    def reach(
        self, keys: NDArray[np.int64], reads: NDArray[np.integer], samples: int, weighted: bool
    ) -> Reached:
        """The branches that samples reach.

        Args:
            keys: (entries,) sample * tips + tip of each entry, sorted.
            reads: (entries,) reads, positive.
            samples: how many samples there are.
            weighted: whether branches are weighted with the share of the reads below.
        """
        sample, tip = np.divmod(keys, self.tips)
        entry, branches, starts = self._climb(sample, tip)
        of_sample = sample[entry]
        row_starts = starts[np.searchsorted(sample, np.arange(samples + 1))]
        lengths = self.length[branches]
        shape = (samples, len(self.length))
        matrix = scipy.sparse.csr_array((lengths, branches, row_starts), shape)
        matrix.has_sorted_indices = matrix.has_canonical_format = True
        faith_pd = np.asarray(matrix.sum(axis=1)).ravel()
        if not weighted:
            return Reached(matrix, faith_pd, faith_pd)
        before = np.concatenate(([0], np.cumsum(reads)))
        first = np.searchsorted(keys, of_sample * self.tips + self.tip_start[branches])
        below = before[entry + 1] - before[first]
        ends = before[np.searchsorted(sample, np.arange(samples + 1))]
        matrix.data = lengths * (below / np.diff(ends)[of_sample])
        return Reached(matrix, np.asarray(matrix.sum(axis=1)).ravel(), faith_pd)

    def _climb(
        self, sample: NDArray[np.int64], tip: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The branches found from each entry, as long as they do not hold the sample's next tip.

        Returns:
            The entry of each branch, the branches in order, and (entries + 1,) where those of
            each entry start.
        """
        following = np.full(len(tip), self.tips, dtype=np.int64)
        following[:-1] = np.where(sample[1:] == sample[:-1], tip[1:], self.tips)
        walking, at = np.arange(len(tip)), self.first[tip]
        steps = np.zeros(len(tip), dtype=np.int64)
        found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        while True:
            own = (at >= 0) & (self.tip_stop[at] <= following[walking])
            walking, at = walking[own], at[own]
            if not len(walking):
                break
            found.append((walking, at))
            steps[walking] += 1
            at = self.up[at]
        starts = np.concatenate(([0], np.cumsum(steps)))
        branches = np.empty(int(starts[-1]), dtype=np.int64)
        for step, (entries, nodes) in enumerate(found):
            branches[starts[entries] + step] = nodes
        return np.repeat(np.arange(len(tip)), steps), branches, starts
