"""Registers attention pooling with torch: schema, shapes, autograd, vmap. No arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aam_kernels._runtime import dispatch
from aam_kernels._runtime.folding import fold_rows, fold_sequences
from aam_kernels._runtime.grouping import Sequences, check_sequences
from aam_kernels._runtime.transforms import transformable
from aam_kernels._runtime.trust import Case, case_of

OPERATION = "pooling"
dispatch.register_torch(OPERATION, "aam_kernels.pooling")
dispatch.register_triton(OPERATION, "aam_kernels.pooling")
dispatch.register_cpu(OPERATION, "aam_kernels.pooling")

_WHERE = "Tensor offsets, Tensor? lengths, SymInt max_length, str impl"


@torch.library.custom_op(
    "aam_kernels::attention_pool",
    mutates_args=(),
    schema=f"(Tensor values, Tensor scores, {_WHERE}) -> (Tensor, Tensor)",
)
def attention_pool(
    values: Tensor,
    scores: Tensor,
    offsets: Tensor,
    lengths: Tensor | None,
    max_length: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Pooled values (n, dim) and logsumexp (n,)."""
    sequences = Sequences(offsets, None, lengths, None, max_length)
    check_sequences(sequences, values.shape[0], values.shape[0])
    name = dispatch.choose(OPERATION, impl, values.device, values.dtype, _case(sequences, values))
    return dispatch.implementation(OPERATION, name).forward(values, scores, sequences)


@torch.library.custom_op(
    "aam_kernels::attention_pool_backward",
    mutates_args=(),
    schema="(Tensor grad_pooled, Tensor values, Tensor scores, Tensor pooled, Tensor lse, "
    f"{_WHERE}) -> (Tensor, Tensor)",
)
def attention_pool_backward(
    grad_pooled: Tensor,
    values: Tensor,
    scores: Tensor,
    pooled: Tensor,
    lse: Tensor,
    offsets: Tensor,
    lengths: Tensor | None,
    max_length: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of values and scores."""
    sequences = Sequences(offsets, None, lengths, None, max_length)
    name = dispatch.choose(OPERATION, impl, values.device, values.dtype, _case(sequences, values))
    return dispatch.implementation(OPERATION, name).backward(
        grad_pooled, values, scores, pooled, lse, sequences
    )


def _case(sequences: Sequences, values: Tensor) -> Case:
    form = "self" if sequences.lengths is None else "gaps"
    return case_of((values.shape[1],), sequences.max_length, form=form)


@attention_pool.register_fake
def _(values: Tensor, scores: Tensor, offsets: Tensor, *where: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    count = offsets.shape[0] - 1
    return values.new_empty(count, values.shape[1]), values.new_empty(count, dtype=dtype)


@attention_pool_backward.register_fake
def _(grad_pooled: Tensor, values: Tensor, scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), scores.new_empty(scores.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, scores, offsets, lengths, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(values, scores, *output, offsets, lengths)


def _backward(ctx: Any, grad_pooled: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    grads = _call_backward(grad_pooled, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None)


attention_pool.register_autograd(_backward, setup_context=_setup_context)
_call_backward = transformable(attention_pool_backward)
call = transformable(attention_pool, _setup_context, _backward)
"""The operator, callable inside `torch.func` transforms too."""


@attention_pool.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    return _fold(attention_pool, 0, info, in_dims, inputs)


@attention_pool_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    return _fold(attention_pool_backward, 1, info, in_dims, inputs)


def _fold(
    op: Any, values_place: int, info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Runs a vmapped call as one call over more sequences."""
    size, count = info.batch_size, len(inputs) - 4
    rows = [fold_rows(x, dim, size) for x, dim in zip(inputs[:count], in_dims[:count], strict=True)]
    total = rows[values_place].shape[0] // size
    offsets, lengths = inputs[count : count + 2]
    where = fold_sequences(offsets, lengths, in_dims[count], in_dims[count + 1], size, total)
    results = op(*rows, *where, *inputs[count + 2 :])
    unfolded = tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in results)
    return unfolded, (0,) * len(unfolded)
