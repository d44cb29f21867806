"""`encoder_layer`: checks the arguments once and hands them to the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from aam_kernels._runtime.dropout import resolve_seed
from aam_kernels.encoder_layer import reference
from aam_kernels.encoder_layer.reference import EncoderLayerWeights


def encoder_layer(
    x: Tensor,
    offsets: Tensor,
    weights: EncoderLayerWeights,
    *,
    num_heads: int,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    max_length: int | None = None,
    recompute: bool = True,
    impl: str = "auto",
) -> Tensor:
    """A pre-norm transformer encoder layer over ragged sequences."""
    return reference.encoder_layer(
        x, offsets, weights, num_heads, dropout_p, resolve_seed(seed, dropout_p, x.device)
    )
