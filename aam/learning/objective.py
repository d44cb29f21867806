"""What is learned, as stages that a step can compute in micro-batches and on several devices.

A step goes `draw` -> `asv_losses`, and where samples are learned from `encode_asvs` ->
`encode_samples` -> `losses`. All but `draw` work on some of the ASVs, or of the samples: see
`aam.learning.step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aam.config import FinetunePenaltyOptions, NucleotideOptions, PenaltyOptions
from aam.data.dataset import AsvBatch, Batch
from aam.learning.losses import CladeLoss, DistanceLoss, TargetLoss, Terms, count_divergence
from aam.learning.masking import NoisyAsvs, masked_copies, noisy_asvs, nucleotide_terms
from aam.model import AsvEncoder, CladeHead, FreeClades, Predictor
from aam_kernels import Ragged

PENALTY_OF = {
    "clade_loss": "unifrac_penalty",
    "unifrac_loss": "unifrac_penalty",
    "nucleotide_loss": "nucleotide_penalty",
    "target_loss": "target_penalty",
    "count_loss": "count_penalty",
}


@dataclass(frozen=True)
class Work:
    """A batch with everything random about its data drawn; the same on every rank."""

    batch: Batch | None  # samples with clean sequences, where something is learned from samples
    noisy: NoisyAsvs | None  # sequences whose losses are plain sums over them
    clades: tuple[Tensor, Tensor] | None = None  # that stand for all, and their weights


@dataclass(frozen=True)
class SamplePart:
    """Some of a step's samples."""

    slots: Ragged  # values (slots,) int64, rows of the ASV vectors that come with the part
    counts: Tensor  # (slots,) float32 reads
    first_slot: int  # its row among all slots of the step
    samples: slice  # which of the step's samples these are
    categories: Tensor | None  # (samples of the step, columns) int64 of all samples


class Objective(nn.Module, ABC):
    """Stages of a loss of sequences."""

    frozen_asvs: Tensor | None = None  # (all ASVs of the dataset, dim) vectors of a frozen base
    progress: float = 1.0  # share of the run that is behind the coming step
    masked_share: float = 0.0  # of the distinct ASVs, of which a masked copy is encoded
    encoder: AsvEncoder
    penalties: NucleotideOptions

    @abstractmethod
    def draw(self, batch: Any) -> Work:
        """Draw noise and masks from torch's default generator."""

    @abstractmethod
    def asv_losses(self, noisy: NoisyAsvs, work: Work, first_row: int) -> Terms:
        """The share of some noisy sequences in the losses that are plain sums over them.

        `work` is the whole step, `first_row` the row of their first token among its tokens.
        """

    def weighted(self, terms: Terms) -> Terms:
        """Add ``loss``: the sum of all losses, each times its penalty."""
        losses = [name for name in terms if name in PENALTY_OF]
        parts = [getattr(self.penalties, PENALTY_OF[name]) * terms[name] for name in losses]
        return {"loss": torch.stack(parts).sum(), **terms}


class SampleObjective(Objective):
    """Stages of a loss of samples, beside masked nucleotides of copies of their ASVs."""

    def __init__(self, penalties: NucleotideOptions) -> None:
        super().__init__()
        self.penalties = penalties
        self.masked_share = penalties.masked_share if penalties.nucleotide_penalty else 0.0

    def draw(self, batch: Batch) -> Work:
        """Draw masks."""
        masked = masked_copies(batch.tokens, self.penalties) if self.masked_share else None
        return Work(batch, masked)

    def asv_losses(self, noisy: NoisyAsvs, work: Work, first_row: int) -> Terms:
        """The share of some masked sequences in the nucleotide loss."""
        assert work.noisy is not None
        encoded = self.encoder(noisy.tokens, first_row=first_row)
        return self.weighted(nucleotide_terms(self.encoder, encoded, noisy, len(work.noisy.masked)))

    def encode_asvs(self, tokens: Ragged, first_row: int) -> Tensor:
        """Vectors (asvs, dim) of some ASVs; `first_row` is their first token's row in the step."""
        return self.encoder(tokens, first_row=first_row).vectors

    @abstractmethod
    def encode_samples(self, vectors: Tensor, part: SamplePart) -> Terms:
        """Outputs of some samples, each (samples of the part, ...)."""

    @abstractmethod
    def losses(self, outputs: Terms, work: Work, first: int, last: int) -> Terms:
        """The share of samples `first` to `last` in every loss of the step."""


