"""The losses of samples, each as the sum over a share of them of what makes up the whole.

A step may be computed in pieces and by several processes: every loss here takes the outputs of
all the step's samples and the samples `first` to `last` that it is to answer for, and the shares
of all samples add up to the loss of the step. Distances answer for the pairs of their samples
with themselves and with all later ones.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor

from aam.config import TargetOptions
from aam.data.dataset import Batch
from aam.data.phylogeny import UniFrac
from aam.model import CommunityEncoder
from aam.training.mixtures import spread
from aam_kernels import Ragged

Terms = dict[str, Tensor]
BLOCK_NUMBERS = 1 << 23  # differences of embeddings held at once: bounds memory, not the result


class DistanceSource(Protocol):
    """True distances between rows of the dataset."""

    def pairwise(self, rows: np.ndarray) -> np.ndarray:
        """(n, n) distances of these rows."""
        ...

    def cross(self, rows_a: np.ndarray, rows_b: np.ndarray) -> np.ndarray:
        """(n, m) distances from some rows to others."""
        ...


class TrueDistances:
    """True distances of a step's samples and mixtures."""

    def __init__(self, source: DistanceSource, batch: Batch, columns: np.ndarray | None) -> None:
        """Find what the distances of the mixtures need.

        Args:
            source: of the table's samples; a `UniFrac` if there are mixtures.
            batch: with mixtures after the real samples.
            columns: the table's column of each of the dataset's sequences, for mixtures.
        """
        self.source = source
        self.rows = batch.rows.cpu().numpy()
        self.mixed: UniFrac | None = None
        if len(batch.slots) > len(batch):
            assert columns is not None and isinstance(source, UniFrac)
            asvs = batch.asv_ids[batch.slots.values].cpu().numpy()
            counts = csr_array(
                (
                    batch.counts.cpu().numpy().astype(np.int64),
                    columns[asvs],
                    batch.slots.offsets.cpu().numpy(),
                ),
                shape=(len(batch.slots), len(columns)),
            )
            self.mixed = source.of(counts)

    def between(self, first: int, last: int) -> np.ndarray:
        """Distances (last - first, n - first) from some samples to themselves and all later."""
        known = self.source.cross(self.rows[first:last], self.rows[first:])
        if self.mixed is None:
            return known
        every = self.mixed.cross(np.arange(first, last), np.arange(first, len(self.mixed)))
        # Of whole samples, whatever the token limit.
        every[: known.shape[0], : known.shape[1]] = known
        return every


