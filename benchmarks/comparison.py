"""Interleaved timing of contestants, their ratios, and the table, JSON and plot made of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Timing:
    """Seconds of one contestant, one entry a round."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


@dataclass
class Comparison:
    """Contestants that did the same work in turns, and the one the others are measured against."""

    title: str
    reference: str
    timings: dict[str, Timing]
    notes: dict[str, Any] = field(default_factory=dict)

    def speedup(self, name: str, clock: str = "wall") -> float:
        """Median over rounds of reference seconds / contestant seconds, pair by pair."""
        ours = getattr(self.timings[name], clock)
        theirs = getattr(self.timings[self.reference], clock)
        return statistics.median(b / max(a, 1e-9) for a, b in zip(ours, theirs, strict=True))

    def rows(self) -> list[dict[str, Any]]:
        """One row a contestant: median seconds by both clocks, ratios to the reference."""
        return [
            {
                "case": self.title,
                "contestant": name,
                "rounds": len(timing.wall),
                "wall_seconds": statistics.median(timing.wall),
                "processor_seconds": statistics.median(timing.processor),
                "speedup_wall": self.speedup(name, "wall"),
                "speedup_processor": self.speedup(name, "processor"),
                "is_reference": name == self.reference,
            }
            for name, timing in self.timings.items()
        ]


def run_once(contestants: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Each contestant's result; this is the warm-up of a timed run and all of an untimed one."""
    return {name: contestant() for name, contestant in contestants.items()}


class Rounds:
    """One call is one round: every contestant once, each timed on its own.

    Every second round runs in the opposite order, so that whatever one contestant leaves behind in
    caches or in the processor's clock does not always meet the same successor.
    """

    def __init__(self, contestants: Mapping[str, Callable[[], Any]]):
        self.contestants = contestants
        self.timings = {name: Timing() for name in contestants}
        self.count = 0

    def __call__(self) -> None:
        """Run one round."""
        names = list(self.contestants)
        for name in names if self.count % 2 == 0 else reversed(names):
            wall, processor = time.perf_counter(), processor_seconds()
            self.contestants[name]()
            self.timings[name].processor.append(processor_seconds() - processor)
            self.timings[name].wall.append(time.perf_counter() - wall)
        self.count += 1


def processor_seconds() -> float:
    """CPU time of this process, all its threads, and the children it has waited for."""
    spent = os.times()
    return time.process_time() + spent.children_user + spent.children_system


def rounds_within(seconds: float, one_round: float, least: int = 3, most: int = 25) -> int:
    """How many rounds of `one_round` seconds fit, within [least, most]."""
    return max(least, min(most, int(seconds / max(one_round, 1e-6))))


def format_seconds(seconds: float) -> str:
    """1.23 s, 4.56 ms or 7.89 us."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def format_table(comparisons: list[Comparison]) -> str:
    """The table printed at the end of a run."""
    lines = []
    width = max(len(name) for comparison in comparisons for name in comparison.timings)
    for comparison in comparisons:
        rounds = len(next(iter(comparison.timings.values())).wall)
        lines += ["", f"{comparison.title}  (median of {rounds} interleaved rounds)"]
        for row in comparison.rows():
            ratio = "reference" if row["is_reference"] else f"{row['speedup_wall']:6.2f}x"
            cpu = "" if row["is_reference"] else f"({row['speedup_processor']:.2f}x by CPU time)"
            seconds = format_seconds(row["wall_seconds"])
            lines.append(
                f"  {row['contestant']:<{width}}  {seconds:>9}  {ratio:>9}  {cpu}".rstrip()
            )
        lines += [f"  {key}: {value}" for key, value in comparison.notes.items()]
    return "\n".join(lines)


def write_plot(comparisons: list[Comparison], path: Path) -> None:
    """Speed-ups as horizontal bars on a logarithmic axis, one panel a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [len(comparison.timings) + 1.5 for comparison in comparisons]
    figure, axes = pyplot.subplots(
        len(comparisons), 1, figsize=(9, 0.32 * sum(heights)), sharex=True, squeeze=False,
        height_ratios=heights, layout="constrained",
    )  # fmt: skip
    for axis, comparison in zip(axes[:, 0], comparisons, strict=True):
        rows = comparison.rows()[::-1]
        names = [row["contestant"] for row in rows]
        values = [row["speedup_wall"] for row in rows]
        colours = ["0.6" if row["is_reference"] else "#2a6f97" for row in rows]
        bars = axis.barh(names, [value - 1 for value in values], left=1.0, color=colours)
        axis.bar_label(bars, [f"{value:.2f}x" for value in values], padding=3, fontsize=8)
        axis.set_title(f"{comparison.title}   (1 = {comparison.reference})", fontsize=9, loc="left")
        axis.axvline(1.0, color="0.6", linewidth=0.8)
        axis.set_xscale("log")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    axes[-1, 0].set_xlabel("times faster than the reference (logarithmic)")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
