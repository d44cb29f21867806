"""The layer in plain torch, any dtype: the specification of every implementation.

With ``x`` (tokens, dim) and LN the layer norm (eps 1e-5)::

    q, k, v = split(LN1(x) Wqkv' + bqkv);   p = softmax(q k' / sqrt(head_dim)) per head and sequence
    mid = x + drop1((drop0(p) v) Wout' + bout)
    out = mid + drop3(drop2(gelu(LN2(mid) Win' + bin)) Wffn' + bffn)

Dropout site 0 acts on attention probabilities, sites 1 to 3 on token features. Rows that belong
to no sequence are 0 in the output and are never read. float16 and bfloat16 are computed in float32
and rounded once; float64 in float64. Nothing but the input is kept for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from aam_kernels._runtime.dropout import feature_dropped
from aam_kernels._runtime.grouping import Sequences
from aam_kernels.attention import reference as attention
from aam_kernels.encoder_layer.weights import (
    BRANCH_SITE,
    HIDDEN_SITE,
    NORM_EPS,
    OUTPUT_SITE,
    EncoderLayerWeights,
)


def forward(
    x: Tensor,
    offsets: Tensor,
    weights: EncoderLayerWeights,
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
    max_length: int,
    keep: bool = False,
) -> tuple[Tensor, None]:
    """The layer, (total, D) -> (total, D); nothing is kept, whatever ``keep`` says."""
    out = _Layer(x, offsets, weights, num_heads, dropout_p, seed).out
    return torch.cat([out.to(x.dtype), x.new_zeros(x.shape[0] - out.shape[0], x.shape[1])]), None


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
    """Gradients of ``x`` and the weights, None where ``needs`` says so."""
    layer = _Layer(x, offsets, weights, num_heads, dropout_p, seed)
    w, end = layer.weights, layer.out.shape[0]
    grad_output = _computable(grad_output[:end])
    grad = layer.drop(grad_output, OUTPUT_SITE)
    ffn_out = grad.t() @ layer.hidden, grad.sum(0)
    grad = layer.drop(grad @ w.ffn_out_weight, HIDDEN_SITE)
    grad = torch.ops.aten.gelu_backward(grad, layer.hidden_input)
    ffn_in = grad.t() @ layer.normed2, grad.sum(0)
    grad, *norm2 = _norm_backward(grad @ w.ffn_in_weight, layer.mid, w.norm2_weight, w.norm2_bias)
    grad_mid = grad + grad_output
    grad = layer.drop(grad_mid, BRANCH_SITE)
    out = grad.t() @ layer.attended, grad.sum(0)
    grad_heads = (grad @ w.out_weight).view_as(layer.heads[0])
    grads = attention.backward(grad_heads, *layer.heads, *layer.how)
    grad = torch.cat([part.flatten(1) for part in grads], dim=1)
    qkv = grad.t() @ layer.normed1, grad.sum(0)
    grad, *norm1 = _norm_backward(grad @ w.qkv_weight, layer.x, w.norm1_weight, w.norm1_bias)
    grad_x = torch.cat([grad + grad_mid, grad.new_zeros(x.shape[0] - end, x.shape[1])])
    found = (grad_x, *norm1, *qkv, *out, *norm2, *ffn_in, *ffn_out)
    triples = zip(found, (x, *weights), needs, strict=True)
    return [part.to(tensor.dtype) if need else None for part, tensor, need in triples]


class _Layer:
    """The forward pass with everything that it makes on the way."""

    def __init__(
        self,
        x: Tensor,
        offsets: Tensor,
        weights: EncoderLayerWeights,
        num_heads: int,
        dropout_p: float,
        seed: Tensor | None,
    ) -> None:
        self.dropout_p, self.seed = dropout_p, seed
        self.x = _computable(x[: int(offsets[-1])])
        self.weights = w = EncoderLayerWeights(*(_computable(weight) for weight in weights))
        scale = (x.shape[1] // num_heads) ** -0.5
        self.how = Sequences(offsets), scale, dropout_p, seed
        self.normed1 = layer_norm(self.x, x.shape[1:], w.norm1_weight, w.norm1_bias, NORM_EPS)
        qkv = linear(self.normed1, w.qkv_weight, w.qkv_bias)
        heads = qkv.unflatten(1, (3, num_heads, x.shape[1] // num_heads)).unbind(1)
        self.heads = (*heads, *attention.forward(*heads, *self.how))  # q, k, v, output, lse
        self.attended = self.heads[3].flatten(1)
        branch = linear(self.attended, w.out_weight, w.out_bias)
        self.mid = self.x + self.drop(branch, BRANCH_SITE)
        self.normed2 = layer_norm(self.mid, x.shape[1:], w.norm2_weight, w.norm2_bias, NORM_EPS)
        self.hidden_input = linear(self.normed2, w.ffn_in_weight, w.ffn_in_bias)
        self.hidden = self.drop(gelu(self.hidden_input), HIDDEN_SITE)
        branch = linear(self.hidden, w.ffn_out_weight, w.ffn_out_bias)
        self.out = self.mid + self.drop(branch, OUTPUT_SITE)

    def drop(self, values: Tensor, site: int) -> Tensor:
        """Dropout of (tokens, features), and its own derivative."""
        if self.dropout_p == 0.0:
            return values
        assert self.seed is not None
        rows = torch.arange(values.shape[0], device=values.device)
        lost = feature_dropped(self.seed, rows, values.shape[1], site, self.dropout_p)
        return values.masked_fill(lost, 0.0) / (1.0 - self.dropout_p)


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a layer norm's input, weight and bias."""
    _, mean, rstd = torch.native_layer_norm(x, x.shape[1:], weight, bias, NORM_EPS)
    return torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[1:], mean, rstd, weight, bias, [True, True, True]
    )


def _computable(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
