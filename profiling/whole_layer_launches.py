"""Launchers and configurations of `profiling.half_layer`, compared by `profiling.whole_layer`."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from aam_kernels._runtime.configurations import (
    Configuration,
    launch,
    round_half_up,
)
from aam_kernels._runtime.dropout import drop_below
from aam_kernels.encoder_layer.weights import EncoderLayerWeights
from profiling.ahead_of_time import vendor
from profiling.half_layer import feed_forward_half, half_layer
from profiling.half_layer_in_turn import half_layer_in_turn

ROWS, LENGTH, HEADS, DIM, HIDDEN = 8192, 151, 4, 128, 512
PROGRAMS = {"gfx942": 2 * 228, "sm_90": 2 * 132}


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
    """The attention half, or the whole layer, of dense x (total, D); rows past the last not set.

    ``programs`` share the sequences where keys and values go through a scratch.
    """
    out, dim, sequences = torch.empty_like(x), x.shape[1], offsets.shape[0] - 1
    seed = seed if dropout_p > 0.0 else None
    numbers = ((dim // num_heads) ** -0.5 / math.log(2), drop_below(dropout_p))
    numbers = (*numbers, 1.0 / (1.0 - dropout_p))
    constants = {
        "HEADS": num_heads, "HEAD_DIM": dim // num_heads, "DROPOUT": dropout_p > 0.0,
        "HIDDEN": weights.ffn_in_weight.shape[0] if whole else 0,
        "ROUND_HALF_UP": round_half_up(x.dtype),
    }  # fmt: skip
    if "RESIDENT" not in chosen.meta:
        rows = chosen.meta["BLOCK_ROWS"]
        tiles = triton.cdiv(max_length, rows)
        left = max_length - (tiles - 1) * rows
        launch(
            half_layer_in_turn, sequences, x, out, offsets, *weights, seed, *numbers,
            TILES=tiles, LAST=rows // 2 if left <= rows // 2 else rows,
            configuration=chosen, **constants,
        )  # fmt: skip
        return out
    scratch = None
    if chosen.meta["RESIDENT"]:
        programs = sequences
    else:
        scratch = x.new_empty(programs, 2, chosen.meta["LONGEST"], dim)
    launch(
        half_layer, programs, x, out, scratch, offsets, *weights, seed, sequences, *numbers,
        CHUNKS=triton.cdiv(max_length, chosen.meta["CHUNK"]), configuration=chosen, **constants,
    )  # fmt: skip
    return out


def run_feed_forward_half(
    mid: Tensor,
    offsets: Tensor,
    weights: EncoderLayerWeights,
    dropout_p: float,
    seed: Tensor | None,
    chosen: Configuration,
) -> Tensor:
    """The feed-forward half of dense mid (total, D); rows past the last sequence are not set."""
    out = torch.empty_like(mid)
    launch(
        feed_forward_half, triton.cdiv(mid.shape[0], chosen.meta["BLOCK_ROWS"]),
        mid, out, offsets, *weights[6:], seed if dropout_p > 0.0 else None,
        offsets.shape[0] - 1, drop_below(dropout_p), 1.0 / (1.0 - dropout_p),
        D=mid.shape[1], HIDDEN=weights.ffn_in_weight.shape[0], DROPOUT=dropout_p > 0.0,
        ROUND_HALF_UP=round_half_up(mid.dtype), configuration=chosen,
    )  # fmt: skip
    return out


def attention_candidates(architecture: str, everything: bool) -> list[Configuration]:
    """The form that suits the architecture, or all forms."""
    amd = vendor(architecture) == "amd"
    resident = ((True, 16, 32, 16), (True, 32, 32, 16), (True, 16, 64, 16), (True, 16, 32, 32))
    scratch = ((False, 16, 64, 16), (False, 32, 64, 16), (False, 32, 32, 16))
    metas = [
        {
            "RESIDENT": form, "PIN": amd, "LONGEST": 256, "CHUNK": chunk, "BLOCK_M": block,
            "BLOCK_ROWS": rows, "BLOCK_HIDDEN": 64,
        }
        for form, chunk, rows, block in (*resident, *scratch)
    ]  # fmt: skip
    in_turn = [
        ({"BLOCK_ROWS": rows, "BLOCK_HIDDEN": hidden}, warps)
        for rows, hidden, warps in ((64, 64, 4), (64, 32, 4), (128, 64, 8))
    ]
    a_warp_a_head = [(meta, 4) for meta in metas]
    found = a_warp_a_head + in_turn if amd else in_turn + a_warp_a_head
    if not everything:
        found = found[: len(resident) if amd else len(in_turn)]
    extra = {"matrix_instr_nonkdim": 16, "waves_per_eu": 2} if amd else {}
    chosen = [
        Configuration(meta, {"num_warps": warps, "num_stages": 1, **extra}) for meta, warps in found
    ]
    if amd:  # without a bound on registers: one wave a SIMD, where two would spill
        chosen.append(Configuration(chosen[0].meta, {**chosen[0].options, "waves_per_eu": 0}))
    return chosen


def feed_forward_candidates(architecture: str) -> list[Configuration]:
    """Tiles of rows against blocks of hidden features."""
    amd = vendor(architecture) == "amd"
    found = []
    for rows, hidden, warps in (
        (128, 32, 4), (64, 64, 4), (64, 32, 4), (128, 64, 8), (256, 32, 8)
    ):  # fmt: skip
        options = {"num_warps": warps, "num_stages": 1}
        if amd:
            options |= {"matrix_instr_nonkdim": 16, "waves_per_eu": 2}
        found.append(Configuration({"BLOCK_ROWS": rows, "BLOCK_HIDDEN": hidden}, options))
    return found
