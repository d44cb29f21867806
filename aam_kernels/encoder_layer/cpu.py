"""The layer through the compiled CPU kernels (`aam_kernels/native/layer_forward.hpp`).

A few sequences at a time go through the whole layer in cache, forward and backward. With nothing
kept the backward pass makes a chunk's activations again, by the same arithmetic: gradients are
equal to the bit. float16 and bfloat16 are converted here, computed in float32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aam_kernels._runtime import native
from aam_kernels._runtime.grouping import has_gaps
from aam_kernels._runtime.on_cpu import capsule, dense, like, rounded, rows, seed_of
from aam_kernels.encoder_layer.saved import Saved, new_saved
from aam_kernels.encoder_layer.weights import EncoderLayerWeights


def forward(
    x: Tensor,
    offsets: Tensor,
    weights: EncoderLayerWeights,
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
    max_length: int,
    keep: bool,
) -> tuple[Tensor, Saved | None]:
    """The layer's output (total, D), and with ``keep`` what backward would have to recompute.

    Rows that belong to no sequence are 0 in the output; in what is kept they are undefined.
    """
    output = like(x, has_gaps(offsets, None, x.shape[0]))
    saved = None
    if keep:
        saved = new_saved(x, weights.ffn_in_weight.shape[0], num_heads, on_cpu=True)
    native.kernels().layer_forward(
        capsule(rows(x)), capsule(output), None if saved is None else [*map(capsule, saved)],
        [capsule(dense(weight)) for weight in weights], capsule(offsets.contiguous()), num_heads,
        dropout_p, *seed_of(seed, dropout_p)[:2], torch.get_num_threads(),
    )  # fmt: skip
    return rounded(output, x.dtype), saved


def backward(
    grad_output: Tensor,
    x: Tensor,
    offsets: Tensor,
    weights: EncoderLayerWeights,
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
    max_length: int,
    saved: list[Tensor],
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of ``x`` and the twelve weights, each only where ``needs`` says so."""
    gaps = has_gaps(offsets, None, x.shape[0])
    grads = [like(x, gaps) if needs[0] else None]
    grads += [
        like(weight, False) if need else None
        for weight, need in zip(weights, needs[1:], strict=True)
    ]
    kept = saved[0].dim() == 2
    native.kernels().layer_backward(
        capsule(rows(grad_output)), capsule(rows(x)),
        [capsule(dense(part)) for part in saved] if kept else None, capsule(grads[0]),
        [*map(capsule, grads[1:])], [capsule(dense(weight)) for weight in weights],
        capsule(offsets.contiguous()), num_heads, dropout_p, *seed_of(seed, dropout_p)[:2],
        torch.get_num_threads(),
    )  # fmt: skip
    return [
        None if grad is None else rounded(grad, tensor.dtype)
        for grad, tensor in zip(grads, (x, *weights), strict=True)
    ]
