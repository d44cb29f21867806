"""Registers the encoder layer with torch: schema, shapes, autograd, vmap. No arithmetic.

Forward and backward are two operators, so that compilers see one node each way. The forward
operator returns the output and the four tensors of `sdpa.Saved`; with ``recompute`` those four
are empty. The backward operator returns the gradients that are needed, in order of (x, weights).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aam_kernels._runtime import dispatch
from aam_kernels._runtime.grouping import Sequences, check_sequences
from aam_kernels.encoder_layer.weights import EncoderLayerWeights

OPERATION = "encoder_layer"
dispatch.register_torch(OPERATION, "aam_kernels.encoder_layer")

_HOW = "int num_heads, float dropout_p, Tensor? seed, SymInt max_length, str impl"


@torch.library.custom_op(
    "aam_kernels::encoder_layer",
    mutates_args=(),
    schema=f"(Tensor x, Tensor offsets, Tensor[] weights, {_HOW}, bool recompute) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def encoder_layer(
    x: Tensor,
    offsets: Tensor,
    weights: list[Tensor],
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
    max_length: int,
    impl: str,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output (total, D), then what is kept for backward: empty, or `sdpa.Saved`."""
    check_sequences(Sequences(offsets, max_length=max_length), x.shape[0], x.shape[0])
    name = dispatch.choose(OPERATION, impl, x.device, x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # the operator has chosen its dtypes
        output, saved = dispatch.implementation(OPERATION, name).forward(
            x, offsets, EncoderLayerWeights(*weights), num_heads, dropout_p, seed, max_length,
            not recompute,
        )  # fmt: skip
    return (output, *(saved if saved is not None else _nothing_saved(x)))


@torch.library.custom_op(
    "aam_kernels::encoder_layer_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor x, Tensor offsets, Tensor[] weights, Tensor[] saved, "
    f"bool[] needs, {_HOW}) -> Tensor[]",
)
def encoder_layer_backward(
    grad_output: Tensor,
    x: Tensor,
    offsets: Tensor,
    weights: list[Tensor],
    saved: list[Tensor],
    needs: list[bool],
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
    max_length: int,
    impl: str,
) -> list[Tensor]:
    """The gradients of (x, weights) that ``needs`` asks for."""
    name = dispatch.choose(OPERATION, impl, x.device, x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        grads = dispatch.implementation(OPERATION, name).backward(
            grad_output, x, offsets, EncoderLayerWeights(*weights), num_heads, dropout_p, seed,
            max_length, saved, needs,
        )  # fmt: skip
    return [grad for grad in grads if grad is not None]


def _nothing_saved(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) for _ in range(4))


@encoder_layer.register_fake
def _(
    x: Tensor,
    offsets: Tensor,
    weights: list[Tensor],
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
    max_length: int,
    impl: str,
    recompute: bool,
) -> tuple[Tensor, ...]:
    output = x.new_empty(x.shape)
    if recompute or impl == "math":
        return (output, *_nothing_saved(x))
    total, dim = x.shape
    widths = (3 * dim, dim, dim, weights[8].shape[0])
    kept = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    return (output, *(x.new_empty((total, width), dtype=kept) for width in widths))


@encoder_layer_backward.register_fake
def _(
    grad_output: Tensor,
    x: Tensor,
    offsets: Tensor,
    weights: list[Tensor],
    saved: list[Tensor],
    needs: list[bool],
    *how: Any,
) -> list[Tensor]:
    tensors = zip([x, *weights], needs, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, need in tensors if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, offsets, weights, num_heads, dropout_p, seed, max_length, impl, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros as large as what was kept would be made
    ctx.save_for_backward(x, offsets, seed, *output[1:], *weights)
    ctx.options = num_heads, dropout_p, max_length, impl


def _backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, offsets, seed, *rest = ctx.saved_tensors
    saved, weights = rest[:4], rest[4:]
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2]]
    found: list[Tensor] = []
    if grad_output is None:
        needs = [False] * len(needs)
    else:
        num_heads, dropout_p, max_length, impl = ctx.options
        how = num_heads, dropout_p, seed, max_length, impl
        found = encoder_layer_backward(grad_output, x, offsets, weights, saved, needs, *how)
    remaining = iter(found)
    grads = [next(remaining) if need else None for need in needs]
    return (grads[0], None, grads[1:], *(None,) * 6)


encoder_layer.register_autograd(_backward, setup_context=_setup_context)


@encoder_layer.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    return _one_by_one(encoder_layer, info, in_dims, inputs)


@encoder_layer_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    return _one_by_one(encoder_layer_backward, info, in_dims, inputs)


def _one_by_one(op: Any, info: Any, in_dims: tuple[Any, ...], inputs: Any) -> tuple[Any, Any]:
    """A vmapped call runs call by call: any argument may be batched, weights and seeds too."""

    def select(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, list | tuple):
            dims = dim if isinstance(dim, list | tuple) else [dim] * len(value)
            return [select(part, d, i) for part, d in zip(value, dims, strict=True)]
        return value if dim is None else value.select(dim, i)

    calls = [
        op(*(select(value, dim, i) for value, dim in zip(inputs, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    results = [torch.stack(parts) for parts in zip(*calls, strict=True)]
    if isinstance(calls[0], list):
        return results, [0] * len(results)
    return tuple(results), (0,) * len(results)
