"""The same model as plain torch would be written: padded, masked, every slot encoded.

`nn.TransformerEncoder`'s layers with a key padding mask over tensors of fixed size: every sample
has `token_limit` ASV slots and every ASV as many positions as the longest of the batch. Slots of
no ASV are computed like the others and masked where they would count. All weights have our names
and shapes. Kind to the baseline: sequences are padded to the longest of the batch and not to
`max_bp`, nucleotides are masked in the batch itself instead of in copies, and the nucleotide heads
run at masked positions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aam.learning.losses import DistanceLoss
from aam.model import AsvEncoder, EncodedAsvs, EncoderShape, FreeClades, PretrainedModel
from aam.model.encoder import MASK, VOCABULARY
from aam_kernels import Ragged

PAD, FIRST_BASE, LAST_BASE = 0, 1, 4


@dataclass(frozen=True)
class PaddedBatch:
    """Some samples at fixed size."""

    tokens: Tensor  # (samples, token_limit, length) int64, 0 where there is nothing
    present: Tensor  # (samples, token_limit) bool, slots that hold an ASV

    @property
    def real_share(self) -> float:
        """Real nucleotide tokens over computed ones."""
        return float((self.tokens != PAD).float().mean())

    def cut(self, slots: int) -> PaddedBatch:
        """Its first slots alone."""
        return PaddedBatch(self.tokens[:, :slots], self.present[:, :slots])


def pad_rows(tokens: Ragged) -> Tensor:
    """Sequences at the length of the longest, (rows, length) int64."""
    lengths = tokens.lengths.long()
    rows = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.long)
    rows[torch.arange(rows.shape[1]) < lengths[:, None]] = tokens.values.long()
    return rows


def pad_batch(tokens: Ragged, slots: Ragged, token_limit: int) -> PaddedBatch:
    """Spread a packed batch over fixed slots.

    Args:
        tokens: of the distinct ASVs.
        slots: values (slots,), the distinct ASV in each slot of a sample.
        token_limit: slots a sample.

    Raises:
        ValueError: a sample has more than `token_limit` ASVs.
    """
    counts, distinct = slots.lengths.long(), pad_rows(tokens)
    if int(counts.max()) > token_limit:
        raise ValueError(f"a sample has {int(counts.max())} ASVs, token_limit is {token_limit}")
    present = torch.arange(token_limit) < counts[:, None]
    spread = torch.zeros(len(counts), token_limit, distinct.shape[1], dtype=torch.long)
    spread[present] = distinct[slots.values]
    return PaddedBatch(spread, present)


class Stack(nn.Module):
    """`nn.TransformerEncoderLayer`s, each checkpointed on request, and a last LayerNorm."""

    impl = "math"  # holds squares of the lengths, for all that training knows

    def __init__(self, shape: EncoderShape, checkpointed: bool) -> None:
        super().__init__()
        dim, self.checkpointed = shape.embedding_dim, checkpointed
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, shape.num_heads, shape.ffn_dim or 4 * dim, shape.dropout,
                activation="gelu", batch_first=True, norm_first=True,
            )
            for _ in range(shape.num_layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """(rows, length, dim), (rows, length) bool, True where padded -> (rows, length, dim)."""
        for layer in self.layers:
            if self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(layer, x, src_key_padding_mask=padding, use_reentrant=False)
            else:
                x = layer(x, src_key_padding_mask=padding)
        return self.norm(x)


class MaskedPool(nn.Module):
    """Attention pooling: softmax of w.h / sqrt(dim) over valid positions, then LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(nn.Linear(dim, 1).weight.detach()[0])
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """(rows, length, dim), (rows, length) -> (rows, dim)."""
        scores = x @ self.query / math.sqrt(x.shape[-1])
        weights = scores.masked_fill(padding, float("-inf")).softmax(-1)
        return self.norm(torch.einsum("rl,rld->rd", weights, x))


