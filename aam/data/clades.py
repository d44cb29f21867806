"""The clades of a tree that some ASVs make: what a sequence can be a member of.

The tree is sheared to the ASVs that training knows. A *clade* is a branch with two or more of
them below it, but not all; a *pendant* is the length above an ASV that it shares with none. Nodes
stand in post-order, so the ASVs below a clade are one contiguous range of tips, and whether ASV t
is a member of clade k is ``start[k] <= t < stop[k]``: no matrix of memberships is ever needed.

UniFrac, Faith PD and weighted UniFrac of any ASVs follow from where each joins the tree: known
ones at their own tip, new ones on a branch, with a pendant of their own (`Clades.graft`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aam.data.texts import Texts, match_names
from aam.data.tree import Phylogeny

LEAST_LENGTH = 1e-5
"""Branches that are not longer are no clade: their members are those of the branch above."""

MOST_CLADES = 131_072
"""Of more branches those with most members are clades: a head of all would fill the memory, and
within small ones the nearest known ASV says as much."""

LONGEST_WEIGHT = 5.0  # most that one clade counts in the loss, in mean lengths


@dataclass(frozen=True)
class Grafts:
    """Where new ASVs join the tree.

    Attributes:
        node: ``(n,)`` int64, whose branch each joins.
        shared: ``(n,)`` float64, how much of that branch it shares, from the top.
        own: ``(n,)`` float64, the length that is its own.
    """

    node: NDArray[np.int64]
    shared: NDArray[np.float64]
    own: NDArray[np.float64]

    def __len__(self) -> int:
        """Number of new ASVs."""
        return len(self.node)

    def take(self, index: NDArray[Any]) -> Grafts:
        """Some of them, by numbers or a mask."""
        return Grafts(self.node[index], self.shared[index], self.own[index])


@dataclass(frozen=True, eq=False)
class Clades:
    """A tree sheared to the known ASVs, and its clades.

    Attributes:
        tree: the sheared phylogeny; its tips are the known ASVs, in post-order, named by their
            sequences.
    """

    tree: Phylogeny

    def __len__(self) -> int:
        """Number of clades."""
        return len(self.nodes)

    @property
    def sequences(self) -> Texts:
        """The known ASVs; their order is that of the tips."""
        return Texts.of(self.tree.tip_names)

    @cached_property
    def nodes(self) -> NDArray[np.int64]:
        """``(clades,)`` node of each clade in the tree, ascending: members before their holders."""
        size = self.tree.tip_stop - self.tree.tip_start
        is_clade = (size > 1) & (size < len(self.tree.tip_names))
        found = np.flatnonzero(is_clade & (self.tree.length > LEAST_LENGTH))
        if len(found) > MOST_CLADES:
            found = np.sort(found[np.argsort(-size[found], kind="stable")[:MOST_CLADES]])
        return found

    @cached_property
    def start(self) -> NDArray[np.int64]:
        """``(clades,)`` first tip below each clade."""
        return self.tree.tip_start[self.nodes]

    @cached_property
    def stop(self) -> NDArray[np.int64]:
        """``(clades,)`` the tip after the last below each clade."""
        return self.tree.tip_stop[self.nodes]

    @cached_property
    def length(self) -> NDArray[np.float64]:
        """``(clades,)`` length of each clade's branch, in the tree's units."""
        return self.tree.length[self.nodes]

    @cached_property
    def weight(self) -> NDArray[np.float64]:
        """``(clades,)`` weight of each clade in the loss: its length over the mean, at most 5."""
        mean = self.length.sum() / max(len(self), 1)
        return np.minimum(self.length / max(mean, LEAST_LENGTH), LONGEST_WEIGHT)

    @cached_property
    def clade_of_node(self) -> NDArray[np.int64]:
        """``(nodes,)`` the clade that each node is, or lies in; -1: none."""
        clade = np.full(len(self.tree), -1, dtype=np.int64)
        clade[self.nodes] = np.arange(len(self.nodes))
        at, parent = np.arange(len(self.tree)), self.tree.parent
        up = np.where((clade >= 0) | (parent < 0), at, parent)  # these lead to themselves
        while not np.array_equal(further := up[up], up):  # twice as far each time
            up = further
        return clade[up]

    @cached_property
    def parent(self) -> NDArray[np.int64]:
        """``(clades,)`` the smallest clade that holds each one; -1: none."""
        return self.clade_of_node[self.tree.parent[self.nodes]]

    @cached_property
    def lowest(self) -> NDArray[np.int64]:
        """``(known ASVs,)`` the smallest clade of each; -1: none."""
        return self.clade_of_node[self.tree.parent[self.tree.tip_nodes]]

    @cached_property
    def pendant(self) -> NDArray[np.float64]:
        """``(known ASVs,)`` length above each that it shares with no other."""
        return self.tree.length[self.tree.tip_nodes]

    @cached_property
    def levels(self) -> list[NDArray[np.int64]]:
        """The clades by how many hold them, outermost first; a clade's parent is a level before."""
        return levels_of(self.parent)

    @cached_property
    def root_distance(self) -> NDArray[np.float64]:
        """``(nodes,)`` distance of each node to the root."""
        return sums_to_root(self.tree.parent, self.tree.length)

    @cached_property
    def depth(self) -> NDArray[np.float64]:
        """``(nodes,)`` length of clades from the root to each node, the node's own included."""
        clade = np.zeros(len(self.tree))
        clade[self.nodes] = self.length
        return sums_to_root(self.tree.parent, clade)

    def on_paths(self, tips: NDArray[np.int64]) -> NDArray[np.int64]:
        """The clades of any of some known ASVs ``(n,)``, ascending."""
        on_path = np.zeros(len(self), dtype=bool)
        at = np.unique(self.lowest[tips])
        while len(at := at[at >= 0]):
            at = at[~on_path[at]]
            on_path[at] = True
            at = np.unique(self.parent[at])
        return np.flatnonzero(on_path)

    def near(self, tips: NDArray[np.int64]) -> NDArray[np.int64]:
        """The clades of some known ASVs ``(n,)`` and the sisters of these clades, ascending."""
        on_path = np.zeros(len(self) + 1, dtype=bool)
        on_path[self.on_paths(tips)] = True
        on_path[-1] = True  # holds the outermost ones
        return np.flatnonzero(on_path[self.parent])

    def members(self, lowest: NDArray[np.int64]) -> NDArray[np.bool_]:
        """``(n, clades)`` whether ASVs of these smallest clades ``(n,)`` (-1: none) are in each."""
        start, stop = self.tree.tip_start, self.tree.tip_stop
        node = self.node_of(lowest)[:, None]
        return (self.start <= start[node]) & (self.stop >= stop[node])

    def node_of(self, clade: NDArray[np.int64]) -> NDArray[np.int64]:
        """``(n,)`` node of each clade ``(n,)``; the root for -1."""
        return np.append(self.nodes, len(self.tree) - 1)[clade]

    def ends(self, clade: NDArray[np.int64]) -> Grafts:
        """Places at the lower ends of clades ``(n,)``; the root for -1."""
        node = self.node_of(clade)
        return Grafts(node, self.tree.length[node], np.zeros(len(node)))

    def jaccard(self, one: Grafts, other: Grafts) -> NDArray[np.float64]:
        """Similarity of the clades that the same n ASVs are members of by two opinions.

        Returns:
            ``(n,)`` length of the clades that both places hold, of what either holds, parts of a
            branch included; 1 where neither holds any.
        """
        held, theirs = self._held(one), self._held(other)
        # Above the branch where the ways meet all is shared; on it the shorter part.
        meeting = self._meeting(one.node, other.node)
        shared = np.minimum(np.minimum(held, theirs), self.depth[meeting])
        whole = held + theirs - shared
        return np.divide(shared, whole, out=np.ones_like(whole), where=whole > 0)

    def _held(self, grafts: Grafts) -> NDArray[np.float64]:
        """``(n,)`` length of the clades that each new ASV is a member of."""
        is_clade = np.isin(grafts.node, self.nodes)
        missing = np.maximum(self.tree.length[grafts.node] - grafts.shared, 0.0)
        return self.depth[grafts.node] - np.where(is_clade, missing, 0.0)

    def _meeting(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
        """The lowest node that holds both nodes of each pair."""
        low, high = np.minimum(one, other), np.maximum(one, other)
        first, last = self.tree.tip_start[low], self.tree.tip_stop[low]
        while True:  # the later node, up to where it holds the earlier one
            start, stop = self.tree.tip_start[high], self.tree.tip_stop[high]
            outside = (first < start) | (last > stop)
            if not outside.any():
                return high
            high = np.where(outside, self.tree.parent[high], high)

    def graft(self, grafts: Grafts, names: Sequence[str]) -> tuple[Phylogeny, NDArray[np.int64]]:
        """The tree with new ASVs of some names on it.

        Each joins a branch at some height, through a node of its own; lower ones first.

        Returns:
            The tree, and for each of its nodes the node of the known tree whose branch its
            branch is a part of; -1: the own branch of a new ASV.
        """
        tree, count = self.tree, len(grafts)
        shared = np.clip(grafts.shared, 0.0, tree.length[grafts.node])
        order = np.lexsort((-shared, grafts.node))
        node, shared = grafts.node[order], shared[order]
        on_branch = np.bincount(node, minlength=len(tree))
        before = np.cumsum(on_branch) - on_branch  # grafts on the branches of earlier nodes
        place = np.arange(len(tree)) + 2 * before  # of the old nodes
        tip = 2 * np.arange(count) + node + 1  # of the new ones, after the node whose branch it is
        joint = tip + 1
        is_top = np.append(node[1:] != node[:-1], True)[:count]
        is_lowest = np.roll(is_top, 1)
        total = len(tree) + 2 * count
        parent, length = np.full(total, -1, dtype=np.int64), np.zeros(total)
        above = np.where(tree.parent >= 0, place[tree.parent], -1)
        parent[place], length[place] = above, tree.length
        parent[tip], length[tip] = joint, grafts.own[order]
        higher = np.flatnonzero(~is_top) + 1  # the next one on the same branch
        parent[joint[~is_top]], parent[joint[is_top]] = joint[higher], above[node[is_top]]
        grafted = place[node[is_lowest]]
        parent[grafted] = joint[is_lowest]
        length[grafted] -= shared[is_lowest]
        length[joint] = shared
        length[joint[~is_top]] -= shared[higher]
        origin, number = np.full((2, total), -1, dtype=np.int64)
        origin[place], origin[joint] = np.arange(len(tree)), node
        known, new = self.sequences, Texts.of(list(names))
        number[place[tree.tip_nodes]] = np.arange(len(known))
        number[tip] = len(known) + order
        grown = known.joined(new).take(number[number >= 0])
        return Phylogeny(grown, parent, length, tree.source), origin

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The tree as arrays that a file can hold; `from_arrays` reads them."""
        tree = {"tree.parent": self.tree.parent, "tree.length": self.tree.length}
        return known_arrays(self.sequences) | tree

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], source: str) -> Clades:
        """Read what `to_arrays` gave."""
        parent, length = arrays["tree.parent"], arrays["tree.length"]
        return cls(Phylogeny(known_sequences(arrays), parent, length, source))


def known_arrays(sequences: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Sequences as arrays that a file can hold; `known_sequences` reads them."""
    packed = Texts.of(sequences).packed()
    return {"known.bases": packed.buffer, "known.stops": packed.stops}


def known_sequences(arrays: Mapping[str, NDArray[Any]]) -> Texts:
    """The sequences that a model's file holds."""
    stops = arrays["known.stops"]
    return Texts(arrays["known.bases"], np.concatenate(([0], stops[:-1])).astype(np.int64), stops)


@dataclass(frozen=True, eq=False)
class TreeSplit:
    """A tree's ASVs: those that are known, and those that are left out to be placed.

    Attributes:
        clades: of the known ones.
        unseen: sequences of the others.
        truth: where the others join.
    """

    clades: Clades
    unseen: Texts
    truth: Grafts


def split_tree(tree: Phylogeny, known: NDArray[np.bool_]) -> TreeSplit:
    """The clades of a tree's known tips ``(tips,)``, and where its other tips join.

    Tips are named by their sequences.
    """
    unseen = np.flatnonzero(~known)
    truth = true_grafts(tree, known, unseen)
    return TreeSplit(Clades(tree.shear(known)), Texts.of(tree.tip_names).take(unseen), truth)


def true_grafts(tree: Phylogeny, kept: NDArray[np.bool_], tips: NDArray[np.int64]) -> Grafts:
    """Where tips ``(n,)`` of a tree join what is left of it when only ``kept`` ``(tips,)`` are."""
    runs = tree.runs(kept)
    # The lowest node above each tip that has kept tips below.
    at, own = tree.tip_nodes[tips], np.zeros(len(tips))
    while (lost := runs.of_node[at] < 0).any():
        own += np.where(lost, tree.length[at], 0.0)
        at = np.where(lost, tree.parent[at], at)
    node = runs.of_node[at]
    before = np.concatenate(([0.0], np.cumsum(tree.length[runs.nodes])))
    stop = np.append(runs.start[1:], len(runs.nodes))[node]
    return Grafts(node, before[stop] - before[np.searchsorted(runs.nodes, at)], own)


def places_by_tree(tree: Phylogeny, clades: Clades, sequences: Texts) -> Grafts | None:
    """Where a whole tree says that sequences join the tree of some clades.

    Args:
        tree: tips are named by sequences, in upper or lower case.
        clades: of some of its tips.
        sequences: n other tips.

    Returns:
        None where the clades are not those of this tree, or a sequence is not in it.
    """
    names = Texts.of(tree.tip_names).upper()
    known, tips = match_names(clades.sequences, names), match_names(sequences, names)
    if (known < 0).any() or (tips < 0).any() or (np.diff(known) < 0).any():
        return None
    kept = np.zeros(len(names), dtype=bool)
    kept[known] = True
    sheared, own = tree.shear(kept), clades.tree
    if not np.array_equal(sheared.parent, own.parent):
        return None
    return true_grafts(tree, kept, tips) if np.allclose(sheared.length, own.length) else None


def levels_of(parent: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Numbers 0, 1, ... by how many are above each one, fewest first.

    Args:
        parent: ``(n,)`` what is directly above, a greater number; -1: nothing.
    """
    depth = sums_to_root(parent, np.ones(len(parent))).astype(np.int64) - 1
    order = np.argsort(depth, kind="stable")
    return np.split(order, np.cumsum(np.bincount(depth))[:-1]) if len(parent) else []


def sums_to_root(parent: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of the values of each node and all above it."""
    sums, up = values.copy(), parent.copy()
    while (going := up >= 0).any():  # twice as far each time
        above = np.where(going, up, 0)
        sums, up = sums + np.where(going, sums[above], 0.0), np.where(going, up[above], -1)
    return sums
