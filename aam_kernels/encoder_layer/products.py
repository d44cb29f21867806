"""Matrix products of the layer through the fastest library that torch brings.

On x86 CPUs torch's own float32 products go to MKL, which on processors of other makers runs its
AVX2 code; oneDNN, which torch also brings, uses AVX-512 there: 2.1 times the speed on Zen 5. So
products go through oneDNN where it is built in, with the residual sum in its epilogue. Everywhere
else (GPU, float64, builds without oneDNN) they are plain torch. One call always takes the same
route, so results are reproducible.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_NO_EPILOGUE: tuple[str, list[float], str] = ("none", [], "")


def _onednn_takes(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight' + bias``: (tokens, in), (out, in), (out,) -> (tokens, out)."""
    if _onednn_takes(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *_NO_EPILOGUE)
    return functional.linear(x, weight, bias)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """``residual + x weight' + bias`` as a new tensor."""
    if _onednn_takes(x):
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    return functional.linear(x, weight, bias).add_(residual)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad weight``: (tokens, out), (out, in) -> (tokens, in)."""
    if _onednn_takes(grad):
        return torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, *_NO_EPILOGUE)
    return torch.mm(grad, weight)


def add_weight_gradient(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """``total += grad' x``: (out, in) += (tokens, out), (tokens, in)."""
    if not _onednn_takes(x):
        total.addmm_(grad.t(), x)
    elif grad.shape[1] <= x.shape[1]:  # the smaller operand is the one that gets transposed
        total.add_(torch.ops.mkldnn._linear_pointwise(grad.t(), x.t(), None, *_NO_EPILOGUE))
    else:
        total.t().add_(torch.ops.mkldnn._linear_pointwise(x.t(), grad.t(), None, *_NO_EPILOGUE))
