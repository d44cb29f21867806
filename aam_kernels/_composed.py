"""What errors a half-precision layer of single operations has: the measure for a fused one.

Of an operation, `math` in float16 or bfloat16 rounds once. A layer is six operations forward and
ten backward; an implementation that multiplies half-precision matrices rounds between them, where
`math` computes the whole layer in float32. So in half precision an encoder layer is allowed what
the same layer made of torch's own operations and `math` attention has, where that is more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from aam_kernels._accuracy import Error, error
from aam_kernels._problems import Problem, offsets_of
from aam_kernels._runtime.dropout import feature_dropped, resolve_seed


def widened(
    allowed: Mapping[str, Error],
    problem: Problem,
    inputs: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
) -> dict[str, Error]:
    """Errors of `math`, and of the composed layer where ``problem`` is one in half precision."""
    if problem.operation != "encoder_layer" or inputs["x"].dtype not in HALF:
        return dict(allowed)
    composed = composed_layer(problem, inputs)
    wide = {}
    for name, of_math in allowed.items():
        found = error(composed[name], truth[name])
        wide[name] = Error(max(of_math.largest, found.largest), max(of_math.mean, found.mean))
    return wide


HALF = (torch.float16, torch.bfloat16)


def composed_layer(problem: Problem, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients of a problem's layer, every operation rounding to the inputs' dtype."""
    x = {name: t.detach().requires_grad_() for name, t in inputs.items() if name != "grad"}
    end = sum(problem.lengths)
    output = _layer(problem, x, x["x"][:end])
    grads = torch.autograd.grad(output, tuple(x.values()), inputs["grad"][:end])
    padding = output.new_zeros(inputs["x"].shape[0] - end, output.shape[1])
    names = (f"grad {name}" for name in x)
    return {
        "output": torch.cat([output.detach(), padding]),
        **dict(zip(names, grads, strict=True)),
    }


def _layer(problem: Problem, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    from aam_kernels.attention.api import ragged_attention
    from aam_kernels.encoder_layer.weights import BRANCH_SITE, HIDDEN_SITE, OUTPUT_SITE

    seed = resolve_seed(problem.seed, problem.dropout_p, x.device)
    rows, width = torch.arange(x.shape[0], device=x.device), x.shape[1:]

    def drop(values: Tensor, site: int) -> Tensor:
        if seed is None:
            return values
        lost = feature_dropped(seed, rows, values.shape[1], site, problem.dropout_p)
        return values.masked_fill(lost, 0.0) / (1.0 - problem.dropout_p)

    normed = layer_norm(x, width, w["norm1_weight"], w["norm1_bias"])
    qkv = linear(normed, w["qkv_weight"], w["qkv_bias"]).unflatten(1, (3, problem.heads, -1))
    offsets = offsets_of(problem.lengths, x.device)
    query, key, value = qkv.unbind(1)
    attended = ragged_attention(
        query, key, value, offsets, dropout_p=problem.dropout_p, seed=problem.seed, impl="math"
    )
    assert isinstance(attended, Tensor)
    branch = linear(attended.flatten(1), w["out_weight"], w["out_bias"])
    mid = x + drop(branch, BRANCH_SITE)
    normed = layer_norm(mid, width, w["norm2_weight"], w["norm2_bias"])
    hidden = drop(gelu(linear(normed, w["ffn_in_weight"], w["ffn_in_bias"])), HIDDEN_SITE)
    return mid + drop(linear(hidden, w["ffn_out_weight"], w["ffn_out_bias"]), OUTPUT_SITE)