class CladeObjective(Objective):
    """Memberships in the clades of a tree, and masked nucleotides: sums over noisy ASVs."""

    penalties: PenaltyOptions

    def __init__(
        self,
        encoder: AsvEncoder,
        head: CladeHead,
        penalties: PenaltyOptions,
        loss: CladeLoss,
        *,
        stack_joins: float = 0.0,
    ) -> None:
        """Build the objective; the transformer joins the wide path at a share of the run."""
        super().__init__()
        self.encoder, self.head, self.penalties = encoder, head, penalties
        self.loss, self.stack_joins = loss, stack_joins

    def draw(self, batch: AsvBatch) -> Work:
        """Draw noise, masks and, of very many clades, those that stand for all."""
        noisy = noisy_asvs(batch.tokens, batch.rows, self.penalties)
        return Work(None, noisy, self.loss.draw(batch.rows))

    def asv_losses(self, noisy: NoisyAsvs, work: Work, first_row: int) -> Terms:
        """The share of some sequences in both losses."""
        assert work.noisy is not None and noisy.rows is not None
        joined = self.progress >= self.stack_joins
        encoded = self.encoder(noisy.tokens, first_row=first_row, stack=joined)
        terms = {}
        if self.penalties.unifrac_penalty:
            asvs = len(work.noisy.tokens)
            terms = self.loss.share(self.head, encoded.vectors, noisy.rows, asvs, work.clades)
        if self.penalties.nucleotide_penalty:
            terms |= nucleotide_terms(self.encoder, encoded, noisy, len(work.noisy.masked))
        return self.weighted(terms)


class PairObjective(SampleObjective):
    """Distances between all pairs of a batch's samples, and masked nucleotides of copies."""

    penalties: PenaltyOptions

    def __init__(
        self, encoder: AsvEncoder, pairs: FreeClades, penalties: PenaltyOptions, loss: DistanceLoss
    ) -> None:
        super().__init__(penalties)
        self.encoder, self.pairs, self.loss = encoder, pairs, loss

    def draw(self, batch: Batch) -> Work:
        """Draw masks."""
        work = super().draw(batch)
        return work if self.penalties.unifrac_penalty else Work(None, work.noisy)

    def encode_asvs(self, tokens: Ragged, first_row: int) -> Tensor:
        """Vectors of clean sequences, without dropout: what is random would be used as distance."""
        was_training = self.encoder.training
        self.encoder.eval()
        try:
            return self.encoder(tokens).vectors
        finally:
            self.encoder.train(was_training)

    def encode_samples(self, vectors: Tensor, part: SamplePart) -> Terms:
        """Profiles (samples, width)."""
        return {"profiles": self.pairs.profiles(vectors, part.slots, part.counts)}

    def losses(self, outputs: Terms, work: Work, first: int, last: int) -> Terms:
        """Share of the distance loss."""
        assert work.batch is not None
        profiles, rows = outputs["profiles"], work.batch.rows
        return self.weighted(self.loss.share(self.pairs, profiles, rows, first, last))


class FinetuneObjective(SampleObjective):
    """The target's loss, and the nucleotide and count losses that have a penalty."""

    penalties: FinetunePenaltyOptions

    def __init__(
        self,
        predictor: Predictor,
        penalties: FinetunePenaltyOptions,
        target_loss: TargetLoss,
        *,
        frozen_asvs: Tensor | None = None,
    ) -> None:
        super().__init__(penalties)
        self.predictor, self.target_loss = predictor, target_loss
        self.frozen_asvs = frozen_asvs

    @property
    def encoder(self) -> AsvEncoder:  # type: ignore[override]  # an attribute of the others
        """The base encoder."""
        return self.predictor.encoder

    def train(self, mode: bool = True) -> FinetuneObjective:
        """A frozen base stays in evaluation mode."""
        super().train(mode)
        if self.frozen_asvs is not None:
            self.encoder.eval()
        return self

    def encode_samples(self, vectors: Tensor, part: SamplePart) -> Terms:
        """Predictions, and what the count loss needs."""
        first, predictor = part.first_slot, self.predictor
        hidden = predictor.sample_encoder(vectors, part.slots, part.counts, first)
        outputs = {"prediction": predictor(hidden, part.categories, part.samples, first_row=first)}
        if self.penalties.count_penalty:
            logits = predictor.count_logits(hidden, first)
            outputs["count_loss"] = count_divergence(logits, part.counts, part.slots)
        return outputs

    def losses(self, outputs: Terms, work: Work, first: int, last: int) -> Terms:
        """Share of the target's and count losses."""
        batch = work.batch
        assert batch is not None and batch.targets is not None
        terms = self.target_loss.share(outputs["prediction"], batch.targets, first, last)
        if self.penalties.count_penalty:
            terms["count_loss"] = outputs["count_loss"][first:last].sum() / len(batch)
        return self.weighted(terms)
