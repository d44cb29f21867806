"""The figure of a step's memory: by stage, at the peak, by module."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from aam.report.drawing import MUTED, SERIES, Figure, draw, short, svg_file
from aam.report.results import number
from aam.report.run_files import read_table

UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}
WIDTH = 5.4  # inches
PARTS = ("weights", "gradients", "optimizer state", "kept for backward")  # of a module


def memory_figure(table: pd.DataFrame) -> Figure | None:
    """Draw memory.tsv: columns section, name, part, bytes, detail."""
    panels = []
    for title, bars in memory_bars(table).items():
        unit, scale = unit_of(bars)
        totals = (bars.sum(axis=1) / scale).items()
        said = "; ".join(f"{label} {number(total)} {unit}" for label, total in totals)
        plot = partial(plot_bars, title=title, bars=bars)
        panels.append(draw(title, f"{title}: {said}.", plot, (WIDTH, height(bars))))
    if not panels:
        return None
    caption = "One step, measured before training. What is kept for backward is the most at a time."
    best = table[table["detail"].str.startswith("recommended")]
    for row in best.itertuples():
        caption += f" Largest batch for the memory that was free: {row.name} in {row.part}."
    return Figure("memory", "Memory of a step", panels, caption)


def memory_bars(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Bars by title, a line each: bytes of one column, or of several that are stacked."""
    sections = dict(iter(table.groupby("section")))
    found = {}
    if "stage" in sections:
        stages = sections["stage"]
        found["By stage, above what was there before"] = stages.assign(
            name=stages["name"] + ", " + stages["part"]
        ).set_index("name")[["bytes"]]
    if "peak" in sections:
        found["What the peak is made of"] = sections["peak"].set_index("part")[["bytes"]]
    if "module" in sections:
        wide = sections["module"].pivot_table("bytes", "name", "part", aggfunc="sum", sort=False)
        found["By module"] = wide.reindex(columns=[name for name in PARTS if name in wide])
    return {title: bars.fillna(0).clip(lower=0) for title, bars in found.items()}


def plot_bars(axes: Any, title: str, bars: pd.DataFrame) -> None:
    """Horizontal bars, their parts beside one another and their sum behind them."""
    unit, scale = unit_of(bars)
    places = range(len(bars))
    ends = pd.Series(0.0, bars.index)
    for part, colour in zip(bars, SERIES, strict=False):
        sizes = bars[part] / scale
        axes.barh(places, sizes, left=ends, color=colour, linewidth=0, label=part)
        ends = ends + sizes
    for place, end in zip(places, ends, strict=True):
        axes.annotate(
            number(end), (end, place), (4, 0), textcoords="offset points", va="center",
            fontsize=8, color=MUTED,
        )  # fmt: skip
    axes.set_yticks(places, [short(str(label), 36) for label in bars.index])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.margins(x=0.16)
    axes.grid(axis="y", visible=False)
    axes.set(title=title, xlabel=unit)
    if bars.shape[1] > 1:
        axes.legend(loc="lower right")


def unit_of(bars: pd.DataFrame) -> tuple[str, float]:
    """The largest unit in which the longest bar is at least 1, and its bytes."""
    longest = bars.sum(axis=1).max()
    return next((unit for unit in UNITS.items() if longest >= unit[1]), ("B", 1.0))


def height(bars: pd.DataFrame) -> float:
    """Inches that the bars take."""
    return 1.0 + 0.26 * max(4, len(bars))


def main() -> None:
    """Print the figure of the memory.tsv that is named on the command line, as an SVG file."""
    found = memory_bars(read_table(Path(sys.argv[1]))[0])
    plots = [partial(plot_bars, title=title, bars=bars) for title, bars in found.items()]
    heights = [height(bars) for bars in found.values()]
    svg = svg_file(plots, (WIDTH, sum(heights)), height_ratios=heights)
    sys.stdout.buffer.write(svg.encode())
