"""`encoder_layer`: arguments are checked once, the operator does the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from aam_kernels._runtime.checks import check_offsets_argument, check_tensors, known_length
from aam_kernels._runtime.dispatch import check_name
from aam_kernels._runtime.dropout import resolve_seed
from aam_kernels.encoder_layer.ops import call as _operator
from aam_kernels.encoder_layer.weights import EncoderLayerWeights


def encoder_layer(
    x: Tensor,
    offsets: Tensor,
    weights: EncoderLayerWeights,
    *,
    num_heads: int,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    first_row: int = 0,
    max_length: int | None = None,
    recompute: bool = True,
    impl: str = "auto",
) -> Tensor:
    """One pre-norm transformer encoder layer (exact GELU, eps 1e-5) within ragged sequences.

    ``mid = x + attention(norm1(x))``, ``output = mid + feed_forward(norm2(mid))``, with dropout
    on attention probabilities, both branch outputs and the hidden features.

    Args:
        x: (total, D) float32, float16, bfloat16 or float64. On a CPU half types are computed in
            float32 and rounded once. Under autocast on a GPU the whole layer runs in the
            autocast dtype; a CPU's autocast changes nothing.
        offsets: (n + 1,) int32 on the same device. Rows past ``offsets[-1]`` give output 0 and
            gradient 0, whatever they hold.
        weights: see `EncoderLayerWeights`; `weights_from_torch` takes them from a torch layer.
        num_heads: divides D.
        dropout_p: probability of dropping, in [0, 1).
        seed: an int or a 0-d int64 tensor; every mask is a pure function of (seed, site, row,
            feature or key, head). None: drawn from torch's default generator.
        first_row: the row of a larger packed batch that row 0 of ``x`` is: with the same seed,
            dropout of a part is then that of the whole.
        max_length: bound on the lengths. Given, no GPU is waited for.
        recompute: True keeps ``x`` alone for backward (4 D bytes a token in float32) and makes
            the rest again, to the bit. False keeps 4 (6 D + F + heads) bytes a token on a CPU;
            on a GPU 20 D + 4 heads in float32, 12 D + 4 heads in a half type.
        impl: "auto", "triton", "cpu", "sdpa" or "math". A name is honoured or refused.

    Returns:
        (total, D) in the dtype of ``x``.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, offset value (looked at on CPU only) or option.
        NotImplementedError: inside forward-mode differentiation.
    """
    check_name(impl)
    dtype = x.dtype
    if x.device.type == "cuda" and torch.is_autocast_enabled("cuda") and dtype != torch.float64:
        half = torch.get_autocast_dtype("cuda")
        x, weights = x.to(half), EncoderLayerWeights(*(weight.to(half) for weight in weights))
    check_tensors(x=x, **dict(zip(EncoderLayerWeights._fields, weights, strict=True)))
    _check_shapes(x, weights, num_heads)
    check_offsets_argument("offsets", offsets, x.device)
    output, *_ = _operator(
        x,
        offsets,
        *weights,
        num_heads,
        float(dropout_p),
        resolve_seed(seed, dropout_p, x.device, first_row),
        known_length("max_length", max_length),
        impl,
        recompute,
    )
    return output.to(dtype)


def _check_shapes(x: Tensor, weights: EncoderLayerWeights, num_heads: int) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be (total, D), got {tuple(x.shape)}")
    dim = x.shape[1]
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide the width {dim}, got {num_heads}")
    hidden = weights.ffn_in_weight.shape[0]
    shapes = (
        (dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,),
        (dim,), (dim,), (hidden, dim), (hidden,), (dim, hidden), (dim,),
    )  # fmt: skip
    for name, weight, shape in zip(weights._fields, weights, shapes, strict=True):
        if weight.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(weight.shape)}")
