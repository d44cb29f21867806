"""What is learned, as stages that a step can compute in pieces and on several devices.

Pretraining: squared error of all pairwise distances of the batch, and cross-entropy of masked
nucleotides. Distances are computed from clean tokens without dropout; the masked rows are
copies of some of the batch's distinct ASVs, encoded apart from the clean ones.
Fine-tuning: the target's loss, and on request the same two and the count loss.

A step goes `draw` -> `nucleotides`, `encode_asvs` -> `encode_samples` -> `losses`. All but `draw`
work on a part: some of the ASVs, or of the samples. See `aam.training.step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aam.config import FinetunePenaltyOptions, PenaltyOptions
from aam.data.dataset import Batch
from aam.model import CommunityEncoder, Encoded, Predictor
from aam.training.losses import (
    DistanceLoss,
    FaithLoss,
    TargetLoss,
    Terms,
    TrueDistances,
    count_divergence,
)
from aam.training.masking import MaskedCopies, masked_copies, masked_nucleotide_terms
from aam.training.mixtures import add_mixtures
from aam_kernels import Ragged


@dataclass(frozen=True)
class Work:
    """A batch with everything random about its data drawn; the same on every rank.

    Attributes:
        batch: real samples, and mixtures after them in ``slots`` and ``counts``.
        masked: masked copies of some of its distinct ASVs, None without that loss.
        truth: true distances of samples and mixtures, None without that loss.
        encodes_samples: False where only nucleotides are learned.
    """

    batch: Batch
    masked: MaskedCopies | None
    truth: TrueDistances | None
    encodes_samples: bool = True


@dataclass(frozen=True)
class SamplePart:
    """Some of a step's samples.

    Attributes:
        slots: values ``(slots,)`` int64, rows of the ASV vectors that come with the part.
        counts: ``(slots,)`` float32 reads.
        first_slot: row of the part's first slot among all slots of the step.
        samples: which of the step's samples these are.
        categories: ``(samples of the step, columns)`` int64 of all samples, or None.
    """

    slots: Ragged
    counts: Tensor
    first_slot: int
    samples: slice
    categories: Tensor | None


class Objective(nn.Module, ABC):
    """Stages of a loss. Called through `forward`, so that sharded weights are there when needed."""

    frozen_asvs: Tensor | None = None
    """(all ASVs of the dataset, dim) vectors of a frozen base, encoded once for the run."""

    encoder: CommunityEncoder
    penalties: PenaltyOptions

    def forward(self, stage: str, *arguments: Any) -> Any:
        """Run a stage by its name."""
        return getattr(self, stage)(*arguments)

    @property
    def mixtures(self) -> float:
        """Mixtures of samples in a step, for each real one."""
        return 0.0

    @property
    def masked_share(self) -> float:
        """Share of the distinct ASVs of which a masked copy is encoded."""
        return self.penalties.masked_share if self.penalties.nucleotide_penalty else 0.0

    @property
    def holds_matrices(self) -> bool:
        """Whether the attention implementation may hold squares of the lengths."""
        return self.encoder.asv_encoder.stack.impl in ("math", "sdpa")

    @abstractmethod
    def draw(self, batch: Batch) -> Work:
        """Draw mixtures and masks from torch's default generator."""

    @abstractmethod
    def encode_asvs(self, tokens: Ragged, first_row: int) -> Tensor:
        """Vectors (asvs, dim) of some ASVs; `first_row` is their first token's row in the step."""

    @abstractmethod
    def encode_samples(self, vectors: Tensor, part: SamplePart) -> Terms:
        """Outputs of some samples, each (samples of the part, ...)."""

    @abstractmethod
    def losses(self, outputs: Terms, work: Work, first: int, last: int) -> Terms:
        """The share of samples `first` to `last` in every loss of the step."""

    def nucleotides(self, copies: MaskedCopies, total: int, first_row: int) -> Terms:
        """The share of some masked copies in the nucleotide loss."""
        terms = masked_nucleotide_terms(self.encoder, copies, total, first_row)
        return weighted(terms, self.penalties)


