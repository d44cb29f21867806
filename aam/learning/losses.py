"""The losses of samples, each as the sum over a share of them of what makes up the whole.

A step may be computed in micro-batches and by several processes: every loss here takes the outputs
of all the step's samples and the samples `first` to `last` that it is to answer for, and the shares
of all samples add up to the loss of the step. Distances answer for the pairs of their samples with
themselves and with all later ones. The loss of clades is a plain sum over ASVs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aam.config import TargetOptions
from aam.data.clades import Clades
from aam.data.table_distances import PrecomputedDistances, TableDistances
from aam.model import CladeHead, FreeClades
from aam_kernels import Ragged

Terms = dict[str, Tensor]
Drawn = tuple[Tensor, Tensor]  # clades (m,) int64 that stand for all, and their weights (m,)
BLOCK_NUMBERS = 1 << 23  # differences of embeddings held at once: bounds memory, not the result


class DistanceLoss:
    """Mean over all pairs i < j of (predicted - true distance)^2, in units of the distances."""

    WEIGHT = 10.0  # of squared errors of about 0.1, beside losses of about 1

    def __init__(self, source: TableDistances | PrecomputedDistances) -> None:
        self.source = source

    def share(
        self, pairs: FreeClades, profiles: Tensor, rows: Tensor, first: int, last: int
    ) -> Terms:
        """Share of samples `first` to `last` in the loss, and in the mean absolute error.

        `profiles` (n, width) are of all samples of the step, rows (n,) int64 of the dataset.
        """
        numbers = rows.cpu().numpy()
        predicted = pairs.distances(profiles[first:last], profiles[first:])
        true = self.source.cross(numbers[first:last], numbers[first:])
        error = (predicted - torch.as_tensor(true).to(predicted)).triu(1)
        all_pairs = max(1, len(profiles) * (len(profiles) - 1) // 2)
        return {
            "unifrac_loss": self.WEIGHT * (error / pairs.unit).square().sum() / all_pairs,
            "distance_mae": error.detach().abs().sum() / all_pairs,
        }


class CladeLoss:
    """Length-weighted cross-entropy of the memberships of ASVs in the clades of a tree.

    0.1 times the mean over ASVs of sum_k w_k BCE(x_tk, y_tk), w_k = min(l_k / mean l, 5). Up to
    ``SAMPLED_ABOVE`` clades all are summed. Above, those on the paths of the step's ASVs and
    their sisters are, and of the rest a sample, drawn in proportion to w_k and weighted so that
    its expectation is their sum. Row t of the dataset is the ASV of tip t of the clades' tree.
    """

    WEIGHT = 0.1
    SAMPLED_ABOVE = 32_768
    SAMPLED = 4_096  # clades drawn beside the paths

    def __init__(self, clades: Clades) -> None:
        self.clades = clades
        self.start, self.stop = torch.from_numpy(clades.start), torch.from_numpy(clades.stop)
        self.weight = torch.from_numpy(clades.weight).float()
        self.samples = len(clades) > self.SAMPLED_ABOVE
        self._cumulated = np.cumsum(clades.weight)

    def draw(self, rows: Tensor) -> Drawn | None:
        """Clades for a step of these ASVs, from torch's default generator; None: all clades."""
        if not self.samples:
            return None
        near = self.clades.near(rows.cpu().numpy())
        chance = torch.rand(self.SAMPLED, dtype=torch.float64).numpy() * self._cumulated[-1]
        drawn = np.minimum(np.searchsorted(self._cumulated, chance), len(self.clades) - 1)
        # Drawn of all: those that are near are there already, so the rest stands for the rest.
        drawn = drawn[~np.isin(drawn, near)]
        each = self._cumulated[-1] / self.SAMPLED
        chosen = torch.from_numpy(np.concatenate([near, drawn]))
        weights = torch.cat([self.weight[chosen[: len(near)]], torch.full((len(drawn),), each)])
        return chosen.to(rows.device), weights.to(rows.device)

    def members(self, rows: Tensor, clades: Tensor | None) -> Tensor:
        """Memberships (asvs, clades) bool of known ASVs in all clades, or in some (m,)."""
        start, stop = self.start.to(rows.device), self.stop.to(rows.device)
        if clades is not None:
            start, stop = start[clades], stop[clades]
        return (rows[:, None] >= start) & (rows[:, None] < stop)

    def share(
        self, head: CladeHead, vectors: Tensor, rows: Tensor, total: int, drawn: Drawn | None
    ) -> Terms:
        """Share of ASVs `rows` (n,) with vectors (n, dim) in the loss of the step's `total`."""
        clades, weights = (None, self.weight.to(rows.device)) if drawn is None else drawn
        logits = head(vectors, clades)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()  # sums of many terms
        true = self.members(rows, clades).to(logits.dtype)
        each = F.binary_cross_entropy_with_logits(logits, true, weight=weights, reduction="sum")
        return {"clade_loss": each * (self.WEIGHT / total)}


class TargetLoss:
    """The loss of predictions (samples, outputs) against targets (samples,)."""

    def __init__(
        self, options: TargetOptions, class_weights: Tensor | None, is_classification: bool
    ) -> None:
        """Cross-entropy of class codes, weighted by (classes,), or the options' loss of numbers."""
        self.options, self.class_weights = options, class_weights
        self.is_classification = is_classification

    def __call__(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Weighted mean over the samples."""
        return self.share(predicted, true, 0, len(true))["target_loss"]

    def share(self, predicted: Tensor, true: Tensor, first: int, last: int) -> Terms:
        """Share of the weighted mean; arguments as in `DistanceLoss.share`."""
        weights = torch.ones(len(true), device=true.device)
        if self.class_weights is not None:
            weights = self.class_weights.to(true.device)[true]
        own = slice(first, last)
        losses = self.each(predicted[own], true[own]) * weights[own]
        return {"target_loss": losses.sum() / weights.sum()}

    def each(self, predicted: Tensor, true: Tensor) -> Tensor:
        """(samples,) loss of each sample."""
        if self.is_classification:
            return F.cross_entropy(predicted, true, reduction="none")
        error, level = true - predicted[:, 0], self.options.quantile
        match self.options.target_loss:
            case "smooth-l1":
                return F.smooth_l1_loss(predicted[:, 0], true, reduction="none")
            case "mse":
                return error.square()
            case "mae":
                return error.abs()
            case "quantile":
                return torch.maximum(level * error, (level - 1) * error)
        return torch.where(error > 0, level, 1 - level) * error.square()


def count_divergence(logits: Tensor, counts: Tensor, slots: Ragged) -> Tensor:
    """KL(true || predicted) relative abundances of each sample, (samples,), in nats.

    It has the same scale whatever the depth of sequencing and the transform of the target.
    """
    lengths = slots.lengths

    def reduce(values: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(values, how, lengths=lengths, unsafe=True)

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(lengths.long())

    logits = logits.float() if logits.dtype != torch.float64 else logits
    share = counts / spread(reduce(counts, "sum"))
    centred = logits - spread(reduce(logits.detach(), "max"))
    log_predicted = centred - spread(reduce(centred.exp(), "sum").log())
    return reduce(share * (share.log() - log_predicted), "sum")


def blocks(samples: int, width: int, least: int = 1) -> list[tuple[int, int]]:
    """At least `least` ranges of samples whose differences with all others are held at once."""
    rows = max(1, min(BLOCK_NUMBERS // max(1, samples * width), math.ceil(samples / least)))
    return [(first, min(samples, first + rows)) for first in range(0, samples, rows)]
