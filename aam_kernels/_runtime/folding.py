"""`torch.vmap` over packed rows: a batch of packed tensors is one packed tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def fold_rows(x: Tensor, dim: int | None, size: int) -> Tensor:
    """(size, total, ...) with the batch at ``dim`` (None: shared) -> (size * total, ...)."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def fold_sequences(
    offsets: Tensor,
    lengths: Tensor | None,
    offsets_dim: int | None,
    lengths_dim: int | None,
    size: int,
    total: int,
) -> tuple[Tensor, Tensor]:
    """Offsets and lengths of ``size * n`` sequences, each batch element ``total`` rows on.

    Raises:
        ValueError: the rows number 2**31 or more.
    """
    if size * total >= 1 << 31:
        raise ValueError(f"vmap over {size} x {total} rows exceeds int32 offsets")
    bounds = _batch_first(offsets, offsets_dim, size)
    real = bounds.diff(dim=1) if lengths is None else _batch_first(lengths, lengths_dim, size)
    shift = torch.arange(size, dtype=torch.int32, device=offsets.device).unsqueeze(1) * total
    starts = (bounds[:, :-1] + shift).reshape(-1)
    end = starts.new_full((1,), size * total)
    return torch.cat((starts, end)), real.reshape(-1).contiguous()


def refuse_batched(dim: int | None, name: str) -> None:
    """Raises ValueError for an argument that vmap may not batch."""
    if dim is not None:
        raise ValueError(f"vmap over {name} is not supported; expected one {name} for the batch")


def _batch_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
