"""Ragged attention by Triton kernels (``impl="triton"``).

Sequences of up to 256 rows go to `short`, where the launch tables have a configuration for them,
all others to `long`. Every kernel takes packed rows as they lie, writes every row of its outputs
(0 where no sequence is, NaN where one is longer than ``max_length`` promised) and waits for
nothing: only an unknown ``max_length`` (-1) is read back from the GPU.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from aam_kernels._runtime.configurations import NVIDIA, architecture
from aam_kernels._runtime.grouping import Sequences
from aam_kernels.attention.triton import short


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output (total, heads, head_dim) and logsumexp (total, heads) float32."""
    output = query.new_empty(query.shape)
    lse = forward_into(output, query, key, value, sequences, scale, dropout_p, seed)
    return output, lse


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    sequences: Sequences,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    backward_into(
        grads, grad_output, query, key, value, output, lse, sequences, scale, dropout_p, seed
    )
    return grads


def forward_into(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """Writes the output where the caller wants it, and returns the logsumexp.

    All of (rows, heads, head_dim) with any strides and a dense last dimension.
    """
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    if query.numel() == 0:
        return lse
    if columns := _columns_to_add(query):
        wide = query.new_empty(*query.shape[:2], query.shape[2] + columns, dtype=output.dtype)
        query, key, value = (pad(x, (0, columns)) for x in (query, key, value))
        lse = forward_into(wide, query, key, value, sequences, scale, dropout_p, seed)
        output.copy_(wide[..., :-columns])
        return lse
    lengths = _longest(sequences)
    arguments = (query, key, value, output, lse, sequences, scale, dropout_p, seed, *lengths)
    if short.forward_configuration(query, max(lengths)) is not None:
        short.forward(*arguments)
    else:
        _long().forward(*arguments)
    return lse


def backward_into(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    sequences: Sequences,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Writes the gradients of query, key and value where the caller wants them.

    For example into three slices of one (total, 3, heads, head_dim) tensor.
    """
    if query.numel() == 0 and key.numel() == 0:
        return
    if columns := _columns_to_add(query):
        grad_output, query, key, value, output = (
            pad(x, (0, columns)) for x in (grad_output, query, key, value, output)
        )
        wide = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        backward_into(
            wide, grad_output, query, key, value, output, lse, sequences, scale, dropout_p, seed
        )
        for grad, padded in zip(grads, wide, strict=True):
            grad.copy_(padded[..., :-columns])
        return
    lengths = _longest(sequences)
    tensors = (grad_output, query, key, value, output, lse, grads)
    arguments = (*tensors, sequences, scale, dropout_p, seed, *lengths)
    if short.backward_configuration(query, max(lengths)) is not None:
        short.backward(*arguments)
    else:
        _long().backward(*arguments)


def _columns_to_add(query: Tensor) -> int:
    """Zero columns that narrow heads get on NVIDIA, up to a power of two.

    Elsewhere a kernel masks what a head lacks; there the masks would spill registers.
    """
    head_dim = query.shape[2]
    width = max(16, 1 << (head_dim - 1).bit_length())
    return width - head_dim if width <= 64 and architecture() in NVIDIA else 0


def _longest(sequences: Sequences) -> tuple[int, int]:
    """The longest query and key sequence; waits for the GPU where they are not known."""
    length = sequences.max_length
    if length < 0:
        length = _measured(sequences.offsets, sequences.lengths)
    if not sequences.cross:
        return length, length
    key_length = sequences.max_key_length
    if key_length < 0:
        key_length = _measured(*sequences.key_side())
    return length, key_length


def _measured(offsets: Tensor, lengths: Tensor | None) -> int:
    rows = offsets.diff() if lengths is None else lengths
    return int(rows.max()) if rows.numel() else 0


def _long() -> ModuleType:
    return importlib.import_module("aam_kernels.attention.triton.long")
