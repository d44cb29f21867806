"""The fine-tuned model: base encoder, sample encoder, covariates, a stack of its own and a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aam.model.encoder import AsvEncoder, EncoderShape, make_stack
from aam.model.fusion import FUSIONS, CategoricalEmbedding
from aam.model.heads import HEADS
from aam_kernels import Ragged
from aam_kernels.modules import AttentionPool


@dataclass(frozen=True)
class PredictorShape:
    """What fixes the predictor's own weights; saved with every model."""

    outputs: int = 1
    count_embedding: str = "none"
    category_sizes: tuple[int, ...] = ()
    categorical_embed_dim: int = 16
    categorical_fusion: str = "concat"
    target_head: str = "linear"
    target_norm: bool = True
    predict_counts: bool = False


class SampleEncoder(nn.Module):
    """A sample's ASV vectors, each seen in the light of the others.

    Vectors of a pretrained base are nearly equal, so they are standardised first: by the mean and
    spread of the training part's slots, which are saved with the model.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, shape: EncoderShape, count_embedding: str, kernels: dict[str, Any]) -> None:
        super().__init__()
        dim = shape.embedding_dim
        self.count_embedding = count_embedding
        width = {"none": 0, "add": dim, "concat": dim, "film": 2 * dim}[count_embedding]
        if width:
            self.count_projection = nn.Linear(1, width)
        if count_embedding == "concat":
            self.count_merge = nn.Linear(2 * dim, dim)
        self.stack = make_stack(shape, kernels, shape.dropout)
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
        """Encode samples.

        Args:
            vectors: (asvs, dim) of the base encoder.
            slots: values (slots,) int64, the row of `vectors` in each slot of a sample.
            counts: (slots,) reads.
            first_row: where these slots begin among all those of a step.

        Returns:
            Values (slots, dim).
        """
        x = ((vectors - self.mean) / self.spread)[slots.values]
        if self.count_embedding != "none":
            count = self.count_projection(torch.log1p(counts.to(x.dtype))[:, None])
            if self.count_embedding == "add":
                x = x + count
            elif self.count_embedding == "concat":
                x = self.count_merge(torch.cat([x, count], dim=-1))
            else:
                scale, shift = count.chunk(2, dim=-1)
                x = x * (1 + scale) + shift
        return self.stack(slots.with_values(x), first_row)


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
        self.encoder = encoder
        self.shape = shape
        kernels = {"impl": impl, "recompute": recompute}
        dim, dropout = encoder.shape.embedding_dim, encoder.shape.dropout
        self.sample_encoder = SampleEncoder(encoder.shape, shape.count_embedding, kernels)
        if shape.category_sizes:
            self.categories = CategoricalEmbedding(
                shape.category_sizes, shape.categorical_embed_dim
            )
            self.fusion = FUSIONS[shape.categorical_fusion](dim, self.categories.width)
        self.stack = make_stack(encoder.shape, kernels, dropout)
        self.pool = AttentionPool(dim, impl=impl)
        self.norm = nn.LayerNorm(dim) if shape.target_norm else nn.Identity()
        self.head = HEADS[shape.target_head](dim, shape.outputs)
        if shape.predict_counts:
            self.count_stack = make_stack(encoder.shape, kernels, dropout)
            self.count_head = nn.Linear(dim, 1)

    def forward(
        self,
        hidden: Ragged,
        categories: Tensor | None = None,
        samples: slice = slice(None),
        *,
        first_row: int = 0,
    ) -> Tensor:
        """Predict the target.

        Args:
            hidden: values (slots, dim), the sample encoder's output for some samples of a step.
            categories: (samples, columns) int64, 0 = unknown; needed if the model has columns.
                Of all samples of the step: the dropout of its parts is then that of the whole.
            samples: which of the step's samples these are.
            first_row: where their slots begin among all those of the step.

        Returns:
            (samples, outputs): a transformed number, or class logits.
        """
        if self.shape.category_sizes:
            assert categories is not None
            hidden = self.fusion(hidden, self.categories(categories)[samples])
        return self.head(self.norm(self.pool(self.stack(hidden, first_row))))

    def count_logits(self, samples: Ragged, first_row: int = 0) -> Tensor:
        """Logits of the relative abundances, (slots,): their softmax over a sample predicts it."""
        return self.count_head(self.count_stack(samples, first_row).values)[:, 0]


def category_codes(values: Sequence[str | None], classes: Sequence[str]) -> list[int]:
    """Codes 1..N of the sorted classes; 0 for unknown or missing."""
    code = {name: i + 1 for i, name in enumerate(classes)}
    return [0 if value is None else code.get(value, 0) for value in values]
