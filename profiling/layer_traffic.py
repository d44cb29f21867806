"""Bytes that the encoder layer moves, counted from its launches.

``python -m profiling.layer_traffic`` prints them.

Every launch (or, for the baseline, every operation of an eager torch layer with one fused
attention kernel each way) is charged each tensor that it is given, once: what a perfect cache
would leave. Unit: one pass over a (tokens, D) tensor of the layer's dtype. Nothing is compiled or
run; a count, not a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aam_kernels.encoder_layer import triton as layer
from aam_kernels.encoder_layer.weights import EncoderLayerWeights
from profiling.fake_driver import captured

Rows = list[tuple[str, float]]
"""(what, passes), in order."""

SEQUENCES, LENGTH, HEADS, DROPOUT = 8192, 151, 4, 0.1


class Problem:
    """A layer of width D with F = 4 D on equal rows; tensors without memory."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        def some(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        self.x = some(SEQUENCES * LENGTH, dim)
        self.offsets = torch.empty(SEQUENCES + 1, dtype=torch.int32, device="meta")
        self.seed = torch.empty((), dtype=torch.int64, device="meta")
        self.weights = EncoderLayerWeights(
            some(dim), some(dim), some(3 * dim, dim), some(3 * dim), some(dim, dim), some(dim),
            some(dim), some(dim), some(4 * dim, dim), some(4 * dim), some(dim, 4 * dim), some(dim),
        )  # fmt: skip

    def passes(self, tensors: Iterable[Any]) -> float:
        """Tensors with at least one number a token, in passes; weights are smaller."""
        sizes = (
            tensor.numel() * tensor.element_size()
            for tensor in tensors
            if isinstance(tensor, Tensor) and tensor.numel() >= len(self.x)
        )
        return sum(sizes) / (self.x.numel() * self.x.element_size())


def launched(problem: Problem, keep: bool) -> tuple[Rows, Rows]:
    """Forward and backward of ``impl="triton"``."""
    how = (problem.weights, HEADS, DROPOUT, problem.seed, LENGTH)
    with captured("gfx942", compiling=False) as launches:
        _, saved = layer.forward(problem.x, problem.offsets, *how, keep)
        forward = list(launches)
        launches.clear()
        kept = list(saved) if saved is not None else [problem.x.new_empty(0)] * 5
        layer.backward(problem.x, problem.x, problem.offsets, *how, kept, [True] * 13)
    return (
        [(launch.kernel, problem.passes(launch.arguments.values())) for launch in forward],
        [(launch.kernel, problem.passes(launch.arguments.values())) for launch in launches],
    )


class _Counting(TorchDispatchMode):
    """Charges every operation that is no view."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem, self.rows = problem, Rows()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        moved = self.problem.passes(tree_leaves((args, kwargs, result)))
        if moved and str(function) not in _FREE and not _is_view(function):
            self.rows.append((str(function).removeprefix("aten."), moved))
        return result


_FREE = ("aten._unsafe_view.default", "aten.empty_like.default")


def _is_view(function: Any) -> bool:
    returns = function._schema.returns
    return any(x.alias_info is not None and not x.alias_info.is_write for x in returns)


def eager(problem: Problem) -> tuple[Rows, Rows]:
    """Forward and backward of the same layer in eager torch operations."""
    x = problem.x.detach().requires_grad_()
    weights = [weight.detach().requires_grad_() for weight in problem.weights]
    with _Counting(problem) as counting:
        output = _eager_layer(x, EncoderLayerWeights(*weights))
        forward = list(counting.rows)
        counting.rows.clear()
        torch.autograd.grad(output, [x, *weights], problem.x)
    return forward, counting.rows


def _dropout(x: Tensor) -> Tensor:
    return torch.native_dropout(x, DROPOUT, train=True)[0]  # what a GPU runs


def _eager_layer(x: Tensor, w: EncoderLayerWeights) -> Tensor:
    dim = x.shape[1]
    normed = layer_norm(x, (dim,), w.norm1_weight, w.norm1_bias)
    qkv = linear(normed, w.qkv_weight, w.qkv_bias)
    heads = qkv.view(SEQUENCES, LENGTH, 3, HEADS, dim // HEADS).permute(2, 0, 3, 1, 4)
    attended, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads.unbind(0), DROPOUT)
    attended = attended.transpose(1, 2).reshape(x.shape)
    mid = x + _dropout(linear(attended, w.out_weight, w.out_bias))
    normed = layer_norm(mid, (dim,), w.norm2_weight, w.norm2_bias)
    hidden = _dropout(gelu(linear(normed, w.ffn_in_weight, w.ffn_in_bias)))
    return mid + _dropout(linear(hidden, w.ffn_out_weight, w.ffn_out_bias))


def total(rows: Rows) -> float:
    """Passes of all rows together."""
    return sum(passes for _, passes in rows)


def report(dim: int, dtype: torch.dtype, write: Callable[[str], object]) -> None:
    """Every launch, then the totals."""
    problem = Problem(dim, dtype)
    kept, recomputed, baseline = launched(problem, True), launched(problem, False), eager(problem)
    write(f"D = {dim}, F = {4 * dim}, {dtype}; passes over (tokens, D)\n")
    for name, (forward, backward) in (("kept", kept), ("recompute", recomputed)):
        for direction, rows in (("forward", forward), ("backward", backward)):
            write(f"{name}, {direction}: {len(rows)} launches, {total(rows):.1f}\n")
            for kernel, passes in rows:
                write(f"    {kernel:24s} {passes:6.2f}\n")
    for name, (forward, backward) in (
        ("kept", kept), ("recompute", recomputed), ("eager torch", baseline),
    ):  # fmt: skip
        both = total(forward) + total(backward)
        share = both / (total(baseline[0]) + total(baseline[1]))
        write(
            f"{name:12s} forward {total(forward):6.1f}  backward {total(backward):6.1f}  "
            f"together {both:6.1f}  of eager torch {share:.2f}\n"
        )


if __name__ == "__main__":
    report(128, torch.bfloat16, sys.stdout.write)