class DistanceLoss:
    """Mean over all pairs i < j of (predicted - true distance)^2.

    With a tree the true distances of any community are known, so a batch can also hold mixtures
    of its samples: more pairs, and more kinds of them, from ASVs that are encoded anyway.
    """

    def __init__(
        self, source: DistanceSource, *, mixtures: float = 0.0, columns: np.ndarray | None = None
    ) -> None:
        """Set up the loss.

        Args:
            source: true distances; a `UniFrac` if there are mixtures.
            mixtures: how many, for each real sample of a batch.
            columns: the table's column of each of the dataset's sequences, for mixtures.
        """
        self.source, self.mixtures, self.columns = source, mixtures, columns

    def truth(self, batch: Batch) -> TrueDistances:
        """True distances of a batch's real samples and mixtures."""
        return TrueDistances(self.source, batch, self.columns)

    def share(
        self,
        encoder: CommunityEncoder,
        z: Tensor,
        truth: TrueDistances,
        first: int,
        last: int,
    ) -> Terms:
        """Share of the loss, and of the mean absolute error of the real samples.

        Args:
            encoder: its UniFrac encoder predicts distances.
            z: (n, width) embeddings of all samples.
            truth: their true distances.
            first: first sample of the share.
            last: the one after its last.
        """
        count, real = len(z), len(truth.rows)
        predicted = encoder.unifrac_encoder.distances(z[first:last], z[first:])
        true = torch.as_tensor(truth.between(first, last), dtype=z.dtype, device=z.device)
        error = (predicted - true).triu(1)
        seen = error.detach()[: max(0, real - first), : max(0, real - first)]
        return {
            "unifrac_loss": error.square().sum() / max(1, count * (count - 1) // 2),
            "distance_mae": seen.abs().sum() / max(1, real * (real - 1) // 2),
        }


class FaithLoss:
    """Squared error of Faith PD, in units of its standard deviation on the training part."""

    def __init__(self, values: np.ndarray, mean: float, deviation: float) -> None:
        self.values = values  # (dataset rows,) Faith PD
        self.mean = mean
        self.deviation = deviation

    def share(
        self, encoder: CommunityEncoder, z: Tensor, batch: Batch, first: int, last: int
    ) -> Terms:
        """Share of the mean over samples; arguments as in `DistanceLoss.share`."""
        predicted = encoder.unifrac_encoder.faith_head(z[first:last])[:, 0]
        rows = batch.rows[first:last].cpu().numpy()
        true = (self.values[rows] - self.mean) / self.deviation
        error = predicted - torch.as_tensor(true, dtype=z.dtype, device=z.device)
        return {"unifrac_loss": error.square().sum() / len(z)}


class TargetLoss:
    """The loss of predictions (samples, outputs) against targets (samples,)."""

    def __init__(
        self, options: TargetOptions, class_weights: Tensor | None, is_classification: bool
    ) -> None:
        """Set up the loss.

        Args:
            options: which loss of a number, and its quantile.
            class_weights: (classes,) weights of the cross-entropy, None: all 1.
            is_classification: cross-entropy of class codes instead of a loss of numbers.
        """
        self.options, self.class_weights = options, class_weights
        self.is_classification = is_classification

    def __call__(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Weighted mean over the samples."""
        weights = self.weights(true)
        return (self.each(predicted, true) * weights).sum() / weights.sum()

    def share(self, predicted: Tensor, true: Tensor, first: int, last: int) -> Terms:
        """Share of the weighted mean; arguments as in `DistanceLoss.share`."""
        weights = self.weights(true)
        own = slice(first, last)
        losses = self.each(predicted[own], true[own]) * weights[own]
        return {"target_loss": losses.sum() / weights.sum()}

    def weights(self, true: Tensor) -> Tensor:
        """(samples,) how much each sample counts."""
        if self.class_weights is None:
            return torch.ones(len(true), device=true.device)
        return self.class_weights.to(true.device)[true]

    def each(self, predicted: Tensor, true: Tensor) -> Tensor:
        """(samples,) loss of each sample."""
        if self.is_classification:
            return F.cross_entropy(predicted, true, reduction="none")
        error, name = true - predicted[:, 0], self.options.target_loss
        if name == "smooth-l1":
            return F.smooth_l1_loss(predicted[:, 0], true, reduction="none")
        if name == "mse":
            return error.square()
        if name == "mae":
            return error.abs()
        level = self.options.quantile
        if name == "quantile":
            return torch.maximum(level * error, (level - 1) * error)
        return torch.where(error > 0, level, 1 - level) * error.square()


def count_divergence(logits: Tensor, counts: Tensor, slots: Ragged) -> Tensor:
    """KL(true || predicted) relative abundances of each sample, (samples,), in nats.

    A divergence between compositions has the same scale whatever the depth of sequencing and
    whatever the transform of the target.
    """
    lengths = slots.lengths

    def reduce(values: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(values, how, lengths=lengths, unsafe=True)

    share = counts / spread(reduce(counts, "sum"), lengths)
    centred = logits - spread(reduce(logits.detach(), "max"), lengths)
    log_predicted = centred - spread(reduce(centred.exp(), "sum").log(), lengths)
    return reduce(share * (share.log() - log_predicted), "sum")


def blocks(samples: int, width: int, least: int = 1) -> list[tuple[int, int]]:
    """Ranges of samples whose differences with all others are held at once.

    Args:
        samples: how many there are.
        width: numbers of an embedding.
        least: how many ranges there should be, if there are as many samples.
    """
    rows = max(1, min(BLOCK_NUMBERS // max(1, samples * width), math.ceil(samples / least)))
    return [(first, min(samples, first + rows)) for first in range(0, samples, rows)]
