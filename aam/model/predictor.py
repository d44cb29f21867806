"""The fine-tuned model: the base encoder, covariates, a stack of its own and a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from aam.model.encoder import CommunityEncoder, Encoded, make_stack
from aam.model.fusion import FUSIONS, CategoricalEmbedding
from aam.model.heads import HEADS
from aam_kernels import Ragged
from aam_kernels.modules import AttentionPool


@dataclass(frozen=True)
class PredictorShape:
    """What fixes the predictor's own weights; saved with every model."""

    outputs: int = 1
    category_sizes: tuple[int, ...] = ()
    categorical_embed_dim: int = 16
    categorical_fusion: str = "concat"
    target_head: str = "linear"
    target_norm: bool = True
    predict_counts: bool = False


class Predictor(nn.Module):
    """Predicts a metadata column (and, if asked, relative abundances) from a sample's ASVs."""

    def __init__(
        self,
        encoder: CommunityEncoder,
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
        encoded: Encoded,
        categories: Tensor | None = None,
        samples: slice = slice(None),
        *,
        first_row: int = 0,
    ) -> Tensor:
        """Predict the target.

        Args:
            encoded: the base encoder's view of a batch, or of some samples of a step.
            categories: (samples, columns) int64, 0 = unknown; needed if the model has columns.
                Of all samples of the step: the dropout of its parts is then that of the whole.
            samples: which of the step's samples these are.
            first_row: where their slots begin among all those of the step.

        Returns:
            (samples, outputs): a transformed number, or class logits.
        """
        hidden = encoded.samples
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
