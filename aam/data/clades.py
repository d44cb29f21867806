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
from typing import Any, NamedTuple

import numpy as np

from aam.data.texts import Texts, match_names
from aam.data.tree import Phylogeny

LEAST_LENGTH = 1e-5
"""Branches that are not longer are no clade: their members are those of the branch above."""

MOST_CLADES = 131_072
"""Of more branches those with most members are clades: a head of all would fill the memory, and
within small ones the nearest known ASV says as much."""

LONGEST_WEIGHT = 5.0  # most that one clade counts in the loss, in mean lengths


class Grafts(NamedTuple):
    """Where n new ASVs join the tree."""

    node: np.ndarray  # (n,) int64, whose branch each joins
    shared: np.ndarray  # (n,) float64, how much of that branch it shares, from the top
    own: np.ndarray  # (n,) float64, the length that is its own

    def take(self, index: np.ndarray) -> Grafts:
        """Some of them, by numbers or a mask."""
        return Grafts(*(values[index] for values in self))


class Clades:
    """A tree sheared to the known ASVs, which name its tips, and its clades."""

    def __init__(self, tree: Phylogeny) -> None:
        self.tree, self.sequences = tree, Texts.of(tree.tip_names)
        size = tree.tip_stop - tree.tip_start
        is_clade = (size > 1) & (size < len(tree.tip_names)) & (tree.length > LEAST_LENGTH)
        nodes = np.flatnonzero(is_clade)
        if len(nodes) > MOST_CLADES:
            nodes = np.sort(nodes[np.argsort(-size[nodes], kind="stable")[:MOST_CLADES]])
        # (clades,) node of each in the tree, ascending: members before their holders.
        self.nodes, self.length = nodes, tree.length[nodes]
        # (clades,) first tip below each, and the one after the last.
        self.start, self.stop = tree.tip_start[nodes], tree.tip_stop[nodes]
        # (clades,) weight in the loss: length over the mean, at most 5.
        mean = self.length.sum() / max(len(nodes), 1)
        self.weight = np.minimum(self.length / max(mean, LEAST_LENGTH), LONGEST_WEIGHT)
        clade, at = np.full(len(tree), -1), np.arange(len(tree))
        clade[nodes] = np.arange(len(nodes))
        up = np.where((clade >= 0) | (tree.parent < 0), at, tree.parent)  # these lead to themselves
        while not np.array_equal(further := up[up], up):  # twice as far each time
            up = further
        # The smallest clade that each node is or lies in, and that holds each clade and each known
        # ASV; -1: none.
        self.clade_of_node = clade[up]
        self.parent = self.clade_of_node[tree.parent[nodes]]
        self.lowest = self.clade_of_node[tree.parent[tree.tip_nodes]]
        # (known ASVs,) length above each that it shares with no other.
        self.pendant = tree.length[tree.tip_nodes]
        # (nodes,) distance to the root, and length of clades from there to the node's lower end.
        self.root_distance = sums_to_root(tree.parent, tree.length)
        self.depth = sums_to_root(tree.parent, np.where(clade >= 0, tree.length, 0.0))

    def __len__(self) -> int:
        return len(self.nodes)

    def on_paths(self, tips: np.ndarray) -> np.ndarray:
        """The clades of any of some known ASVs ``(n,)``, ascending."""
        on_path = np.zeros(len(self), dtype=bool)
        at = np.unique(self.lowest[tips])
        while len(at := at[at >= 0]):
            at = at[~on_path[at]]
            on_path[at] = True
            at = np.unique(self.parent[at])
        return np.flatnonzero(on_path)

    def near(self, tips: np.ndarray) -> np.ndarray:
        """The clades of some known ASVs ``(n,)`` and the sisters of these clades, ascending."""
        holders = np.append(self.on_paths(tips), -1)  # -1 holds the outermost ones
        return np.flatnonzero(np.isin(self.parent, holders))

    def members(self, lowest: np.ndarray) -> np.ndarray:
        """``(n, clades)`` whether ASVs of these smallest clades ``(n,)`` (-1: none) are in each."""
        node = self.node_of(lowest)[:, None]
        return (self.start <= self.tree.tip_start[node]) & (self.stop >= self.tree.tip_stop[node])

    def node_of(self, clade: np.ndarray) -> np.ndarray:
        """``(n,)`` node of each clade ``(n,)``; the root for -1."""
        return np.append(self.nodes, len(self.tree) - 1)[clade]

    def ends(self, clade: np.ndarray) -> Grafts:
        """Places at the lower ends of clades ``(n,)``; the root for -1."""
        node = self.node_of(clade)
        return Grafts(node, self.tree.length[node], np.zeros(len(node)))

    def jaccard(self, one: Grafts, other: Grafts) -> np.ndarray:
        """``(n,)`` length of the clades that both of two places hold, of what either holds.

        Parts of a branch included; 1 where neither holds any.
        """
        tree = self.tree

        def held(grafts: Grafts) -> np.ndarray:
            missing = np.maximum(tree.length[grafts.node] - grafts.shared, 0.0)
            return self.depth[grafts.node] - np.isin(grafts.node, self.nodes) * missing

        # Where the ways meet: the later node, or the lowest above it that holds the earlier one.
        low, meeting = np.minimum(one.node, other.node), np.maximum(one.node, other.node)
        while (outside := tree.tip_start[meeting] > tree.tip_start[low]).any():
            meeting = np.where(outside, tree.parent[meeting], meeting)
        ours, theirs = held(one), held(other)
        # Above that branch all is shared; on it the shorter part.
        shared = np.minimum(np.minimum(ours, theirs), self.depth[meeting])
        whole = ours + theirs - shared
        return np.divide(shared, whole, out=np.ones_like(whole), where=whole > 0)

    def graft(self, grafts: Grafts, names: Sequence[str]) -> tuple[Phylogeny, np.ndarray]:
        """The tree with new ASVs of some names on it, and where its branches come from.

        Each joins a branch at some height, through a node of its own, which cuts the branch. Of
        each new branch ``(nodes,)`` the known one that it is a part of; -1: a new ASV's pendant.
        """
        tree, count = self.tree, len(names)
        shared = np.clip(grafts.shared, 0.0, tree.length[grafts.node])
        order = np.lexsort((-shared, grafts.node))  # on each branch the lowest joins first
        node = grafts.node[order]
        pieces = 1 + np.bincount(node, minlength=len(tree))  # of each old branch
        tip = 2 * np.arange(count) + node + 1  # after the old nodes and joints before it
        total = len(tree) + 2 * count
        is_piece = np.ones(total, dtype=bool)
        is_piece[tip] = False
        piece, branch = np.flatnonzero(is_piece), np.repeat(np.arange(len(tree)), pieces)
        is_old = np.diff(branch, prepend=-1) != 0  # the lowest piece of each branch
        end = np.empty(len(piece))  # how far from the branch's top each piece reaches down
        end[is_old], end[~is_old] = tree.length, shared[order]
        is_top = np.diff(branch, append=len(tree)) != 0
        above = np.where(tree.parent >= 0, piece[is_old][tree.parent], -1)
        parent, length = np.empty(total, dtype=np.int64), np.empty(total)
        parent[piece] = np.where(is_top, above[branch], np.roll(piece, -1))
        length[piece] = end - np.where(is_top, 0.0, np.roll(end, -1))
        parent[tip], length[tip] = tip + 1, grafts.own[order]
        origin, number = np.full((2, total), -1)
        origin[piece] = branch
        number[piece[is_old][tree.tip_nodes]] = np.arange(len(self.sequences))
        number[tip] = len(self.sequences) + order
        grown = self.sequences.joined(Texts.of(list(names))).take(number[number >= 0])
        return Phylogeny(grown, parent, length, tree.source), origin

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The tree as arrays that a file can hold; `from_arrays` reads them."""
        tree = {"tree.parent": self.tree.parent, "tree.length": self.tree.length}
        return known_arrays(self.sequences) | tree

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], source: str) -> Clades:
        """Read what `to_arrays` gave."""
        parent, length = arrays["tree.parent"], arrays["tree.length"]
        return cls(Phylogeny(known_sequences(arrays), parent, length, source))


def known_arrays(sequences: Sequence[str]) -> dict[str, np.ndarray]:
    """Sequences as arrays that a file can hold; `known_sequences` reads them."""
    packed = Texts.of(sequences).packed()
    return {"known.bases": packed.buffer, "known.stops": packed.stops}


def known_sequences(arrays: Mapping[str, Any]) -> Texts:
    """The sequences that a model's file holds."""
    stops = arrays["known.stops"]
    return Texts(arrays["known.bases"], np.append(0, stops[:-1]).astype(np.int64), stops)


