"""One vector a sample, whose products are the lengths that samples share.

With A_ik the share of branch k that sample i holds, z_i = [sqrt(l_k) A_ik over the inner branches;
sqrt(own length) of each pendant branch] has z_i . z_j = S_ij, the length that both hold, and
|z_i|^2 = Faith PD; unweighted UniFrac is 1 - S_ij / (PD_i + PD_j - S_ij). Short vectors keep the
products nearly: the inner branches are projected onto the leading directions of communities of
known ASVs, the pendants are added up with signs at hashed places (a count sketch, Charikar et
al. 2002). Faith PD stands beside them as a number of its own, which no projection keeps well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array, vstack

from aam.data.clades import Clades
from aam.data.table import FeatureTable
from aam.data.texts import Texts, match_names
from aam.data.tree import Phylogeny
from aam.data.unifrac import TreeWalk

DIRECTIONS = 256  # of the projection; a vector has as many numbers for the pendants
MOST_NUMBERS = 2**25  # of all directions together: of very large trees there are fewer
COMMUNITIES = 1024  # most samples that the directions are fitted to
LEAST_COMMUNITIES = 512  # of fewer samples, random sets of known ASVs stand for the rest
RANDOM_ASVS = 100  # ASVs of such a set
_ROWS = 512  # samples whose vectors are made together


@dataclass(frozen=True, eq=False)
class Embedding:
    """Directions that inner branches are projected onto.

    Attributes:
        directions: ``(directions, inner branches)`` float32, orthonormal.
    """

    directions: NDArray[np.float32]

    @property
    def most(self) -> int:
        """Numbers of the longest vector."""
        return 2 * len(self.directions)

    @classmethod
    def fit(cls, clades: Clades, communities: csr_array, seed: int) -> Embedding:
        """Find the leading directions of communities.

        Args:
            clades: of the known ASVs.
            communities: ``(n, known ASVs)`` reads; n may be 0.
            seed: of what is drawn.
        """
        from sklearn.utils.extmath import randomized_svd

        generator = np.random.default_rng(seed)
        count, tips = communities.shape
        chosen = communities[np.sort(generator.permutation(count)[:COMMUNITIES])]
        sets, size = max(0, LEAST_COMMUNITIES - count), min(RANDOM_ASVS, tips)
        drawn = [np.sort(generator.choice(tips, size, replace=False)) for _ in range(sets)]
        indices = np.array(drawn, dtype=np.int64).ravel()
        random = csr_array(
            (np.ones(len(indices)), indices, np.arange(sets + 1) * size), (sets, tips)
        )
        rows = vstack([chosen, random], format="csr")
        inner, scale = _inner(clades)
        reached = TreeWalk(clades.tree).branches(rows, np.arange(tips))
        held = reached[:, inner].astype(np.float32) @ diags_array(scale)
        used = np.flatnonzero(np.bincount(held.indices, minlength=held.shape[1]))
        most = MOST_NUMBERS // max(1, len(inner)) + 1
        number = min(DIRECTIONS, most, held.shape[0], len(used))
        directions = np.zeros((number, len(inner)), dtype=np.float32)
        if number:  # a star has no inner branches
            directions[:, used] = randomized_svd(held[:, used], number, random_state=seed)[2]
        return cls(directions)

    def rows(
        self,
        table: FeatureTable,
        clades: Clades,
        grafted: tuple[Phylogeny, NDArray[np.int64]],
        dimensions: int,
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float64]]]:
        """Vectors and Faith PD of a table's samples, some samples at a time.

        Args:
            table: the samples.
            clades: of the known ASVs.
            grafted: their tree with the table's new ASVs, and where its branches come from.
            dimensions: numbers of a vector, at most ``most``.
        """
        tree, origin = grafted
        tip_of_column = match_names(table.feature_ids, tree.tip_names)
        walk, directions = TreeWalk(tree), self.directions[: dimensions // 2]
        project = _projection(clades, origin, directions)
        sketch = _sketch(tree, clades, origin, dimensions - len(directions))
        for low in range(0, len(table.sample_ids), _ROWS):
            reached = walk.branches(table.counts[low : low + _ROWS], tip_of_column)
            vectors = np.concatenate([reached @ project, (reached @ sketch).toarray()], axis=1)
            yield vectors.astype(np.float32), reached.sum(axis=1)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """As a file can hold it; `from_arrays` reads it."""
        return {"embedding.directions": self.directions}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Embedding:
        """Read what `to_arrays` gave."""
        return cls(arrays["embedding.directions"])


def _inner(clades: Clades) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The known tree's inner branches, and what makes a length held of each a coordinate."""
    tree = clades.tree
    inner = np.flatnonzero((tree.tip_stop - tree.tip_start > 1) & (tree.length > 0))
    return inner, (1 / np.sqrt(tree.length[inner])).astype(np.float32)


def _projection(
    clades: Clades, origin: NDArray[np.int64], directions: NDArray[np.float32]
) -> NDArray[np.float32]:
    """``(branches, directions)``: a length held of each branch as numbers of the vector."""
    inner, scale = _inner(clades)
    place = np.full(len(clades.tree) + 1, -1)
    place[inner] = np.arange(len(inner))
    column = place[origin]
    found = np.zeros((len(origin), len(directions)), dtype=np.float32)
    own = column >= 0
    found[own] = directions.T[column[own]] * scale[column[own], None]
    return found


def _sketch(tree: Phylogeny, clades: Clades, origin: NDArray[np.int64], width: int) -> csr_array:
    """``(branches, width)``: a length held of each pendant branch as numbers of the vector."""
    name, whole = np.zeros(len(origin), dtype=np.uint64), np.zeros(len(origin))
    tips = tree.tip_nodes
    name[tips], whole[tips] = Texts.of(tree.tip_names).hashes(), tree.length[tips]
    of_known = np.full(len(clades.tree) + 1, -1)
    of_known[clades.tree.tip_nodes] = np.arange(len(clades.sequences))
    tip = of_known[origin]
    pendant = tip >= 0  # also the upper parts of a known pendant that new ASVs share
    name[pendant] = clades.sequences.hashes()[tip[pendant]]
    whole[pendant] = clades.pendant[tip[pendant]]
    held = np.flatnonzero(((origin < 0) | pendant) & (whole > 0))
    if not width:
        return csr_array((len(origin), 0))
    place = ((name[held] >> np.uint64(1)) % np.uint64(width)).astype(np.int64)
    sign = np.where(name[held] & np.uint64(1), 1.0, -1.0)
    return csr_array((sign / np.sqrt(whole[held]), (held, place)), shape=(len(origin), width))
