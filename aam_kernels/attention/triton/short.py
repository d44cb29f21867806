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

LENGTHS = (64, 112, 160, 256)
"""Lengths that the tables may have entries for; the tiles of 101 keys fit 112, of 151 keys 160."""
WIDTHS = (32, 64, 128)

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
        _seed(seed, sequences),
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
        _seed(seed, sequences),
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
    if length > LENGTHS[-1]:
        return None
    return configuration(kernel, query.dtype, query.shape[2], length)


def _seed(seed: Tensor | None, sequences: Sequences) -> Tensor:
    """Without dropout any pointer: Triton 3.3 takes no None in a tuple."""
    return sequences.offsets if seed is None else seed


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


def _forward_candidates(
    architecture: str, dtype: torch.dtype, width: int, length: int
) -> list[Configuration]:
    """AMD: a warp holds all keys and values. NVIDIA: they lie in shared memory, the scores do not.

    On NVIDIA IEEE float32 has no matrix instructions, and such tiles do not fit registers.
    """
    size = length * width
    if architecture in AMD:
        if size * dtype.itemsize > (40960 if dtype == torch.float32 else 32768):
            return []
        warps = 1
    else:
        if dtype == torch.float32 or size > 20480:
            return []
        warps = 1 if size <= 7168 else 2 if size <= 10240 else 4
    found = _configurations(architecture, length, warps, (2, 1), wide=size <= 160 * 32)
    more = _configurations(architecture, length, 2 * warps, (2,), wide=True)
    if architecture in AMD:
        # Registers leave room for one wave in any case; where that is said, none of them spills.
        more = [one._replace(options={**one.options, "waves_per_eu": 1}) for one in more]
    return found + more


def _backward_candidates(
    architecture: str, dtype: torch.dtype, width: int, length: int
) -> list[Configuration]:
    """As many warps as it takes to hold the gradients of keys and values in registers."""
    size = length * width
    if architecture in AMD:
        if size * dtype.itemsize > 40960:
            return []
        warps = 2 if size <= 160 * 32 else 4
        return _configurations(architecture, length, warps, (1, 2), wide=warps == 4)
    if dtype == torch.float32 or size > 16384:
        return []
    warps = 2 if size <= 4096 else 4 if size <= 7168 else 8
    found = _configurations(architecture, length, warps, (2, 1), wide=True)
    if warps < 8:
        found += _configurations(architecture, length, 2 * warps, (2, 1), wide=True)
    return found


def _configurations(
    architecture: str, length: int, warps: int, stages: tuple[int, ...], *, wide: bool
) -> list[Configuration]:
    """Blocks of 16 queries, and each way to cut ``length`` keys into tiles."""
    tilings = {
        64: ((64,),),
        112: ((64, 32, 16), (64, 64)),
        160: ((128, 32), (64, 64, 32)) if wide else ((64, 64, 32), (128, 32)),
        256: ((128, 128), (128, 64, 64)),
    }[length]
    # Left alone, NVIDIA's assembler aims at three programs more than there is room for, and spills.
    options = {"matrix_instr_nonkdim": 16} if architecture in AMD else {"maxnreg": 255}
    return [
        Configuration(
            {"BLOCK_M": 16, **{f"TILE_{n}": tile for n, tile in enumerate((*tiles, 0, 0)[:3])}},
            {"num_warps": warps, "num_stages": stage, **options},
        )
        for stage in stages
        for tiles in tilings
    ]


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
    seed = torch.zeros(3, dtype=torch.int64, device=device)
    rest = (sequences, width**-0.5, 0.1, seed, length, length)
    if not grad:
        return lambda: forward(query, key, value, output, lse, *rest)
    if device.type != "meta":
        forward(query, key, value, output, lse, *rest)
    dq, dk, dv = torch.empty_like(qkv).unbind(1)
    return lambda: backward(output, query, key, value, output, lse, (dq, dk, dv), *rest)


_CONSTANTS = ("BLOCK_M", "TILE_0", "TILE_1", "TILE_2")
TUNABLES = (
    Tunable(
        "short_forward",
        WIDTHS,
        LENGTHS,
        _forward_candidates,
        partial(_example, grad=False),
        _CONSTANTS,
    ),
    Tunable(
        "short_backward",
        WIDTHS,
        LENGTHS,
        _backward_candidates,
        partial(_example, grad=True),
        _CONSTANTS,
    ),
)
