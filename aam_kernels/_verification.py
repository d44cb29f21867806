"""Measures every implementation against float64 on this machine's own device.

`aam_kernels.verify` is the command line of it. What passed in a complete run is remembered for
the device: away from the CPU, ``impl="auto"`` uses nothing else.

Each implementation must show, on every problem of the contract and in every dtype it takes: an
error against ``math`` in float64 of at most twice the error of ``math`` in that dtype (plus a
small floor), for the output and each gradient, largest and mean; the same bits when repeated; the
same bits when every row that belongs to no sequence is NaN; and zeros on those rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from aam_kernels._problems import FLOORS, PROBLEMS, Error, Problem, error
from aam_kernels._runtime.device import device_key, remember
from aam_kernels._runtime.dispatch import available_impls

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RATIO = 2.0
"""How many times the error of `math` an implementation may have."""


@dataclass(frozen=True)
class Check:
    """One implementation on one problem in one dtype.

    Attributes:
        operation: name of the operation.
        impl: name of the implementation.
        dtype: "float32", "bfloat16", "float16".
        problem: what was computed.
        worst: the tensor whose error is the largest share of what is allowed.
        error: its largest error, as a share of its largest true value.
        ratio: that error over the error of `math` (0 when both are within the floor).
        failures: what broke the contract, empty when nothing did.
        seconds: time taken.
    """

    operation: str
    impl: str
    dtype: str
    problem: str
    worst: str
    error: float
    ratio: float
    failures: tuple[str, ...]
    seconds: float


@dataclass
class VerificationReport:
    """All checks made on one device."""

    device: str
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.failures]

    def passing(self) -> list[str]:
        """Names ``operation/impl`` of which every check passed."""
        seen = {f"{check.operation}/{check.impl}" for check in self.checks}
        return sorted(seen - {f"{check.operation}/{check.impl}" for check in self.failures})

    def to_json(self) -> str:
        """Device, verdict and every check."""
        content = {
            "device": self.device,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
        }
        return json.dumps(content, indent=1)

    def table(self) -> str:
        """One line for every operation, implementation and dtype, then every failure."""
        head = ("operation", "impl", "dtype", "problems", "worst error", "to math", "verdict")
        rows = [head]
        for (operation, impl, dtype), checks in _grouped(self.checks).items():
            worst = max(checks, key=lambda check: check.error)
            failed = sum(bool(check.failures) for check in checks)
            rows.append(
                (
                    operation,
                    impl,
                    dtype,
                    str(len(checks)),
                    f"{worst.error:.1e}",
                    f"{max(check.ratio for check in checks):.2f}x",
                    f"{failed} FAILED" if failed else "passed",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [self.device]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        for check in self.failures:
            where = f"{check.operation}/{check.impl} {check.dtype}, {check.problem}"
            lines.extend(f"FAILED {where}: {failure}" for failure in check.failures)
        return "\n".join(lines)


def verify(
    device: torch.device | str | None = None,
    *,
    operations: tuple[str, ...] | None = None,
    impls: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    save: bool = False,
) -> VerificationReport:
    """Checks implementations on a device against the contract.

    Args:
        device: where to run; None: the GPU if there is one, else the CPU.
        operations: which operations; None: all.
        impls: which implementations; None: all that are available there.
        dtypes: dtypes of the inputs.
        save: remember what passed, for ``impl="auto"``. Only a complete run may be saved.

    Raises:
        ValueError: an unknown operation, an implementation that is not available on the device,
            or ``save`` with a restricted run.
    """
    if save and (operations or impls or dtypes != DTYPES):
        raise ValueError("only a complete run can be saved: leave out operations, impls, dtypes")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    available = _available(device)
    for operation in operations or ():
        if operation not in available:
            raise ValueError(f"operation must be one of {tuple(available)}, got {operation!r}")
    report = VerificationReport(device_key(device))
    for operation in operations or tuple(available):
        for impl in impls or ():
            if impl not in available[operation]:
                raise ValueError(
                    f"{operation}: impl={impl!r} is not available here; available: "
                    f"{', '.join(available[operation])}"
                )
        for dtype in dtypes:
            for problem in PROBLEMS[operation]():
                names = impls or available[operation]
                report.checks.extend(check_problem(problem, names, dtype, device))
    if save:
        remember(device, report.passing())
    return report


def check_problem(
    problem: Problem, impls: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> Iterator[Check]:
    """Checks several implementations on one problem; truth and `math` are computed once."""
    inputs = problem.inputs(dtype, device)
    truth = problem.run("math", {name: x.double() for name, x in inputs.items()})
    math = problem.run("math", inputs)
    allowed = {name: error(math[name], truth[name]) for name in truth}
    for impl in impls:
        started = time.perf_counter()
        result = problem.run(impl, inputs)
        worst, largest, ratio, failures = _compare(result, truth, allowed, FLOORS[dtype])
        failures += _repeat(problem, impl, inputs, result)
        yield Check(
            problem.operation,
            impl,
            str(dtype).removeprefix("torch."),
            problem.name,
            worst,
            largest,
            ratio,
            tuple(failures),
            time.perf_counter() - started,
        )


def _compare(
    result: dict[str, Tensor], truth: dict[str, Tensor], math: dict[str, Error], floor: Error
) -> tuple[str, float, float, list[str]]:
    """The worst tensor, its error, the worst ratio to math, and what is too large."""
    worst, worst_share, largest, worst_ratio = "", -1.0, 0.0, 0.0
    failures = []
    for name, expected in truth.items():
        measured = error(result[name], expected)
        for kind in ("largest", "mean"):
            found, of_math = getattr(measured, kind), getattr(math[name], kind)
            bound = RATIO * of_math + getattr(floor, kind)
            if not found <= bound:
                failures.append(f"{name}: {kind} error {found:.2e}, allowed {bound:.2e}")
            if found > getattr(floor, kind):
                worst_ratio = max(worst_ratio, found / max(of_math, 1e-300))
            if kind == "largest" and found / bound > worst_share:
                worst, worst_share, largest = name, found / bound, found
    return worst, largest, worst_ratio, failures


def _repeat(
    problem: Problem, impl: str, inputs: dict[str, Tensor], result: dict[str, Tensor]
) -> list[str]:
    """Repeats with NaN in every ignored row: the same bits, and zeros there."""
    ignored = problem.ignored(next(iter(inputs.values())).device)
    poisoned = {name: x.clone() for name, x in inputs.items()}
    for name, rows in ignored.items():
        poisoned[name][rows] = float("nan")
    failures = []
    for what, repeated in (
        ("repeated", problem.run(impl, inputs)),
        ("with NaN in ignored rows", problem.run(impl, poisoned)),
    ):
        different = [name for name in result if not torch.equal(result[name], repeated[name])]
        if different:
            failures.append(f"{what}: {', '.join(different)} not bitwise equal")
    for name, rows in ignored.items():
        tensor = result["output"] if name == "grad" else result[f"grad {name}"]
        if bool((tensor[rows] != 0).any()):
            failures.append(f"rows without a sequence are not 0: {name}")
    return failures


def _available(device: torch.device) -> dict[str, tuple[str, ...]]:
    """Implementations of every operation of the package; importing one registers it."""
    import aam_kernels.attention.ops
    import aam_kernels.pooling.ops

    if find_spec("aam_kernels.encoder_layer.ops") is not None:
        import aam_kernels.encoder_layer.ops  # noqa: F401
    return {name: impls for name, impls in available_impls(device).items() if name in PROBLEMS}


def _grouped(checks: list[Check]) -> dict[tuple[str, str, str], list[Check]]:
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.operation, check.impl, check.dtype), []).append(check)
    return groups


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m aam_kernels.verify",
        description="Measure every attention implementation against float64 on this device.",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if any")
    parser.add_argument("--operation", action="append", help="only this one; repeatable")
    parser.add_argument("--impl", action="append", help="only this one; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every check here")
    options = parser.parse_args(arguments)
    complete = not (options.operation or options.impl)
    try:
        report = verify(
            options.device,
            operations=tuple(options.operation) if options.operation else None,
            impls=tuple(options.impl) if options.impl else None,
            save=complete,
        )
    except ValueError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return 2
    sys.stdout.write(report.table() + "\n")
    if options.json is not None:
        options.json.write_text(report.to_json())
    return 0 if report.passed else 1
