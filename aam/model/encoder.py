"""From nucleotides to ASV vectors, from ASV vectors to samples, from samples to distances.

Everything is ragged: a batch holds each distinct ASV once, samples gather from its encodings.
Shapes: ``asvs`` distinct ASVs of the batch, ``slots`` (sample, ASV) pairs, ``samples`` samples,
``dim`` the width of the stacks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aam_kernels import Ragged
from aam_kernels.modules import AttentionPool, TransformerEncoder

VOCABULARY = 7  # pad, A, C, G, T, START, MASK
LINEAGE_FEATURES = 256
SLOT_POSITIONS = 5  # special slots that imported checkpoints keep beyond the token limit


@dataclass(frozen=True)
class EncoderShape:
    """What fixes the weights' shapes; saved with every model.

    Attributes mean what the options of the same name in `aam.config.ModelOptions` mean.
    """

    embedding_dim: int = 128
    num_heads: int = 4
    num_layers: int = 4
    ffn_dim: int | None = None
    dropout: float = 0.1
    count_embedding: str = "none"
    sample_position: str = "none"
    sample_embedding: str = "lineages"
    nucleotide_embedding: str = "site"
    distance_scale: float = 0.0
    max_bp: int = 150
    token_limit: int = 1024


@dataclass(frozen=True)
class Encoded:
    """What the base encoder knows of a batch."""

    asv_vectors: Tensor  # (asvs, dim), one row per distinct ASV
    asv_slots: Ragged  # values (slots, dim): the ASV vectors of each sample
    samples: Ragged  # values (slots, dim): the sample encoder's output


def make_stack(shape: EncoderShape, kernels: dict[str, Any], dropout: float) -> TransformerEncoder:
    """A pre-norm transformer stack of the shape's width."""
    return TransformerEncoder(
        shape.embedding_dim,
        shape.num_heads,
        shape.num_layers,
        ffn_dim=shape.ffn_dim,
        dropout=dropout,
        **kernels,
    )


class AsvEncoder(nn.Module):
    """Nucleotides of an ASV to one vector: embeddings, stack, attention pooling."""

    def __init__(self, shape: EncoderShape, kernels: dict[str, Any]) -> None:
        super().__init__()
        dim = shape.embedding_dim
        self.token_embedding = nn.Embedding(VOCABULARY, dim)
        self.position_embedding = nn.Embedding(shape.max_bp + 1, dim)
        if shape.nucleotide_embedding == "site":
            # A sum of token and position embeddings, averaged over a sequence, says how many of
            # each base there are, not where: the stack would first have to learn to tell.
            self.site_embedding = nn.Embedding((shape.max_bp + 1) * VOCABULARY, dim)
        self.stack = make_stack(shape, kernels, shape.dropout)
        self.pool = AttentionPool(dim, impl=kernels.get("impl", "auto"))
        self.nucleotide_head = nn.Linear(dim, VOCABULARY)

    def forward(self, tokens: Ragged, *, dropout: bool = True, first_row: int = 0) -> Ragged:
        """Encode every nucleotide.

        Args:
            tokens: values (nucleotides,) uint8, one row an ASV.
            dropout: False switches it off in training mode too.
            first_row: where these tokens begin among all those of a step: its dropout is that of
                the whole, whatever the parts.

        Returns:
            Values (nucleotides, dim).
        """
        sites = positions_in_rows(tokens) * VOCABULARY + tokens.values
        embedded = nn.functional.embedding(sites, self.nucleotide_vectors())
        hidden = Ragged(embedded, tokens.offsets, tokens.max_length)
        if dropout or not self.training:
            return self.stack(hidden, first_row)
        self.stack.eval()
        try:
            return self.stack(hidden, first_row)
        finally:
            self.stack.train()

    def nucleotide_vectors(self) -> Tensor:
        """What every token is at every position, (positions * tokens, dim).

        There are a thousand of them and a hundred thousand nucleotides in a batch: adding the
        embeddings here and gathering once saves two passes over the batch each way.
        """
        token, position = self.token_embedding.weight, self.position_embedding.weight
        vectors = (token + position[:, None]).flatten(0, 1)
        if hasattr(self, "site_embedding"):
            vectors = vectors + self.site_embedding.weight
        return vectors


