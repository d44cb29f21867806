"""From the nucleotides of an ASV to its vector, and to the nucleotides that were masked.

Two paths see a sequence. The *wide path* adds up a vector for each base at each position, as a
perceptron on one-hot bases does: it learns clades in a minute. The *stack* is a transformer on
`aam_kernels`, whose pooled output joins through a gate that starts at zero, so that the whole is
never below its cheap part. Everything is ragged: no sequence is padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aam_kernels import Ragged
from aam_kernels.modules import AttentionPool, TransformerEncoder

VOCABULARY = 7  # pad, A, C, G, T, START, MASK
MASK = 6


@dataclass(frozen=True)
class EncoderShape:
    """What fixes the weights' shapes, as in `aam.config.ModelOptions`; saved with every model."""

    encoder: str = "transformer"
    embedding_dim: int = 128
    wide_dim: int = 512
    num_heads: int = 4
    num_layers: int = 2
    ffn_dim: int | None = None
    dropout: float = 0.1
    max_bp: int = 150


@dataclass(frozen=True)
class EncodedAsvs:
    """What the encoder knows of some ASVs."""

    vectors: Tensor  # (asvs, dim)
    hidden: Tensor | None  # (nucleotides, dim), the stack's output; None without a stack


def make_stack(shape: EncoderShape, impl: str, recompute: bool) -> TransformerEncoder:
    """A pre-norm transformer stack of the shape's width."""
    return TransformerEncoder(
        shape.embedding_dim, shape.num_heads, shape.num_layers, ffn_dim=shape.ffn_dim,
        dropout=shape.dropout, impl=impl, recompute=recompute,
    )  # fmt: skip


class WidePath(nn.Module):
    """Sum of a vector for each base at each position -> LayerNorm -> GELU -> Linear."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.sites = nn.Parameter(torch.empty((shape.max_bp + 1) * VOCABULARY, shape.wide_dim))
        self.norm = nn.LayerNorm(shape.wide_dim)
        self.project = nn.Linear(shape.wide_dim, shape.embedding_dim)
        nn.init.normal_(self.sites, std=0.1)
        with torch.no_grad():
            self.sites.view(-1, VOCABULARY, shape.wide_dim)[:, MASK] = 0.0

    def forward(self, tokens: Ragged) -> Tensor:
        """Tokens of some ASVs, one row each, to (asvs, dim)."""
        offsets = tokens.offsets[:-1].long()
        hidden = F.embedding_bag(sites_of(tokens), self.sites, offsets, mode="sum")
        return self.project(F.gelu(self.norm(hidden)))


class AsvEncoder(nn.Module):
    """The pretrained base: nucleotides of an ASV to one vector.

    Args:
        shape: widths and variants.
        impl: attention implementation, as in `aam_kernels`.
        recompute: keep only layer inputs for the backward pass.
    """

    def __init__(self, shape: EncoderShape, *, impl: str = "auto", recompute: bool = True) -> None:
        super().__init__()
        self.shape = shape
        dim, positions = shape.embedding_dim, shape.max_bp + 1
        self.wide = WidePath(shape)
        # What base stands at a position, given the ASV's vector: a line for each base and place.
        self.site_head = nn.Parameter(torch.zeros(positions, 4, dim))
        self.site_bias = nn.Parameter(torch.zeros(positions, 4))
        if self.has_stack:
            self.token_embedding = nn.Embedding(VOCABULARY, dim)
            self.position_embedding = nn.Embedding(positions, dim)
            # A sum of token and position embeddings, averaged over a sequence, says how many of
            # each base there are, not where: the stack would first have to learn to tell.
            self.site_embedding = nn.Embedding(positions * VOCABULARY, dim)
            self.stack = make_stack(shape, impl, recompute)
            self.pool = AttentionPool(dim, impl=impl)
            self.gate = nn.Parameter(torch.zeros(dim))
            self.nucleotide_head = nn.Linear(dim, 4)

    @property
    def has_stack(self) -> bool:
        """Whether there is a transformer beside the wide path."""
        return self.shape.encoder == "transformer"

    def forward(self, tokens: Ragged, *, first_row: int = 0, stack: bool = True) -> EncodedAsvs:
        """Encode some ASVs.

        Args:
            tokens: values (nucleotides,) uint8, one row an ASV.
            first_row: where these tokens begin among all those of a step: its dropout is that of
                the whole, whatever the micro-batches.
            stack: False leaves the transformer out.
        """
        vectors = self.wide(tokens)
        if not (stack and self.has_stack):
            return EncodedAsvs(vectors, None)
        embedded = F.embedding(sites_of(tokens), self.nucleotide_vectors())
        hidden = self.stack(tokens.with_values(embedded), first_row)
        return EncodedAsvs(vectors + self.gate * self.pool(hidden), hidden.values)

    def nucleotide_vectors(self) -> Tensor:
        """What every token is at every position, (positions * tokens, dim).

        There are a thousand of them and a hundred thousand nucleotides in a batch: adding the
        embeddings here and gathering once saves two passes over the batch each way.
        """
        token, position = self.token_embedding.weight, self.position_embedding.weight
        return (token + position[:, None]).flatten(0, 1) + self.site_embedding.weight

    def nucleotide_logits(self, encoded: EncodedAsvs, tokens: Ragged, places: Tensor) -> Tensor:
        """Logits of A, C, G and T, (masked, 4), at some places.

        Args:
            encoded: of the tokens.
            tokens: the rows that hold the places.
            places: (masked,) int64, ascending, in the values of the tokens.
        """
        row = torch.searchsorted(tokens.offsets[1:].long(), places, right=True)
        position = places - tokens.offsets[row].long()
        logits = torch.einsum("md,mbd->mb", encoded.vectors[row], self.site_head[position])
        logits = logits + self.site_bias[position]
        if encoded.hidden is not None:
            logits = logits + self.nucleotide_head(encoded.hidden[places])
        return logits


def positions_in_rows(ragged: Ragged) -> Tensor:
    """Position of every value in its row, (total,) int64."""
    total, starts = ragged.values.shape[0], ragged.offsets[:-1].long()
    start = torch.repeat_interleave(starts, ragged.lengths.long(), output_size=total)
    return torch.arange(total, device=ragged.values.device) - start


def sites_of(tokens: Ragged) -> Tensor:
    """Number of each token at its position in its row, (nucleotides,) int64."""
    return positions_in_rows(tokens) * VOCABULARY + tokens.values
