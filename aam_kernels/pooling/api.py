"""Public pooling function: arguments are checked once, the operator does the rest."""

from __future__ import annotations

from torch import Tensor

from aam_kernels._runtime.checks import check_offsets_argument, check_tensors, known_length
from aam_kernels._runtime.dispatch import check_name
from aam_kernels.pooling.ops import call as _operator


def attention_pool(
    values: Tensor,
    scores: Tensor,
    offsets: Tensor,
    *,
    max_length: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax-weighted sum of each sequence's rows.

    Args:
        values: (total, dim) float32, float16, bfloat16 or float64.
        scores: (total,) logits, same dtype and device.
        offsets: (n + 1,) int32 on the same device, from 0, never decreasing.
        max_length: bound on the lengths. Given, no GPU is waited for.
        impl: "auto", "triton", "cpu", "sdpa" or "math". A name is honoured or refused.

    Returns:
        (n, dim); 0 for an empty sequence. Rows past ``offsets[-1]`` get gradient 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, offset value (looked at on CPU only) or option.
        NotImplementedError: inside forward-mode differentiation.
    """
    check_name(impl)
    check_tensors(values=values, scores=scores)
    if values.dim() != 2 or scores.shape != values.shape[:1]:
        raise ValueError(
            "expected values (total, dim) and scores (total,), got "
            f"{tuple(values.shape)} and {tuple(scores.shape)}"
        )
    check_offsets_argument("offsets", offsets, values.device)
    pooled, _ = _operator(
        values, scores, offsets, None, known_length("max_length", max_length), impl
    )
    return pooled
