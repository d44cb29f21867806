"""Speeds as bars, one panel a case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.comparison import Comparison, is_limit


def write_plot(comparisons: Sequence[Comparison], path: Path) -> None:
    """Speeds over the reference as horizontal bars on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [[name for name in each.timings if not is_limit(name)] for each in comparisons]
    heights = [len(names) + 1.5 for names in shown]
    figure, axes = pyplot.subplots(
        len(comparisons), 1, figsize=(9, 0.32 * sum(heights)), sharex=True, squeeze=False,
        height_ratios=heights, layout="constrained",
    )  # fmt: skip
    for axis, comparison in zip(axes[:, 0], comparisons, strict=True):
        rows = [row for row in comparison.rows()[::-1] if not is_limit(row["contestant"])]
        names = [row["contestant"] for row in rows]
        values = [row["speed"] for row in rows]
        colours = ["0.6" if name == comparison.reference else "#2a6f97" for name in names]
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
