"""The losses, as modules that turn a batch into named loss terms.

Pretraining: squared error of all pairwise distances of the batch, and cross-entropy of masked
nucleotides. Distances are computed from clean tokens without dropout; the masked rows are
copies of some of the batch's distinct ASVs, encoded beside the clean ones.
Fine-tuning: the target's loss, and on request the same two and the count loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor, nn

from aam.config import FinetunePenaltyOptions, PenaltyOptions, TargetOptions
from aam.data.dataset import Batch
from aam.data.phylogeny import UniFrac
from aam.data.sequences import MASK, A, T
from aam.model import CommunityEncoder, Encoded, Predictor
from aam_kernels import Ragged

Terms = dict[str, Tensor]


class DistanceSource(Protocol):
    """True distances between rows of the dataset."""

    def pairwise(self, rows: np.ndarray) -> np.ndarray:
        """(n, n) distances of these rows."""
        ...


class PretrainObjective(nn.Module):
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
        self.unifrac = unifrac

    def forward(self, batch: Batch) -> Terms:
        """Loss terms, with their weighted sum under ``loss``."""
        terms: Terms = {}
        if self.unifrac is not None and self.penalties.unifrac_penalty:
            vectors = self.encoder.encode_asvs(batch.tokens, dropout=False)
            if isinstance(self.unifrac, DistanceLoss):
                batch = self.unifrac.add_mixtures(batch)
            encoded = self.encoder.encode_samples(vectors, batch.slots, batch.counts)
            terms |= self.unifrac(self.encoder, encoded, batch)
        if self.penalties.nucleotide_penalty:
            terms |= masked_nucleotide_terms(self.encoder, batch.tokens, self.penalties)
        return total(terms, self.penalties)


class FinetuneObjective(nn.Module):
    """The target's loss, and the pretraining and count losses that have a penalty."""

    def __init__(
        self,
        predictor: Predictor,
        penalties: FinetunePenaltyOptions,
        target_loss: Callable[[Tensor, Tensor], Tensor],
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
        self.unifrac = unifrac
        self.frozen_asvs = frozen_asvs

    def train(self, mode: bool = True) -> FinetuneObjective:
        """A frozen base stays in evaluation mode."""
        super().train(mode)
        if self.frozen_asvs is not None:
            self.predictor.encoder.eval()
        return self

    def forward(self, batch: Batch) -> Terms:
        """Loss terms, with their weighted sum under ``loss``."""
        encoder = self.predictor.encoder
        encoded = self.encode(batch)
        terms = {
            "target_loss": self.target_loss(
                self.predictor(encoded, batch.categories), batch.targets
            )
        }
        if self.penalties.count_penalty:
            logits = self.predictor.count_logits(encoded.samples)
            terms["count_loss"] = count_divergence(logits, batch.counts, batch.slots)
        if self.unifrac is not None and self.penalties.unifrac_penalty:
            terms |= self.unifrac(encoder, encoded, batch)
        if self.penalties.nucleotide_penalty:
            terms |= masked_nucleotide_terms(encoder, batch.tokens, self.penalties)
        return total(terms, self.penalties)

    def encode(self, batch: Batch) -> Encoded:
        """The base encoder's view of a batch; without graph where the base is frozen."""
        encoder = self.predictor.encoder
        if self.frozen_asvs is None:
            vectors = encoder.encode_asvs(batch.tokens, dropout=self.unifrac is None)
            return encoder.encode_samples(vectors, batch.slots, batch.counts)
        with torch.no_grad():
            vectors = self.frozen_asvs[batch.asv_ids]
            return encoder.encode_samples(vectors, batch.slots, batch.counts)


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

    def add_mixtures(self, batch: Batch) -> Batch:
        """The batch with mixtures of its samples after the real ones."""
        number = round(self.mixtures * len(batch))
        if not number or len(batch) < 2:
            return batch
        slots, counts = mix_samples(batch.slots, batch.counts, batch.asv_ids, number)
        joined = Ragged(
            torch.cat([batch.slots.values, slots.values]),
            torch.cat([batch.slots.offsets, slots.offsets[1:] + batch.slots.offsets[-1]]),
            max(batch.slots.max_length, slots.max_length),
        )
        return replace(batch, slots=joined, counts=torch.cat([batch.counts, counts]))

    def __call__(self, encoder: CommunityEncoder, encoded: Encoded, batch: Batch) -> Terms:
        """Loss of a batch, and the mean absolute error of its real samples beside it."""
        z = encoder.unifrac_encoder(encoded, batch.slots)
        predicted = encoder.unifrac_encoder.distances(z)
        true = torch.as_tensor(self.true(batch), dtype=z.dtype, device=z.device)
        row, column = torch.triu_indices(len(z), len(z), 1, device=z.device)
        error = (predicted - true)[row, column]
        real = error.detach()[column < len(batch)]
        return {"unifrac_loss": error.square().mean(), "distance_mae": real.abs().mean()}

    def true(self, batch: Batch) -> np.ndarray:
        """True distances of a batch's real samples and mixtures, (n, n)."""
        known = self.source.pairwise(batch.rows.cpu().numpy())
        count = len(batch.slots)
        if count == len(known):
            return known
        assert self.columns is not None and isinstance(self.source, UniFrac)
        asvs = batch.asv_ids[batch.slots.values].cpu().numpy()
        counts = csr_array(
            (
                batch.counts.cpu().numpy().astype(np.int64),
                self.columns[asvs],
                batch.slots.offsets.cpu().numpy(),
            ),
            shape=(count, len(self.columns)),
        )
        every = self.source.of(counts).pairwise(np.arange(count))
        every[: len(known), : len(known)] = known  # of whole samples, whatever the token limit
        return every


class FaithLoss:
    """Squared error of Faith PD, in units of its standard deviation on the training part."""

    def __init__(self, values: np.ndarray, mean: float, deviation: float) -> None:
        self.values = values  # (dataset rows,) Faith PD
        self.mean = mean
        self.deviation = deviation

    def __call__(self, encoder: CommunityEncoder, encoded: Encoded, batch: Batch) -> Terms:
        """Loss of a batch."""
        z = encoder.unifrac_encoder(encoded, batch.slots)
        predicted = encoder.unifrac_encoder.faith_head(z)[:, 0]
        true = (self.values[batch.rows.cpu().numpy()] - self.mean) / self.deviation
        error = predicted - torch.as_tensor(true, dtype=z.dtype, device=z.device)
        return {"unifrac_loss": error.square().mean()}


def total(terms: Terms, penalties: PenaltyOptions) -> Terms:
    """Add the sum of all losses, each times its penalty."""
    weighted = [
        getattr(penalties, name.removesuffix("_loss") + "_penalty") * value
        for name, value in terms.items()
        if name.endswith("_loss")
    ]
    return {"loss": torch.stack(weighted).sum(), **terms}


def masked_nucleotide_terms(
    encoder: CommunityEncoder, tokens: Ragged, penalties: PenaltyOptions
) -> Terms:
    """Cross-entropy and accuracy at the masked positions of copies of some distinct ASVs."""
    count = max(1, round(penalties.masked_share * len(tokens)))
    chosen = torch.randperm(len(tokens), device=tokens.values.device)[:count]
    copies = take_rows(tokens, chosen.sort().values)
    masked, positions = mask_tokens(copies, penalties.mask_probability, penalties.mask_strategy)
    logits = nucleotide_logits(encoder, masked, positions)
    true = copies.values[positions].long()
    if not len(positions):
        return {"nucleotide_loss": logits.sum()}
    return {
        "nucleotide_loss": F.cross_entropy(logits, true),
        "nucleotide_accuracy": (logits.detach().argmax(-1) == true).float().mean(),
    }


def nucleotide_logits(encoder: CommunityEncoder, masked: Ragged, positions: Tensor) -> Tensor:
    """Logits (positions, vocabulary) of the nucleotide head, at the masked positions only."""
    hidden = encoder.asv_encoder(masked).values[positions]
    return encoder.asv_encoder.nucleotide_head(hidden)


def mask_tokens(tokens: Ragged, probability: float, strategy: str) -> tuple[Ragged, Tensor]:
    """Replace some of the nucleotides by MASK.

    Args:
        tokens: values (nucleotides,) uint8.
        probability: share of the A, C, G and T that is masked.
        strategy: ``random`` single positions, or ``span``: runs of 3 to 5 in a row.

    Returns:
        The masked rows, and the positions in `values` that were masked.
    """
    values = tokens.values
    if strategy == "random":
        hit = torch.rand(values.shape, device=values.device) < probability
    else:
        hit = span_hits(tokens, probability)
    hit &= (values >= A) & (values <= T)
    return (
        Ragged(values.masked_fill(hit, MASK), tokens.offsets, tokens.max_length),
        hit.nonzero()[:, 0],
    )


def take_rows(ragged: Ragged, index: Tensor) -> Ragged:
    """The rows of a ragged tensor at `index` (m,), in that order."""
    lengths = ragged.lengths.long()[index]
    offsets = torch.zeros(len(index) + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    shift = ragged.offsets[:-1].long()[index] - offsets[:-1]
    count = int(offsets[-1])
    source = torch.arange(count, device=lengths.device)
    source += torch.repeat_interleave(shift, lengths, output_size=count)
    return Ragged(ragged.values[source], offsets.int(), ragged.max_length)


def span_hits(tokens: Ragged, probability: float) -> Tensor:
    """Runs of 3 to 5 positions that stay in their row and cover about `probability` of it."""
    values = tokens.values
    total_values = len(values)
    # A position is hit unless none of the mean 4 positions before it starts a run over it.
    start_rate = 1 - (1 - probability) ** 0.25
    starts = (torch.rand(values.shape, device=values.device) < start_rate).nonzero()[:, 0]
    lengths = torch.randint(3, 6, starts.shape, device=values.device)
    row_ends = tokens.offsets[1:].long()
    row = torch.searchsorted(row_ends, starts, right=True)
    ends = torch.minimum(starts + lengths, row_ends[row])
    change = torch.zeros(total_values + 1, dtype=torch.int32, device=values.device)
    one = torch.ones_like(starts, dtype=torch.int32)
    change.index_add_(0, starts, one).index_add_(0, ends, -one)
    return change[:-1].cumsum(0) > 0


def mix_samples(
    slots: Ragged, counts: Tensor, asv_ids: Tensor, number: int
) -> tuple[Ragged, Tensor]:
    """Communities that lie between two samples: each ASV of either is kept with a probability.

    Args:
        slots: values (slots,) int64, the row of `asv_ids` in each slot of a sample.
        counts: (slots,) reads.
        asv_ids: (rows,) int64, which ASV a row is; without sharing an ASV has several rows.
        number: mixtures to draw. Each is of two different samples i and j and keeps an ASV of i
            with probability p and one of j with 1 - p, p uniform in (0, 1).

    Returns:
        The mixtures' slots and counts; an ASV kept from both samples has the sum of their reads.
    """
    device, samples = slots.values.device, len(slots)
    first = torch.randint(samples, (number,), device=device)
    second = (first + torch.randint(1, samples, (number,), device=device)) % samples
    share = torch.rand(number, device=device)
    pairs = torch.stack([first, second], 1).flatten()
    asvs, reads = take_rows(slots, pairs), take_rows(slots.with_values(counts), pairs)
    mixture = torch.arange(number, device=device).repeat_interleave(2)
    chance = torch.stack([share, 1 - share], 1).flatten()
    of_mixture, of_chance = spread(mixture, asvs.lengths), spread(chance, asvs.lengths)
    kept = torch.rand(len(of_chance), device=device) < of_chance
    empty = torch.ones(number, dtype=torch.bool, device=device)
    empty[of_mixture[kept]] = False
    kept |= empty[of_mixture]  # a mixture of nothing is that of everything
    rows = asvs.values[kept]
    width = int(asv_ids.max()) + 1
    key, place = torch.unique(of_mixture[kept] * width + asv_ids[rows], return_inverse=True)
    mixed_rows = torch.empty_like(key)
    mixed_rows[place] = rows
    mixed_counts = torch.zeros(len(key), dtype=counts.dtype, device=device)
    mixed_counts.index_add_(0, place, reads.values[kept])
    lengths = torch.bincount(key // width, minlength=number)
    offsets = torch.zeros(number + 1, dtype=torch.int32, device=device)
    offsets[1:] = lengths.cumsum(0)
    return Ragged(mixed_rows, offsets, int(lengths.max())), mixed_counts


def count_divergence(logits: Tensor, counts: Tensor, slots: Ragged) -> Tensor:
    """Mean over samples of KL(true || predicted) relative abundances, in nats.

    A divergence between compositions has the same scale whatever the depth of sequencing and
    whatever the transform of the target.
    """
    lengths = slots.lengths
    share = counts / spread(torch.segment_reduce(counts, "sum", lengths=lengths), lengths)
    highest = torch.segment_reduce(logits.detach(), "max", lengths=lengths)
    centred = logits - spread(highest, lengths)
    normaliser = torch.segment_reduce(centred.exp(), "sum", lengths=lengths).log()
    log_predicted = centred - spread(normaliser, lengths)
    return (share * (share.log() - log_predicted)).sum() / len(slots)


def spread(per_row: Tensor, lengths: Tensor) -> Tensor:
    """Repeat each row's number for every one of its values."""
    return torch.repeat_interleave(per_row, lengths.long())


def make_target_loss(
    target: TargetOptions, class_weights: Tensor | None, is_classification: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of (samples, outputs) predictions against (samples,) targets."""
    if is_classification:
        return lambda logits, true: F.cross_entropy(logits, true, weight=class_weights)

    def regression(predicted: Tensor, true: Tensor) -> Tensor:
        error = true - predicted[:, 0]
        if target.target_loss == "smooth-l1":
            return F.smooth_l1_loss(predicted[:, 0], true)
        if target.target_loss == "mse":
            return error.square().mean()
        if target.target_loss == "mae":
            return error.abs().mean()
        level = target.quantile
        if target.target_loss == "quantile":
            return torch.maximum(level * error, (level - 1) * error).mean()
        return (torch.where(error > 0, level, 1 - level) * error.square()).mean()

    return regression
