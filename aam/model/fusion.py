"""Categorical covariates: embeddings, and how they join the ASVs of a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aam_kernels import Ragged

CATEGORY_DROPOUT = 0.1


class CategoricalEmbedding(nn.Module):
    """One embedding a column, concatenated; category 0 is unknown or missing."""

    def __init__(self, sizes: Sequence[int], dim: int) -> None:
        super().__init__()
        self.columns = nn.ModuleList(nn.Embedding(size + 1, dim) for size in sizes)
        self.dropout = nn.Dropout(CATEGORY_DROPOUT)
        self.width = dim * len(sizes)

    def forward(self, categories: Tensor) -> Tensor:
        """(samples, columns) int64 to (samples, columns * dim)."""
        parts = [column(categories[:, i]) for i, column in enumerate(self.columns)]
        return self.dropout(torch.cat(parts, dim=-1))


class ConcatFusion(nn.Module):
    """W[h; c] at every position."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.merge = nn.Linear(dim + width, dim)

    def forward(self, samples: Ragged, covariates: Tensor) -> Ragged:
        """Values (slots, dim) and covariates (samples, width) to values (slots, dim)."""
        spread = spread_over_rows(covariates, samples)
        merged = self.merge(torch.cat([samples.values, spread], dim=-1))
        return Ragged(merged, samples.offsets, samples.max_length)


class AddFusion(nn.Module):
    """h + Wc at every position."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, dim)

    def forward(self, samples: Ragged, covariates: Tensor) -> Ragged:
        """Values (slots, dim) and covariates (samples, width) to values (slots, dim)."""
        spread = spread_over_rows(self.project(covariates), samples)
        return Ragged(samples.values + spread, samples.offsets, samples.max_length)


FUSIONS = {"concat": ConcatFusion, "add": AddFusion}


def spread_over_rows(per_sample: Tensor, samples: Ragged) -> Tensor:
    """Repeat each sample's row for every one of its slots."""
    return torch.repeat_interleave(
        per_sample, samples.lengths.long(), dim=0, output_size=samples.values.shape[0]
    )
