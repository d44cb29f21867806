"""How errors are measured, and which are allowed.

An implementation may have twice the error of ``math`` in the same dtype, plus a small floor, for
each tensor, largest and mean; and never more than a ceiling, so that a device on which ``math``
itself is wrong lends it to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

RATIO = 2.0
"""How many times the error of `math` an implementation may have."""


@dataclass(frozen=True)
class Error:
    """Largest and mean absolute error of one tensor, as shares of its largest true value.

    Of 1, the size of the inputs, where the true values are smaller: what cancels to nothing, such
    as the gradient of a query that sees one key, has no size of its own.
    """

    largest: float
    mean: float


FLOORS = {
    torch.float64: Error(1e-14, 1e-15),
    torch.float32: Error(3e-7, 3e-8),
    torch.bfloat16: Error(2e-3, 1e-5),
    torch.float16: Error(3e-4, 1e-6),
}
"""Errors that pass whatever `math` has: about a rounding of the largest value of a tensor."""

CEILINGS = {
    torch.float64: 1e-9,
    torch.float32: 2e-3,  # with large logits; TF32 products have their own
    torch.bfloat16: 1e-1,
    torch.float16: 2e-2,
}
"""Largest errors that nothing right has."""
TF32_CEILING = 5e-2


@dataclass(frozen=True)
class Comparison:
    """One result beside the truth.

    Attributes:
        worst: the tensor whose error is the largest share of what is allowed.
        error: its largest error.
        ratio: the largest ratio to the error of `math` (0 when all are within the floor).
        failures: what is too large.
    """

    worst: str
    error: float
    ratio: float
    failures: tuple[str, ...]


def error(measured: Tensor, truth: Tensor) -> Error:
    """Compares with a float64 truth; anything not finite is an infinite error."""
    if truth.numel() == 0:
        return Error(0.0, 0.0)
    difference = (measured.to(truth.device).double() - truth).abs()
    if not bool(difference.isfinite().all()):
        return Error(float("inf"), float("inf"))
    scale = max(float(truth.abs().max()), 1.0)
    return Error(float(difference.max()) / scale, float(difference.mean()) / scale)


def ceiling(dtype: torch.dtype) -> float:
    """The largest error that anything may have in a dtype."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return TF32_CEILING
    return CEILINGS[dtype]


def compare(
    result: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    math: Mapping[str, Error],
    dtype: torch.dtype,
    logit: float = 0.0,
    slack: float = 1.0,
) -> Comparison:
    """Compares every tensor of a result with the truth and with the errors of `math`.

    ``logit``: the largest logit where logits are large. Kernels that keep the logsumexp round
    exp(S - logsumexp) by as much as float32 rounds S; four such roundings are allowed, and in the
    mean a tenth of that. ``slack``: factor on all that is allowed.
    """
    worst, worst_share, largest, worst_ratio = "", -1.0, 0.0, 0.0
    failures = []
    for name, expected in truth.items():
        measured = error(result[name], expected)
        for kind in ("largest", "mean"):
            found, of_math = getattr(measured, kind), getattr(math[name], kind)
            floor = getattr(FLOORS[dtype], kind)
            roundings = 2**-22 * logit * (1.0 if kind == "largest" else 0.1)
            bound = min(slack * (RATIO * of_math + floor + roundings), ceiling(dtype))
            if not found <= bound:
                failures.append(f"{name}: {kind} error {found:.2e}, allowed {bound:.2e}")
            if found > floor:
                worst_ratio = max(worst_ratio, found / max(of_math, 1e-300))
            if kind == "largest" and found / bound > worst_share:
                worst, worst_share, largest = name, found / bound, found
    return Comparison(worst, largest, worst_ratio, tuple(failures))
