"""The layer through torch's own kernels, one cache-sized chunk of whole sequences at a time.

Each chunk goes through the whole layer before the next one starts, so what the layer makes on the
way stays in cache; the backward pass does the same with the derivative written out, adding each
chunk's weight gradients to the totals in order. Nothing is recorded by autograd. With
``recompute`` only the layer's input is kept and a chunk's activations are made again right
before they are used; without it, what `SAVED` names is kept. Both run the same `forward_chunk`
arithmetic, so their gradients are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu

from aam_kernels._runtime.grouping import Sequences
from aam_kernels.encoder_layer import chunk_attention
from aam_kernels.encoder_layer.chunks import Chunk, layer_chunks
from aam_kernels.encoder_layer.masks import feature_factors
from aam_kernels.encoder_layer.products import (
    add_weight_gradient,
    input_gradient,
    linear,
    linear_add,
)
from aam_kernels.encoder_layer.saved import Saved, new_saved
from aam_kernels.encoder_layer.weights import (
    BRANCH_SITE,
    HIDDEN_SITE,
    NORM_EPS,
    OUTPUT_SITE,
    EncoderLayerWeights,
)
from aam_kernels.encoder_layer.workers import share

# Rows of a chunk; 8 sequences of 101 tokens. Forward on one core, one noisy sweep: 73 GFLOP/s with
# 404 rows, 78 with 808, 64 with 1,616.
CHUNK_ROWS = 832


@dataclass(frozen=True)
class Layer:
    """Everything about a call that is the same for every chunk."""

    weights: EncoderLayerWeights
    num_heads: int
    dropout_p: float
    seed: Tensor | None

    def multiplier(self, x: Tensor, rows: Tensor | None, site: int) -> Tensor | None:
        """0 where an element of ``x`` is dropped, 1 / (1 - p) elsewhere; None without dropout."""
        if self.dropout_p == 0.0:
            return None
        assert self.seed is not None and rows is not None
        return feature_factors(x, rows, site, self.dropout_p, self.seed)


class Activations(NamedTuple):
    """What one chunk's backward pass needs; (chunk rows, ...)."""

    rows: Tensor | None  # rows in the packed tensor, None without dropout
    x: Tensor
    normed1: Tensor
    statistics1: tuple[Tensor, Tensor]
    attention: list[chunk_attention.Kept]
    branch_kept: Tensor | None
    normed2: Tensor
    statistics2: tuple[Tensor, Tensor]
    hidden: Tensor  # after GELU and its dropout
    hidden_kept: Tensor | None
    saved: Saved


def forward_chunk(x: Tensor, chunk: Chunk, layer: Layer, saved: Saved | None = None) -> Activations:
    """Everything of the layer but its last product; what ``saved`` holds is not made again."""
    w = layer.weights
    rows = chunk.numbers(x.device) if layer.dropout_p else None
    normed1, *statistics1 = _norm(x, w.norm1_weight, w.norm1_bias)
    qkv = linear(normed1, w.qkv_weight, w.qkv_bias) if saved is None else saved.qkv
    attended, attention = chunk_attention.forward(
        qkv, chunk, layer.num_heads, layer.dropout_p, layer.seed, rows,
        None if saved is None else (saved.attended, saved.lse),
    )  # fmt: skip
    branch_kept = layer.multiplier(x, rows, BRANCH_SITE)
    if saved is not None and saved.mid.dim() == 2:
        mid = saved.mid
    elif branch_kept is None:
        mid = linear_add(attended, w.out_weight, w.out_bias, x)
    else:
        mid = torch.addcmul(x, linear(attended, w.out_weight, w.out_bias), branch_kept)
    normed2, *statistics2 = _norm(mid, w.norm2_weight, w.norm2_bias)
    if saved is not None and saved.hidden_input.dim() == 2:
        hidden_input = saved.hidden_input
    else:
        hidden_input = linear(normed2, w.ffn_in_weight, w.ffn_in_bias)
    hidden = gelu(hidden_input)
    hidden_kept = layer.multiplier(hidden, rows, HIDDEN_SITE)
    if hidden_kept is not None:
        hidden.mul_(hidden_kept)
    lse = x.new_empty(0) if chunk.packed is None else attention[0].probabilities
    return Activations(
        rows, x, normed1, (statistics1[0], statistics1[1]), attention, branch_kept, normed2,
        (statistics2[0], statistics2[1]), hidden, hidden_kept,
        Saved(qkv, attended, lse, mid, hidden_input),
    )  # fmt: skip


