"""Sequences with noise: masked nucleotides that are to be told, and substituted ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aam.config import NucleotideOptions
from aam.data.sequences import MASK, A, T
from aam.model import AsvEncoder, EncodedAsvs
from aam.model.encoder import positions_in_rows
from aam_kernels import Ragged

SUBSTITUTED_SHARE = 0.7  # of the rows that are not masked
SUBSTITUTION_RATE = 0.04  # the largest; each row's is drawn between 0 and it
CUT_SHARE = 0.1  # of the rows, whose end or beginning is masked
CUT_LENGTH = 0.3  # of a row, at most


@dataclass(frozen=True)
class NoisyAsvs:
    """Sequences as the encoder sees them in training."""

    tokens: Ragged  # values (nucleotides,) uint8, one row an ASV
    masked: Tensor  # (masked,) int64, ascending places in the values that are asked for
    true: Tensor  # (masked,) int64, what stood there
    rows: Tensor | None = None  # (asvs,) int64 of the dataset; None: nucleotides alone are asked

    def part(self, rows: slice, values: slice) -> NoisyAsvs:
        """Contiguous rows, and the values that are theirs."""
        bounds = torch.tensor([values.start, values.stop], device=self.masked.device)
        low, high = torch.searchsorted(self.masked, bounds).tolist()
        offsets = self.tokens.offsets[rows.start : rows.stop + 1] - values.start
        return NoisyAsvs(
            Ragged(self.tokens.values[values], offsets, self.tokens.max_length),
            self.masked[low:high] - values.start,
            self.true[low:high],
            None if self.rows is None else self.rows[rows],
        )


def masked_copies(tokens: Ragged, penalties: NucleotideOptions) -> NoisyAsvs:
    """Copies of a random share of the sequences, with random nucleotides masked."""
    count = max(1, round(penalties.masked_share * len(tokens)))
    chosen = torch.randperm(len(tokens), device=tokens.values.device)[:count]
    copies = take_rows(tokens, chosen.sort().values)
    masked, places = mask_tokens(copies, penalties.mask_probability, penalties.mask_strategy)
    return NoisyAsvs(masked, places, copies.values[places].long())


def noisy_asvs(tokens: Ragged, rows: Tensor, penalties: NucleotideOptions) -> NoisyAsvs:
    """All sequences, some masked, most of the others with some bases substituted.

    What is substituted or cut off teaches that relatives belong to the same clades, and that a
    part of a sequence may have to do; masked nucleotides are asked for in the same pass.
    """
    values, device = tokens.values, tokens.values.device
    lengths = tokens.lengths.long()
    is_base = (values >= A) & (values <= T)
    share = penalties.masked_share if penalties.nucleotide_penalty else 0.0
    is_masked = (torch.rand(len(tokens), device=device) < share).repeat_interleave(lengths)
    places = mask_tokens(tokens, penalties.mask_probability, penalties.mask_strategy)[1]
    places = places[is_masked[places]]
    rate = torch.rand(len(tokens), device=device) * SUBSTITUTION_RATE
    rate *= torch.rand(len(tokens), device=device) < SUBSTITUTED_SHARE
    hit = torch.rand(values.shape, device=device) < rate.repeat_interleave(lengths)
    hit &= is_base & ~is_masked
    other = (values - A + torch.randint(1, 4, values.shape, device=device)) % 4 + A
    noisy = torch.where(hit, other.to(values.dtype), values)
    noisy[places] = MASK
    noisy.masked_fill_(_cut_off(tokens, lengths) & is_base & ~is_masked, MASK)
    return NoisyAsvs(tokens.with_values(noisy), places, values[places].long(), rows)


def _cut_off(tokens: Ragged, lengths: Tensor) -> Tensor:
    """Places (nucleotides,) bool at the end or the beginning of some rows."""
    device = tokens.values.device
    count = torch.rand(len(tokens), device=device) * CUT_LENGTH * lengths
    count *= torch.rand(len(tokens), device=device) < CUT_SHARE
    at_end = torch.rand(len(tokens), device=device) < 0.5
    place = positions_in_rows(tokens)
    first = torch.where(at_end, lengths - count, 0)
    last = torch.where(at_end, lengths, count + 1)  # START stands before the first base
    last = torch.where(count >= 1, last, 0)
    return (place >= first.repeat_interleave(lengths)) & (place < last.repeat_interleave(lengths))


def nucleotide_terms(
    encoder: AsvEncoder, encoded: EncodedAsvs, asvs: NoisyAsvs, total: int
) -> dict[str, Tensor]:
    """Cross-entropy and accuracy at masked places of ASVs, as sums divided by the step's total."""
    logits = encoder.nucleotide_logits(encoded, asvs.tokens, asvs.masked)
    share, true = 1.0 / max(1, total), asvs.true - A
    hits = (logits.detach().argmax(-1) == true).sum()
    return {
        "nucleotide_loss": F.cross_entropy(logits, true, reduction="sum") * share,
        "nucleotide_accuracy": hits * share,
    }


def mask_tokens(tokens: Ragged, probability: float, strategy: str) -> tuple[Ragged, Tensor]:
    """Replace a share of the A, C, G and T by MASK: single ones, or runs of 3 to 5 ("span").

    Returns the masked rows, and the positions in `values` that were masked.
    """
    values = tokens.values
    if strategy == "random":
        hit = torch.rand(values.shape, device=values.device) < probability
    else:
        hit = span_hits(tokens, probability)
    hit &= (values >= A) & (values <= T)
    return tokens.with_values(values.masked_fill(hit, MASK)), hit.nonzero()[:, 0]


def take_rows(ragged: Ragged, index: Tensor) -> Ragged:
    """The rows of a ragged tensor at `index` (m,), in that order."""
    lengths = ragged.lengths.long()[index]
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    shift = ragged.offsets[:-1].long()[index] - offsets[:-1]
    source = torch.arange(int(offsets[-1]), device=lengths.device)
    source += shift.repeat_interleave(lengths, output_size=len(source))
    return Ragged(ragged.values[source], offsets.int(), ragged.max_length)


def span_hits(tokens: Ragged, probability: float) -> Tensor:
    """Runs of 3 to 5 positions that stay in their row and cover about `probability` of it."""
    values = tokens.values
    # A position is hit unless none of the mean 4 positions before it starts a run over it.
    start_rate = 1 - (1 - probability) ** 0.25
    starts = (torch.rand(values.shape, device=values.device) < start_rate).nonzero()[:, 0]
    lengths = torch.randint(3, 6, starts.shape, device=values.device)
    row_ends = tokens.offsets[1:].long()
    row = torch.searchsorted(row_ends, starts, right=True)
    ends = torch.minimum(starts + lengths, row_ends[row])
    change = torch.zeros(len(values) + 1, dtype=torch.int32, device=values.device)
    one = torch.ones_like(starts, dtype=torch.int32)
    change.index_add_(0, starts, one).index_add_(0, ends, -one)
    return change[:-1].cumsum(0) > 0