class PretrainObjective(Objective):
    """UniFrac (or Faith PD) and masked-nucleotide losses of a batch."""

    def __init__(
        self,
        encoder: CommunityEncoder,
        penalties: PenaltyOptions,
        unifrac: DistanceLoss | FaithLoss | None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.penalties = penalties
        self.unifrac = unifrac if penalties.unifrac_penalty else None

    @property
    def mixtures(self) -> float:
        """Mixtures of samples in a step, for each real one."""
        return self.unifrac.mixtures if isinstance(self.unifrac, DistanceLoss) else 0.0

    def draw(self, batch: Batch) -> Work:
        """Draw mixtures and masks."""
        truth = None
        if isinstance(self.unifrac, DistanceLoss):
            batch = add_mixtures(batch, self.unifrac.mixtures)
            truth = self.unifrac.truth(batch)
        masked = None
        if self.penalties.nucleotide_penalty:
            masked = masked_copies(batch.tokens, self.penalties)
        return Work(batch, masked, truth, encodes_samples=self.unifrac is not None)

    def encode_asvs(self, tokens: Ragged, first_row: int) -> Tensor:
        """Vectors of clean sequences, without dropout."""
        return self.encoder.encode_asvs(tokens, dropout=False)

    def encode_samples(self, vectors: Tensor, part: SamplePart) -> Terms:
        """Embeddings ``z`` (samples, width)."""
        return {"z": self.encoder.embed(vectors, part.slots, part.counts, part.first_slot)}

    def losses(self, outputs: Terms, work: Work, first: int, last: int) -> Terms:
        """Share of the UniFrac loss."""
        terms = unifrac_share(self.unifrac, self.encoder, outputs["z"], work, first, last)
        return weighted(terms, self.penalties)


class FinetuneObjective(Objective):
    """The target's loss, and the pretraining and count losses that have a penalty."""

    penalties: FinetunePenaltyOptions

    def __init__(
        self,
        predictor: Predictor,
        penalties: FinetunePenaltyOptions,
        target_loss: TargetLoss,
        *,
        unifrac: DistanceLoss | FaithLoss | None = None,
        frozen_asvs: Tensor | None = None,
    ) -> None:
        """Build the objective.

        Args:
            predictor: the model.
            penalties: weights of the losses.
            target_loss: of predictions (samples, outputs) and targets (samples,).
            unifrac: distance loss, where it has a penalty.
            frozen_asvs: (all ASVs, dim) vectors of a frozen base, encoded once for the run.
        """
        super().__init__()
        self.predictor = predictor
        self.penalties = penalties
        self.target_loss = target_loss
        self.unifrac = unifrac if penalties.unifrac_penalty else None
        self.frozen_asvs = frozen_asvs

    @property
    def encoder(self) -> CommunityEncoder:  # type: ignore[override]
        """The base encoder."""
        return self.predictor.encoder

    def train(self, mode: bool = True) -> FinetuneObjective:
        """A frozen base stays in evaluation mode."""
        super().train(mode)
        if self.frozen_asvs is not None:
            self.encoder.eval()
        return self

    def draw(self, batch: Batch) -> Work:
        """Draw masks."""
        truth = None
        if isinstance(self.unifrac, DistanceLoss):
            truth = self.unifrac.truth(batch)
        masked = None
        if self.penalties.nucleotide_penalty:
            masked = masked_copies(batch.tokens, self.penalties)
        return Work(batch, masked, truth)

    def encode_asvs(self, tokens: Ragged, first_row: int) -> Tensor:
        """Vectors of sequences; without dropout where distances are learned."""
        return self.encoder.encode_asvs(tokens, dropout=self.unifrac is None, first_row=first_row)

    def encode_samples(self, vectors: Tensor, part: SamplePart) -> Terms:
        """Predictions, and what the other losses need."""
        encoder = self.encoder
        encoded = self.encode(vectors, part)
        outputs = {
            "prediction": self.predictor(
                encoded, part.categories, part.samples, first_row=part.first_slot
            )
        }
        if self.penalties.count_penalty:
            logits = self.predictor.count_logits(encoded.samples, part.first_slot)
            outputs["count_loss"] = count_divergence(logits, part.counts, part.slots)
        if self.unifrac is not None:
            outputs["z"] = encoder.unifrac_encoder(encoded, part.slots, part.first_slot)
        return outputs

    def encode(self, vectors: Tensor, part: SamplePart) -> Encoded:
        """The base encoder's view of samples; without graph where the base is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.frozen_asvs is None):
            return self.encoder.encode_samples(vectors, part.slots, part.counts, part.first_slot)

    def losses(self, outputs: Terms, work: Work, first: int, last: int) -> Terms:
        """Share of the target's, count and UniFrac losses."""
        batch = work.batch
        assert batch.targets is not None
        terms = self.target_loss.share(outputs["prediction"], batch.targets, first, last)
        if self.penalties.count_penalty:
            terms["count_loss"] = outputs["count_loss"][first:last].sum() / len(batch)
        if self.unifrac is not None:
            terms |= unifrac_share(self.unifrac, self.encoder, outputs["z"], work, first, last)
        return weighted(terms, self.penalties)


def unifrac_share(
    unifrac: DistanceLoss | FaithLoss | None,
    encoder: CommunityEncoder,
    z: Tensor,
    work: Work,
    first: int,
    last: int,
) -> Terms:
    """Share of the distance or Faith PD loss."""
    if isinstance(unifrac, DistanceLoss):
        assert work.truth is not None
        return unifrac.share(encoder, z, work.truth, first, last)
    assert unifrac is not None
    return unifrac.share(encoder, z, work.batch, first, last)


def weighted(terms: Terms, penalties: PenaltyOptions) -> Terms:
    """Add ``loss``: the sum of all losses, each times its penalty."""
    parts = [
        getattr(penalties, name.removesuffix("_loss") + "_penalty") * value
        for name, value in terms.items()
        if name.endswith("_loss")
    ]
    return {"loss": torch.stack(parts).sum(), **terms}
