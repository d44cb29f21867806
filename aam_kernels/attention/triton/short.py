"""Launches the kernels for sequences of few keys: `short_forward` and `short_backward`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import triton
from torch import Tensor

from aam_kernels._runtime.configurations import (
    AMD,
    Configuration,
    Tunable,
    configuration,
    dot_precision,
    launch,
    round_half_up,
)
from aam_kernels._runtime.dropout import drop_below
from aam_kernels._runtime.grouping import Sequences
from aam_kernels.attention.triton.short_backward import short_backward
from aam_kernels.attention.triton.short_forward import short_forward
from aam_kernels.attention.triton.short_rows import SEQUENCE_GROUP

TILES = {
    32: (32,),
    64: (64,),
    112: (64, 32, 16),
    128: (64, 64),
    160: (64, 64, 32),
    192: (64, 64, 64),
    256: (128, 128),
}
"""Tiles of keys for sequences up to a length, unless a candidate has others."""

_LEAST_SCALE = 1e-30  # scores are masked with -inf, and -inf * 0 is no number


def forward_configuration(query: Tensor, length: int) -> Configuration | None:
    """The configuration of `forward` for sequences up to ``length``; None: not served."""
    return _configuration("short_forward", query, length)


def backward_configuration(query: Tensor, length: int) -> Configuration | None:
    """The configuration of `backward` for sequences up to ``length``; None: not served."""
    return _configuration("short_backward", query, length)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    sequences: Sequences,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    max_length: int,
    max_key_length: int,
) -> None:
    """Writes output (total, heads, head_dim) and lse (total, heads) float32, contiguous.

    Tensors may have any strides with a dense last dimension.
    """
    chosen = forward_configuration(query, max(max_length, max_key_length))
    assert chosen is not None
    launch(
        short_forward,
        _programs(sequences, query.shape[1]),
        query,
        key,
        value,
        output,
        lse,
        *_places(sequences),
        seed if dropout_p > 0.0 else None,
        sequences.offsets.shape[0] - 1,
        query.shape[0],
        query.shape[1],
        *_strides(query, key, value, output),
        max(abs(scale), _LEAST_SCALE) * math.log2(math.e),
        drop_below(dropout_p),
        1.0 / (1.0 - dropout_p),
        configuration=chosen,
        **_constants(query, scale, dropout_p),
    )


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    sequences: Sequences,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    max_length: int,
    max_key_length: int,
) -> None:
    """Writes the gradients of query, key and value into ``grads``; see `forward`."""
    chosen = backward_configuration(query, max(max_length, max_key_length))
    assert chosen is not None
    keep = 1.0 - dropout_p
    launch(
        short_backward,
        _programs(sequences, query.shape[1]),
        grad_output,
        query,
        key,
        value,
        output,
        lse,
        *grads,
        *_places(sequences),
        seed if dropout_p > 0.0 else None,
        sequences.offsets.shape[0] - 1,
        query.shape[0],
        key.shape[0],
        query.shape[1],
        *_strides(grad_output, query, key, value, output, *grads),
        max(abs(scale), _LEAST_SCALE) * math.log2(math.e),
        scale / keep,
        abs(scale) / keep,
        drop_below(dropout_p),
        keep,
        1.0 / keep,
        configuration=chosen,
        **_constants(query, scale, dropout_p),
    )


def _configuration(kernel: str, query: Tensor, length: int) -> Configuration | None:
    if length > max(TILES):
        return None
    return configuration(kernel, query.dtype, query.shape[2], length)


def _programs(sequences: Sequences, heads: int) -> int:
    """Sequences in whole groups, at least one place of which is left for the tail."""
    count = sequences.offsets.shape[0] - 1
    return (count // SEQUENCE_GROUP + 1) * SEQUENCE_GROUP * heads


def _places(sequences: Sequences) -> tuple[Tensor | None, ...]:
    return sequences.offsets, sequences.lengths, sequences.key_offsets, sequences.key_lengths


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of rows and heads, in the order of the kernels' arguments."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def _constants(query: Tensor, scale: float, dropout_p: float) -> dict[str, object]:
    head_dim = query.shape[2]
    return {
        "HEAD_DIM": head_dim,
        "D": max(16, triton.next_power_of_2(head_dim)),
        "DROPOUT": dropout_p > 0.0,
        "NEGATIVE": scale < 0.0,
        "PRECISION": dot_precision(query.dtype),
        "ROUND_HALF_UP": round_half_up(query.dtype),
        "GROUP": SEQUENCE_GROUP,
    }


def _candidates(
    architecture: str, dtype: torch.dtype, width: int, length: int, *, grad: bool
) -> list[Configuration]:
    """Forward one warp holds all keys for 16 queries at a time; backward warps share the keys."""
    found = []
    for warps in (2, 4, 1) if grad else (1, 2):
        for stages in (1, 2) if grad else (2, 1):
            for tiles in _tilings(length):
                meta = {f"TILE_{n}": tile for n, tile in enumerate((*tiles, 0, 0)[:3])}
                options = {"num_warps": warps, "num_stages": stages}
                if architecture in AMD:
                    options["matrix_instr_nonkdim"] = 16
                block = 16 if grad else 16 * warps
                found.append(Configuration({"BLOCK_M": block, **meta}, options))
    return found


def _tilings(length: int) -> list[tuple[int, ...]]:
    """Ways to cut ``length`` keys into tiles."""
    found = [TILES[length]]
    for tiles in ((128,), (128, 32), (128, 64), (128, 64, 64)):
        if sum(tiles) == length:
            found.insert(0, tiles)
    return found


def _example(
    dtype: torch.dtype, width: int, length: int, device: torch.device, *, grad: bool
) -> Callable[[], object]:
    """About as many tokens as a batch has, in sequences of one length and four heads."""
    count = max(1, (1 << 18) // length)
    total, heads = count * length, 4
    qkv = torch.randn(total, 3, heads, width, device=device).to(dtype)
    query, key, value = qkv.unbind(1)
    offsets = torch.arange(count + 1, dtype=torch.int32, device=device) * length
    sequences = Sequences(offsets, max_length=length, max_key_length=length)
    output = torch.empty(total, heads, width, dtype=dtype, device=device)
    lse = torch.empty(total, heads, device=device)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    rest = (sequences, width**-0.5, 0.1, seed, length, length)
    if not grad:
        return lambda: forward(query, key, value, output, lse, *rest)
    if device.type != "meta":
        forward(query, key, value, output, lse, *rest)
    dq, dk, dv = torch.empty_like(qkv).unbind(1)
    return lambda: backward(output, query, key, value, output, lse, (dq, dk, dv), *rest)


TUNABLES = tuple(
    Tunable(
        kernel,
        (16, 32, 64, 128),
        tuple(TILES),
        partial(_candidates, grad=grad),
        partial(_example, grad=grad),
        ("BLOCK_M", "TILE_0", "TILE_1", "TILE_2"),
    )
    for kernel, grad in (("short_forward", False), ("short_backward", True))
)
