"""The layer by Triton kernels (``impl="triton"``): every product with what stands around it.

Forward (the names are those of `aam_kernels.encoder_layer.reference`)::

    qkv      = LN1(x) Wqkv' + bqkv                        layer_product
    attended = attention(qkv), float32                    aam_kernels.attention.triton
    mid      = x + drop1(attended Wout' + bout)           layer_product
    hidden   = drop2(gelu(LN2(mid) Win' + bin))           layer_product
    output   = mid + drop3(hidden Wffn' + bffn)           layer_product

five launches; three where the tables offer `layer_feed_forward`, which is all after attention at
once (half types, widths up to 128). `layer_feed_backward` is its counterpart.

Backward keeps qkv, attended and the logsumexp, or makes them again from x with the same launches
and so to the same bits; mid and hidden are always made again.

Products take operands in the dtype of the weights and add in float32. Sums of a row, residuals
inside a kernel and the attended values for backward are float32: attention's gradient needs
rowsum(dO O) more exactly than a half type holds O. Rows past the last sequence are never read,
and 0 in the output and the gradient of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aam_kernels._runtime.grouping import Sequences
from aam_kernels.attention import triton as attention
from aam_kernels.encoder_layer.saved import Saved, nothing_saved
from aam_kernels.encoder_layer.triton.launches import FeedGradients, Launcher, Norm, served
from aam_kernels.encoder_layer.triton.tunables import TUNABLES as TUNABLES
from aam_kernels.encoder_layer.weights import (
    BRANCH_SITE,
    HIDDEN_SITE,
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
    keep: bool,
) -> tuple[Tensor, Saved | None]:
    """The layer, (total, D) -> (total, D), and with ``keep`` what backward does not make again."""
    layer = _Layer(x, offsets, weights, num_heads, dropout_p, seed, max_length)
    qkv, attended, lse = layer.attend(torch.float32 if keep else x.dtype)
    output = layer.feed_forward(attended)
    if not keep:
        return output, None
    return output, nothing_saved(x)._replace(qkv=qkv, attended=attended, lse=lse)


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
    layer = _Layer(x, offsets, weights, num_heads, dropout_p, seed, max_length)
    qkv, attended, lse = saved[:3] if saved[0].dim() == 2 else layer.attend(torch.float32)
    found = layer.backward(grad_output.contiguous(), qkv, attended, lse, needs)
    return [grad if need else None for grad, need in zip(found, needs, strict=True)]


class _Layer:
    """One call."""

    def __init__(
        self,
        x: Tensor,
        offsets: Tensor,
        weights: EncoderLayerWeights,
        num_heads: int,
        dropout_p: float,
        seed: Tensor | None,
        max_length: int,
    ) -> None:
        self.x = x.contiguous()
        self.weights = w = EncoderLayerWeights(*(weight.contiguous() for weight in weights))
        self.norm1, self.norm2 = Norm(w.norm1_weight, w.norm1_bias), Norm(*w[6:8])
        self.launcher = Launcher(offsets, dropout_p, seed)
        self.heads = (num_heads, x.shape[1] // num_heads)
        scale = self.heads[1] ** -0.5
        self.how = Sequences(offsets, max_length=max_length), scale, dropout_p, seed

    def attend(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value (total, 3 D), attended (total, D) and lse (total, heads).

        ``dtype`` is that of attended: what follows it in the forward pass rounds it anyway.
        """
        w = self.weights
        qkv = self.launcher.product(self.x, w.qkv_weight, w.qkv_bias, norm=self.norm1)
        attended = torch.empty_like(self.x, dtype=dtype)
        parts = qkv.unflatten(1, (3, *self.heads)).unbind(1)
        lse = attention.forward_into(attended.unflatten(1, self.heads), *parts, *self.how)
        return qkv, attended, lse

    def mid(self, attended: Tensor) -> Tensor:
        """The input with the attention branch added, (total, D)."""
        w = self.weights
        return self.launcher.product(
            attended, w.out_weight, w.out_bias, residual=self.x, output_site=BRANCH_SITE
        )

    def feed_forward(self, attended: Tensor) -> Tensor:
        """The layer's output, (total, D)."""
        if served("layer_feed_forward", self.x):
            return self.launcher.feed_forward(attended, self.x, self.weights)
        w, product, mid = self.weights, self.launcher.product, self.mid(attended)
        hidden = product(
            mid, w.ffn_in_weight, w.ffn_in_bias, norm=self.norm2, gelu=True,
            output_site=HIDDEN_SITE,
        )  # fmt: skip
        return product(
            hidden, w.ffn_out_weight, w.ffn_out_bias, residual=mid, output_site=OUTPUT_SITE
        )

    def backward(
        self, grad_output: Tensor, qkv: Tensor, attended: Tensor, lse: Tensor, needs: list[bool]
    ) -> list[Tensor | None]:
        """Gradients in the order of (x, weights); those of weights that nobody needs are None."""
        w, launcher, product = self.weights, self.launcher, self.launcher.product
        need = EncoderLayerWeights(*needs[1:])
        ffn_out, ffn_in, out, in_projection = ((None, None),) * 4

        fed = self.feed_backward(grad_output, attended)
        grad_mid, norm2 = fed.grad_mid, fed.norm
        if need.ffn_out_weight or need.ffn_out_bias:
            ffn_out = launcher.weight_gradient(
                grad_output, fed.hidden, w.ffn_out_weight, w.ffn_out_bias, site=OUTPUT_SITE
            )
        if need.ffn_in_weight or need.ffn_in_bias:
            ffn_in = launcher.weight_gradient(
                fed.grad_hidden, fed.normed, w.ffn_in_weight, w.ffn_in_bias
            )
        del fed

        if need.out_weight or need.out_bias:
            out = launcher.weight_gradient(
                grad_mid, attended, w.out_weight, w.out_bias, site=BRANCH_SITE
            )
        grad = product(grad_mid, w.out_weight, transposed=True, input_site=BRANCH_SITE)
        grad_qkv = self.attention_backward(grad, qkv, attended, lse)
        grad = product(grad_qkv, w.qkv_weight, transposed=True)
        grad_x, norm1, normed = launcher.norm_backward(grad, self.x, self.norm1, grad_mid)
        if need.qkv_weight or need.qkv_bias:
            in_projection = launcher.weight_gradient(grad_qkv, normed, w.qkv_weight, w.qkv_bias)
        return [grad_x, *norm1, *in_projection, *out, *norm2, *ffn_in, *ffn_out]

    def feed_backward(self, grad_output: Tensor, attended: Tensor) -> FeedGradients:
        """From the gradient of the output to that of mid."""
        w, launcher = self.weights, self.launcher
        if served("layer_feed_backward", self.x):
            return launcher.feed_backward(grad_output, attended, self.x, w)
        mid = self.mid(attended)
        hidden, grad_hidden = launcher.hidden_backward(
            grad_output, mid, self.norm2, w.ffn_in_weight, w.ffn_in_bias, w.ffn_out_weight,
            (HIDDEN_SITE, OUTPUT_SITE),
        )  # fmt: skip
        grad = launcher.product(grad_hidden, w.ffn_in_weight, transposed=True)
        grad_mid, norm, normed = launcher.norm_backward(grad, mid, self.norm2, grad_output)
        return FeedGradients(grad_mid, normed, hidden, grad_hidden, norm)

    def attention_backward(
        self, grad: Tensor, qkv: Tensor, attended: Tensor, lse: Tensor
    ) -> Tensor:
        """Gradient of query, key and value, (total, 3 D)."""
        grad_qkv = torch.empty_like(qkv)
        parts, grads = (x.unflatten(1, (3, *self.heads)).unbind(1) for x in (qkv, grad_qkv))
        grad, attended = (x.unflatten(1, self.heads) for x in (grad, attended))
        attention.backward_into(grads, grad, *parts, attended, lse, *self.how)
        return grad_qkv
