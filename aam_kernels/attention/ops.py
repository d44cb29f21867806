"""Registers ragged attention with torch: schema, shapes, autograd, vmap. No arithmetic.

Forward and backward are two operators, so that compilers see one node each way. "auto" is
resolved inside the operator, where the tensors are real, never while a graph is traced. The
logsumexp is not differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aam_kernels._runtime import dispatch
from aam_kernels._runtime.folding import fold_rows, fold_sequences, refuse_batched
from aam_kernels._runtime.grouping import Sequences, check_sequences
from aam_kernels._runtime.transforms import transformable
from aam_kernels._runtime.trust import Case, case_of

OPERATION = "attention"
dispatch.register_torch(OPERATION, "aam_kernels.attention")
dispatch.register_triton(OPERATION, "aam_kernels.attention", dispatch.takes(1, 128))
dispatch.register_cpu(OPERATION, "aam_kernels.attention", dispatch.takes(8, 128))

_FURTHEST_ROW = 1 << 22
_WHERE = (
    "Tensor offsets, Tensor? key_offsets, Tensor? lengths, Tensor? key_lengths, Tensor? seed, "
    "SymInt max_length, SymInt max_key_length, float? scale, float dropout_p, str impl"
)


@torch.library.custom_op(
    "aam_kernels::ragged_attention",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {_WHERE}) -> (Tensor, Tensor)",
)
def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    key_offsets: Tensor | None,
    lengths: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    max_length: int,
    max_key_length: int,
    scale: float | None,
    dropout_p: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Output (total, heads, head_dim) and logsumexp (total, heads)."""
    sequences = Sequences(offsets, key_offsets, lengths, key_lengths, max_length, max_key_length)
    check_sequences(sequences, query.shape[0], key.shape[0])
    name = dispatch.choose(
        OPERATION, impl, query.device, query.dtype, _case(sequences, query, dropout_p)
    )
    query, key, value = (_dense_heads(x) for x in (query, key, value))
    return dispatch.implementation(OPERATION, name).forward(
        query, key, value, sequences, _scale(scale, query), dropout_p, seed
    )


@torch.library.custom_op(
    "aam_kernels::ragged_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, "
    f"Tensor lse, {_WHERE}) -> (Tensor, Tensor, Tensor)",
)
def ragged_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    offsets: Tensor,
    key_offsets: Tensor | None,
    lengths: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    max_length: int,
    max_key_length: int,
    scale: float | None,
    dropout_p: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    sequences = Sequences(offsets, key_offsets, lengths, key_lengths, max_length, max_key_length)
    name = dispatch.choose(
        OPERATION, impl, query.device, query.dtype, _case(sequences, query, dropout_p)
    )
    tensors = (_dense_heads(x) for x in (grad_output, query, key, value, output))
    return dispatch.implementation(OPERATION, name).backward(
        *tensors, lse, sequences, _scale(scale, query), dropout_p, seed
    )


def _case(sequences: Sequences, query: Tensor, dropout_p: float) -> Case:
    longest = sequences.max_length
    if sequences.cross and longest >= 0:
        known = sequences.max_key_length >= 0
        longest = max(longest, sequences.max_key_length) if known else -1
    gaps = sequences.lengths is not None or sequences.key_lengths is not None
    form = "cross" if sequences.cross else "gaps" if gaps else "self"
    return case_of((query.shape[-1],), longest, dropout_p, form)


def _scale(scale: float | None, query: Tensor) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _dense_heads(x: Tensor) -> Tensor:
    """Kernels read a head as consecutive elements; an expanded gradient is not that.

    Nor may the rows of a tile lie 2**31 elements apart: GPU kernels address them with 32 bits.
    """
    return x if x.stride(-1) == 1 and x.stride(0) <= _FURTHEST_ROW else x.contiguous()


@ragged_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *where: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=dtype)


@ragged_attention_backward.register_fake
def _(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *where = inputs
    tensors, ctx.options = where[:5], where[5:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, *tensors)


def _backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    grads = _call_backward(grad_output, *ctx.saved_tensors, *ctx.options)
    return (*grads, *(None,) * 10)


ragged_attention.register_autograd(_backward, setup_context=_setup_context)
_call_backward = transformable(ragged_attention_backward)
call = transformable(ragged_attention, _setup_context, _backward)
"""The operator, callable inside `torch.func` transforms too."""


@ragged_attention.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    return _fold(ragged_attention, 1, info, in_dims, inputs)


@ragged_attention_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    return _fold(ragged_attention_backward, 2, info, in_dims, inputs)


def _fold(
    op: Any, key_place: int, info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Runs a vmapped call as one call over more sequences; ``key_place`` is the key's argument."""
    size = info.batch_size
    count = len(inputs) - 10
    refuse_batched(in_dims[count + 4], "seed")
    rows = [fold_rows(x, dim, size) for x, dim in zip(inputs[:count], in_dims[:count], strict=True)]
    offsets, key_offsets, lengths, key_lengths = inputs[count : count + 4]
    dims = in_dims[count : count + 4]
    total, total_key = rows[key_place - 1].shape[0] // size, rows[key_place].shape[0] // size
    where = fold_sequences(offsets, lengths, dims[0], dims[2], size, total)
    where_key: tuple[Tensor | None, Tensor | None]
    if key_offsets is None:
        where_key = (None, None)
    else:
        where_key = fold_sequences(key_offsets, key_lengths, dims[1], dims[3], size, total_key)
    results = op(*rows, where[0], where_key[0], where[1], where_key[1], *inputs[count + 4 :])
    unfolded = tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in results)
    return unfolded, (0,) * len(unfolded)
