"""Contestants that do the same work on one device: checked, then timed in turns by its own clock.

On a GPU a run is timed between two events on the stream; on a CPU, where the harness is tested, by
the wall clock. A contestant that cannot be prepared or does not run is a row with its reason.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from aam_kernels._timing import seconds_of, shown

Work = Callable[[], list[Tensor]]
"""Runs once: output, then gradients."""


class Unavailable(Exception):
    """A contestant cannot take part here; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """One way to do the work of a case.

    Attributes:
        prepare: makes everything that is not timed and returns the work; may raise.
        forward: the forward pass alone, to count what it keeps for backward; None: not counted.
        unpack: result -> the tensors to compare with the truth: padding removed.
    """

    prepare: Callable[[], Work]
    forward: Callable[[], Tensor] | None = None
    unpack: Callable[[list[Tensor]], list[Tensor]] = list


@dataclass
class Row:
    """What was measured of one contestant.

    Attributes:
        name: of the contestant.
        reason: why it did not take part, or how far it is from the truth; empty: it is right.
        seconds: of each round.
        error: largest error of any tensor, as a share of the tensor's largest value.
        kept: bytes that its forward pass keeps for backward.
        speedup: median over rounds of the reference's seconds over its own.
    """

    name: str
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    kept: int | None = None
    speedup: float | None = None


@dataclass
class Case:
    """One comparison on one device."""

    title: str
    reference: str
    rows: list[Row]

    def lines(self) -> list[str]:
        """The comparison as text."""
        rounds = max((len(row.seconds) for row in self.rows), default=0)
        width = max(len(row.name) for row in self.rows)
        lines = [f"{self.title}  (median of {rounds} interleaved rounds)"]
        for row in self.rows:
            if not row.seconds:
                lines.append(f"  {row.name:<{width}}  n/a: {row.reason}")
                continue
            ratio = "reference" if row.name == self.reference else ""
            if not ratio and row.speedup is not None:
                ratio = f"{row.speedup:.2f}x"
            kept = "" if row.kept is None else f"{row.kept / 1e6:,.1f} MB kept"
            error = "" if row.error is None else f"error {row.error:.1e}"
            clock = shown(statistics.median(row.seconds))
            line = f"  {row.name:<{width}}  {clock:>9}  {ratio:>9}  {error:<13}  {kept:<14}"
            lines.append(f"{line} {row.reason}".rstrip())
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            {**asdict(row), "median": statistics.median(row.seconds) if row.seconds else None}
            for row in self.rows
        ]
        return {"title": self.title, "reference": self.reference, "rows": rows}


def compare(
    title: str,
    contestants: Mapping[str, Contestant],
    *,
    reference: str,
    truth: list[Tensor],
    device: torch.device,
    tolerance: float,
    budget: float = 4.0,
    rounds: tuple[int, int] = (3, 25),
) -> Case:
    """Prepares and checks every contestant, then runs them in turns.

    Args:
        title: of the case.
        contestants: name -> contestant.
        reference: the one that ratios are taken to, if it takes part.
        truth: what each returns; empty: nothing to compare with (dropout of another kind).
        device: where they run.
        tolerance: error beyond which a row is marked as wrong.
        budget: seconds for the rounds, about.
        rounds: the fewest and the most.
    """
    rows: dict[str, Row] = {}
    works: dict[str, Work] = {}
    for name, contestant in contestants.items():
        row = rows[name] = Row(name)
        try:
            works[name] = contestant.prepare()
            result = contestant.unpack(works[name]())
            _synchronize(device)
            row.error = _error(result, truth) if truth else None
            if contestant.forward is not None:
                row.kept = kept_bytes(contestant.forward)
        except Exception as problem:
            works.pop(name, None)
            told = " ".join(str(problem).split())
            known = isinstance(problem, Unavailable)
            row.reason = (told if known else f"{type(problem).__name__}: {told}")[:200]
            continue
        if row.error is not None and not row.error <= tolerance:
            row.reason = "WRONG"
    _run_rounds(works, rows, device, budget, rounds)
    if reference in works:
        for name in works:
            pairs = zip(rows[reference].seconds, rows[name].seconds, strict=True)
            rows[name].speedup = statistics.median(a / max(b, 1e-9) for a, b in pairs)
    return Case(title, reference, list(rows.values()))


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages that autograd keeps for backward, parameters and inputs left out."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        leaf = x if x._base is None else x._base
        if not leaf.is_leaf or not leaf.requires_grad:
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    held = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held.append(forward())  # alive until counted, or storages would be counted twice
    return sum(storages.values())


def _run_rounds(
    works: Mapping[str, Work],
    rows: Mapping[str, Row],
    device: torch.device,
    budget: float,
    rounds: tuple[int, int],
) -> None:
    started = time.perf_counter()
    names = list(works)
    for number in range(rounds[1]):
        if number >= rounds[0] and time.perf_counter() - started > budget:
            break
        for name in names[:: 1 if number % 2 == 0 else -1]:
            rows[name].seconds.append(seconds_of(works[name], device))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _error(result: list[Tensor], truth: list[Tensor]) -> float:
    if len(result) != len(truth):
        raise ValueError(f"{len(result)} tensors, expected {len(truth)}")
    errors = []
    for found, expected in zip(result, truth, strict=True):
        exact = expected.detach().double()
        difference = (found.detach().double() - exact).abs().max()
        errors.append(float(difference / exact.abs().max().clamp(min=1e-30)))
    return max((x if x == x else float("inf") for x in errors), default=0.0)
