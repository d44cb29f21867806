"""The fine-tuned model: base encoder, sample encoder, covariates, a stack of its own and a head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aam.model.encoder import AsvEncoder, EncoderShape, make_stack
from aam_kernels import Ragged
from aam_kernels.modules import AttentionPool

CATEGORY_DROPOUT = 0.1


@dataclass(frozen=True)
class PredictorShape:
    """What fixes the predictor's own weights; saved with every model."""

    outputs: int = 1
    count_embedding: str = "none"
    category_sizes: tuple[int, ...] = ()
    categorical_embed_dim: int = 16
    categorical_fusion: str = "concat"
    target_head: str = "linear"
    predict_counts: bool = False


class SampleEncoder(nn.Module):
    """A sample's ASV vectors, each seen in the light of the others.

    Vectors of a pretrained base are nearly equal, so they are standardised first: by the mean and
    spread of the training part's slots, which are saved with the model.
    """

    mean: Tensor
    spread: Tensor

    def __init__(
        self, shape: EncoderShape, count_embedding: str, impl: str = "auto", recompute: bool = True
    ) -> None:
        super().__init__()
        dim = shape.embedding_dim
        self.count_projection = nn.Linear(1, dim) if count_embedding == "add" else None
        self.stack = make_stack(shape, impl, recompute)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(dim))

    @torch.no_grad()
    def standardise_by(self, vectors: Tensor, times: Tensor) -> None:
        """Take mean and spread from ASV vectors (asvs, dim) that occur `times` (asvs,) each."""
        share = (times / times.sum())[:, None]
        self.mean.copy_((share * vectors).sum(0))
        variance = (share * (vectors - self.mean).square()).sum(0)
        self.spread.copy_(variance.sqrt().clamp_min(1e-6))

    def forward(self, vectors: Tensor, slots: Ragged, counts: Tensor, first_row: int = 0) -> Ragged:
        """Encode samples, to values (slots, dim).

        Args:
            vectors: (asvs, dim) of the base encoder.
            slots: values (slots,) int64, the row of `vectors` in each slot of a sample.
            counts: (slots,) reads.
            first_row: where these slots begin among all those of a step.
        """
        x = ((vectors - self.mean) / self.spread)[slots.values]
        if self.count_projection is not None:
            x = x + self.count_projection(torch.log1p(counts.to(x.dtype))[:, None])
        return self.stack(slots.with_values(x), first_row)


class CategoricalEmbedding(nn.Module):
    """One embedding a categorical column, concatenated; category 0 is unknown or missing."""

    def __init__(self, sizes: Sequence[int], dim: int) -> None:
        super().__init__()
        self.columns = nn.ModuleList(nn.Embedding(size + 1, dim) for size in sizes)
        self.dropout = nn.Dropout(CATEGORY_DROPOUT)

    def forward(self, categories: Tensor) -> Tensor:
        """(samples, columns) int64 to covariates (samples, columns * dim)."""
        parts = [column(categories[:, i]) for i, column in enumerate(self.columns)]
        return self.dropout(torch.cat(parts, dim=-1))


class Fusion(nn.Module):
    """A sample's covariates c join each of its slots h: W[h; c] (concat) or h + Wc (add)."""

    def __init__(self, kind: str, dim: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "concat":
            self.merge = nn.Linear(dim + width, dim)
        else:
            self.project = nn.Linear(width, dim)

    def forward(self, samples: Ragged, covariates: Tensor) -> Ragged:
        """Values (slots, dim) and covariates (samples, width) to values (slots, dim)."""
        own = covariates if self.kind == "concat" else self.project(covariates)
        total, times = samples.values.shape[0], samples.lengths.long()
        own = torch.repeat_interleave(own, times, dim=0, output_size=total)
        if self.kind == "concat":
            return samples.with_values(self.merge(torch.cat([samples.values, own], dim=-1)))
        return samples.with_values(samples.values + own)


class ResidualHead(nn.Module):
    """Linear plus MLP: the line that fits, and what bends around it."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, outputs)
        self.mlp = mlp(dim, outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """(samples, dim) to (samples, outputs)."""
        return self.linear(pooled) + self.mlp(pooled)


def mlp(dim: int, outputs: int) -> nn.Module:
    """Two layers with a GELU between them."""
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, outputs))


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "mlp": mlp,
    "linear+mlp": ResidualHead,
}


class Predictor(nn.Module):
    """Predicts a metadata column (and, if asked, relative abundances) from a sample's ASVs."""

    def __init__(
        self,
        encoder: AsvEncoder,
        shape: PredictorShape,
        *,
        impl: str = "auto",
        recompute: bool = True,
    ) -> None:
        super().__init__()
        self.encoder, self.shape = encoder, shape
        dim = encoder.shape.embedding_dim
        self.sample_encoder = SampleEncoder(encoder.shape, shape.count_embedding, impl, recompute)
        if shape.category_sizes:
            width = shape.categorical_embed_dim
            self.categories = CategoricalEmbedding(shape.category_sizes, width)
            self.fusion = Fusion(shape.categorical_fusion, dim, width * len(shape.category_sizes))
        self.stack = make_stack(encoder.shape, impl, recompute)
        self.pool = AttentionPool(dim, impl=impl)
        self.norm = nn.LayerNorm(dim)
        self.head = HEADS[shape.target_head](dim, shape.outputs)
        if shape.predict_counts:
            self.count_stack = make_stack(encoder.shape, impl, recompute)
            self.count_head = nn.Linear(dim, 1)

    def forward(
        self,
        hidden: Ragged,
        categories: Tensor | None = None,
        samples: slice = slice(None),
        *,
        first_row: int = 0,
    ) -> Tensor:
        """Predict the target, (samples, outputs): a transformed number, or class logits.

        Args:
            hidden: values (slots, dim), the sample encoder's output for some samples of a step.
            categories: (samples, columns) int64, 0 = unknown; needed if the model has columns.
                Of all samples of the step: the dropout of its parts is then that of the whole.
            samples: which of the step's samples these are.
            first_row: where their slots begin among all those of the step.
        """
        if self.shape.category_sizes:
            assert categories is not None
            fused = self.fusion(hidden, self.categories(categories)[samples])
            hidden = fused.with_values(fused.values.to(hidden.values.dtype))  # as before autocast
        return self.head(self.norm(self.pool(self.stack(hidden, first_row))))

    def count_logits(self, samples: Ragged, first_row: int = 0) -> Tensor:
        """Logits of the relative abundances, (slots,): their softmax over a sample predicts it."""
        return self.count_head(self.count_stack(samples, first_row).values)[:, 0]
