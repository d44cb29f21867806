"""A phylogeny held as arrays: read from Newick, checked, sheared to the tips of a table."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from aam.data.newick import parse_newick
from aam.data.sequences import read_fasta, read_qza_member
from aam.data.texts import Texts
from aam.errors import InputError, name_some


@dataclass(frozen=True, eq=False)
class Phylogeny:
    """A rooted tree in post-order: children before parents, the root last.

    So the tips below node b are tip_start[b] to tip_stop[b] - 1.
    """

    tip_names: Sequence[str]  # in post-order
    parent: np.ndarray  # (nodes,) int64, number of the parent; -1: the root
    length: np.ndarray  # (nodes,) float64, of the branch above the node; 0 for the root
    source: str  # the file, for messages

    def __len__(self) -> int:
        return len(self.parent)

    @cached_property
    def tip_nodes(self) -> np.ndarray:
        """``(tips,)`` int64, node of each tip."""
        return np.flatnonzero(np.bincount(self.parent[:-1], minlength=len(self)) == 0)

    @cached_property
    def tip_stop(self) -> np.ndarray:
        """``(nodes,)`` int64, the tip after the last below each node."""
        return np.cumsum(np.bincount(self.tip_nodes, minlength=len(self)))

    @cached_property
    def tip_start(self) -> np.ndarray:
        """``(nodes,)`` int64, the first tip below each node."""
        first = np.arange(len(self))
        backwards = first[-2::-1].copy()
        first[self.parent[backwards]] = backwards  # of all children the first is written last
        while not np.array_equal(further := first[first], first):  # twice as far each time
            first = further
        return self.tip_stop[first] - 1

    def rename(self, names: Mapping[str, str]) -> Phylogeny:
        """The same tree with tips named ``names[name]``; what is not in it keeps its name."""
        return replace(self, tip_names=tuple(names.get(name, name) for name in self.tip_names))

    def shear(self, kept: np.ndarray) -> Phylogeny:
        """The tree of the tips where ``kept`` ``(tips,)`` is true.

        Branches that hold the same kept tips are merged into one of their summed length. The
        root stays where it is, so that distances to the root do not change.
        """
        branch = self.merged(kept)
        alive = np.flatnonzero(branch >= 0)
        lowest = np.flatnonzero(np.diff(branch[alive], prepend=-1))
        parent = self.parent[alive[np.append(lowest[1:], len(alive)) - 1]]
        return Phylogeny(
            Texts.of(self.tip_names).take(kept),
            np.where(parent >= 0, branch[parent], -1),
            np.add.reduceat(self.length[alive], lowest),
            self.source,
        )

    def merged(self, kept: np.ndarray) -> np.ndarray:
        """``(nodes,)`` the branch of the sheared tree that each is a part of; -1: of none."""
        tips_before = np.append(0, np.cumsum(kept))
        start, stop = tips_before[self.tip_start], tips_before[self.tip_stop]
        alive = np.flatnonzero(stop > start)
        if not len(alive):
            raise InputError(
                f"{self.source}: no tip of the tree is left; use the tree that was made for these "
                "sequences"
            )
        # Of a chain of single children, lowest first, all hold the same tips.
        is_lowest = np.ones(len(alive), dtype=bool)
        is_lowest[1:-1] = (np.diff(start[alive[:-1]]) != 0) | (np.diff(stop[alive[:-1]]) != 0)
        branch = np.full(len(self), -1)
        branch[alive] = np.cumsum(is_lowest) - 1
        return branch


def read_tree(path: str | Path, *, sequences: str | Path | None = None) -> Phylogeny:
    """Read a rooted tree with branch lengths from Newick, a text file or a ``.qza`` of one.

    Underscores in names are kept, support values and other labels of inner nodes are ignored,
    and so is a length of the root. Depth and number of children are not limited. `sequences` is
    FASTA (or ``.qza``) that maps hashed tip names to their sequences, as those of a table.

    Raises:
        InputError: no such file, not one Newick tree, branches without a length, with a negative
            or a non-finite one, tips without a name or with the same name.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".qza":
            content = read_qza_member(path, "data/tree.nwk", "Phylogeny[Rooted]")
            text = np.frombuffer(content, dtype=np.uint8)
        elif path.stat().st_size == 0:
            text = np.empty(0, dtype=np.uint8)
        else:
            text = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        raise InputError(f"{path}: cannot read the tree: {error.strerror}") from error
    plain = parse_newick(text)
    tree = _read_any(path, text.tobytes()) if plain is None else Phylogeny(*plain, str(path))
    return tree if sequences is None else tree.rename(read_fasta(Path(sequences)))


def _read_any(path: Path, content: bytes) -> Phylogeny:
    """Read a tree by scikit-bio, node by node, and check it."""
    from skbio import TreeNode
    from skbio.io import NewickFormatError

    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        problem = "not a text file; expected a tree in Newick format (.nwk)"
        raise InputError(f"{path}: {problem}") from error
    if not text.strip():
        raise InputError(f"{path}: the file is empty; expected a tree in Newick format")
    if not text.rstrip().endswith(";"):
        raise InputError(
            f"{path}: no ';' at the end; expected a whole tree in Newick format "
            "(a truncated file must be copied again)"
        )
    options = {"format": "newick", "verify": False, "convert_underscores": False}
    try:
        root = TreeNode.read(io.StringIO(text), **options)
    except (NewickFormatError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a tree in Newick format: {reason}") from error
    trees = re.sub(r"'(?:[^']|'')*'|\[[^\]]*\]", "", text).count(";")
    if trees > 1:  # scikit-bio reads the first one
        raise InputError(f"{path}: holds {trees} trees; expected one: keep the one to be used")
    nodes = list(root.postorder(include_self=True))
    number = {id(node): place for place, node in enumerate(nodes)}
    parent = np.array([number.get(id(node.parent), -1) for node in nodes])
    length = np.array([np.nan if node.length is None else node.length for node in nodes])
    length[-1] = 0.0
    names = [node.name or "" for node in nodes if not node.children]
    _check(tree := Phylogeny(names, parent, length, str(path)))
    return replace(tree, tip_names=Texts.of(names))


def _check(tree: Phylogeny) -> None:
    names, times = tree.tip_names, Counter(tree.tip_names)
    if times[""]:
        raise InputError(
            f"{tree.source}: {times['']} of {len(names)} tips have no name; name every tip"
        )
    if repeated := [name for name in times if times[name] > 1]:
        raise InputError(
            f"{tree.source}: {len(repeated)} tip names stand more than once "
            f"({name_some(repeated)}); every tip needs its own name"
        )
    for bad, what, remedy in (
        (np.isnan(tree.length), "no branch length", "UniFrac needs a tree with branch lengths"),
        (tree.length < 0, "a negative branch length", "set negative lengths to 0"),
        (np.isinf(tree.length), "an infinite branch length", "correct them"),
    ):
        nodes = np.flatnonzero(bad)
        ends = [(names[tree.tip_start[one]], names[tree.tip_stop[one] - 1]) for one in nodes[:4]]
        above = [a if a == b else f"the ancestor of {a} and {b}" for a, b in ends]
        if len(nodes):
            raise InputError(
                f"{tree.source}: {len(nodes)} of {len(tree) - 1} branches have {what} "
                f"(above {name_some(above)}); {remedy}"
            )
