"""How a new ASV joins the branch that its clades end at: the law of its own length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aam.data.clades import Clades, Grafts
from aam.data.neighbours import Found, Neighbours

EDGES = (1.75, 2.75, 3.75, 4.75, 6.75, 8.75, 12.75)
MOST = 2000


@dataclass(frozen=True, eq=False)
class Attachment:
    """Mean length that an ASV adds to the tree, by its distance to the nearest known one.

    Attributes:
        own: ``(bins,)`` lengths.
    """

    own: NDArray[np.float64]

    @classmethod
    def fit(cls, clades: Clades, neighbours: Neighbours, seed: int = 0) -> Attachment:
        """Leave known ASVs out one by one."""
        count = len(clades.tree.tip_names)
        tips = np.sort(np.random.default_rng(seed).permutation(count)[:MOST])
        near = neighbours.find(clades.sequences.take(tips), leave_out=tips)
        above = clades.tree.parent[clades.tip_nodes[tips]]
        size = clades.tree.tip_stop[above] - clades.tree.tip_start[above]
        added = clades.pendant[tips] + np.where(size == 2, clades.tree.length[above], 0.0)
        place = np.searchsorted(EDGES, near.distance[:, 0])
        sums = np.bincount(place, added, len(EDGES) + 1)
        counts = np.bincount(place, minlength=len(EDGES) + 1)
        return cls((sums + added.mean()) / (counts + 1))

    def grafts(self, clades: Clades, lowest: NDArray[np.int64], near: Found) -> Grafts:
        """Places of new ASVs.

        Args:
            clades: of the known ones.
            lowest: ``(n,)`` the smallest clade of each; -1: none.
            near: their neighbours.
        """
        node = np.where(lowest >= 0, clades.nodes[lowest], len(clades.tree) - 1)
        own = self.own[np.searchsorted(EDGES, near.distance[:, 0])]
        return Grafts(node, clades.tree.length[node], own)

    def to_arrays(self) -> dict[str, NDArray[np.float64]]:
        """As a file can hold it."""
        return {"attachment.own": self.own}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Attachment:
        """Read what `to_arrays` gave."""
        return cls(arrays["attachment.own"])
