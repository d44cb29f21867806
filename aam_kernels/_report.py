"""What `verify` found: every check and time, as a table for people and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from aam_kernels._timing import shown
from aam_kernels._torch_backends import BackendCheck
from aam_kernels._torch_backends import table as backend_table

TIMED_WIDTH = 128
"""Width of the rows on which implementations are timed, in four heads."""


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


@dataclass(frozen=True)
class Timing:
    """Seconds of one implementation on rows like those of a model.

    Attributes:
        operation: name of the operation.
        impl: name of the implementation.
        dtype: "float32", "bfloat16", "float16".
        rows: how many sequences.
        length: rows of each.
        forward: median seconds; None where it did not run.
        backward: median seconds of the gradients of every input, without the forward pass.
        reason: why there are none.
    """

    operation: str
    impl: str
    dtype: str
    rows: int
    length: int
    forward: float | None
    backward: float | None
    reason: str = ""


def _time(timing: Timing | None, which: str) -> str:
    """A cell of the table: empty where no times were asked for."""
    if timing is None:
        return ""
    seconds = getattr(timing, which)
    return "n/a" if seconds is None else shown(seconds)


@dataclass
class VerificationReport:
    """All that was measured on one device; `backends` is for information."""

    device: str
    environment: str = ""
    kernels: str = ""
    """On a CPU: which of the compiled kernels run there and on whose threads, or why none do."""
    checks: list[Check] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    backends: list[BackendCheck] = field(default_factory=list)
    lost: str = ""
    """What left the device unusable, so that nothing after it was checked; empty: nothing did."""

    @property
    def passed(self) -> bool:
        """Whether every check of our own implementations passed."""
        return not self.failures

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.failures]

    def to_json(self) -> str:
        """Device, verdict, every check, every time, every backend of torch."""
        content = {
            "device": self.device,
            "environment": self.environment,
            "kernels": self.kernels,
            "passed": self.passed,
            "lost": self.lost,
            "checks": [asdict(check) for check in self.checks],
            "timings": [asdict(timing) for timing in self.timings],
            "torch_backends": [asdict(check) for check in self.backends],
        }
        return json.dumps(content, indent=1)

    def table(self) -> str:
        """One line for every operation, implementation and dtype, every failure, torch's own."""
        head = ("operation", "impl", "dtype", "problems", "worst error", "to math", "forward",
                "backward", "verdict")  # fmt: skip
        rows = [head]
        clocks = {(x.operation, x.impl, x.dtype): x for x in self.timings}
        for place, checks in grouped(self.checks).items():
            worst = max(checks, key=lambda check: check.error)
            failed = sum(bool(check.failures) for check in checks)
            timing = clocks.get(place)
            rows.append(
                (
                    *place,
                    str(len(checks)),
                    f"{worst.error:.1e}",
                    f"{max(check.ratio for check in checks):.2f}x",
                    _time(timing, "forward"),
                    _time(timing, "backward"),
                    f"{failed} FAILED" if failed else "passed",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [line for line in (self.device, self.kernels) if line]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        sizes = {x.operation: f"{x.operation} {x.rows} x {x.length}" for x in self.timings}
        if sizes:
            lines.append(f"times: {', '.join(sizes.values())} tokens, width {TIMED_WIDTH}")
        lines += [
            f"no time of {x.operation}/{x.impl} {x.dtype}: {x.reason}"
            for x in self.timings
            if x.reason
        ]
        for check in self.failures:
            where = f"{check.operation}/{check.impl} {check.dtype}, {check.problem}"
            lines.extend(f"FAILED {where}: {failure}" for failure in check.failures)
        if self.lost:
            lines.append(f"{self.lost} left the device unusable: nothing after it was checked")
        if self.backends:
            lines += ["", *backend_table(self.backends)]
        return "\n".join(lines)


def grouped(checks: list[Check]) -> dict[tuple[str, str, str], list[Check]]:
    """Checks by (operation, implementation, dtype)."""
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.operation, check.impl, check.dtype), []).append(check)
    return groups