def last_product(made: Activations, layer: Layer) -> Tensor:
    """The layer's output from `forward_chunk`'s result."""
    w = layer.weights
    kept = layer.multiplier(made.x, made.rows, OUTPUT_SITE)
    if kept is None:
        return linear_add(made.hidden, w.ffn_out_weight, w.ffn_out_bias, made.saved.mid)
    return torch.addcmul(
        made.saved.mid, linear(made.hidden, w.ffn_out_weight, w.ffn_out_bias), kept
    )


def backward_chunk(
    grad_output: Tensor,
    made: Activations,
    chunk: Chunk,
    layer: Layer,
    totals: list[Tensor | None],
    need_input: bool,
) -> Tensor | None:
    """Adds the chunk's weight gradients to ``totals`` and returns the gradient of its input."""
    w, total, saved = layer.weights, EncoderLayerWeights(*totals), made.saved
    kept = layer.multiplier(made.x, made.rows, OUTPUT_SITE)
    grad = grad_output if kept is None else grad_output * kept
    _add_linear(total.ffn_out_weight, total.ffn_out_bias, grad, made.hidden)
    grad = input_gradient(grad, w.ffn_out_weight)
    if made.hidden_kept is not None:
        grad.mul_(made.hidden_kept)
    grad = torch.ops.aten.gelu_backward.grad_input(grad, saved.hidden_input, grad_input=grad)
    _add_linear(total.ffn_in_weight, total.ffn_in_bias, grad, made.normed2)
    grad = input_gradient(grad, w.ffn_in_weight)
    grad_mid = _norm_backward(
        grad, saved.mid, made.statistics2, w.norm2_weight, w.norm2_bias,
        total.norm2_weight, total.norm2_bias,
    ).add_(grad_output)  # fmt: skip
    grad = grad_mid if made.branch_kept is None else grad_mid * made.branch_kept
    _add_linear(total.out_weight, total.out_bias, grad, saved.attended)
    grad = input_gradient(grad, w.out_weight)
    grad = chunk_attention.backward(
        grad, saved.qkv, saved.attended, made.attention, chunk, layer.num_heads,
        layer.dropout_p, layer.seed, made.rows,
    )  # fmt: skip
    _add_linear(total.qkv_weight, total.qkv_bias, grad, made.normed1)
    if not need_input and total.norm1_weight is None and total.norm1_bias is None:
        return None
    grad = input_gradient(grad, w.qkv_weight)
    return _norm_backward(
        grad, made.x, made.statistics1, w.norm1_weight, w.norm1_bias,
        total.norm1_weight, total.norm1_bias,
    ).add_(grad_mid)  # fmt: skip


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_layer_norm(x, x.shape[1:], weight, bias, NORM_EPS)


def _norm_backward(
    grad: Tensor,
    x: Tensor,
    statistics: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    total_weight: Tensor | None,
    total_bias: Tensor | None,
) -> Tensor:
    mask = [True, total_weight is not None, total_bias is not None]
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[1:], *statistics, weight, bias, mask
    )
    if total_weight is not None:
        total_weight.add_(grad_weight)
    if total_bias is not None:
        total_bias.add_(grad_bias)
    return grad_x


