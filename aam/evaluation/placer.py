"""Where ASVs join the tree that a pretrained model knows, and the distances that follow.

A known ASV is its own tip. For a new one two opinions about its clades are added as logits: the
network's, which sees it in the coordinates of its nearest known ASV, and the vote of its nearest
ones. The best path from the root is decoded from the sum; where the ASV leaves it, and what length
is its own, `aam.data.placement` says. Reverse complements and sequences of another region are
recognised, and not placed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from aam.data.clades import Clades, Grafts, levels_of
from aam.data.embedding import Embedding
from aam.data.neighbours import Found, Neighbours
from aam.data.placement import Law, Placement
from aam.data.sequences import MASK, START, tokenize
from aam.data.table import FeatureTable
from aam.data.texts import Texts, match_names
from aam.data.tree import Phylogeny
from aam.data.unifrac import UniFrac
from aam.errors import InputError, name_some
from aam.evaluation.outputs import in_chunks
from aam.learning.model_file import SavedModel
from aam.model import PretrainedModel
from aam_kernels import Ragged

if TYPE_CHECKING:
    import pandas as pd

WEIGHT = "placing.network_weight"  # among a model's arrays
CLIP = 5.0  # largest network logit: where it is surer than that it has not been tested
LEAST_VOTE = 0.03  # probability of a clade for which no neighbour votes
ASVS_AT_ONCE = 512  # sequences encoded at once
LOGITS_AT_ONCE = 1 << 21  # numbers: bounds memory, not the result
MOST_DENSE = 32_768  # clades; of more, only those of an ASV's candidates are looked at


@dataclass(frozen=True, eq=False)
class Placed:
    """Where n ASVs join the tree."""

    grafts: Grafts  # (n,) places; a known ASV is at the end of its own tip
    known: np.ndarray  # (n,) int64, the known ASV that each equals; -1: it is new
    clade: np.ndarray  # (n,) int64, the smallest clade of each; -1: none
    nearest: np.ndarray  # (n,) int64, the nearest known ASV
    distance: np.ndarray  # (n,) float64, its distance in edits
    support: np.ndarray  # (n,) mean probability of the clades on the path; 1 for known ones
    reverse: np.ndarray  # (n,) bool, reverse complements
    foreign: np.ndarray  # (n,) bool, of another region

    @property
    def usable(self) -> np.ndarray:
        """``(n,)`` bool, whether an ASV has a place."""
        return ~(self.reverse | self.foreign)


class Placer:
    """Places ASVs on the tree of a pretrained model; without one as their nearest known ones."""

    network_weight = 1.0

    def __init__(
        self, model: PretrainedModel | None, placement: Placement, neighbours: Neighbours
    ) -> None:
        """`neighbours` is the index of the known ASVs."""
        self.model, self.placement, self.clades = model, placement, placement.clades
        self.neighbours = neighbours

    @classmethod
    def of(cls, saved: SavedModel, model: PretrainedModel) -> Placer:
        """The placer of a saved model, which a tree must have taught."""
        if model.clades is None:
            raise InputError(
                f"{saved.path}: knows no clades: distances taught it; pretrain with --tree"
            )
        clades = Clades.from_arrays(saved.arrays, str(saved.path))
        placement = Placement(clades, Law.from_arrays(saved.arrays))
        placer = cls(model, placement, Neighbours(clades.sequences))
        placer.network_weight = float(saved.arrays[WEIGHT].item())
        return placer

    def nearest_neighbour(self) -> Placer:
        """The baseline: a new ASV gets the clades of its nearest known one."""
        return Placer(None, self.placement, self.neighbours)

    def find(self, sequences: Sequence[str]) -> tuple[np.ndarray, Found]:
        """The known ASV that each sequence equals (-1: none), and the neighbours of the others."""
        texts = Texts.of(sequences)
        known = match_names(texts, self.clades.sequences)
        return known, self.neighbours.find(texts.take(known < 0))

    def vectors(self, sequences: Sequence[str], known: np.ndarray, near: Found) -> np.ndarray:
        """Vectors (n, dim) float32 of n sequences of which `find` gave the rest.

        New ones are seen in the coordinates of their nearest known ones.
        """
        assert self.model is not None
        shape, texts = self.model.encoder.shape, Texts.of(sequences)
        found = np.empty((len(known), shape.embedding_dim), dtype=np.float32)
        for part in in_chunks(np.flatnonzero(known >= 0), ASVS_AT_ONCE):
            found[part] = self._encode(tokenize(texts.take(part), shape.max_bp))
        place = np.cumsum(known < 0) - 1  # among the new ones
        for part in in_chunks(np.flatnonzero(known < 0), ASVS_AT_ONCE):
            found[part] = self._encode(self._aligned(near.take(place[part])))
        return found

    def _aligned(self, near: Found) -> Ragged:
        """Tokens of new ASVs in the coordinates of their nearest known ones, cut as in training."""
        assert self.model is not None
        most = self.model.encoder.shape.max_bp
        bases = near.aligned[:, :most]  # A 1 to T 4; 0 where a sequence has no base
        lengths = np.minimum(self.neighbours.lengths[near.index[:, 0]], most)
        tokens = np.full((len(bases), bases.shape[1] + 1), START, dtype=np.uint8)
        tokens[:, 1:] = np.where(bases == 0, MASK, bases)
        return Ragged.from_padded(torch.from_numpy(tokens), torch.from_numpy(lengths + 1))

    @torch.no_grad()
    def _encode(self, tokens: Ragged) -> np.ndarray:
        assert self.model is not None
        self.model.eval()
        device = next(self.model.parameters()).device
        return self.model.encoder(tokens.to(device)).vectors.cpu().numpy()

    def place(
        self, sequences: Sequence[str], found: tuple[np.ndarray, Found] | None = None
    ) -> Placed:
        """Places of DNA in upper case; `found` is what `find` gave, where it is known already."""
        known, near = found or self.find(sequences)
        count, new, tips = len(known), known < 0, self.clades.tree.tip_nodes[known]
        places = Grafts(tips, self.clades.tree.length[tips], np.zeros(count))
        placed = Placed(
            places, known, self.clades.lowest[known], known.copy(), np.zeros(count),
            np.ones(count), np.zeros(count, dtype=bool), np.zeros(count, dtype=bool),
        )  # fmt: skip
        grafts, placed.clade[new], placed.support[new] = self.place_new(near)
        for values, own in zip(places, grafts, strict=True):
            values[new] = own
        placed.nearest[new], placed.distance[new] = near.index[:, 0], near.distance[:, 0]
        placed.reverse[new], placed.foreign[new] = near.reverse, near.foreign
        return placed

    def place_new(self, near: Found) -> tuple[Grafts, np.ndarray, np.ndarray]:
        """Places of new ASVs, the smallest clade of each (-1: none), and the path's support."""
        count, clades = len(near.index), self.clades
        if self.model is None:
            lowest = np.append(clades.lowest, -1)[near.index[:, 0]]
            return self.placement.copied(near), lowest, np.ones(count)
        lowest, support = np.full(count, -1), np.ones(count)
        grafts = Grafts(np.zeros(count, np.int64), np.zeros(count), np.zeros(count))
        for part in self.parts(count):
            some = near.take(part)
            chosen = np.arange(len(clades))
            if len(clades) > MOST_DENSE:
                chosen = clades.on_paths(np.unique(some.index[some.index >= 0]))
            column = np.full(len(clades) + 1, -1)  # of each clade; the last one: of none
            column[chosen] = np.arange(len(chosen))
            logits = self.logits(some, chosen)
            best, support[part] = best_path(column[clades.parent[chosen]], logits)
            lowest[part] = np.append(chosen, -1)[best]
            sure = 1 / (1 + np.exp(-logits))
            own = self.placement.grafts(some, lowest[part], sure, column[:-1])
            for values, placed in zip(grafts, own, strict=True):
                values[part] = placed
        return grafts, lowest, support

    def parts(self, count: int) -> list[slice]:
        """ASVs whose logits are held at once."""
        size = max(1, LOGITS_AT_ONCE // max(1, min(len(self.clades), MOST_DENSE)))
        return [slice(low, low + size) for low in range(0, count, size)]

    def logits(self, near: Found, clades: np.ndarray) -> np.ndarray:
        """Sum of both opinions of new ASVs on some clades: (asvs, clades) float32."""
        votes = self.placement.vote(near, clades)
        np.clip(votes, LEAST_VOTE, 1 - LEAST_VOTE, out=votes)
        logits = np.log(votes / (1 - votes))
        if self.network_weight:
            logits += self.network_weight * self.network_logits(near, clades).clip(-CLIP, CLIP)
        return logits

    @torch.no_grad()
    def network_logits(self, near: Found, clades: np.ndarray | None = None) -> np.ndarray:
        """The network's opinion of new ASVs on all clades, or some: (asvs, clades) float32."""
        assert self.model is not None and self.model.clades is not None
        device = self.model.clades.weight.device
        vectors = torch.from_numpy(self._encode(self._aligned(near))).to(device)
        chosen = None if clades is None else torch.from_numpy(clades).to(device)
        return self.model.clades(vectors, chosen).cpu().numpy()


def best_path(parent: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The path from the root with the largest sum of logits (asvs, clades).

    Returns its last clade (asvs,), -1 where the root alone is best, and the mean probability along
    it (asvs,). `parent` (clades,) is the clade that holds each, -1: none.
    """
    if not logits.size:
        return np.full(len(logits), -1), np.ones(len(logits))
    sums, sure = logits.copy(), 1 / (1 + np.exp(-logits))
    depth = np.ones(logits.shape[1])
    for level, own in enumerate(levels_of(parent)[1:], start=2):
        depth[own] = level
        sums[:, own] += sums[:, parent[own]]
        sure[:, own] += sure[:, parent[own]]
    rows, best = np.arange(len(logits)), sums.argmax(axis=1)
    found = sums[rows, best] > 0
    return np.where(found, best, -1), np.where(found, sure[rows, best] / depth[best], 1.0)


def grafted_tree(
    clades: Clades, placed: Placed, sequences: Sequence[str]
) -> tuple[Phylogeny, np.ndarray]:
    """The model's tree with all new ASVs that have a place on it; see `Clades.graft`."""
    new = (placed.known < 0) & placed.usable
    return clades.graft(placed.grafts.take(new), Texts.of(sequences).take(new))


def sample_vectors(
    placer: Placer, table: FeatureTable, placed: Placed, embedding: Embedding, dimensions: int
) -> pd.DataFrame:
    """A row a sample: ``faith_pd``, and ``e0``, ... of a number of dimensions."""
    import pandas as pd

    grafted = grafted_tree(placer.clades, placed, table.feature_ids)
    vectors, faith = embedding.vectors(table, placer.clades, grafted, dimensions)
    frame = pd.DataFrame(vectors, pd.Index(table.sample_ids, name="sample-id")).add_prefix("e")
    frame.insert(0, "faith_pd", faith)
    return frame


def unifrac_by_model(table: FeatureTable, clades: Clades, placed: Placed) -> UniFrac:
    """UniFrac of a table whose features were placed; those without a place are left out."""
    require_places(table, placed)
    tree = grafted_tree(clades, placed, table.feature_ids)[0]
    return UniFrac(table, tree, drop_missing=not placed.usable.all())


def require_places(table: FeatureTable, placed: Placed) -> None:
    """Refuse a table that has nothing, or a sample nothing, near what the model knows."""
    if not placed.usable.any():
        reason = "they are of another region or were read in another way"
        if placed.reverse.mean() > 0.5:
            reason = "they are reverse complements: turn the sequences round"
        raise InputError(
            f"{table.source}: none of its {len(table.feature_ids)} features is near an ASV that "
            f"the model knows; probably {reason}"
        )
    empty = np.flatnonzero(np.asarray(table.counts @ placed.usable.astype(np.int64)) == 0)
    if len(empty):
        names = name_some([table.sample_ids[row] for row in empty[:4]])
        raise InputError(
            f"{table.source}: {len(empty)} of {len(table.sample_ids)} samples ({names}) have no "
            "ASV near one that the model knows: remove them from the table"
        )
