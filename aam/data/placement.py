"""Where sequences that are not in the tree of the known ones join it.

A new sequence leaves the known tree at some depth below the root, and from there on it has a
length of its own. Its way from the root is that of its nearest known sequence within the clade
that was decoded for it; how far it goes along follows from the depth that its neighbours let
expect, and from how sure the clades on the way are: each branch counts by its probability.

Depth and own length are learned from the known sequences: each is taken out of the tree and
found again by its neighbours, while the tree says where it was. Both are ridge regressions on the
distance of the nearest sequence and on the mean length that the neighbours have for themselves,
which says how finely the tree is divided there. On `ibd`, for the new sequences of training
samples held out, the two explain .55 of the variance of own lengths, the distance alone .26.

Likelihood placement (pplacer, Matsen et al. 2010; EPA-ng, Barbera et al. 2019) on the tree of the
candidates changed the Jaccard of memberships by -.001 to +.007 on `ibd`, and improved no distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from aam.data.clades import LEAST_LENGTH, Clades, Grafts
from aam.data.neighbours import NEAREST, Found, Neighbours

CALIBRATED = 3000  # known sequences that are taken out and placed again, at most
FARTHEST = 0.97  # quantile of distances to the nearest; longer ones count as that one
RIDGE = 10.0  # penalty of the regressions, on standardised terms
KEPT = 0.7  # of the length by which unsure branches shorten the way, what no own length gets

STEPS = (0.0, 1.75, 2.75, 3.75, 4.75, 6.75, 8.75, 12.75)
"""Distances from which on G(h) has another value: 1, 2, 3, 4, 5-6, 7-8, 9-12 edits, more."""


class Law(NamedTuple):
    """How distances become lengths in one tree: two ridge regressions on the same terms.

    They give the own length, and the height at which a sequence leaves the tree above the mean
    depth of its neighbours. G(h) is the baseline's law: the mean length that an ASV adds to the
    tree where it gets the clades of its nearest one, by the distance h between them.
    """

    centre: np.ndarray  # (5,) means of the terms
    slopes: np.ndarray  # (2, 5) of the own length and of the height
    levels: np.ndarray  # (2,) means of the two
    longest: float  # own length that is predicted
    farthest: float  # distance beyond which the own length grows no more
    added: np.ndarray  # (steps,) G(h)

    @classmethod
    def fit(cls, clades: Clades, neighbours: Neighbours, *, seed: int = 0) -> Law:
        """Take known sequences out of the tree, one by one, and find them by their neighbours.

        `neighbours` indexes the tree's tips, in their order; `seed` draws ``CALIBRATED`` of more.
        """
        tree, tip_nodes = clades.tree, clades.tree.tip_nodes
        tips = np.arange(len(tip_nodes))
        if len(tips) > CALIBRATED:
            tips = np.sort(np.random.default_rng(seed).choice(tips, CALIBRATED, replace=False))
        found = neighbours.find(clades.sequences.take(tips), leave_out=tips)
        placed = np.isfinite(found.distance[:, 0])
        if not placed.any():
            return cls(np.zeros(5), np.zeros((2, 5)), np.zeros(2), 0.0, 1.0, np.zeros(len(STEPS)))
        # Without a tip its sister's branch and the one above them are one.
        children = np.bincount(tree.parent[:-1], minlength=len(tree))
        above = tree.parent[tip_nodes]
        index = found.index[:, :NEAREST]
        sister = (above[index] == above[tips, None]) & (children[above[tips]] == 2)[:, None]
        pendant = clades.pendant[index] + sister * tree.length[above[tips], None]
        farthest = float(np.quantile(found.distance[placed, 0], FARTHEST))
        terms = _terms(found, pendant, farthest)[placed]
        depth = clades.root_distance
        rise = (found.weights * depth[tip_nodes[index]]).sum(axis=1) - depth[above[tips]]
        target = np.stack([clades.pendant[tips], rise], axis=1)[placed]
        centre, spread = terms.mean(axis=0), np.maximum(terms.std(axis=0), 1e-9)
        scaled, levels = (terms - centre) / spread, target.mean(axis=0)
        gram = scaled.T @ scaled + RIDGE * np.eye(len(centre))
        slopes = np.linalg.solve(gram, scaled.T @ (target - levels)).T / spread
        # A pair's branch belongs to no clade once one of the two is gone.
        pair = tree.tip_stop[above[tips]] - tree.tip_start[above[tips]] == 2
        added = (clades.pendant[tips] + pair * tree.length[above[tips]])[placed]
        step = _step_of(found.distance[placed, 0])
        sums = np.bincount(step, added, len(STEPS)) + added.mean()
        means = sums / (np.bincount(step, minlength=len(STEPS)) + 1)
        return cls(centre, slopes, levels, float(clades.pendant.max()), farthest, means)

    def predict(self, found: Found, pendant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(n,)`` own lengths and ``(n,)`` heights above the neighbours' mean depth.

        Of n sequences whose neighbours have lengths ``(n, NEAREST)`` for themselves.
        """
        terms = _terms(found, pendant, self.farthest) - self.centre
        own, rise = (self.levels + terms @ self.slopes.T).T
        longest = max(self.longest, LEAST_LENGTH)
        return np.clip(own, LEAST_LENGTH, longest), np.maximum(rise, 0.0)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """As a file can hold it; `from_arrays` reads it."""
        return {f"law.{name}": np.asarray(value) for name, value in self._asdict().items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Law:
        """Read what `to_arrays` gave."""
        return cls(*(arrays[f"law.{name}"][()] for name in cls._fields))


@dataclass(frozen=True, eq=False)
class Placement:
    """Places sequences on the tree of the known ones; lengths are in the tree's units."""

    clades: Clades
    law: Law

    def vote(self, near: Found, clades: np.ndarray) -> np.ndarray:
        """``(n, m)`` float32 share of the neighbours' votes for clades ``(m,)``."""
        start, stop = self.clades.start[clades], self.clades.stop[clades]
        weights = near.weights.astype(np.float32)
        votes = np.zeros((len(weights), len(start)), dtype=np.float32)
        for place in range(weights.shape[1]):
            tip = near.index[:, place, None]
            votes += weights[:, place, None] * ((start <= tip) & (tip < stop))
        return votes

    def copied(self, near: Found) -> Grafts:
        """Nearest-neighbour placement, the baseline: clades of the nearest one, and G(h)."""
        ends = self.clades.ends(np.append(self.clades.lowest, -1)[near.index[:, 0]])
        return ends._replace(own=self.law.added[_step_of(near.distance[:, 0])])

    def grafts(
        self,
        near: Found,  # of n sequences
        lowest: np.ndarray,  # (n,) the smallest clade that was decoded for each; -1: none
        sure: np.ndarray,  # (n, columns) probability of each clade
        column: np.ndarray,  # (clades,) where in `sure` a clade stands; -1: it has no chance
    ) -> Grafts:
        """Where sequences join."""
        clades, tree, distance = self.clades, self.clades.tree, self.clades.root_distance
        index, root = near.index[:, :NEAREST], len(tree) - 1
        own, rise = self.law.predict(near, clades.pendant[index])
        mean = (near.weights * distance[tree.tip_nodes[index]]).sum(axis=1)
        tip, deepest = self._way(index, lowest)
        depth = np.minimum(np.maximum(mean - rise, 0.0), deepest)
        ways = [tree.tip_nodes[tip]]  # the nodes up to the root, and then the root
        while (ways[-1] != root).any():
            ways.append(np.where(ways[-1] == root, root, tree.parent[ways[-1]]))
        node = np.stack(ways, axis=1)
        # The way is as long as its branches down to that depth, each counted by its probability.
        top = distance[np.where(node == root, root, tree.parent[node])]
        clade = clades.clade_of_node[node]
        place = np.append(column, -1)[clade]
        chance = np.where(clade >= 0, 0.0, 1.0)
        chance[place >= 0] = sure[np.nonzero(place >= 0)[0], place[place >= 0]]
        length = np.clip(depth[:, None] - top, 0.0, tree.length[node])
        expected = (chance * length).sum(axis=1)
        branch = np.arange(len(tip)), (expected[:, None] < top).sum(axis=1)
        shared = np.clip(expected - top[branch], 0.0, tree.length[node[branch]])
        return Grafts(node[branch], shared, own + (1 - KEPT) * (depth - expected))

    def _way(self, index: np.ndarray, lowest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The known sequence whose way each follows, ``(n,)``, and how deep at most, ``(n,)``.

        That of its nearest neighbour in its clade; where none is in it, to the clade's own end.
        """
        clades = self.clades
        inside = (index >= clades.start[lowest, None]) & (index < clades.stop[lowest, None])
        inside |= (lowest < 0)[:, None]
        place = inside.argmax(axis=1)
        tip, found = index[np.arange(len(index)), place], inside.any(axis=1)
        tip = np.where(found & (tip >= 0), tip, clades.start[lowest])
        end = np.where(lowest >= 0, clades.root_distance[clades.nodes[lowest]], 0.0)
        return tip, np.where(found & (index[:, 0] >= 0), np.inf, end)


def _step_of(distance: np.ndarray) -> np.ndarray:
    return np.searchsorted(STEPS, distance, side="right") - 1


def _terms(found: Found, pendant: np.ndarray, farthest: float) -> np.ndarray:
    """``(n, 5)`` what own lengths and heights are regressed on; the arguments are `predict`'s."""
    present = found.index[:, :NEAREST] >= 0
    count = np.maximum(present.sum(axis=1), 1)
    distance = np.sqrt(np.minimum(found.distance[:, 0], farthest))
    local = np.sqrt((pendant * present).sum(axis=1) / count)
    return np.stack([distance, local, distance**2, local**2, distance * local], axis=1)