def _add_linear(
    total_weight: Tensor | None, total_bias: Tensor | None, grad: Tensor, x: Tensor
) -> None:
    if total_weight is not None:
        add_weight_gradient(total_weight, grad, x)
    if total_bias is not None:
        total_bias.add_(grad.sum(0))


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
    layer = Layer(_computable(weights, x), num_heads, dropout_p, seed)
    compute = layer.weights.qkv_weight.dtype
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    real = _real_rows(x, offsets, output)
    saved = None
    if keep:
        hidden = weights.ffn_in_weight.shape[0]
        saved = new_saved(x, hidden, num_heads, on_cpu=x.device.type == "cpu")
        saved.lse.zero_()  # made again where it is needed

    def work(chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            made = forward_chunk(chunk.take(real).to(compute), chunk, layer)
            chunk.put(output, last_product(made, layer))
            if saved is not None:
                for whole, part in zip(saved, made.saved, strict=True):
                    if whole.dim() == part.dim() == 2:
                        chunk.put(whole, part)

    share(_chunks(x, offsets, max_length), work)
    return _clear_unreal(output, offsets), saved


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
    layer = Layer(_computable(weights, x), num_heads, dropout_p, seed)
    compute = layer.weights.qkv_weight.dtype
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    real = _real_rows(x, offsets, grad_x)
    grad_output = _real_rows(grad_output, offsets, None)

    def work(chunks: Sequence[Chunk]) -> list[Tensor | None]:
        totals = [
            torch.zeros_like(weight) if need else None
            for weight, need in zip(layer.weights, needs[1:], strict=True)
        ]
        for chunk in chunks:
            part = None
            if saved[0].dim() == 2:
                part = Saved(*(chunk.take(x) if x.dim() == 2 else x for x in saved))
            made = forward_chunk(chunk.take(real).to(compute), chunk, layer, part)
            grad = chunk.take(grad_output).to(compute)
            grad = backward_chunk(grad, made, chunk, layer, totals, needs[0])
            if grad_x is not None and grad is not None:
                chunk.put(grad_x, grad)
        return totals

    shares = share(_chunks(x, offsets, max_length), work) or [work([])]
    finished: list[Tensor | None] = []
    for weight, (total, *others) in zip(weights, zip(*shares, strict=True), strict=True):
        for other in others:  # in order of the threads, so that sums are reproducible
            total.add_(other) if total is not None else None
        finished.append(None if total is None else total.to(weight.dtype))
    return [None if grad_x is None else _clear_unreal(grad_x, offsets), *finished]


def _chunks(x: Tensor, offsets: Tensor, max_length: int) -> list[Chunk]:
    """Cache-sized chunks on a CPU; elsewhere everything at once, without reading the offsets."""
    if x.device.type == "cpu":
        return list(layer_chunks(offsets, CHUNK_ROWS))
    if x.shape[0] == 0 or offsets.shape[0] == 1:
        return []
    return [Chunk(x.shape[0], 0, None, (), Sequences(offsets, max_length=max_length))]


def _real_rows(x: Tensor, offsets: Tensor, result: Tensor | None) -> Tensor:
    """``x`` as it may be computed with: rows of no sequence are cleared where they are computed.

    On a CPU no chunk holds such rows; ``result`` gets their zeros here.
    """
    if x.device.type != "cpu":
        return _clear_unreal(x, offsets)
    if result is not None:
        result[int(offsets[-1]) :] = 0
    return x


def _clear_unreal(x: Tensor, offsets: Tensor) -> Tensor:
    """Zeros in the rows past ``offsets[-1]``, without waiting for a GPU."""
    if x.device.type == "cpu":
        return x
    real = torch.arange(x.shape[0], device=x.device) < offsets[-1]
    return torch.where(real.unsqueeze(1), x, x.new_zeros(()))


def _computable(weights: EncoderLayerWeights, x: Tensor) -> EncoderLayerWeights:
    """The weights, contiguous, in the dtype that is computed in: on a CPU not a half one."""
    if x.device.type != "cpu":
        return EncoderLayerWeights(*(weight.contiguous() for weight in weights))
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return EncoderLayerWeights(*(weight.to(compute).contiguous() for weight in weights))
