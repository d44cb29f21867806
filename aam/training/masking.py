"""Masked copies of some of a batch's distinct ASVs, of which the nucleotides are to be told."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aam.config import PenaltyOptions
from aam.data.sequences import MASK, A, T
from aam.model import CommunityEncoder
from aam_kernels import Ragged


@dataclass(frozen=True)
class MaskedCopies:
    """Sequences with some nucleotides masked.

    Attributes:
        tokens: values ``(nucleotides,)`` uint8, one row a copy.
        positions: ``(masked,)`` int64, ascending positions in the values that are masked.
        true: ``(masked,)`` int64, what stood there.
    """

    tokens: Ragged
    positions: Tensor
    true: Tensor


def masked_copies(tokens: Ragged, penalties: PenaltyOptions) -> MaskedCopies:
    """Copies of a random share of the sequences, with random nucleotides masked."""
    count = max(1, round(penalties.masked_share * len(tokens)))
    chosen = torch.randperm(len(tokens), device=tokens.values.device)[:count]
    copies = take_rows(tokens, chosen.sort().values)
    masked, positions = mask_tokens(copies, penalties.mask_probability, penalties.mask_strategy)
    return MaskedCopies(masked, positions, copies.values[positions].long())


def masked_nucleotide_terms(
    encoder: CommunityEncoder, copies: MaskedCopies, total: int, first_row: int = 0
) -> dict[str, Tensor]:
    """Cross-entropy and accuracy at masked positions, as sums over a part divided by the total.

    Args:
        encoder: its nucleotide head is asked.
        copies: a part of the masked copies, or all of them.
        total: masked positions of all copies of the step.
        first_row: row of the part's first token among the tokens of all copies.
    """
    logits = nucleotide_logits(encoder, copies.tokens, copies.positions, first_row)
    share = 1.0 / max(1, total)
    hits = (logits.detach().argmax(-1) == copies.true).sum()
    return {
        "nucleotide_loss": F.cross_entropy(logits, copies.true, reduction="sum") * share,
        "nucleotide_accuracy": hits * share,
    }


def nucleotide_logits(
    encoder: CommunityEncoder, masked: Ragged, positions: Tensor, first_row: int = 0
) -> Tensor:
    """Logits (positions, vocabulary) of the nucleotide head, at the masked positions only."""
    hidden = encoder.asv_encoder(masked, first_row=first_row).values[positions]
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
