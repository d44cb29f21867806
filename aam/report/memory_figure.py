"""The figure of a step's memory: by stage, at the peak, by module, kept by a layer."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aam.report.drawing import COLOUR, SERIES, draw, short
from aam.report.figures import Figure
from aam.report.results import number
from aam.report.run_files import table_rows, to_float
from aam.report.theme import STYLE

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
PARTS = ("weights", "gradients", "optimizer state", "kept for backward")
Rows = Sequence[Mapping[str, str]]


def memory_figure(rows: Rows) -> Figure | None:
    """Draw memory.tsv.

    Args:
        rows: columns section, name, part, bytes, detail.
    """
    panels = tuple(
        _panel(name, title, bars)
        for name, title, bars in (
            ("stages", "By stage, above what was there before", _stages(rows)),
            ("peak", "What the peak is made of", _peak(rows)),
            ("modules", "By module", _modules(rows)),
            ("layers", "Kept for backward, a token a layer", _layers(rows)),
        )
        if bars
    )
    if not panels:
        return None
    best = [row for row in rows if row["detail"].startswith("recommended")]
    caption = "One step, measured before training. What is kept for backward is the most at a time."
    if best:
        caption += (
            f" Largest batch for the memory that was free: {best[0]['name']} in {best[0]['part']}."
        )
    return Figure("memory", "Memory of a step", panels, caption, wide=True)


Bar = tuple[str, dict[str, float]]  # label, bytes by series


def _of(rows: Rows, section: str) -> list[Mapping[str, str]]:
    return [row for row in rows if row["section"] == section]


def _stages(rows: Rows) -> list[Bar]:
    return [
        (f"{row['name']}, {row['part']}", {"": to_float(row["bytes"])})
        for row in _of(rows, "stage")
    ]


def _peak(rows: Rows) -> list[Bar]:
    return [(row["part"], {"": to_float(row["bytes"])}) for row in _of(rows, "peak")]


def _modules(rows: Rows) -> list[Bar]:
    found: dict[str, dict[str, float]] = {}
    for row in _of(rows, "module"):
        if row["part"] in PARTS:
            found.setdefault(row["name"], {})[row["part"]] = to_float(row["bytes"])
    return list(found.items())


def _layers(rows: Rows) -> list[Bar]:
    return [
        (f"{row['name']}, {row['part']}", {"": to_float(row["bytes"])})
        for row in _of(rows, "layer")
        if to_float(row["bytes"]) > 0
    ]


def _panel(name: str, title: str, bars: list[Bar]) -> str:
    """Horizontal bars, stacked where there are several series."""
    totals = [sum(max(0.0, size) for size in parts.values()) for _, parts in bars]
    units = UNITS if name != "layers" else UNITS[-1:]
    scale, unit = next((one for one in units if max(totals) >= one[0]), UNITS[-1])
    series = list(dict.fromkeys(key for _, parts in bars for key in parts))
    colours = dict(zip(series, SERIES, strict=False))

    def plot(axes: Any) -> None:
        for height, (_, parts) in enumerate(bars):
            left = 0.0
            for key, size in parts.items():
                axes.barh(height, size / scale, left=left, color=colours[key], linewidth=0)
                left += max(0.0, size) / scale
            shown = sum(parts.values()) / scale
            axes.annotate(
                number(shown), (left, height), (4, 0), textcoords="offset points", va="center",
                fontsize=8, color=COLOUR["muted"],
            )  # fmt: skip
        axes.set_yticks(range(len(bars)), [short(label, 36) for label, _ in bars])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.margins(x=0.16)
        axes.grid(axis="y", visible=False)
        axes.set(title=title, xlabel=unit)
        if len(series) > 1:
            for key in series:
                axes.barh(0, 0, color=colours[key], label=key)
            axes.legend(loc="lower right")

    said = "; ".join(
        f"{label} {number(total / scale)} {unit}"
        for (label, _), total in zip(bars, totals, strict=True)
    )
    size = (5.4, 1.0 + 0.26 * max(4, len(bars)))
    return draw(f"memory-{name}", f"{title}: {said}.", plot, size=size)


def standalone(figure: Figure | None) -> str:
    """The panels below one another as an SVG file of its own, in the colours of a light page."""
    colours = dict(re.findall(r"--(\w+): (#\w+);", STYLE.partition("@media")[0]))
    top, width, placed = 0.0, 0.0, []
    for panel in figure.panels if figure else ():
        box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', panel)
        assert box is not None
        wide, high = map(float, box.groups())
        placed.append(
            panel.replace("<svg ", f'<svg y="{top:g}" width="{wide:g}" height="{high:g}" ', 1)
        )
        top, width = top + high + 12, max(width, wide)
    inner = re.sub(
        r"var\(--(\w+)\)", lambda found: colours.get(found[1], "sans-serif"), "".join(placed)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {top:g}" '
        f'width="{width:g}" height="{top:g}" font-family="sans-serif">'
        f'<rect width="100%" height="100%" fill="{colours["paper"]}"/>{inner}</svg>\n'
    )


def main() -> None:
    """Print the figure of the memory.tsv that is named on the command line, as an SVG file."""
    figure = memory_figure(list(table_rows(Path(sys.argv[1]))))
    sys.stdout.buffer.write(standalone(figure).encode())
