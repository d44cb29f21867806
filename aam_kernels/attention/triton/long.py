"""Attention of rows of any length: what serves every case that the short kernels leave.

`TUNABLES` lists the blocks worth trying: rows of a program's own block, rows of the blocks that are
streamed past it, warps, stages, and on AMD the size of a matrix instruction (0: the compiler's).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from aam_kernels._runtime.configurations import AMD, Configuration, Tunable, dtype_class
from aam_kernels._runtime.grouping import Sequences
from aam_kernels.attention.triton.long_backward import backward
from aam_kernels.attention.triton.long_forward import configured, forward

__all__ = ["TUNABLES", "backward", "configured", "forward"]

ANY_LENGTH = 1 << 30
Blocks = tuple[int, int, int, int, int]
_HALF_AMD = {
    "long_forward": {
        64: [(128, 64, 4, 1, 0), (128, 64, 4, 2, 0), (128, 32, 4, 1, 0)],
        128: [(128, 32, 4, 1, 0), (128, 64, 4, 1, 0), (64, 32, 4, 1, 16)],
    },
    "long_backward_queries": {
        32: [(128, 32, 4, 2, 0), (128, 64, 4, 1, 16), (128, 32, 4, 2, 16)],
        64: [(128, 32, 4, 2, 0), (128, 32, 4, 1, 0), (128, 32, 4, 1, 16)],
        128: [(128, 32, 4, 1, 0), (64, 32, 4, 1, 16), (64, 16, 4, 1, 16)],
    },
    "long_backward_keys": {
        32: [(128, 32, 4, 1, 16), (128, 64, 4, 1, 16), (64, 32, 2, 1, 16)],
        64: [(128, 32, 4, 1, 16), (64, 32, 2, 1, 16), (128, 16, 4, 1, 16)],
        128: [(128, 32, 4, 1, 16), (128, 16, 4, 1, 16), (64, 16, 4, 1, 16)],
    },
}
_FLOAT32_AMD = {
    "long_forward": {
        32: [(128, 64, 4, 1, 0), (128, 32, 4, 1, 0)],
        64: [(128, 32, 4, 1, 0), (64, 32, 4, 1, 16)],
        128: [(64, 32, 4, 1, 16), (64, 16, 4, 1, 16)],
    },
    "long_backward_queries": {
        32: [(128, 32, 4, 1, 16), (128, 32, 4, 1, 0), (64, 32, 4, 1, 16)],
        128: [(64, 16, 4, 1, 16), (64, 32, 4, 1, 16)],
    },
    "long_backward_keys": {
        32: [(128, 32, 4, 1, 16), (64, 32, 4, 1, 16), (64, 16, 4, 1, 16)],
        128: [(64, 16, 4, 1, 16), (32, 16, 4, 1, 16)],
    },
}
_HALF_NVIDIA = {
    "long_forward": {
        32: [(128, 64, 4, 2, 0), (128, 64, 8, 2, 0), (64, 64, 4, 1, 0)],
        128: [(128, 64, 8, 2, 0), (128, 64, 8, 1, 0), (64, 64, 4, 1, 0)],
    },
    "long_backward_queries": {
        64: [(64, 64, 4, 2, 0), (128, 64, 8, 2, 0), (64, 32, 4, 1, 0)],
        128: [(64, 64, 4, 2, 0), (128, 32, 8, 1, 0), (64, 32, 4, 1, 0), (64, 16, 4, 1, 0)],
    },
    "long_backward_keys": {
        32: [(128, 64, 8, 2, 0), (64, 64, 4, 1, 0)],
        64: [(128, 64, 8, 1, 0), (128, 32, 8, 1, 0), (64, 32, 4, 1, 0)],
        128: [(128, 32, 8, 1, 0), (128, 16, 8, 1, 0), (64, 16, 4, 1, 0), (64, 16, 8, 1, 0)],
    },
}
_FLOAT32_NVIDIA = {
    "long_forward": {
        32: [(64, 64, 8, 1, 0), (32, 32, 4, 1, 0)],
        64: [(64, 32, 8, 1, 0), (32, 32, 8, 1, 0)],
        128: [(32, 32, 8, 1, 0), (32, 16, 8, 1, 0), (16, 16, 8, 1, 0)],
    },
    "long_backward_queries": {
        32: [(64, 64, 8, 1, 0), (32, 32, 4, 1, 0)],
        64: [(32, 32, 8, 1, 0), (32, 16, 8, 1, 0)],
        128: [(32, 16, 8, 1, 0), (16, 32, 8, 1, 0), (16, 16, 8, 1, 0), (16, 16, 4, 1, 0)],
    },
    "long_backward_keys": {
        32: [(64, 64, 8, 1, 0), (32, 32, 4, 1, 0)],
        64: [(64, 64, 8, 1, 0), (32, 32, 8, 1, 0)],
        128: [(32, 32, 8, 1, 0), (32, 16, 8, 1, 0), (16, 16, 8, 1, 0)],
    },
}
_LISTED = {
    (True, "half"): _HALF_AMD,
    (True, "float32"): _FLOAT32_AMD,
    (False, "half"): _HALF_NVIDIA,
    (False, "float32"): _FLOAT32_NVIDIA,
}


def _candidates(
    kernel: str, architecture: str, dtype: torch.dtype, width: int, length: int
) -> list[Configuration]:
    by_width = _LISTED[architecture in AMD, dtype_class(dtype)][kernel]
    listed = by_width[min(wide for wide in by_width if wide >= width)]
    return [_configuration(kernel, blocks) for blocks in listed]


def _configuration(kernel: str, blocks: Blocks) -> Configuration:
    own, streamed, warps, stages, instruction = blocks
    if kernel == "long_backward_keys":
        meta = {"BLOCK_M": streamed, "BLOCK_N": own}
    else:
        meta = {"BLOCK_M": own, "BLOCK_N": streamed}
    options = {"num_warps": warps, "num_stages": stages}
    if instruction:
        options["matrix_instr_nonkdim"] = instruction
    return Configuration(meta, options)


def _example(
    kernel: str, dtype: torch.dtype, width: int, length: int, device: torch.device
) -> Callable[[], object]:
    length = min(length, 1024)
    rows, heads = 32, 4
    offsets = torch.arange(rows + 1, dtype=torch.int32, device=device) * length
    where = (Sequences(offsets), width**-0.5, 0.0, None, length, length)
    query, key, value, *grads = torch.randn(
        rows * length, 3, heads, width, dtype=dtype, device=device
    ).unbind(1) + torch.empty(rows * length, 3, heads, width, dtype=dtype, device=device).unbind(1)
    output = torch.empty(rows * length, heads, width, dtype=dtype, device=device)
    lse = torch.empty(rows * length, heads, device=device)
    forwards = partial(forward, query, key, value, output, lse, *where)
    if kernel == "long_forward":
        return forwards
    forwards()
    grad_query, grad_key, grad_value = grads
    gradients = (grad_query, grad_key, grad_value)
    return partial(
        backward, torch.randn_like(output), query, key, value, output, lse, gradients, *where
    )


TUNABLES = tuple(
    Tunable(
        kernel,
        widths=(16, 32, 64, 128),
        lengths=(ANY_LENGTH,),
        candidates=partial(_candidates, kernel),
        example=partial(_example, kernel),
        constants=("BLOCK_M", "BLOCK_N"),
    )
    for kernel in _HALF_AMD
)
