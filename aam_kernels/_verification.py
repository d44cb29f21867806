"""Measures every implementation against float64 on this machine's own device.

`aam_kernels.verify` is the command line of it. What passed or failed in a complete run is
remembered for the device, and spares `aam_kernels._runtime.trust` its small checks.

Each implementation must show, on every problem of the contract and in every dtype it takes: an
error against ``math`` in float64 of at most twice the error of ``math`` in that dtype (plus a
small floor), for the output and each gradient, largest and mean; the same bits when repeated; the
same bits when every row that belongs to no sequence is NaN; and zeros on those rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from aam_kernels import _quick_check  # noqa: F401  (installs the check that dispatch asks for)
from aam_kernels._accuracy import compare, error
from aam_kernels._composed import widened
from aam_kernels._problems import PROBLEMS, Problem, problems_of
from aam_kernels._report import TIMED_WIDTH, Check, Timing, VerificationReport, grouped
from aam_kernels._runtime import native, record, trust
from aam_kernels._runtime.device import device_key, environment
from aam_kernels._runtime.dispatch import available_impls
from aam_kernels._timing import median_seconds
from aam_kernels._torch_backends import check_backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CRASH = "does not run"
_SMALL = 1 << 24  # elements of scores or matrices up to which the truth is computed on the CPU


def verify(
    device: torch.device | str | None = None,
    *,
    operations: tuple[str, ...] | None = None,
    impls: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    save: bool = False,
    quick: bool = False,
    times: bool = False,
    backends: bool = False,
) -> VerificationReport:
    """Checks implementations on a device against the contract.

    Args:
        device: where to run; None: the GPU if there is one, else the CPU.
        operations: which operations; None: all.
        impls: which implementations; None: all that are available there.
        dtypes: dtypes of the inputs.
        save: remember what passed and what failed, so that calls need no small check of their
            own. Only a complete run may be saved.
        quick: two or three problems for each operation instead of all.
        times: also time every implementation.
        backends: also measure torch's own attention backends, for information.

    Raises:
        ValueError: an unknown operation, an implementation that is not available on the device,
            or ``save`` with a restricted run.
    """
    if save and (operations or impls or dtypes != DTYPES or quick):
        raise ValueError(
            "only a complete run can be saved: leave out operations, impls, dtypes and quick"
        )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    available = _available(device)
    _check_names(operations, impls, available)
    kernels = native.description() if device.type == "cpu" else ""
    report = VerificationReport(device_key(device), environment(device), kernels)
    with trust.suspended():
        _check_all(report, operations or tuple(available), impls, available, dtypes, device, quick)
        if times and not report.lost:
            for operation in operations or tuple(available):
                for dtype in dtypes:
                    names = impls or available[operation]
                    report.timings.extend(_times(operation, names, dtype, device))
    if save:
        _remember(report, dtypes)
    if backends and not report.lost and (operations is None or "attention" in operations):
        report.backends = check_backends(device, dtypes, times=times)
    return report


def _check_all(
    report: VerificationReport,
    operations: tuple[str, ...],
    impls: tuple[str, ...] | None,
    available: dict[str, tuple[str, ...]],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    quick: bool,
) -> None:
    """Every problem, until one leaves the device unusable."""
    for operation in operations:
        for dtype in dtypes:
            for problem in problems_of(operation, quick=quick):
                for check in check_problem(problem, impls or available[operation], dtype, device):
                    report.checks.append(check)
                    crashed = any(CRASH in failure for failure in check.failures)
                    if crashed and not trust.usable(device):
                        name = f"{check.operation}/{check.impl} {check.dtype}, {check.problem},"
                        report.lost = name
                        return


def check_problem(
    problem: Problem, impls: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> Iterator[Check]:
    """Checks several implementations on one problem; truth and `math` are computed once."""
    inputs = problem.inputs(dtype, device)
    where = "cpu" if problem.size() < _SMALL else device
    truth = problem.run("math", {name: x.to(where, torch.float64) for name, x in inputs.items()})
    math = problem.run("math", inputs)
    allowed = {name: error(math[name], truth[name]) for name in truth}
    allowed = widened(allowed, problem, inputs, truth)
    for impl in impls:
        started = time.perf_counter()
        worst, largest, ratio = "", float("inf"), float("inf")
        failures: list[str] = []
        try:
            result = problem.run(impl, inputs)
            found = compare(result, truth, allowed, dtype, problem.largest_logit())
            worst, largest, ratio = found.worst, found.error, found.ratio
            failures = [*found.failures, *_repeat(problem, impl, inputs, result)]
        except Exception as crash:  # a crash is a failure of the contract
            told = " ".join(str(crash).split())[:500]
            failures.append(f"{CRASH}: {type(crash).__name__}: {told}")
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


def _times(
    operation: str, impls: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> Iterator[Timing]:
    """Times implementations on many rows of ASVs; what does not run says why."""
    count = 2048 if device.type == "cuda" else 16
    length = 151
    timed = Problem(operation, "timing", (length,) * count, 4, TIMED_WIDTH // 4)
    inputs = timed.inputs(dtype, device)
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if name != "grad"}
    name = str(dtype).removeprefix("torch.")
    for impl in impls:
        try:
            output = timed.call(impl, leaves)

            def forward(impl: str = impl) -> Tensor:
                with torch.no_grad():
                    return timed.call(impl, leaves)

            def backward(output: Tensor = output) -> object:
                tensors = tuple(leaves.values())
                return torch.autograd.grad(output, tensors, inputs["grad"], retain_graph=True)

            forward_seconds = median_seconds(forward, device, budget=0.2)
            backward_seconds = median_seconds(backward, device, budget=0.2)
        except Exception as problem:  # out of memory, or what has failed the checks too
            told = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
            yield Timing(operation, impl, name, count, length, None, None, told)
            continue
        yield Timing(operation, impl, name, count, length, forward_seconds, backward_seconds)


def _remember(report: VerificationReport, dtypes: tuple[torch.dtype, ...]) -> None:
    """Writes what passed and what failed into the record, in place of earlier small checks."""
    names = {str(dtype).removeprefix("torch."): dtype for dtype in dtypes}
    entries = {}
    for (operation, impl, dtype), checks in grouped(report.checks).items():
        failed = [check for check in checks if check.failures]
        if report.lost and not failed:
            continue  # not all of it was checked
        told = "; ".join(f"{check.problem}: {check.failures[0]}" for check in failed[:3])
        name = trust.entry(operation, impl, names[dtype])
        entries[name] = (
            f"{operation}: impl={impl!r} failed `verify` on {report.device} ({dtype}, "
            f"{len(failed)} of {len(checks)} problems): {told}"
            if failed
            else ""
        )
    record.write(report.environment, entries, [name.removesuffix("*") for name in entries])
    trust.forget()


def _check_names(
    operations: tuple[str, ...] | None,
    impls: tuple[str, ...] | None,
    available: dict[str, tuple[str, ...]],
) -> None:
    for operation in operations or ():
        if operation not in available:
            raise ValueError(f"operation must be one of {tuple(available)}, got {operation!r}")
    for operation in operations or tuple(available):
        for impl in impls or ():
            if impl not in available[operation]:
                raise ValueError(
                    f"{operation}: impl={impl!r} is not available here; available: "
                    f"{', '.join(available[operation])}"
                )


def _available(device: torch.device) -> dict[str, tuple[str, ...]]:
    """Implementations of every operation of the package; importing one registers it."""
    import aam_kernels.attention.ops
    import aam_kernels.pooling.ops

    if find_spec("aam_kernels.encoder_layer.ops") is not None:
        import aam_kernels.encoder_layer.ops  # noqa: F401
    return {name: impls for name, impls in available_impls(device).items() if name in PROBLEMS}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m aam_kernels.verify",
        description="Measure every implementation, and torch's own attention backends, against "
        "float64 on this device. Exits with 1 when one of ours fails.",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if any")
    parser.add_argument("--operation", action="append", help="only this one; repeatable")
    parser.add_argument("--impl", action="append", help="only this one; repeatable")
    parser.add_argument("--quick", action="store_true", help="a few problems; nothing remembered")
    parser.add_argument("--no-times", action="store_true", help="errors only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    options = parser.parse_args(arguments)
    complete = not (options.operation or options.impl or options.quick)
    try:
        report = verify(
            options.device,
            operations=tuple(options.operation) if options.operation else None,
            impls=tuple(options.impl) if options.impl else None,
            save=complete,
            quick=options.quick,
            times=not options.no_times,
            backends=True,
        )
    except ValueError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return 2
    sys.stdout.write(report.table() + "\n")
    if options.json is not None:
        options.json.write_text(report.to_json())
    return 0 if report.passed else 1
