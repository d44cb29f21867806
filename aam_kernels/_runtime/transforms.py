"""Custom operators under `torch.func`.

`torch.library.register_autograd` serves eager autograd, compile and export, but the function it
generates is refused by `torch.func.grad` and `torch.vmap` over it (torch 2.7 to 2.13). Inside a
transform the same rules are therefore run by an autograd function in setup_context form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def transformable(
    operator: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Returns ``operator``, callable inside function transforms too.

    Args:
        operator: a custom operator with its autograd and vmap rules registered.
        setup_context: the rule registered for it; None: it has no derivative.
        backward: the rule registered for it; None: it has no derivative.
    """

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return operator(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if setup_context is not None:
                setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if backward is None:
                raise RuntimeError(f"{operator}: no autograd formula for a second derivative")
            return backward(ctx, *grads)

    def call(*inputs: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return Function.apply(*inputs)
        return operator(*inputs)

    return call