class PaddedEncoder(AsvEncoder):
    """Nucleotides of an ASV to one vector, by our weights under our names, padded."""

    def __init__(self, shape: EncoderShape, *, checkpointed: bool = True) -> None:
        """Build the encoder.

        Args:
            shape: of ours.
            checkpointed: recompute the layers in backward.
        """
        super().__init__(shape)
        self.stack = Stack(shape, checkpointed)  # type: ignore[assignment]  # padded on purpose
        self.pool = MaskedPool(shape.embedding_dim)  # type: ignore[assignment]  # likewise

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (rows, length) int64 to vectors (rows, dim) and states (rows, length, dim)."""
        padding = rows == PAD
        sites = torch.arange(rows.shape[1]) * VOCABULARY + rows
        own = sites.masked_fill(padding, 0)  # no token is PAD at position 0
        wide = F.embedding_bag(own, self.wide.sites, mode="sum", padding_idx=0)
        vectors = self.wide.project(F.gelu(self.wide.norm(wide)))
        # Rows of padding alone attend to their first position: a softmax over nothing is NaN.
        padding[:, 0] = False
        states = self.stack(F.embedding(sites, self.nucleotide_vectors()), padding)
        return vectors + self.gate * self.pool(states, padding), states

    def forward(self, tokens: Ragged, *, first_row: int = 0, stack: bool = True) -> EncodedAsvs:
        """In the place of ours in any objective; with its stack, whatever is asked."""
        rows = pad_rows(tokens)
        vectors, states = self.encode(rows)
        return EncodedAsvs(vectors, states[rows != PAD])

    def padded_logits(self, vectors: Tensor, states: Tensor, chosen: Tensor) -> Tensor:
        """Logits (masked, 4) of the bases at chosen places (rows, length) bool."""
        row, position = chosen.nonzero(as_tuple=True)
        logits = torch.einsum("md,mbd->mb", vectors[row], self.site_head[position])
        return logits + self.site_bias[position] + self.nucleotide_head(states[chosen])


def padded_profiles(pairs: FreeClades, vectors: Tensor, present: Tensor) -> Tensor:
    """Profiles (samples, width), from the vectors (samples * slots, dim) of all slots."""
    there = present[..., None]
    strongest = pairs.strongest(vectors).view(*present.shape, -1)
    strongest = strongest.masked_fill(~there, -math.inf).amax(1)
    mean = (pairs.mean(vectors).view(*present.shape, -1) * there).sum(1) / there.sum(1)
    return pairs.norm(torch.cat([strongest, mean], dim=-1))


def mask_nucleotides(
    tokens: Tensor, probability: float = 0.15, share: float = 0.25
) -> tuple[Tensor, Tensor]:
    """Replace bases of a share of the sequences by MASK: (masked tokens, where)."""
    bases = (tokens >= FIRST_BASE) & (tokens <= LAST_BASE)
    chosen = bases & (torch.rand(tokens.shape) < probability)
    chosen &= torch.rand(*tokens.shape[:-1], 1) < share
    return tokens.masked_fill(chosen, MASK), chosen


Labelled = tuple[PaddedBatch, Tensor]
"""Samples and their true distances, (samples, samples)."""


def losses(
    model: PretrainedModel, batch: PaddedBatch, tokens: Tensor, chosen: Tensor, true: Tensor
) -> dict[str, Tensor]:
    """Those of `PairObjective`, of tokens of which the chosen ones are masked.

    Args:
        model: of a `PaddedEncoder` and free clades without abundance.
        batch: samples as they are.
        tokens: the same, masked.
        chosen: where, bool.
        true: (samples, samples) distances.
    """
    encoder, pairs = model.encoder, model.pairs
    assert isinstance(encoder, PaddedEncoder) and pairs is not None
    vectors, states = encoder.encode(tokens.flatten(0, 1))
    profiles = padded_profiles(pairs, vectors, batch.present)
    row, column = torch.triu_indices(len(profiles), len(profiles), 1)
    errors = (pairs.distances(profiles, profiles) - true)[row, column] / pairs.unit
    logits = encoder.padded_logits(vectors, states, chosen.flatten(0, 1))
    found = {
        "unifrac_loss": DistanceLoss.WEIGHT * errors.square().mean(),
        "nucleotide_loss": F.cross_entropy(logits, batch.tokens[chosen] - FIRST_BASE),
    }
    return {"loss": found["unifrac_loss"] + found["nucleotide_loss"], **found}


def training_step(
    model: PretrainedModel, optimizer: torch.optim.Optimizer, batches: Sequence[Labelled]
) -> dict[str, float]:
    """Forward and backward of each batch, and one optimizer step.

    Args:
        model: in training mode.
        optimizer: of the model's parameters.
        batches: their gradients are averaged.

    Returns:
        The losses of the step, averaged.
    """
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, float] = {}
    for batch, true in batches:
        found = losses(model, batch, *mask_nucleotides(batch.tokens), true)
        (found["loss"] / len(batches)).backward()
        for name in list(found):  # popped, or the next batch's graph would lie beside this one
            sums[name] = sums.get(name, 0.0) + found.pop(name).item() / len(batches)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return sums