class SampleEncoder(nn.Module):
    """A sample's ASV vectors, each seen in the light of the others."""

    def __init__(self, shape: EncoderShape, kernels: dict[str, Any], dropout: float) -> None:
        super().__init__()
        dim = shape.embedding_dim
        self.count_embedding = shape.count_embedding
        width = {"none": 0, "add": dim, "concat": dim, "film": 2 * dim}[shape.count_embedding]
        if width:
            self.count_projection = nn.Linear(1, width)
        if shape.count_embedding == "concat":
            self.count_merge = nn.Linear(2 * dim, dim)
        if shape.sample_position == "slot":
            self.position_embedding = nn.Embedding(shape.token_limit + SLOT_POSITIONS, dim)
        self.stack = make_stack(shape, kernels, dropout)

    def forward(self, asv_slots: Ragged, counts: Tensor, first_row: int = 0) -> Ragged:
        """Encode samples.

        Args:
            asv_slots: values (slots, dim), ASV vectors of each sample.
            counts: (slots,) reads.
            first_row: where these slots begin among all those of a step.

        Returns:
            Values (slots, dim).
        """
        x = asv_slots.values
        if self.count_embedding != "none":
            count = self.count_projection(torch.log1p(counts.to(x.dtype))[:, None])
            if self.count_embedding == "add":
                x = x + count
            elif self.count_embedding == "concat":
                x = self.count_merge(torch.cat([x, count], dim=-1))
            else:
                scale, shift = count.chunk(2, dim=-1)
                x = x * (1 + scale) + shift
        if hasattr(self, "position_embedding"):
            x = x + self.position_embedding(positions_in_rows(asv_slots))
        return self.stack(Ragged(x, asv_slots.offsets, asv_slots.max_length), first_row)


class UnifracEncoder(nn.Module):
    """Samples to the embeddings whose distances are UniFrac distances.

    UniFrac asks which lineages are present. The mean and the maximum over a sample's ASVs of a
    projection of their vectors can say that; an attention-weighted mean alone cannot.
    """

    def __init__(self, shape: EncoderShape, kernels: dict[str, Any], dropout: float) -> None:
        super().__init__()
        dim = shape.embedding_dim
        self.stack = make_stack(shape, kernels, dropout)
        self.pool = AttentionPool(dim, impl=kernels.get("impl", "auto"))
        self.lineages = shape.sample_embedding == "lineages"
        width = dim
        if self.lineages:
            self.mean_projection = nn.Linear(dim, LINEAGE_FEATURES, bias=False)
            self.max_projection = nn.Linear(dim, LINEAGE_FEATURES, bias=False)
            width += 2 * LINEAGE_FEATURES
            # One size for every sample: while the encoder still changes fast, the common scale of
            # all distances would otherwise change faster than s can follow.
            self.norm = nn.LayerNorm(width)
        self.width = width
        self.faith_head = nn.Linear(width, 1)
        self.log_scale = nn.Parameter(
            torch.tensor(math.log(shape.distance_scale or 10.0)),
            requires_grad=not shape.distance_scale,
        )

    def forward(self, encoded: Encoded, slots: Ragged, first_row: int = 0) -> Tensor:
        """Sample embeddings z, (samples, width)."""
        pooled = self.pool(self.stack(encoded.samples, first_row))
        if not self.lineages:
            return pooled
        present = self.mean_projection(encoded.asv_vectors)[slots.values]
        strongest = self.max_projection(encoded.asv_vectors)[slots.values]
        lengths = slots.lengths
        parts = [
            pooled,
            torch.segment_reduce(present, "mean", lengths=lengths, unsafe=True),
            torch.segment_reduce(strongest, "max", lengths=lengths, unsafe=True),
        ]
        return self.norm(torch.cat(parts, dim=-1))

    def distances(self, z: Tensor, others: Tensor | None = None) -> Tensor:
        """Predicted distances tanh(|z_i - z_j| / s) between embeddings.

        Args:
            z: (n, width).
            others: (m, width); z itself if not given, the diagonal is then 0.
        """
        predicted = torch.tanh(euclidean(z, others) / self.log_scale.exp())
        if others is None:
            predicted = predicted * (1 - torch.eye(len(z), dtype=z.dtype, device=z.device))
        return predicted

    @torch.no_grad()
    def calibrate(self, z: Tensor, mean_distance: float) -> None:
        """Set s so that the mean predicted distance of these samples is `mean_distance`."""
        if not self.log_scale.requires_grad:
            return
        row, column = torch.triu_indices(len(z), len(z), 1)
        distance = euclidean(z)[row, column].double()
        low, high = -20.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            if torch.tanh(distance / math.exp(middle)).mean() > mean_distance:
                low = middle
            else:
                high = middle
        self.log_scale.fill_((low + high) / 2)


