"""Matplotlib figures as inline SVG that follows the page's colours and fonts.

A figure is drawn in stand-in colours that are replaced by the CSS variables of the page, so that
the same drawing is right in light and dark mode. Text stays text: it can be searched and read
aloud.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

NAMES = ("ink", "muted", "line", "paper", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
COLOUR = {name: f"#0102{index:02x}" for index, name in enumerate(NAMES, start=1)}
"""Stand-in colours, by CSS variable; no colour map holds one of them."""

SERIES = tuple(COLOUR[f"c{index}"] for index in range(1, 9))

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aam",
    "text.parse_math": False,  # a class may be named "$" something
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOUR["muted"],
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOUR["line"],
    "grid.linewidth": 0.7,
    "text.color": COLOUR["ink"],
    "axes.labelcolor": COLOUR["ink"],
    "axes.titlecolor": COLOUR["ink"],
    "xtick.color": COLOUR["muted"],
    "ytick.color": COLOUR["muted"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "patch.edgecolor": COLOUR["ink"],
    "lines.linewidth": 1.6,
}


def draw(
    name: str, alt: str, plot: Callable[[Any], None], *, size: tuple[float, float] = (4.4, 3.3)
) -> str:
    """Draw one panel.

    Args:
        name: unique in the page; prefixes every id of the drawing.
        alt: what the drawing shows, for those who do not see it.
        plot: draws into the axes that it is given.
        size: inches.

    Returns:
        One ``<svg>`` element without any reference outside the page.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        # Letters that matplotlib's own font lacks are drawn by the browser.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        plot(figure.add_subplot())
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue(), name, alt)


def shade(colour: str, opacity: np.ndarray) -> np.ndarray:
    """``(n, 4)`` RGBA of one stand-in colour at many opacities."""
    from matplotlib.colors import to_rgba

    shades = np.tile(to_rgba(colour), (len(opacity), 1))
    shades[:, 3] = opacity
    return shades


def short(text: str, length: int = 22) -> str:
    """A label that fits a drawing; its end is kept, since names often differ there."""
    text = " ".join(_printable(text).split())
    tail = length // 3
    return text if len(text) <= length else f"{text[: length - tail - 1]}…{text[-tail:]}"


def limits(values: np.ndarray) -> tuple[float, float]:
    """Ends of an axis that holds the values with a small margin."""
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def identity(axes: Any, span: tuple[float, float]) -> None:
    """The line on which a prediction is right, on square axes from and to ``span``."""
    axes.plot(span, span, color=COLOUR["muted"], linestyle=(0, (4, 3)), linewidth=1.1)
    axes.set(xlim=span, ylim=span, aspect="equal")


def dots(axes: Any, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> None:
    """A scatter of many points."""
    size = 11 if len(x) > 600 else 20
    axes.scatter(x, y, s=size, color=colour, alpha=0.55, linewidths=0, label=label or None)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _inline(svg: str, name: str, alt: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', svg)
    label = html.escape(_printable(alt), quote=True)
    opening = (
        f'<svg class="plot" viewBox="{box[1] if box else "0 0 1 1"}" role="img" '
        f'aria-label="{label}"><title>{label}</title>'
    )
    svg = opening + svg[svg.index(">") + 1 :]
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"(font: [^;\"']*?[\d.]+px) '[^;\"]*", r"\1 var(--font)", svg)
    for variable, colour in COLOUR.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r">\s+<", "><", svg)
