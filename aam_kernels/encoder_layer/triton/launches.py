"""Launches the kernels of the layer; shapes are those of the tensors, nothing waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from aam_kernels._runtime.configurations import (
    Configuration,
    configuration,
    dot_precision,
    launch,
    round_half_up,
)
from aam_kernels._runtime.dropout import drop_below
from aam_kernels.encoder_layer.triton.feed_forward import (
    layer_feed_backward,
    layer_feed_forward,
)
from aam_kernels.encoder_layer.triton.gradients import (
    layer_add_partials,
    layer_norm_backward,
    layer_weight_gradient,
)
from aam_kernels.encoder_layer.triton.product import layer_hidden_backward, layer_product
from aam_kernels.encoder_layer.weights import (
    BRANCH_SITE,
    HIDDEN_SITE,
    OUTPUT_SITE,
    EncoderLayerWeights,
)

WIDTHS, LENGTHS = (128,), (0,)
"""Of the tables: wider matrices are taken in blocks, and the rows of a batch do not matter."""
NORM_WIDTHS = (128, 512, 2048)
"""Of `layer_norm_backward`, which holds whole rows."""

WEIGHT_PROGRAMS = 512
NORM_PROGRAMS = 512
"""Programs that share the tokens of a sum; more only make more partial sums."""
SHARE_GROUP = 128
"""Partial sums that one program adds where there are many."""


@dataclass(frozen=True)
class Norm:
    """Weight and bias of a layer norm."""

    weight: Tensor
    bias: Tensor


class FeedGradients(NamedTuple):
    """What the backward pass of everything after attention leaves for the rest."""

    grad_mid: Tensor  # (total, D)
    normed: Tensor  # (total, D), the norm's output
    hidden: Tensor  # (total, F), after GELU and dropout
    grad_hidden: Tensor  # (total, F), before GELU
    norm: tuple[Tensor, Tensor]  # of its weight and bias


def served(kernel: str, x: Tensor) -> bool:
    """Whether the tables offer a kernel for the width and dtype of ``x``."""
    return configuration(kernel, x.dtype, x.shape[1], LENGTHS[0]) is not None


@dataclass(frozen=True)
class Launcher:
    """What is the same for every launch of one call."""

    offsets: Tensor
    dropout_p: float
    seed: Tensor | None

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        input_site: int = 0,
        output_site: int = 0,
        gelu: bool = False,
        transposed: bool = False,
    ) -> Tensor:
        """(total, K) times a weight (N, K), or (K, N) if ``transposed`` -> (total, N)."""
        strides = weight.stride()
        width, inner = weight.shape
        if transposed:
            strides, (width, inner) = strides[::-1], (inner, width)
        output = weight.new_empty(x.shape[0], width)
        chosen = _configuration("layer_product", weight.dtype, width)
        programs = triton.cdiv(x.shape[0], chosen.meta["BLOCK_M"]) * triton.cdiv(
            width, chosen.meta["BLOCK_N"]
        )
        launch(
            layer_product, programs,
            x, weight, bias, *_norm_tensors(norm), residual, output, *self._place(),
            x.shape[0], *strides, *self._dropout(),
            N=width, K=inner, INPUT_SITE=self._site(input_site),
            OUTPUT_SITE=self._site(output_site), GELU=gelu,
            configuration=chosen, **_arithmetic(weight.dtype),
        )  # fmt: skip
        return output

    def feed_forward(self, attended: Tensor, x: Tensor, weights: EncoderLayerWeights) -> Tensor:
        """The layer's output (total, D) from what attention gave; see `layer_feed_forward`."""
        (total, dim), hidden = x.shape, weights.ffn_in_weight.shape[0]
        output = x.new_empty(total, dim)
        chosen = configuration("layer_feed_forward", x.dtype, dim, LENGTHS[0])
        assert chosen is not None
        launch(
            layer_feed_forward, triton.cdiv(total, chosen.meta["BLOCK_M"]),
            attended, x, *weights[4:], output, *self._place(), total, *self._dropout(),
            **self._shapes(x, hidden), configuration=chosen,
        )  # fmt: skip
        return output

    def feed_backward(
        self, grad_output: Tensor, attended: Tensor, x: Tensor, weights: EncoderLayerWeights
    ) -> FeedGradients:
        """The backward pass of `feed_forward` but for the weights of its products."""
        (total, dim), hidden = x.shape, weights.ffn_in_weight.shape[0]
        chosen = configuration("layer_feed_backward", x.dtype, dim, LENGTHS[0])
        assert chosen is not None
        programs = triton.cdiv(total, chosen.meta["BLOCK_M"])
        made = (*torch.empty((2, total, dim), dtype=x.dtype, device=x.device),)
        made += (*torch.empty((2, total, hidden), dtype=x.dtype, device=x.device),)
        partials = torch.empty((programs, 2 * dim), dtype=torch.float32, device=x.device)
        launch(
            layer_feed_backward, programs,
            grad_output, attended, x, *weights[4:11], *made, partials, *self._place(),
            *self._dropout(), **self._shapes(x, hidden), configuration=chosen,
        )  # fmt: skip
        norm = _add_partials(partials, weights.norm2_weight, weights.norm2_bias)
        return FeedGradients(*made, norm)

    def _shapes(self, x: Tensor, hidden: int) -> dict[str, object]:
        dim = x.shape[1]
        return {
            "D": dim,
            "F": hidden,
            "BLOCK_D": max(16, triton.next_power_of_2(dim)),
            "BRANCH_SITE": self._site(BRANCH_SITE),
            "HIDDEN_SITE": self._site(HIDDEN_SITE),
            "OUTPUT_SITE": self._site(OUTPUT_SITE),
            **_arithmetic(x.dtype),
        }

    def hidden_backward(
        self,
        grad_output: Tensor,
        mid: Tensor,
        norm: Norm,
        ffn_in_weight: Tensor,
        ffn_in_bias: Tensor,
        ffn_out_weight: Tensor,
        sites: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Hidden features and the gradient before their GELU, both (total, F)."""
        hidden = mid.new_empty(mid.shape[0], ffn_in_weight.shape[0])
        grad_hidden_input = torch.empty_like(hidden)
        chosen = _configuration("layer_hidden_backward", mid.dtype, hidden.shape[1])
        programs = triton.cdiv(mid.shape[0], chosen.meta["BLOCK_M"]) * triton.cdiv(
            hidden.shape[1], chosen.meta["BLOCK_N"]
        )
        launch(
            layer_hidden_backward, programs,
            grad_output, mid, norm.weight, norm.bias, ffn_in_weight, ffn_in_bias, ffn_out_weight,
            hidden, grad_hidden_input, *self._place(), *self._dropout(),
            N=hidden.shape[1], K=mid.shape[1], HIDDEN_SITE=self._site(sites[0]),
            OUTPUT_SITE=self._site(sites[1]), configuration=chosen, **_arithmetic(mid.dtype),
        )  # fmt: skip
        return hidden, grad_hidden_input

    def norm_backward(
        self, grad: Tensor, x: Tensor, norm: Norm, residual: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Gradient of ``x`` plus the residual, those of weight and bias, and the norm's output."""
        total, dim = x.shape
        chosen = _configuration("layer_norm_backward", x.dtype, dim)
        programs = min(NORM_PROGRAMS, max(1, triton.cdiv(total, chosen.meta["BLOCK_ROWS"])))
        grad_x = x.new_empty(total, dim)
        normed = torch.empty_like(grad_x)
        partials = torch.empty((programs, 2 * dim), dtype=torch.float32, device=x.device)
        launch(
            layer_norm_backward, programs,
            grad, x, residual, norm.weight, norm.bias, grad_x, normed, partials, self.offsets,
            self.offsets.shape[0] - 1, total, programs,
            D=dim, BLOCK_D=triton.next_power_of_2(dim), ROUND_HALF_UP=round_half_up(x.dtype),
            configuration=chosen,
        )  # fmt: skip
        grads = _add_partials(partials, norm.weight, norm.bias)
        return grad_x, grads, normed

    def weight_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *, site: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Gradients of a weight (N, K) and its bias, from (total, N) and (total, K)."""
        (width, inner), total = weight.shape, x.shape[0]
        chosen = _configuration("layer_weight_gradient", weight.dtype, inner)
        blocks = triton.cdiv(width, chosen.meta["BLOCK_N"]) * triton.cdiv(
            inner, chosen.meta["BLOCK_K"]
        )
        rows = chosen.meta["BLOCK_ROWS"]
        shares = min(triton.cdiv(WEIGHT_PROGRAMS, blocks), max(1, triton.cdiv(total, 4 * rows)))
        rows_a_share = triton.cdiv(triton.cdiv(total, shares), rows) * rows
        size = width * inner + width
        partials = torch.empty((shares, size), dtype=torch.float32, device=x.device)
        launch(
            layer_weight_gradient, shares * blocks,
            grad, x, partials, *self._place(), rows_a_share, *self._dropout(),
            N=width, K=inner, SITE=self._site(site), configuration=chosen,
            **_arithmetic(weight.dtype),
        )  # fmt: skip
        return _add_partials(partials, weight, bias)

    def _place(self) -> tuple[Tensor, Tensor | None, int]:
        seed = self.seed if self.dropout_p > 0.0 else None
        return self.offsets, seed, self.offsets.shape[0] - 1

    def _dropout(self) -> tuple[int, float]:
        return drop_below(self.dropout_p), 1.0 / (1.0 - self.dropout_p)

    def _site(self, site: int) -> int:
        return site if self.dropout_p > 0.0 else 0


def _add_partials(partials: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of (shares, weight + bias) over the shares; many shares in two steps."""
    chosen = _configuration("layer_add_partials", weight.dtype, 0)
    shares, size = partials.shape
    blocks = triton.cdiv(size, chosen.meta["BLOCK"])
    if shares > SHARE_GROUP**2 // 16:
        groups = triton.cdiv(shares, SHARE_GROUP)
        sums = partials.new_empty(groups, size)
        launch(
            layer_add_partials, groups * blocks,
            partials, sums, sums, shares, SHARE_GROUP, size, 0, configuration=chosen,
        )  # fmt: skip
        partials, shares = sums, groups
    grads = torch.empty_like(weight), torch.empty_like(bias)
    launch(
        layer_add_partials, blocks,
        partials, *grads, shares, shares, weight.numel(), bias.numel(), configuration=chosen,
    )  # fmt: skip
    return grads


def _norm_tensors(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.weight, norm.bias)


def _arithmetic(dtype: torch.dtype) -> dict[str, object]:
    return {"PRECISION": dot_precision(dtype), "ROUND_HALF_UP": round_half_up(dtype)}


def _configuration(kernel: str, dtype: torch.dtype, width: int) -> Configuration:
    widest = NORM_WIDTHS[-1] if kernel == "layer_norm_backward" else WIDTHS[-1]
    found = configuration(kernel, dtype, min(width, widest), LENGTHS[0])
    assert found is not None, f"the tables hold no {kernel}"
    return found
