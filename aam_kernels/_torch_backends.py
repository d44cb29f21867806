"""torch's own attention backends beside ours, each against float64, with and without padding.

On some ROCm versions torch's ``mem_efficient`` silently returned wrong numbers as soon as a padding
mask was given. Here everyone sees what the installed one does. For information only: `aam_kernels`
calls none of these with a mask.
"""

from __future__ import annotations

import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from aam_kernels._accuracy import error
from aam_kernels._timing import median_seconds, shown

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
MASKS = {
    "no mask": (151,) * 8,
    "padding mask": (151, 1, 33, 101, 150, 64, 17, 128),
    "empty row": (151, 1, 0, 101, 0, 64, 17, 128),
}
"""What is masked, and the lengths of the rows."""
HEADS, HEAD_DIM = 4, 32
WRONG = {torch.float32: 5e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Errors beyond rounding in that dtype (TF32 products, in float32): the result is wrong."""


@dataclass(frozen=True)
class BackendCheck:
    """One backend of ``scaled_dot_product_attention`` with one kind of mask in one dtype.

    Attributes:
        backend: one of `BACKENDS`.
        mask: one of `MASKS`.
        dtype: "float32", "bfloat16", "float16".
        verdict: "right", "WRONG" or "n/a".
        forward_error: largest error of the output in real rows, as a share of its largest value.
        backward_error: the same of the worst gradient.
        forward_seconds: median; None where nothing ran.
        backward_seconds: median.
        reason: why it does not run, or which tensor is wrong.
    """

    backend: str
    mask: str
    dtype: str
    verdict: str
    forward_error: float | None = None
    backward_error: float | None = None
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    reason: str = ""


class _Case(NamedTuple):
    tensors: tuple[Tensor, Tensor, Tensor]  # (rows, heads, length, head_dim)
    grad: Tensor
    mask: Tensor | None  # (rows, 1, 1, length), True where there is a key
    real: Tensor  # (rows, 1, length, 1)


def check_backends(
    device: torch.device, dtypes: tuple[torch.dtype, ...], *, times: bool = True
) -> list[BackendCheck]:
    """Every backend, kind of mask and dtype on a device."""
    found = []
    for dtype in dtypes:
        for mask in MASKS:
            case = _case(mask, dtype, device)
            truth = _truth(case)
            for backend in BACKENDS:
                found.append(_check(backend, mask, dtype, case, truth, device, times))
    return found


def table(checks: list[BackendCheck]) -> list[str]:
    """One line for every backend and dtype; reasons below."""
    reasons: list[str] = []
    heads = ("torch backend", "dtype", *MASKS, "forward", "backward")
    rows = [heads]
    for backend, dtype in dict.fromkeys((check.backend, check.dtype) for check in checks):
        line = {c.mask: c for c in checks if (c.backend, c.dtype) == (backend, dtype)}
        timed = next((c for c in line.values() if c.mask == "padding mask"), None)
        if timed is None or timed.forward_seconds is None:
            timed = next(iter(line.values()))
        clocks = (timed.forward_seconds, timed.backward_seconds)
        rows.append(
            (
                backend,
                dtype,
                *(_cell(line[mask], reasons) for mask in MASKS if mask in line),
                *("" if clock is None else shown(clock) for clock in clocks),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = [
        f"torch's scaled_dot_product_attention, {len(MASKS['no mask'])} rows to "
        f"{max(MASKS['no mask'])}, {HEADS} heads of {HEAD_DIM} (for information, the exit code "
        "does not depend on it; larger of the errors of output and gradients; times with the mask):"
    ]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    return [*lines, *(f"[{number}] {reason}" for number, reason in enumerate(reasons, 1))]


def _cell(check: BackendCheck, reasons: list[str]) -> str:
    note = ""
    if check.reason:
        if check.reason not in reasons:
            reasons.append(check.reason)
        note = f" [{reasons.index(check.reason) + 1}]"
    if check.forward_error is None or check.backward_error is None:
        return f"{check.verdict}{note}"
    return f"{check.verdict} {max(check.forward_error, check.backward_error):.1e}{note}"


def _check(
    backend: str,
    mask: str,
    dtype: torch.dtype,
    case: _Case,
    truth: dict[str, Tensor],
    device: torch.device,
    times: bool,
) -> BackendCheck:
    name = str(dtype).removeprefix("torch.")
    always = torch.is_warn_always_enabled()
    try:
        with warnings.catch_warnings(record=True) as told, sdpa_kernel([BACKENDS[backend]]):
            warnings.simplefilter("always")
            torch.set_warn_always(True)
            result = _run(case)
            errors = {tensor: error(x, truth[tensor]).largest for tensor, x in result.items()}
    except Exception as problem:  # whatever torch's backends raise: told as n/a
        return BackendCheck(backend, mask, name, "n/a", reason=_reason(problem, told))
    finally:
        torch.set_warn_always(always)
    wrong = [f"{tensor} {x:.1e}" for tensor, x in errors.items() if not x <= WRONG[dtype]]
    clocks: tuple[float | None, float | None] = (None, None)
    if times:
        with sdpa_kernel([BACKENDS[backend]]), suppress(RuntimeError):
            clocks = _clocks(case, device)
    return BackendCheck(
        backend,
        mask,
        name,
        "WRONG" if wrong else "right",
        errors["output"],
        max(x for tensor, x in errors.items() if tensor != "output"),
        *clocks,
        reason=f"{backend}, {mask}, {name}: error of {', '.join(wrong)}" if wrong else "",
    )


def _case(mask: str, dtype: torch.dtype, device: torch.device) -> _Case:
    """What stands in padding is finite, so that a mask has to keep it out."""
    lengths = torch.tensor(MASKS[mask])
    generator = torch.Generator().manual_seed(7)
    shape = (4, len(lengths), HEADS, max(MASKS["no mask"]), HEAD_DIM)
    drawn = torch.randn(shape, generator=generator).to(device, dtype)
    slots = (torch.arange(shape[3]) < lengths[:, None]).to(device)
    real = slots[:, None, :, None]
    query, key, value, grad = drawn.unbind(0)
    return _Case(
        (query, key, value),
        grad * real,
        None if mask == "no mask" else slots[:, None, None, :],
        real,
    )


def _truth(case: _Case) -> dict[str, Tensor]:
    """The same in float64 on the CPU, by explicit products; a row without keys gives 0."""
    mask = None if case.mask is None else case.mask.cpu()
    tensors = tuple(x.cpu().double().requires_grad_() for x in case.tensors)
    scores = tensors[0] @ tensors[1].transpose(2, 3) * HEAD_DIM**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e300)
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights * mask
    output = weights @ tensors[2]
    grads = torch.autograd.grad(output, tensors, case.grad.cpu().double())
    return _named(output.detach() * case.real.cpu(), grads)


def _run(case: _Case) -> dict[str, Tensor]:
    tensors = tuple(x.detach().requires_grad_() for x in case.tensors)
    output = _attention(tensors, case.mask)
    grads = torch.autograd.grad(output, tensors, case.grad)
    seen = torch.where(case.real, output.detach(), output.new_zeros(()))
    return _named(seen, grads)


def _attention(tensors: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
    query, key, value = tensors
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _named(output: Tensor, grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    names = ("grad query", "grad key", "grad value")
    return {"output": output, **dict(zip(names, grads, strict=True))}


def _clocks(case: _Case, device: torch.device) -> tuple[float | None, float | None]:
    tensors = tuple(x.detach().requires_grad_() for x in case.tensors)
    output = _attention(tensors, case.mask)

    def forward() -> Tensor:
        return _attention(case.tensors, case.mask)

    def backward() -> object:
        return torch.autograd.grad(output, tensors, case.grad, retain_graph=True)

    return (
        median_seconds(forward, device, budget=0.05),
        median_seconds(backward, device, budget=0.05),
    )


def _reason(problem: Exception, told: list[warnings.WarningMessage]) -> str:
    """What torch warned of while it refused, else what it raised: one line."""
    lines = []
    for warning in told:
        line = re.sub(r"\s*\(Triggered internally.*", "", " ".join(str(warning.message).split()))
        if "not used because" not in line and "runtime disabled" not in line and line not in lines:
            lines.append(line)
    if lines:
        return " ".join(lines)[:300]
    first = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {first[0] if first else ''}"[:300]
