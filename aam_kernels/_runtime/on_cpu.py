"""Tensors on their way into the compiled CPU kernels, which compute in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from aam_kernels._runtime.grouping import Sequences


def rows(x: Tensor) -> Tensor:
    """``x`` in float32 with consecutive elements in its last dimension; itself where it is so."""
    x = x if x.dtype == torch.float32 else x.float()
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def dense(x: Tensor) -> Tensor:
    """``x`` in float32 and contiguous; itself where it is so."""
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()


def capsule(x: Tensor | None) -> object:
    """A tensor for the kernels, None as it is.

    Python's protocol costs 2 us a tensor, this 0.2, and a layer has up to 35. Autograd is not
    asked: operators are below it.
    """
    return None if x is None else to_dlpack(x)


def where(sequences: Sequences) -> tuple[object, object, object, object]:
    """Offsets, lengths, key offsets and key lengths for the kernels."""
    return (
        capsule(sequences.offsets.contiguous()),
        capsule(_contiguous(sequences.lengths)),
        capsule(_contiguous(sequences.key_offsets)),
        capsule(_contiguous(sequences.key_lengths)) if sequences.cross else None,
    )


def like(x: Tensor, gaps: bool) -> Tensor:
    """Memory for a float32 result in the shape of ``x``: zeros where no kernel writes some rows."""
    if x.dtype == torch.float32 and not gaps:  # the least that torch can be asked
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    make = x.new_zeros if gaps else x.new_empty
    return make(x.shape, dtype=torch.float32)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in a dtype; itself where it has that."""
    return x if x.dtype == dtype else x.to(dtype)


def seed_of(seed: Tensor | None, dropout_p: float) -> list[int]:
    """Seed, first row and first key row, which are looked at only where something is dropped."""
    if dropout_p == 0.0:
        return [0, 0, 0]
    assert seed is not None
    return seed.tolist()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
