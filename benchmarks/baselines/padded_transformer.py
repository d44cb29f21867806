"""The same model as plain torch would be written: padded, masked, every slot encoded.

`nn.TransformerEncoder` with a key padding mask over tensors of fixed size: every sample has
`token_limit` ASV slots and every ASV as many positions as the longest of the batch. Slots of no ASV
are computed like the others and masked where they would count. The form is the reference's: token
plus position embedding, stack, attention pooling per slot; slot position, sample stack; UniFrac
stack, attention pooling; nucleotides are masked in the batch itself. Kind to the baseline:
sequences are padded to the longest of the batch and not to `max_bp`, and the nucleotide head runs
at masked positions only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PAD, MASK, VOCABULARY = 0, 6, 7
FIRST_BASE, LAST_BASE = 1, 4
EXTRA_POSITIONS = 5
STACKS = ("nucleotide", "sample", "unifrac")


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


def pad_batch(
    token_values: Tensor,
    token_offsets: Tensor,
    slot_values: Tensor,
    slot_offsets: Tensor,
    token_limit: int,
) -> PaddedBatch:
    """Spread a packed batch (distinct ASVs, and slots that name them) over fixed slots.

    Args:
        token_values: (total_tokens,) tokens of the distinct ASVs.
        token_offsets: (distinct + 1,).
        slot_values: (slots,) row of the distinct ASVs in each slot.
        slot_offsets: (samples + 1,).
        token_limit: slots a sample.

    Raises:
        ValueError: a sample has more than `token_limit` ASVs.
    """
    asvs, counts = token_offsets.diff().long(), slot_offsets.diff().long()
    if int(counts.max()) > token_limit:
        raise ValueError(f"a sample has {int(counts.max())} ASVs, token_limit is {token_limit}")
    distinct = torch.zeros(len(asvs), int(asvs.max()), dtype=torch.long)
    distinct[torch.arange(distinct.shape[1]) < asvs[:, None]] = token_values.long()
    present = torch.arange(token_limit) < counts[:, None]
    tokens = torch.zeros(len(counts), token_limit, distinct.shape[1], dtype=torch.long)
    tokens[present] = distinct[slot_values]
    return PaddedBatch(tokens, present)


class Stack(nn.Module):
    """`nn.TransformerEncoderLayer`s, each checkpointed on request, and a last LayerNorm."""

    def __init__(self, dim: int, heads: int, layers: int, dropout: float, checkpointed: bool):
        super().__init__()
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
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

    def __init__(self, dim: int):
        super().__init__()
        self.score = nn.Linear(dim, 1, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """(rows, length, dim), (rows, length) -> (rows, dim)."""
        scores = self.score(x).squeeze(-1) / math.sqrt(x.shape[-1])
        weights = scores.masked_fill(padding, float("-inf")).softmax(-1)
        return self.norm(torch.einsum("rl,rld->rd", weights, x))


class PaddedTransformer(nn.Module):
    """Nucleotides -> ASVs -> sample embedding, padded at both levels."""

    def __init__(
        self,
        *,
        dim: int = 128,
        heads: int = 4,
        layers: int = 4,
        dropout: float = 0.1,
        max_bp: int = 150,
        token_limit: int = 1024,
        checkpointed: Collection[str] = STACKS,
    ):
        """Build the model.

        Args:
            dim: width of every stack.
            heads: attention heads.
            layers: layers of each of the three stacks.
            dropout: everywhere, the sample and UniFrac stacks included.
            max_bp: bases of the position embedding, START not counted.
            token_limit: slots a sample.
            checkpointed: stacks whose layers are recomputed in backward, of `STACKS`.
        """
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, dim)
        self.position_embedding = nn.Embedding(max_bp + 1, dim)
        self.slot_embedding = nn.Embedding(token_limit + EXTRA_POSITIONS, dim)
        self.stacks = nn.ModuleDict(
            {name: Stack(dim, heads, layers, dropout, name in checkpointed) for name in STACKS}
        )
        self.asv_pool, self.sample_pool = MaskedPool(dim), MaskedPool(dim)
        self.nucleotide_head = nn.Linear(dim, VOCABULARY)

    def forward(self, tokens: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Encode samples.

        Args:
            tokens: (samples, slots, length) int64.
            present: (samples, slots) bool.

        Returns:
            Sample embeddings (samples, dim) and nucleotide states (samples, slots, length, dim).
        """
        samples, slots, length = tokens.shape
        rows = tokens.flatten(0, 1)  # (samples * slots, length)
        padding = _keep_one(rows == PAD)
        x = self.token_embedding(rows) + self.position_embedding.weight[:length]
        states = self.stacks["nucleotide"](x, padding)
        asvs = self.asv_pool(states, padding).view(samples, slots, -1)
        padding = ~present
        x = self.stacks["sample"](asvs + self.slot_embedding.weight[:slots], padding)
        embedding = self.sample_pool(self.stacks["unifrac"](x, padding), padding)
        return embedding, states.view(samples, slots, length, -1)


def _keep_one(padding: Tensor) -> Tensor:
    """Let rows of padding alone attend to their first position: a softmax over nothing is NaN."""
    padding = padding.clone()
    padding[:, 0] &= ~padding.all(-1)
    return padding


def mask_nucleotides(tokens: Tensor, probability: float = 0.15) -> tuple[Tensor, Tensor]:
    """Replace bases by MASK at random: (masked tokens, where)."""
    bases = (tokens >= FIRST_BASE) & (tokens <= LAST_BASE)
    chosen = bases & (torch.rand(tokens.shape) < probability)
    return tokens.masked_fill(chosen, MASK), chosen


def predicted_distances(embedding: Tensor, scale: float = 10.0) -> Tensor:
    """tanh(|z_i - z_j| / scale), (samples, samples)."""
    difference = embedding[:, None] - embedding[None]
    return torch.tanh(difference.square().sum(-1).clamp_min(1e-8).sqrt() / scale)


Labelled = tuple[PaddedBatch, Tensor]
"""Samples and their true distances, (samples, samples)."""


def training_step(
    model: PaddedTransformer,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Labelled],
    *,
    unifrac_weight: float = 10.0,
) -> dict[str, float]:
    """Forward and backward of each batch, and one optimizer step.

    Args:
        model: in training mode.
        optimizer: of the model's parameters.
        batches: their gradients are averaged.
        unifrac_weight: weight of the distance loss beside the nucleotide loss.

    Returns:
        The losses of the step, averaged.
    """
    optimizer.zero_grad(set_to_none=True)
    sums = {"loss": 0.0, "unifrac_loss": 0.0, "nucleotide_loss": 0.0}
    for batch, distances in batches:
        tokens, chosen = mask_nucleotides(batch.tokens)
        embedding, states = model(tokens, batch.present)
        row, column = torch.triu_indices(len(embedding), len(embedding), 1)
        errors = (predicted_distances(embedding) - distances.to(embedding.dtype))[row, column]
        unifrac = errors.square().mean()
        nucleotide = F.cross_entropy(model.nucleotide_head(states[chosen]), batch.tokens[chosen])
        loss = unifrac_weight * unifrac + nucleotide
        (loss / len(batches)).backward()
        for name, value in zip(sums, (loss, unifrac, nucleotide), strict=True):
            sums[name] += value.item() / len(batches)
        del states, embedding, loss  # or the next batch's would lie beside them
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return sums