class TreeSplit(NamedTuple):
    """A tree's ASVs: those that are known, and those that are left out to be placed."""

    clades: Clades  # of the known ones
    unseen: Texts  # sequences of the others
    truth: Grafts  # where the others join


def split_tree(tree: Phylogeny, known: np.ndarray) -> TreeSplit:
    """The clades of known tips ``(tips,)``, named by sequences, and where the other tips join."""
    unseen = Texts.of(tree.tip_names).take(~known)
    truth = true_grafts(tree, known, np.flatnonzero(~known))
    return TreeSplit(Clades(tree.shear(known)), unseen, truth)


def true_grafts(tree: Phylogeny, kept: np.ndarray, tips: np.ndarray) -> Grafts:
    """Where tips ``(n,)`` of a tree join what is left of it when only ``kept`` ``(tips,)`` are."""
    branch = tree.merged(kept)
    # The lowest node above each tip that has kept tips below.
    at, own = tree.tip_nodes[tips], np.zeros(len(tips))
    while (lost := branch[at] < 0).any():
        own += np.where(lost, tree.length[at], 0.0)
        at = np.where(lost, tree.parent[at], at)
    alive = np.flatnonzero(branch >= 0)
    before = np.append(0.0, np.cumsum(tree.length[alive]))
    stop = np.searchsorted(branch[alive], branch[at], side="right")
    return Grafts(branch[at], before[stop] - before[np.searchsorted(alive, at)], own)


def places_by_tree(tree: Phylogeny, clades: Clades, sequences: Texts) -> Grafts | None:
    """Where a whole tree says that sequences ``(n,)`` join the tree of some clades.

    Its tips are named by sequences, in upper or lower case. None: the clades are not those of this
    tree, or a sequence is not in it.
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


def levels_of(parent: np.ndarray) -> list[np.ndarray]:
    """Clades by how many hold them, outermost first, of the ``(clades,)`` that hold each directly.

    These have greater numbers, and stand a level before; -1: none.
    """
    depth = sums_to_root(parent, np.ones(len(parent))).astype(np.int64) - 1
    order = np.argsort(depth, kind="stable")
    return np.split(order, np.cumsum(np.bincount(depth))[:-1]) if len(parent) else []


def sums_to_root(parent: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sum of the values of each node and all above it."""
    sums, up = values.copy(), parent.copy()
    while (going := up >= 0).any():  # twice as far each time
        above = np.where(going, up, 0)
        sums, up = sums + np.where(going, sums[above], 0.0), np.where(going, up[above], -1)
    return sums
