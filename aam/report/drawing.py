"""Matplotlib figures as inline SVG that follows the page's colours and fonts.

A figure is drawn in the colours of light paper, which become the page's CSS variables, so that
the same drawing is right in light and dark mode. Text stays text: it can be searched and read
aloud.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

PALETTE = {  # CSS variable: its colour on light and on dark paper
    "ink": ("#182026", "#e6ebef"),
    "muted": ("#5a6872", "#9dabb6"),
    "line": ("#dfe4e8", "#323c45"),
    "paper": ("#ffffff", "#1a2026"),
    "c1": ("#1f6fb2", "#66b0ee"),
    "c2": ("#cf5a14", "#f5934f"),
    "c3": ("#16866b", "#4cc9a6"),
    "c4": ("#8a4fa8", "#c795e3"),
    "c5": ("#b98a00", "#e5bf45"),
    "c6": ("#c43a6c", "#f283aa"),
    "c7": ("#4a7d1f", "#9bcf6a"),
    "c8": ("#6b6fc9", "#a4a8f5"),
}
INK, MUTED, LINE, PAPER, *SERIES = (light for light, _ in PALETTE.values())
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}
DASHED = {"color": MUTED, "linestyle": (0, (4, 3)), "linewidth": 1.1}
DOTS = 1_500  # of one colour in a scatter; more are drawn at random, always the same ones
SQUARE = (4.4, 4.2)  # inches

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be named "$" something
    "axes.formatter.use_mathtext": False,
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8.5),
}


@dataclass(frozen=True)
class Figure:
    """A figure of the page: drawings beside one another (SVG elements) and a caption."""

    id: str
    title: str
    panels: Sequence[str]
    caption: str


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The look of all that is drawn inside."""
    from matplotlib import rc_context

    with rc_context(_STYLE), warnings.catch_warnings():
        # Letters that matplotlib's own font lacks are drawn by the browser.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def new_axes(width: float = 4.4, height: float = 3.3, **options: Any) -> Any:
    """Axes of a figure of their own, in inches, or with `options` of `subplots` several of one."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots(**options)


def svg_file(figure: Any) -> str:
    """A matplotlib figure as an SVG file."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def svg_element(axes: Any, name: str, alt: str) -> str:
    """The figure of the axes as an `<svg>` element without any reference outside the page.

    Args:
        axes: the only ones of their figure.
        name: unique in the page: the ids of the drawing are made of it.
        alt: what the drawing shows, for those who do not see it.
    """
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": name}):
        svg = svg_file(axes.figure)
    box = re.search(r'viewBox="[^"]*"', svg)
    label = html.escape(printable(alt), quote=True)
    opening = f'<svg class="plot" {box[0] if box else ""} role="img" aria-label="{label}">'
    svg = svg[svg.index("<svg") :]
    svg = f"{opening}<title>{label}</title>{svg[svg.index('>') + 1 :]}"
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to groups, and they occur twice
    svg = re.sub(
        r"\b(fill|stroke): (#\w{6})", lambda at: f"{at[1]}: {_VARIABLES.get(at[2], at[2])}", svg
    )
    return re.sub(r">\s+<", "><", svg.replace("xlink:href", "href"))


def scatter(name: str, alt: str, groups: Mapping[str, tuple[str, pd.DataFrame]], what: str) -> str:
    """Predicted against true values, by label: a colour and rows of the columns true, predicted."""
    axes = new_axes(*SQUARE)
    for label, (colour, rows) in groups.items():
        shown = rows if len(rows) <= DOTS else rows.sample(DOTS, random_state=0)
        size = 11 if len(shown) > 600 else 20
        axes.scatter(
            shown["true"], shown["predicted"], size, colour, alpha=0.55, linewidths=0, label=label
        )
    identity(axes, np.concatenate([rows[["true", "predicted"]] for _, rows in groups.values()]))
    axes.set(xlabel=f"true {what}", ylabel=f"predicted {what}")
    if len(groups) > 1:
        axes.legend(loc="upper left", handletextpad=0.2)
    return svg_element(axes, name, alt)


def identity(axes: Any, values: np.ndarray) -> None:
    """The line on which a prediction is right, on square axes that hold the values."""
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low) or 0.5
    span = (low - margin, high + margin)
    axes.plot(span, span, **DASHED)
    axes.set(xlim=span, ylim=span, aspect="equal")


def stretches(table: pd.DataFrame, by: str, count: int) -> Any:
    """The rows in the order of a column, grouped into stretches of about equal numbers."""
    table = table.sort_values(by, kind="stable")
    return table.groupby(np.arange(len(table)) * count // len(table))


def printable(text: str) -> str:
    """The text with spaces for letters that cannot be shown."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def short(text: str, length: int = 22) -> str:
    """A label that fits a drawing; its end is kept, since names often differ there."""
    text = " ".join(printable(text).split())
    tail = length // 3
    return text if len(text) <= length else f"{text[: length - tail - 1]}…{text[-tail:]}"
