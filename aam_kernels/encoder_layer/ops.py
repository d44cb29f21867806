"""Registers the encoder layer with torch: schema, shapes, autograd, vmap. No arithmetic.

Forward and backward are two operators, so that compilers see one node each way. The forward
operator returns the output and the tensors of `Saved`; with ``recompute`` those are empty. The
backward operator returns the gradients of (x, weights), empty where not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aam_kernels._runtime import dispatch
from aam_kernels._runtime.grouping import Sequences, check_sequences
from aam_kernels._runtime.transforms import transformable
from aam_kernels._runtime.trust import case_of
from aam_kernels.encoder_layer.saved import Saved, new_saved, nothing_saved
from aam_kernels.encoder_layer.weights import EncoderLayerWeights

OPERATION = "encoder_layer"


def _refused_by_cpu(width: tuple[int, ...]) -> str:
    dim, heads = width
    if dim % 16 == 0 and 8 <= dim // heads <= 128:
        return ""
    return (
        f"takes a width D that is a multiple of 16 and a head_dim of 8 to 128, got D = {dim} "
        f"and head_dim {dim // heads}"
    )


dispatch.register_torch(OPERATION, "aam_kernels.encoder_layer")
dispatch.register_triton(OPERATION, "aam_kernels.encoder_layer")
dispatch.register_cpu(OPERATION, "aam_kernels.encoder_layer", _refused_by_cpu)

_HOW = "int num_heads, float dropout_p, Tensor? seed, SymInt max_length, str impl"


# One argument a weight: torch.func cannot differentiate an operator that takes a list of tensors.
_WEIGHTS = ", ".join(f"Tensor {name}" for name in EncoderLayerWeights._fields)


@torch.library.custom_op(
    "aam_kernels::encoder_layer",
    mutates_args=(),
    schema=f"(Tensor x, Tensor offsets, {_WEIGHTS}, {_HOW}, bool recompute) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def encoder_layer(x: Tensor, offsets: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Output (total, D), then what is kept for backward: empty, or `Saved`."""
    weights = EncoderLayerWeights(*arguments[:12])
    num_heads, dropout_p, seed, max_length, impl, recompute = arguments[12:]
    check_sequences(Sequences(offsets, max_length=max_length), x.shape[0], x.shape[0])
    case = case_of((x.shape[1], num_heads), max_length, dropout_p)
    name = dispatch.choose(OPERATION, impl, x.device, x.dtype, case)
    with torch.autocast(x.device.type, enabled=False):  # the operator has chosen its dtypes
        output, saved = dispatch.implementation(OPERATION, name).forward(
            x, offsets, weights, num_heads, dropout_p, seed, max_length, not recompute
        )
    return (output, *(_kept(x, arguments) if saved is None else saved))


@torch.library.custom_op(
    "aam_kernels::encoder_layer_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, Tensor x, Tensor offsets, {_WEIGHTS}, Tensor qkv, "
    f"Tensor attended, Tensor lse, Tensor mid, Tensor hidden_input, bool[] needs, {_HOW}) "
    f"-> ({', '.join(['Tensor'] * 13)})",
)
def encoder_layer_backward(
    grad_output: Tensor, x: Tensor, offsets: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Gradients of (x, weights); those that ``needs`` does not ask for are empty."""
    weights, saved = EncoderLayerWeights(*arguments[:12]), arguments[12:17]
    needs, num_heads, dropout_p, seed, max_length, impl = arguments[17:]
    case = case_of((x.shape[1], num_heads), max_length, dropout_p)
    name = dispatch.choose(OPERATION, impl, x.device, x.dtype, case)
    with torch.autocast(x.device.type, enabled=False):
        grads = dispatch.implementation(OPERATION, name).backward(
            grad_output, x, offsets, weights, num_heads, dropout_p, seed, max_length, saved, needs
        )
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def _kept(x: Tensor, arguments: tuple[Any, ...]) -> Saved:
    """Tensors of the shapes that are kept: a trace fixes them before "auto" is resolved."""
    num_heads, *_, impl, recompute = arguments[12:]
    if recompute or impl == "math":
        return nothing_saved(x)
    hidden = EncoderLayerWeights(*arguments[:12]).ffn_in_weight.shape[0]
    return new_saved(x, hidden, num_heads, on_cpu=x.device.type == "cpu" and impl != "triton")


@encoder_layer.register_fake
def _(x: Tensor, offsets: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape), *_kept(x, arguments))


@encoder_layer_backward.register_fake
def _(grad_output: Tensor, x: Tensor, offsets: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    needs = arguments[17]
    tensors = zip((x, *arguments[:12]), needs, strict=True)
    return tuple(t.new_empty(t.shape) if need else x.new_empty(0) for t, need in tensors)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, offsets, *weights = inputs[:14]
    num_heads, dropout_p, seed, max_length, impl, _ = inputs[14:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros as large as what was kept would be made
    ctx.save_for_backward(x, offsets, seed, *output[1:], *weights)
    ctx.options = num_heads, dropout_p, max_length, impl


def _backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, offsets, seed, *rest = ctx.saved_tensors
    saved, weights = rest[:5], rest[5:]
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:14]]
    if grad_output is None:
        return (None,) * 20
    num_heads, dropout_p, max_length, impl = ctx.options
    found = _call_backward(
        grad_output, x, offsets, *weights, *saved, needs, num_heads, dropout_p, seed, max_length,
        impl,
    )  # fmt: skip
    grads = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    return (grads[0], None, *grads[1:], *(None,) * 6)


encoder_layer.register_autograd(_backward, setup_context=_setup_context)
_call_backward = transformable(encoder_layer_backward)
call = transformable(encoder_layer, _setup_context, _backward)
"""The operator, callable inside `torch.func` transforms too."""


@encoder_layer.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    return _one_by_one(encoder_layer, info, in_dims, inputs)


@encoder_layer_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    return _one_by_one(encoder_layer_backward, info, in_dims, inputs)


def _one_by_one(op: Any, info: Any, in_dims: tuple[Any, ...], inputs: Any) -> tuple[Any, Any]:
    """A vmapped call runs call by call: any argument may be batched, weights and seeds too."""
    calls = [
        op(
            *(
                value if dim is None or isinstance(value, list) else value.select(dim, i)
                for value, dim in zip(inputs, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
    return results, (0,) * len(results)