class CommunityEncoder(nn.Module):
    """The pretrained base: ASV, sample and UniFrac encoder."""

    def __init__(
        self,
        shape: EncoderShape,
        *,
        impl: str = "auto",
        recompute: bool = True,
        sample_dropout: float = 0.0,
    ) -> None:
        """Build the encoder.

        Args:
            shape: widths and variants.
            impl: attention implementation, as in `aam_kernels`.
            recompute: keep only layer inputs for the backward pass.
            sample_dropout: dropout of the sample and UniFrac stacks; 0 where distances are
                learned, because noise that differs between samples would be used as distance.
        """
        super().__init__()
        self.shape = shape
        kernels = {"impl": impl, "recompute": recompute}
        self.asv_encoder = AsvEncoder(shape, kernels)
        self.sample_encoder = SampleEncoder(shape, kernels, sample_dropout)
        self.unifrac_encoder = UnifracEncoder(shape, kernels, sample_dropout)

    def encode_asvs(self, tokens: Ragged, *, dropout: bool = True, first_row: int = 0) -> Tensor:
        """One vector an ASV, (asvs, dim); arguments as in `AsvEncoder.forward`."""
        return self.asv_encoder.pool(self.asv_encoder(tokens, dropout=dropout, first_row=first_row))

    def encode_samples(
        self, asv_vectors: Tensor, slots: Ragged, counts: Tensor, first_row: int = 0
    ) -> Encoded:
        """Gather each sample's ASV vectors and encode the samples.

        Args:
            asv_vectors: (asvs, dim).
            slots: values (slots,) int64, the row of `asv_vectors` in each slot.
            counts: (slots,) reads.
            first_row: where these slots begin among all those of a step.
        """
        gathered = Ragged(asv_vectors[slots.values], slots.offsets, slots.max_length)
        return Encoded(asv_vectors, gathered, self.sample_encoder(gathered, counts, first_row))

    def embed(
        self, asv_vectors: Tensor, slots: Ragged, counts: Tensor, first_row: int = 0
    ) -> Tensor:
        """Sample embeddings z, (samples, width); arguments as in `encode_samples`."""
        encoded = self.encode_samples(asv_vectors, slots, counts, first_row)
        return self.unifrac_encoder(encoded, slots, first_row)


def positions_in_rows(ragged: Ragged) -> Tensor:
    """Position of every value in its row, (total,) int64."""
    lengths = ragged.lengths.long()
    total = ragged.values.shape[0]
    start = torch.repeat_interleave(ragged.offsets[:-1].long(), lengths, output_size=total)
    return torch.arange(total, device=ragged.values.device) - start


def euclidean(z: Tensor, others: Tensor | None = None) -> Tensor:
    """Distances sqrt(max(|z_i - z_j|^2, 1e-8)); differences first, so near pairs are exact."""
    difference = z[:, None] - (z if others is None else others)[None]
    return difference.square().sum(-1).clamp_min(1e-8).sqrt()
