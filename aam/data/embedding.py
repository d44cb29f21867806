"""One vector a sample, whose products are the lengths that samples share.

With A_ik the share of branch k that sample i holds, z_i = [sqrt(l_k) A_ik over the inner branches;
sqrt(own length) of each pendant branch] has z_i . z_j = S_ij, the length that both hold, and
|z_i|^2 = Faith PD; unweighted UniFrac is 1 - S_ij / (PD_i + PD_j - S_ij). Short vectors keep the
products nearly: the inner branches are projected onto the leading directions of communities of
known ASVs, the pendants are added up with signs at hashed places (a count sketch, Charikar et
al. 2002). Faith PD stands beside them as a number of its own, which no projection keeps well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
    """Directions that inner branches are projected onto."""

    directions: np.ndarray  # (directions, inner branches) float32, orthonormal

    @property
    def most(self) -> int:
        """Numbers of the longest vector."""
        return 2 * len(self.directions)

    @classmethod
    def fit(cls, clades: Clades, communities: csr_array, seed: int) -> Embedding:
        """Leading directions of communities ``(n, known ASVs)`` of reads; n may be 0."""
        from sklearn.utils.extmath import randomized_svd

        generator = np.random.default_rng(seed)
        count, tips = communities.shape
        chosen = communities[np.sort(generator.permutation(count)[:COMMUNITIES])]
        sets, size = max(0, LEAST_COMMUNITIES - count), min(RANDOM_ASVS, tips)
        drawn = [np.sort(generator.choice(tips, size, replace=False)) for _ in range(sets)]
        indices = np.array(drawn, dtype=np.int64).ravel()
        starts = np.arange(sets + 1) * size
        random = csr_array((np.ones(len(indices)), indices, starts), (sets, tips))
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

    def vectors(
        self,
        table: FeatureTable,
        clades: Clades,  # of the known ASVs
        grafted: tuple[
            Phylogeny, np.ndarray
        ],  # with the table's new ASVs, as `Clades.graft` has it
        dimensions: int,  # 1 to `most`
    ) -> tuple[np.ndarray, np.ndarray]:
        """Vectors ``(samples, dimensions)`` float32 of a table, and Faith PD ``(samples,)``."""
        tree, origin = grafted
        tip_of_column = match_names(table.feature_ids, tree.tip_names)
        walk, directions = TreeWalk(tree), self.directions[: dimensions // 2]
        inner, scale = _inner(clades)
        column = np.full(len(clades.tree) + 1, len(inner))  # a last one of zeros: no inner branch
        column[inner] = np.arange(len(inner))
        by_column = np.pad(directions.T * scale[:, None], ((0, 1), (0, 0)))
        project = by_column[column[origin]]
        sketch = _sketch(tree, clades, origin, dimensions - len(directions))
        vectors, faith = np.empty((len(table.sample_ids), dimensions), dtype=np.float32), []
        for low in range(0, len(vectors), _ROWS):
            reached = walk.branches(table.counts[low : low + _ROWS], tip_of_column)
            vectors[low : low + _ROWS, : len(directions)] = reached @ project
            vectors[low : low + _ROWS, len(directions) :] = (reached @ sketch).toarray()
            faith.append(reached.sum(axis=1))
        return vectors, np.concatenate(faith)


def _inner(clades: Clades) -> tuple[np.ndarray, np.ndarray]:
    """The known tree's inner branches, and what makes a length held of each a coordinate."""
    tree = clades.tree
    inner = np.flatnonzero((tree.tip_stop - tree.tip_start > 1) & (tree.length > 0))
    return inner, (1 / np.sqrt(tree.length[inner])).astype(np.float32)


def _sketch(tree: Phylogeny, clades: Clades, origin: np.ndarray, width: int) -> csr_array:
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
    place = ((name[held] >> np.uint64(1)) % np.uint64(width)).astype(np.int64)
    sign = np.where(name[held] & np.uint64(1), 1.0, -1.0)
    return csr_array((sign / np.sqrt(whole[held]), (held, place)), shape=(len(origin), width))
