"""A phylogeny held as arrays: read from Newick, checked, sheared to the tips of a table."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aam.data.newick import parse_newick
from aam.data.sequences import read_fasta, read_qza_member
from aam.data.texts import Texts
from aam.errors import InputError, name_some


@dataclass(frozen=True, eq=False)
class Phylogeny:
    """A rooted tree in post-order: children before parents, the root last.

    So the tips below node b are tip_start[b] to tip_stop[b] - 1.

    Attributes:
        tip_names: names of the tips, in post-order.
        parent: ``(nodes,)`` int64, post-order number of the parent; -1 for the root.
        length: ``(nodes,)`` float64, length of the branch above the node; 0 for the root.
        source: the file, for messages.
    """

    tip_names: Sequence[str]
    parent: NDArray[np.int64]
    length: NDArray[np.float64]
    source: str

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self.parent)

    @cached_property
    def tip_nodes(self) -> NDArray[np.int64]:
        """``(tips,)`` int64, node of each tip."""
        return np.flatnonzero(np.bincount(self.parent[:-1], minlength=len(self)) == 0)

    @cached_property
    def tip_stop(self) -> NDArray[np.int64]:
        """``(nodes,)`` int64, the tip after the last below each node."""
        return np.cumsum(np.bincount(self.tip_nodes, minlength=len(self)))

    @cached_property
    def tip_start(self) -> NDArray[np.int64]:
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

    def shear(self, kept: NDArray[np.bool_]) -> Phylogeny:
        """The tree of the tips where ``kept`` ``(tips,)`` is true.

        Branches that hold the same kept tips are merged into one of their summed length. The
        root stays where it is, so that distances to the root do not change.
        """
        runs = self.runs(kept)
        parent = self.parent[runs.nodes[np.append(runs.start[1:], len(runs.nodes)) - 1]]
        return Phylogeny(
            Texts.of(self.tip_names).take(kept),
            np.where(parent >= 0, runs.of_node[parent], -1),
            np.add.reduceat(self.length[runs.nodes], runs.start),
            self.source,
        )

    def runs(self, kept: NDArray[np.bool_]) -> Runs:
        """The branches that hold the same kept tips: what `shear` makes one branch of."""
        tips_before = np.concatenate(([0], np.cumsum(kept)))
        start, stop = tips_before[self.tip_start], tips_before[self.tip_stop]
        alive = np.flatnonzero(stop > start)
        if not len(alive):
            raise InputError(f"{self.source}: no tip of the tree is left")
        start, stop = start[alive], stop[alive]
        # A chain of single children is a run of equal tip ranges, lowest branch first.
        opens_run = np.ones(len(alive), dtype=bool)
        opens_run[1:-1] = (start[1:-1] != start[:-2]) | (stop[1:-1] != stop[:-2])
        of_node = np.full(len(self), -1, dtype=np.int64)
        of_node[alive] = np.cumsum(opens_run) - 1
        return Runs(alive, np.flatnonzero(opens_run), of_node)


class Runs(NamedTuple):
    """Branches of a tree that some tips make one.

    Attributes:
        nodes: ``(alive,)`` int64, the nodes with such tips below, in post-order.
        start: ``(runs,)`` int64, where each run begins among them, lowest branch first.
        of_node: ``(nodes,)`` int64, the run of each node of the tree; -1: no such tips below.
    """

    nodes: NDArray[np.int64]
    start: NDArray[np.int64]
    of_node: NDArray[np.int64]


def read_tree(path: str | Path, *, sequences: str | Path | None = None) -> Phylogeny:
    """Read a rooted tree with branch lengths from a Newick file or a QIIME 2 artifact of one.

    Underscores in names are kept, support values and other labels of inner nodes are ignored,
    and so is a length of the root. Depth and number of children are not limited.

    Args:
        path: ``.nwk`` or any other text file, or ``.qza``.
        sequences: FASTA (or ``.qza``) that maps hashed tip names to their sequences, where the
            feature table was read with the same one.

    Raises:
        InputError: no such file, not one Newick tree, branches without a length, with a negative
            or a non-finite one, tips without a name or with the same name.
    """
    path = Path(path)
    text = _read_bytes(path)
    plain = parse_newick(text)
    tree = _read_any(path, text) if plain is None else Phylogeny(*plain, str(path))
    return tree if sequences is None else tree.rename(read_fasta(Path(sequences)))


def _read_bytes(path: Path) -> NDArray[np.uint8]:
    """The text of the tree, memory-mapped where it is a file of its own."""
    try:
        if path.suffix.lower() == ".qza":
            content = read_qza_member(path, "data/tree.nwk", "Phylogeny[Rooted]")
            return np.frombuffer(content, dtype=np.uint8)
        if path.stat().st_size == 0:
            return np.empty(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        raise InputError(f"{path}: cannot read the tree: {error.strerror}") from error


def _read_any(path: Path, content: NDArray[np.uint8]) -> Phylogeny:
    """Read a tree by scikit-bio, node by node, and check it."""
    from skbio import TreeNode
    from skbio.io import NewickFormatError

    try:
        text = content.tobytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not a text file; expected a tree in Newick format (.nwk)"
        ) from error
    if not text.strip():
        raise InputError(f"{path}: the file is empty; expected a tree in Newick format")
    if not text.rstrip().endswith(";"):
        raise InputError(
            f"{path}: no ';' at the end; expected a whole tree in Newick format "
            "(a truncated file must be copied again)"
        )
    try:
        root = TreeNode.read(
            io.StringIO(text), format="newick", verify=False, convert_underscores=False
        )
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
    tree = Phylogeny(
        [node.name or "" for node in nodes if not node.children], parent, length, str(path)
    )
    _check_tips(tree)
    _check_lengths(tree)
    return replace(tree, tip_names=Texts.of(tree.tip_names))


def _check_tips(tree: Phylogeny) -> None:
    times = Counter(tree.tip_names)
    if times[""]:
        raise InputError(
            f"{tree.source}: {times['']} of {len(tree.tip_names)} tips have no name; name every tip"
        )
    repeated = [name for name in times if times[name] > 1]
    if repeated:
        raise InputError(
            f"{tree.source}: {len(repeated)} tip names stand more than once "
            f"({name_some(repeated)}); every tip needs its own name"
        )


def _check_lengths(tree: Phylogeny) -> None:
    for bad, what, remedy in (
        (np.isnan(tree.length), "no branch length", "UniFrac needs a tree with branch lengths"),
        (tree.length < 0, "a negative branch length", "set negative lengths to 0"),
        (np.isinf(tree.length), "an infinite branch length", "correct them"),
    ):
        nodes = np.flatnonzero(bad)
        if len(nodes):
            shown = name_some([_node_name(tree, node) for node in nodes[:4]])
            raise InputError(
                f"{tree.source}: {len(nodes)} of {len(tree) - 1} branches have {what} "
                f"(above {shown}); {remedy}"
            )


def _node_name(tree: Phylogeny, node: int) -> str:
    """A tip's name, or for an inner node the tips at its two ends."""
    start, last = tree.tip_start[node], tree.tip_stop[node] - 1
    first_name, last_name = tree.tip_names[start], tree.tip_names[last]
    return first_name if start == last else f"the ancestor of {first_name} and {last_name}"
