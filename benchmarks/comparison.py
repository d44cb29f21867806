"""Contestants that do the same work in turns: timings, ratios, goals, and their tables."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.machine import COPY, PEAK
from benchmarks.worker import Memory, Worker, processor_seconds

SETTLED = 0.02  # seconds until idle OpenMP threads of the call before no longer spin on a core

Contestants = Mapping[str, Callable[[], Any]]


@dataclass
class Timing:
    """Seconds of one contestant, one entry a round."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """What one call does; `benchmarks.kernels` says how it is counted.

    Attributes:
        operations: floating-point operations of the products that are executed.
        bytes: what must be read and written once.
        model: operations of the forward pass, times three with a backward pass: recomputed
            products are not counted.
    """

    operations: float = 0.0
    bytes: float = 0.0
    model: float = 0.0


@dataclass(frozen=True)
class Goal:
    """A contestant should do at least so much more than another.

    Attributes:
        contestant: who.
        at_least: the ratio.
        over: the other one; empty: the reference.
        of: what is compared: "calls" a second, "operations" a second, "bytes" a second, or
            "memory" (calls within the same memory).
    """

    contestant: str
    at_least: float
    over: str = ""
    of: str = "calls"


@dataclass(frozen=True)
class Figure:
    """Something measured that is no ratio of speeds, and what is asked of it.

    Attributes:
        name: what it is.
        value: measured.
        at_least: asked for; None: anything.
        at_most: likewise.
    """

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether it is as asked; None where nothing is asked."""
        if self.at_least is None and self.at_most is None:
            return None
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return low <= self.value <= high

    def __str__(self) -> str:
        """Name, value and verdict in a line."""
        asked = [
            f"at {word} {limit:.4g}"
            for word, limit in (("least", self.at_least), ("most", self.at_most))
            if limit is not None
        ]
        verdict = f"  ({', '.join(asked)}: {'reached' if self.reached else 'MISSED'})"
        return f"{self.name}: {self.value:.4g}{verdict * bool(asked)}"


