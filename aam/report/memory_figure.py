"""The figure of a step's memory: by stage, at the peak, by module."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from aam.report.drawing import (
    MUTED,
    PAPER,
    SERIES,
    Figure,
    new_axes,
    short,
    style,
    svg_element,
    svg_file,
)
from aam.report.results import number
from aam.report.run_files import read_table

UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}
WIDTH = 5.4  # inches
PARTS = ("weights", "gradients", "optimizer state", "kept for backward")  # of a module


def memory_figure(table: pd.DataFrame) -> Figure | None:
    """Draw memory.tsv: columns section, name, part, bytes, detail."""
    panels = []
    for title, bars in memory_bars(table).items():
        axes = new_axes(WIDTH, height(bars))
        panels.append(svg_element(axes, title, plot_bars(axes, title, bars)))
    caption = "One step, measured before training. What is kept for backward is the most at a time."
    for row in table[table["detail"].str.startswith("recommended")].itertuples():
        caption += f" Largest batch for the memory that was free: {row.name} in {row.part}."
    return Figure("memory", "Memory of a step", panels, caption) if panels else None


def memory_bars(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Bytes of the bars by title: a row a bar, stacked where there are several columns."""
    stages, peak, modules = (
        table[table["section"] == section] for section in ("stage", "peak", "module")
    )
    found = {
        "By stage, above what was there before": stages.assign(
            name=stages["name"] + ", " + stages["part"]
        ).set_index("name")[["bytes"]],
        "What the peak is made of": peak.set_index("part")[["bytes"]],
        "By module": modules[modules["part"].isin(PARTS)].pivot_table(
            "bytes", "name", "part", aggfunc="sum", sort=False
        ),
    }
    return {title: bars.fillna(0).clip(lower=0) for title, bars in found.items() if len(bars)}


def plot_bars(axes: Any, title: str, bars: pd.DataFrame) -> str:
    """Horizontal bars, their parts beside one another and their sum behind them, also in words."""
    totals = bars.sum(axis=1)
    unit, scale = next((unit for unit in UNITS.items() if totals.max() >= unit[1]), ("B", 1.0))
    places, left = range(len(bars)), 0.0
    for part, colour in zip(bars, SERIES, strict=False):
        width = bars[part] / scale
        drawn = axes.barh(places, width, left=left, color=colour, linewidth=0, label=part)
        left = left + width
    axes.bar_label(drawn, map(number, totals / scale), padding=4, fontsize=8, color=MUTED)
    axes.set_yticks(places, [short(label, 36) for label in bars.index])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.margins(x=0.16)
    axes.grid(axis="y", visible=False)
    axes.set(title=title, xlabel=unit)
    if bars.shape[1] > 1:
        axes.legend(loc="lower right")
    said = (f"{label} {number(total)} {unit}" for label, total in (totals / scale).items())
    return f"{title}: {'; '.join(said)}."


def height(bars: pd.DataFrame) -> float:
    """Inches that the bars take."""
    return 1.0 + 0.26 * max(4, len(bars))


def main() -> None:
    """Print the figure of the memory.tsv that is named on the command line, as an SVG file."""
    found = memory_bars(read_table(Path(sys.argv[1]))[0])
    heights = [height(bars) for bars in found.values()]
    with style():
        axes = new_axes(
            WIDTH, sum(heights), nrows=len(found), squeeze=False, height_ratios=heights
        )[:, 0]
        for one, (title, bars) in zip(axes, found.items(), strict=True):
            plot_bars(one, title, bars)
        axes[0].figure.set_facecolor(PAPER)
        sys.stdout.buffer.write(svg_file(axes[0].figure).encode())
