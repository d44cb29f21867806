"""Launchers of the half-layer experiment."""

from __future__ import annotations
import math
import torch
import triton
from torch import Tensor
from aam_kernels._runtime.configurations import Configuration, launch, round_half_up
from aam_kernels._runtime.dropout import drop_below
from aam_kernels.encoder_layer.weights import EncoderLayerWeights
from profiling.half_layer import feed_forward_half, half_layer


def run_half_layer(
    x: Tensor,
    offsets: Tensor,
    weights: EncoderLayerWeights,
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
    max_length: int,
    chosen: Configuration,
    *,
    whole: bool,
    programs: int,
) -> Tensor:
    out = torch.empty_like(x)
    dim = x.shape[1]
    chunk = chosen.meta["CHUNK"]
    scratch = None
    if not chosen.meta["RESIDENT"]:
        scratch = x.new_empty(programs, 2, chosen.meta["LONGEST"], dim)
    seed = seed if dropout_p > 0.0 else None
    launch(
        half_layer,
        programs,
        x,
        out,
        scratch,
        offsets,
        *weights,
        seed,
        offsets.shape[0] - 1,
        (dim // num_heads) ** -0.5 / math.log(2),
        drop_below(dropout_p),
        1.0 / (1.0 - dropout_p),
        HEADS=num_heads,
        HEAD_DIM=dim // num_heads,
        HIDDEN=weights.ffn_in_weight.shape[0] if whole else 0,
        CHUNKS=triton.cdiv(max_length, chunk),
        DROPOUT=dropout_p > 0.0,
        ROUND_HALF_UP=round_half_up(x.dtype),
        configuration=chosen,
    )
    return out


def run_feed_forward_half(mid, offsets, weights, dropout_p, seed, chosen):
    out = torch.empty_like(mid)
    launch(
        feed_forward_half,
        triton.cdiv(mid.shape[0], chosen.meta["BLOCK_ROWS"]),
        mid,
        out,
        offsets,
        *weights[6:],
        seed if dropout_p > 0 else None,
        offsets.shape[0] - 1,
        drop_below(dropout_p),
        1.0 / (1.0 - dropout_p),
        D=mid.shape[1],
        HIDDEN=weights.ffn_in_weight.shape[0],
        DROPOUT=dropout_p > 0.0,
        ROUND_HALF_UP=round_half_up(mid.dtype),
        configuration=chosen,
    )
    return out