@dataclass
class Comparison:
    """What was measured of the contestants of a case, and what is asked of them."""

    title: str
    reference: str
    timings: dict[str, Timing]
    work: dict[str, Work] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)

    def ratio(
        self, name: str, over: str = "", *, of: str = "calls", clock: str = "wall"
    ) -> float | None:
        """How much more of something a contestant does than another, in the median round.

        Args:
            name: the contestant.
            over: the other one; empty: the reference.
            of: see `Goal`.
            clock: "wall" or "processor".

        Returns:
            None where it was not measured, or nothing of that kind is done.
        """
        over = over or self.reference
        if not {name, over} <= set(self.timings):
            return None
        if of == "memory":
            if not {name, over} <= set(self.memory):
                return None
            return self.memory[over].growth / max(self.memory[name].growth, 1e-9)
        ours, theirs = (self._amount(contestant, of) for contestant in (name, over))
        if not ours or not theirs:
            return None
        seconds = zip(
            getattr(self.timings[name], clock), getattr(self.timings[over], clock), strict=True
        )
        return statistics.median(
            (ours / max(a, 1e-9)) / (theirs / max(b, 1e-9)) for a, b in seconds
        )

    def _amount(self, name: str, of: str) -> float:
        return 1.0 if of == "calls" else getattr(self.work.get(name, Work()), of)

    def rows(self) -> list[dict[str, Any]]:
        """One row a contestant: what the table shows, each ratio with what it is taken over."""
        return [
            {
                "contestant": name,
                "rounds": len(timing.wall),
                "wall_seconds": statistics.median(timing.wall),
                "processor_seconds": statistics.median(timing.processor),
                "speed_over": self.reference,
                "speed": self.ratio(name),
                "speed_by_processor": self.ratio(name, clock="processor"),
                "share_of_fma_peak": self.ratio(name, self._peak(name), of="operations"),
                "share_of_fma_peak_by_processor": self.ratio(
                    name, self._peak(name), of="operations", clock="processor"
                ),
                "share_of_fma_peak_by_model_operations": self._model_share(name),
                "share_of_copy_bandwidth": self.ratio(name, COPY, of="bytes"),
                "megabytes": self.memory[name].growth if name in self.memory else None,
                "peak_megabytes": self.memory[name].peak if name in self.memory else None,
                "page_faults": self.faults.get(name),
                "each_round": asdict(timing),
            }
            for name, timing in self.timings.items()
        ]

    def _peak(self, name: str) -> str:
        """The peak that belongs to a contestant: its own process's, if that was measured."""
        own = f"{PEAK}, {name}"
        return own if own in self.timings else PEAK

    def _model_share(self, name: str) -> float | None:
        share = self.ratio(name, self._peak(name), of="operations")
        work = self.work.get(name, Work())
        return share * work.model / work.operations if share and work.model else None

    def verdicts(self) -> list[dict[str, Any]]:
        """One row a goal that could be measured."""
        found = []
        for goal in self.goals:
            measured = self.ratio(goal.contestant, goal.over, of=goal.of)
            if measured is not None:
                found.append(
                    {
                        "case": self.title,
                        **asdict(goal),
                        "over": goal.over or self.reference,
                        "measured": measured,
                        "by_processor": self.ratio(
                            goal.contestant, goal.over, of=goal.of, clock="processor"
                        ),
                        "reached": measured >= goal.at_least,
                    }
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, for the JSON file."""
        return {
            "contestants": self.rows(),
            "goals": self.verdicts(),
            "figures": [{**asdict(one), "reached": one.reached} for one in self.figures],
            "notes": self.notes,
        }


class Rounds:
    """One call is one round: every contestant once, each timed on its own.

    Every second round runs in the opposite order, so that whatever one contestant leaves behind in
    caches or in the processor's clock does not always meet the same successor. A contestant that
    does not fit into memory takes part no longer.

    Attributes:
        results: of each contestant's last run.
        timings: of each contestant's runs.
        refused: why a contestant takes part no longer.
    """

    def __init__(self, contestants: Contestants):
        self.contestants = dict(contestants)
        self.results: dict[str, Any] = {}
        self.timings = {name: Timing() for name in contestants}
        self.refused: dict[str, str] = {}
        self.count = 0

    def warm_up(self) -> None:
        """A round that is not timed."""
        for name in list(self.contestants):
            self._run(name)

    def __call__(self) -> None:
        """Run one round."""
        names = list(self.contestants)
        for name in names if self.count % 2 == 0 else reversed(names):
            time.sleep(SETTLED)
            wall, processor = time.perf_counter(), processor_seconds()
            if not self._run(name):
                continue
            processor, wall = processor_seconds() - processor, time.perf_counter() - wall
            contestant, timing = self.contestants[name], self.timings[name]
            if isinstance(contestant, Worker):
                wall, processor = contestant.wall, contestant.processor
            timing.wall.append(wall)
            timing.processor.append(processor)
        self.count += 1

    def _run(self, name: str) -> bool:
        try:
            self.results[name] = self.contestants[name]()
        except MemoryError as error:
            self.refused[name] = f"n/a: {error}"
            del self.contestants[name], self.timings[name]
        return name in self.contestants


def is_limit(name: str) -> bool:
    """Whether a contestant is one of the machine's limits, not a way to do the work."""
    return name == COPY or name.startswith(PEAK)


def fastest(timings: Mapping[str, Timing], names: Iterable[str]) -> str:
    """The one of some contestants with the smallest median CPU time."""
    measured = [name for name in names if name in timings]
    return min(measured, key=lambda name: statistics.median(timings[name].processor))


def rounds_within(seconds: float, one_round: float, least: int = 3, most: int = 25) -> int:
    """How many rounds of `one_round` seconds fit, within [least, most]."""
    return max(least, min(most, int(seconds / max(one_round, 1e-6))))


def format_seconds(seconds: float) -> str:
    """1.23 s, 4.56 ms or 7.89 us."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def format_comparison(comparison: Comparison) -> str:
    """One case as a table; columns of which nothing was measured are left out."""
    table = [["", "wall", "CPU", "speed", "by CPU", "of FMA", "by CPU", "3 x forward", "of copy"]]
    table[0] += ["MB", "whole process", "page faults"]
    for row in comparison.rows():
        name, clocks = row["contestant"], (row["wall_seconds"], row["processor_seconds"])
        seconds = [name, *map(format_seconds, clocks)]
        if is_limit(name):
            work = comparison.work[name]
            rates = [f"{(work.operations + work.bytes) / clock / 1e9:.0f}" for clock in clocks]
            unit = "GB/s" if name == COPY else "GF/s"
            table.append([*seconds, *(f"{rate} {unit}" for rate in rates), *[""] * 7])
            continue
        speeds = [_times(row["speed"]), _times(row["speed_by_processor"])]
        table.append(
            [
                *seconds,
                *(["reference", ""] if name == comparison.reference else speeds),
                _percent(row["share_of_fma_peak"]),
                _percent(row["share_of_fma_peak_by_processor"]),
                _percent(row["share_of_fma_peak_by_model_operations"]),
                _percent(row["share_of_copy_bandwidth"]),
                *(_whole(row[key]) for key in ("megabytes", "peak_megabytes", "page_faults")),
            ]
        )
    rounds = len(next(iter(comparison.timings.values())).wall)
    lines = ["", f"{comparison.title}  (median of {rounds} interleaved rounds)", *aligned(table)]
    lines += [f"  {key}: {value}" for key, value in comparison.notes.items()]
    lines += [f"  {figure}" for figure in comparison.figures]
    return "\n".join(lines)


def format_goals(comparisons: Iterable[Comparison]) -> str:
    """Every goal that was measured, and whether it was reached by the wall clock."""
    table = [["", "over", "goal", "measured", "by CPU", ""]]
    for verdict in (row for comparison in comparisons for row in comparison.verdicts()):
        shown = _percent if verdict["of"] in ("operations", "bytes") else _times
        table.append(
            [
                f"{verdict['case']}: {verdict['contestant']}",
                verdict["over"] + (", memory" if verdict["of"] == "memory" else ""),
                shown(verdict["at_least"]),
                shown(verdict["measured"]),
                "" if verdict["of"] == "memory" else shown(verdict["by_processor"]),
                "reached" if verdict["reached"] else "MISSED",
            ]
        )
    return "\n".join(["", "goals (at least)", *aligned(table, left=2)]) if len(table) > 1 else ""


def aligned(table: list[list[str]], left: int = 1) -> list[str]:
    """Lines of a table without its empty columns; the first `left` columns begin at the left."""
    filled = [j for j in range(len(table[0])) if j < left or any(row[j] for row in table[1:])]
    widths = {j: max(len(row[j]) for row in table) for j in filled}
    return [
        "  " + "  ".join(
            row[j].ljust(widths[j]) if j < left else row[j].rjust(widths[j]) for j in filled
        ).rstrip()
        for row in table
    ]  # fmt: skip


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
