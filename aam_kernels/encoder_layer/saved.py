"""What the layer keeps for its backward pass when it does not recompute.

The same tensors whichever implementation runs, because compilers fix an operator's outputs when
they trace it: on a CPU everything that is expensive there, on a GPU what attention made.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Saved(NamedTuple):
    """All (total, ...), or empty (0,) where it is not kept. H heads, width D, hidden width F."""

    qkv: Tensor  # (total, 3 D)
    attended: Tensor  # (total, D), at least float32
    lse: Tensor  # (total, H), at least float32; not used by `sdpa` on a CPU
    mid: Tensor  # (total, D), after the attention branch, on a CPU
    hidden_input: Tensor  # (total, F), before GELU, on a CPU


def nothing_saved(x: Tensor) -> Saved:
    """Five empty tensors."""
    return Saved(*(x.new_empty(0) for _ in Saved._fields))


def new_saved(x: Tensor, hidden: int, num_heads: int, *, on_cpu: bool) -> Saved:
    """Uninitialised tensors for what is kept for an input ``x``."""
    total, dim = x.shape
    compute = torch.promote_types(x.dtype, torch.float32)
    widths = {"attended": dim, "lse": num_heads}
    if on_cpu:
        widths |= {"mid": dim, "hidden_input": hidden}
    made = {name: x.new_empty((total, width), dtype=compute) for name, width in widths.items()}
    made["qkv"] = x.new_empty((total, 3 * dim), dtype=compute if on_cpu else x.dtype)
    return nothing_saved(x)._replace(**made)
