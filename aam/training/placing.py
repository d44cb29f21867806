"""Where ASVs join the tree that a pretrained model knows, and the distances that follow.

A known ASV is its own tip. For a new one two opinions about its clades are added as logits: the
network's, which sees it in the coordinates of its nearest known ASV, and the vote of its nearest
ones. The best path from the root is decoded from the sum; how much of the last branch it shares,
and what length is its own, `Attachment` has learned by leaving known ASVs out. Reverse complements
and sequences of another region are recognised, and not placed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aam.data.attachment import Attachment
from aam.data.clades import Clades, Grafts
from aam.data.neighbours import Found, Neighbours
from aam.data.phylogeny import UniFrac
from aam.data.rows import offsets_of
from aam.data.sequences import MASK, START, tokenize
from aam.data.table import FeatureTable
from aam.data.texts import Texts, match_names
from aam.data.tree import Phylogeny
from aam.errors import InputError
from aam.model import PretrainedModel
from aam.training.checkpoint import SavedModel, read_model
from aam_kernels import Ragged

CLIP = 5.0  # largest network logit: where it is surer than that it has not been tested
LEAST_VOTE = 0.01  # probability of a clade for which no neighbour votes
ASVS_AT_ONCE = 512  # sequences encoded at once
LOGITS_AT_ONCE = 1 << 21  # numbers: bounds memory, not the result


@dataclass(frozen=True, eq=False)
class Placed:
    """Where some ASVs join the tree.

    Attributes:
        grafts: ``(n,)`` places; a known ASV is at the end of its own tip.
        known: ``(n,)`` int64, the known ASV that each equals; -1: it is new.
        nearest: ``(n,)`` int64, the nearest known ASV.
        distance: ``(n,)`` float64, its distance in edits.
        support: ``(n,)`` float64, mean probability of the clades on the path; 1 for known ones.
        reverse: ``(n,)`` bool, reverse complements.
        foreign: ``(n,)`` bool, of another region.
    """

    grafts: Grafts
    known: np.ndarray
    nearest: np.ndarray
    distance: np.ndarray
    support: np.ndarray
    reverse: np.ndarray
    foreign: np.ndarray

    @property
    def usable(self) -> np.ndarray:
        """``(n,)`` bool, whether an ASV has a place."""
        return ~(self.reverse | self.foreign)


class Placer:
    """Places ASVs on the tree of a pretrained model."""

    def __init__(
        self,
        model: PretrainedModel | None,
        clades: Clades,
        attachment: Attachment,
        *,
        neighbours: Neighbours | None = None,
        use_votes: bool = True,
    ) -> None:
        """Set up.

        Args:
            model: with a clade head; None: nearest-neighbour placement, the baseline.
            clades: of the known ASVs.
            attachment: how new ASVs join a branch.
            neighbours: index of the known ASVs, where there is one already.
            use_votes: False: the network alone decides on the clades.
        """
        self.model, self.clades, self.attachment = model, clades, attachment
        self.neighbours = neighbours or Neighbours(clades.sequences)
        self.use_votes = use_votes

    @classmethod
    def of(cls, saved: SavedModel, model: PretrainedModel) -> Placer:
        """The placer of a saved model.

        Raises:
            InputError: no tree has taught it.
        """
        if model.clades is None:
            raise InputError(
                f"{saved.path}: knows no clades: distances taught it; pretrain with --tree"
            )
        clades = Clades.from_arrays(saved.arrays, str(saved.path))
        return cls(model, clades, Attachment.from_arrays(saved.arrays))

    def find(self, sequences: Sequence[str]) -> tuple[np.ndarray, Found]:
        """The known ASV that each sequence equals (-1: none), and the neighbours of the others."""
        texts = Texts.of(sequences)
        known = match_names(texts, self.clades.sequences)
        return known, self.neighbours.find(texts.take(known < 0))

    @torch.no_grad()
    def vectors(self, sequences: Sequence[str], known: np.ndarray, near: Found) -> np.ndarray:
        """Vectors (asvs, dim) float32 of sequences; new ones in the coordinates of their nearest.

        Args:
            sequences: n DNA sequences.
            known: (n,) the known ASV that each equals; -1: none.
            near: neighbours of the others.
        """
        assert self.model is not None
        encoder = self.model.encoder
        found = np.empty((len(known), encoder.shape.embedding_dim), dtype=np.float32)
        own = np.flatnonzero(known >= 0)
        for part in np.array_split(own, len(own) // ASVS_AT_ONCE + 1):
            tokens = tokenize(Texts.of(sequences).take(part), encoder.shape.max_bp)[0]
            found[part] = self._encode(tokens)
        new = np.flatnonzero(known < 0)
        for part in np.array_split(np.arange(len(new)), len(new) // ASVS_AT_ONCE + 1):
            found[new[part]] = self._encode(self._aligned(near, part))
        return found

    def _aligned(self, near: Found, part: Any) -> Ragged:
        """Tokens of some new ASVs in the coordinates of their nearest known ones."""
        assert self.model is not None
        lengths = self.neighbours.lengths[near.index[part, 0]]
        tokens = aligned_tokens(near.aligned[part], lengths)
        return clipped(tokens, self.model.encoder.shape.max_bp)

    @torch.no_grad()
    def _encode(self, tokens: Ragged) -> np.ndarray:
        assert self.model is not None
        self.model.eval()
        device = next(self.model.parameters()).device
        return self.model.encoder(tokens.to(device)).vectors.cpu().numpy()

    def place(
        self, sequences: Sequence[str], found: tuple[np.ndarray, Found] | None = None
    ) -> Placed:
        """Places of sequences.

        Args:
            sequences: n DNA sequences in upper case.
            found: what `find` gave for them, where it is known already.
        """
        known, near = found or self.find(sequences)
        lowest, support = self.decode(near)
        new = self.attachment.grafts(self.clades, lowest, near)
        tips = self.clades.tip_nodes
        is_new = known < 0
        count = len(known)
        node, shared = tips[np.maximum(known, 0)], self.clades.tree.length[tips[np.maximum(known, 0)]]
        own, distance, nearest = np.zeros(count), np.zeros(count), known.copy()
        node[is_new], shared[is_new], own[is_new] = new.node, new.shared, new.own
        nearest[is_new], distance[is_new] = near.index[:, 0], near.distance[:, 0]
        sure, reverse, foreign = np.ones(count), np.zeros(count, bool), np.zeros(count, bool)
        sure[is_new], reverse[is_new], foreign[is_new] = support, near.reverse, near.foreign
        grafts = Grafts(node, shared, own)
        return Placed(grafts, known, nearest, distance, sure, reverse, foreign)

    def decode(self, near: Found) -> tuple[np.ndarray, np.ndarray]:
        """Smallest clade of each new ASV (-1: none), and the mean probability along its path."""
        count = len(near.index)
        if self.model is None:
            nearest = near.index[:, 0]
            return np.where(nearest >= 0, self.clades.lowest[nearest], -1), np.ones(count)
        lowest, support = np.full(count, -1), np.ones(count)
        for part in self.parts(count):
            lowest[part], support[part] = best_path(self.clades, self.logits(near, part))
        return lowest, support

    def parts(self, count: int) -> Iterator[slice]:
        """ASVs whose logits are held at once."""
        size = max(1, LOGITS_AT_ONCE // max(1, len(self.clades)))
        for low in range(0, count, size):
            yield slice(low, low + size)

    def logits(self, near: Found, part: slice) -> np.ndarray:
        """Sum of both opinions as logits, (asvs, clades) float32."""
        logits = self.network_logits(near, part)
        if not self.use_votes:
            return logits
        np.clip(logits, -CLIP, CLIP, out=logits)
        votes = self.votes(near.index[part], near.weights[part])
        np.clip(votes, LEAST_VOTE, 1 - LEAST_VOTE, out=votes)
        logits += np.log(votes / (1 - votes))
        return logits

    @torch.no_grad()
    def network_logits(self, near: Found, part: slice) -> np.ndarray:
        """The network's opinion of some new ASVs, (asvs, clades) float32."""
        assert self.model is not None and self.model.clades is not None
        vectors = torch.from_numpy(self._encode(self._aligned(near, part)))
        head = self.model.clades
        return head(vectors.to(head.weight.device)).cpu().numpy()

    def votes(self, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Share (asvs, clades) float32 of the nearest ASVs' votes for each clade."""
        found = np.zeros((len(index), len(self.clades)), dtype=np.float32)
        for place in range(weights.shape[1]):
            tip = index[:, place]
            lowest = np.where(tip >= 0, self.clades.lowest[tip], -1)
            self.clades.spread(lowest, weights[:, place].astype(np.float32), found)
        return found


def load_placer(run: Path, device: torch.device, *, impl: str = "auto") -> Placer:
    """The placer of a run that a tree has taught.

    Raises:
        InputError: there is no such model.
    """
    saved = read_model(run)
    model = saved.build(impl=impl)
    if not isinstance(model, PretrainedModel):
        raise InputError(f"{run}: is a run of finetune; give the folder of one of pretrain")
    return Placer.of(saved, model.to(device))


def best_path(clades: Clades, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The path from the root with the largest sum of logits: its last clade, and its support.

    Args:
        clades: of a tree.
        logits: (asvs, clades).

    Returns:
        (asvs,) clade, -1 where the root alone is best; (asvs,) mean probability along the path.
    """
    sums, sure = np.zeros_like(logits), 1 / (1 + np.exp(-logits))
    depth = np.zeros(len(clades))
    for level, own in enumerate(clades.levels):
        depth[own] = level + 1
        sums[:, own] = logits[:, own]
        if level:
            above = clades.parent[own]
            sums[:, own] += sums[:, above]
            sure[:, own] += sure[:, above]
    if not logits.size:
        return np.full(len(logits), -1), np.ones(len(logits))
    rows, best = np.arange(len(logits)), sums.argmax(axis=1)
    found = sums[rows, best] > 0
    return np.where(found, best, -1), np.where(found, sure[rows, best] / depth[best], 1.0)


def aligned_tokens(bases: np.ndarray, lengths: np.ndarray) -> Ragged:
    """Tokens of sequences in the coordinates of their nearest known ones.

    Args:
        bases: (n, longest) uint8, A 1 to T 4; 0 where a sequence has no base.
        lengths: (n,) bases of the known ones.
    """
    tokens = np.full((len(bases), bases.shape[1] + 1), START, dtype=np.uint8)
    tokens[:, 1:] = np.where(bases == 0, MASK, bases)
    inside = np.arange(tokens.shape[1]) <= lengths[:, None]
    return Ragged(
        torch.from_numpy(tokens[inside]), offsets_of(lengths + 1), int(lengths.max(initial=0)) + 1
    )


def clipped(tokens: Ragged, max_bp: int) -> Ragged:
    """Rows cut after START and `max_bp` bases, as those of training are."""
    lengths = tokens.lengths.numpy()
    if not len(lengths) or lengths.max() <= max_bp + 1:
        return tokens
    kept = np.minimum(lengths, max_bp + 1)
    padded = tokens.to_padded(0)[:, : max_bp + 1]
    values = padded[torch.arange(max_bp + 1) < torch.from_numpy(kept)[:, None]]
    return Ragged(values, offsets_of(kept), max_bp + 1)


def grafted_tree(
    clades: Clades, placed: Placed, sequences: Sequence[str]
) -> tuple[Phylogeny, np.ndarray]:
    """The model's tree with all new ASVs that have a place on it; see `Clades.graft`."""
    new = (placed.known < 0) & placed.usable
    return clades.graft(placed.grafts.take(new), Texts.of(sequences).take(new))


def unifrac_by_model(table: FeatureTable, clades: Clades, placed: Placed) -> UniFrac:
    """UniFrac of a table whose features were placed; those without a place are left out.

    Raises:
        InputError: nothing of the table, or of a sample, is near what the model knows.
    """
    require_places(table, placed)
    tree = grafted_tree(clades, placed, table.feature_ids)[0]
    return UniFrac(table, tree, drop_missing=not placed.usable.all())


def require_places(table: FeatureTable, placed: Placed) -> None:
    """Refuse a table that has nothing near what the model knows.

    Raises:
        InputError: with the likely reason.
    """
    if not placed.usable.any():
        raise InputError(far_from_model(table, placed))


def far_from_model(table: FeatureTable, placed: Placed) -> str:
    """One line for a table of which nothing has a place, with the likely reason."""
    if placed.reverse.mean() > 0.5:
        reason = "they are reverse complements: turn the sequences round"
    else:
        reason = "they are of another region or were read in another way"
    return (
        f"{table.source}: none of its {len(table.feature_ids)} features is near an ASV that the "
        f"model knows; probably {reason}"
    )
