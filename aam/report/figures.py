"""The figures of curves, distances and ordinations; each is ``None`` where a run has no data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aam.report import statistics
from aam.report.drawing import COLOUR, SERIES, dots, draw, identity, limits, shade, short
from aam.report.results import Result, number
from aam.report.run_files import Distances, RunFiles, Series, to_float

CURVE_POINTS = 300
SCATTER_PAIRS = 1_500
ORDINATION_SAMPLES = 500

CURVES = {
    "loss": "Loss (total)",
    "clade_loss": "Clade loss",
    "unifrac_loss": "UniFrac loss",
    "nucleotide_loss": "Nucleotide loss",
    "target_loss": "Target loss",
    "count_loss": "Count loss",
    "clade_jaccard": "Clade memberships of new ASVs, Jaccard",
    "network_weight": "Weight of the network beside the nearest ASVs",
    "mantel_r": "Mantel r",
    "distance_mae": "Mean absolute error of distances",
    "nucleotide_accuracy": "Accuracy on masked nucleotides",
    "r2": "r2 of the target",
    "mae": "Mean absolute error of the target",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "auc": "Area under the ROC curve",
}
PARTS = {"train": ("training", SERIES[0]), "validation": ("validation", SERIES[1])}


@dataclass(frozen=True)
class Figure:
    """A figure of the page: one or more drawings with a caption.

    Attributes:
        id: of the ``<figure>`` element.
        title: plain text.
        panels: SVG elements.
        caption: plain text.
        wide: few, large panels.
    """

    id: str
    title: str
    panels: tuple[str, ...]
    caption: str
    wide: bool = True


def curves_figure(curves: Mapping[str, Mapping[str, Series]], results: Iterable[Result]) -> Any:
    """Losses and validation metrics over the steps, with the best baseline of each metric."""
    judged = [r for r in results if r.best and r.part != "train"]
    baselines = {r.key: r.best for r in reversed(judged)}  # of two with one key, the first
    names = [name for name in CURVES if name in curves]
    if set(names) >= {"loss"} and len([n for n in names if n.endswith("_loss")]) == 1:
        names = [name for name in names if not name.endswith("_loss")]  # it is the total
    panels = tuple(
        _curve_panel("curves", name, CURVES[name], curves[name], baselines.get(name))
        for name in names
    )
    if not panels:
        return None
    caption = (
        "Training (blue) is measured on each batch, in train mode; validation (orange) on what is "
        f"held out, in eval mode. Long series are means of at most {CURVE_POINTS} equal "
        "stretches. A dashed line is the best baseline. Scales with powers of ten are logarithmic."
    )
    return Figure("curves", "Learning curves", panels, caption, wide=False)


def mechanics_figure(curves: Mapping[str, Mapping[str, Series]]) -> Any:
    """Learning rate, gradient norm, speed and whatever else was logged."""
    panels = tuple(
        _curve_panel("mechanics", f"m{i}", short(name.replace("_", " "), 40), curves[name], None)
        for i, name in enumerate(sorted(set(curves) - set(CURVES)))
    )
    if not panels:
        return None
    caption = "How the training itself went: step size, size of the gradient, speed."
    return Figure("mechanics", "Course of the training", panels, caption, wide=False)


def _curve_panel(
    figure: str,
    name: str,
    title: str,
    parts: Mapping[str, Series],
    baseline: tuple[str, float] | None,
) -> str:
    values = np.concatenate([series[1] for series in parts.values()])
    logarithmic = bool(values.min() > 0 and values.max() > 30 * values.min())
    last = "; ".join(f"{part} ends at {number(series[1][-1])}" for part, series in parts.items())

    def plot(axes: Any) -> None:
        for index, (part, series) in enumerate(sorted(parts.items())):
            label, colour = PARTS.get(part, (short(part), SERIES[(index + 2) % 8]))
            step, value = statistics.thin(*series, CURVE_POINTS)
            marker = "o" if len(step) <= 40 else None
            axes.plot(step, value, color=colour, label=label, marker=marker, markersize=3)
        if baseline is not None:
            label = f"{short(baseline[0])} {number(baseline[1])}"
            axes.axhline(baseline[1], color=COLOUR["muted"], linestyle=(0, (4, 3)), label=label)
        if logarithmic:
            few = values.max() < 300 * values.min()
            axes.set_yscale("log")
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5) if few else (1,))
            # Plain text: the page's fonts show powers of ten as matplotlib's markup.
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.02)
        axes.legend(loc="best")

    return draw(f"{figure}-{name}", f"{title} over the training steps; {last}.", plot)


def distances_figure(distances: Distances | None) -> Any:
    """Predicted against true distances, pairs within a group told apart."""
    if distances is None:
        return None
    finite = np.isfinite(distances.true) & np.isfinite(distances.predicted)
    if not finite.any():
        return None
    true, predicted = distances.true[finite], distances.predicted[finite]
    within = distances.same_group[finite] == 1
    known = bool((distances.same_group[finite] >= 0).any())
    span = limits(np.concatenate([true, predicted]))
    crowded = len(true) > SCATTER_PAIRS
    shown = np.flatnonzero(within)
    shown = shown[statistics.draw_rows(len(shown), 400 if crowded else SCATTER_PAIRS)]

    def plot(axes: Any) -> None:
        others = ~within
        if crowded:
            _hexagons(axes, true[others], predicted[others], span)
        else:
            dots(axes, true[others], predicted[others], SERIES[0], "between groups" * known)
        if len(shown):
            dots(axes, true[shown], predicted[shown], SERIES[1], "within a group")
        identity(axes, span)
        axes.set(xlabel="true distance", ylabel="predicted distance")
        if known:
            if crowded:
                axes.plot([], [], "h", color=SERIES[0], label="between groups")
            axes.legend(loc="upper left", handletextpad=0.3)

    alt = (
        f"Predicted against true distances of {len(true)} pairs; mean true "
        f"{number(true.mean())}, mean predicted {number(predicted.mean())}."
    )
    caption = (
        f"{len(true):,} pairs of {len(distances.samples):,} validation samples; on the dashed line "
        "a prediction is right."
    )
    if crowded:
        caption += " The stronger a hexagon's colour, the more pairs (logarithmic)."
    if known:
        caption += f" Orange: {int(within.sum()):,} pairs within a group"
        caption += f", {len(shown)} of them drawn." if len(shown) < within.sum() else "."
    if not finite.all():
        caption += f" {int((~finite).sum())} pairs without a finite number are left out."
    panels = [draw("distances-pairs", alt, plot, size=(4.4, 4.2))]
    panels.append(_calibration_panel(true, predicted, span))
    return Figure("distances", "Predicted against true distances", tuple(panels), caption)


def _calibration_panel(true: np.ndarray, predicted: np.ndarray, span: Any) -> str:
    """Mean and spread of the predictions in bins of equal numbers of true distances."""
    bins = np.array_split(np.argsort(true, kind="stable"), max(1, min(12, len(true) // 5)))
    centre = np.array([true[rows].mean() for rows in bins])
    low, middle, high = (
        np.array([np.quantile(predicted[rows], q) for rows in bins]) for q in (0.1, 0.5, 0.9)
    )

    def plot(axes: Any) -> None:
        axes.fill_between(centre, low, high, color=SERIES[2], alpha=0.25, linewidth=0)
        axes.plot(centre, middle, "o-", color=SERIES[2], markersize=3.5)
        identity(axes, span)
        axes.set(xlabel="true distance", ylabel="median and 80 % range of predictions")

    return draw(
        "distances-bins", "Median predicted distance by true distance.", plot, size=(4.4, 4.2)
    )


def ordination_figure(run: RunFiles) -> Any:
    """Maps of the validation samples by true and by predicted distances."""
    if run.distances is None:
        return None
    true = run.distances.matrix(run.distances.true)
    predicted = run.distances.matrix(run.distances.predicted)
    if true is None or predicted is None or len(true) < 3:
        return None
    drawn = statistics.draw_rows(len(true), ORDINATION_SAMPLES)
    ids = [run.distances.samples[row] for row in drawn]
    true, predicted = true[np.ix_(drawn, drawn)], predicted[np.ix_(drawn, drawn)]
    left, true_share = statistics.principal_coordinates(true)
    right, share = statistics.principal_coordinates(predicted)
    right, correlation = statistics.procrustes(left, right)
    by, colours, legend = _sample_colours(run.summary.get("colours"), ids, left[:, 0])
    frame = np.concatenate([left, right])
    caption = (
        f"{len(ids)} validation samples. Left: principal coordinates of the true distances "
        f"({100 * true_share.sum():.0f} % of their variance). Right: those of the predicted ones "
        f"({100 * share.sum():.0f} %), turned and scaled onto the left "
        f"(Procrustes correlation {number(correlation)}; 1 is the same picture). {by}"
    )
    panels = (
        _map_panel("true", "True distances (PCoA)", left, colours, legend, frame),
        _map_panel("predicted", "Predicted distances (PCoA)", right, colours, legend, frame),
    )
    return Figure("ordination", "Ordination of validation samples", panels, caption)


def _sample_colours(
    chosen: Any, ids: Sequence[str], fallback: np.ndarray
) -> tuple[str, list[Any], list[tuple[str, str]]]:
    """What colours stand for, one a sample, and a legend (empty for a scale)."""
    from matplotlib import colormaps

    chosen = chosen if isinstance(chosen, Mapping) else {}
    known = chosen.get("values")
    known = known if isinstance(known, Mapping) else {}
    column = short(str(chosen.get("column")), 40)
    labels = [str(known.get(name) or "") for name in ids]
    scale = colormaps["viridis"]
    if chosen.get("kind") == "classification" and any(labels):
        ranked = sorted(set(filter(None, labels)), key=lambda name: (-labels.count(name), name))
        colour = {name: SERIES[i] for i, name in enumerate(ranked[:7])}
        other = COLOUR["muted"]
        legend = [(short(name), colour[name]) for name in ranked[:7]]
        if len(colour) < len(set(labels)):
            legend.append(("other or missing", other))
        return f"Colours are classes of {column}.", [colour.get(n, other) for n in labels], legend
    numbers = np.array([to_float(label) for label in labels])
    by = ""
    if not np.isfinite(numbers).any():
        numbers = fallback
        by = "A sample has the same colour in both: its place on the first axis of the left map."
    numbers[~np.isfinite(numbers)] = np.nan
    low, high = np.nanmin(numbers), np.nanmax(numbers)
    by = by or (
        f"Colours are {column}, from {number(low)} (violet) to {number(high)} (yellow)"
        f"{'; grey: not known' if np.isnan(numbers).any() else ''}."
    )
    placed = (numbers - low) / (high - low if high > low else 1.0)
    muted = COLOUR["muted"]
    return by, [scale(0.15 + 0.77 * x) if np.isfinite(x) else muted for x in placed], []


def _map_panel(
    name: str,
    title: str,
    points: np.ndarray,
    colours: list[Any],
    legend: list[tuple[str, str]],
    frame: np.ndarray,
) -> str:
    """A map of samples; ``frame`` holds the points that all maps of a figure make room for."""
    middle = (frame.max(axis=0) + frame.min(axis=0)) / 2
    reach = (float(np.ptp(frame, axis=0).max()) * 0.54 or 0.5) * np.array([-1.0, 1.0])

    def plot(axes: Any) -> None:
        axes.scatter(
            *points.T, c=colours, s=26, alpha=0.85, linewidths=0.4, edgecolors=COLOUR["paper"]
        )
        for label, colour in legend:
            axes.plot([], [], "o", color=colour, label=label)
        if legend:  # below the map, where it hides no sample
            axes.figure.legend(loc="outside lower center", ncols=2, handletextpad=0.2)
        axes.set(xlim=middle[0] + reach, ylim=middle[1] + reach, aspect="equal")
        axes.set(xlabel="axis 1", ylabel="axis 2", title=title)

    alt = f"{title}: map of {len(points)} samples on two axes."
    height = 4.0 + 0.2 * ((len(legend) + 1) // 2)
    return draw(f"ordination-{name}", alt, plot, size=(4.4, height))


def _hexagons(axes: Any, x: np.ndarray, y: np.ndarray, span: tuple[float, float]) -> None:
    cells = axes.hexbin(x, y, gridsize=38, extent=(*span, *span), mincnt=1, linewidths=0.2)
    counted = np.asarray(cells.get_array(), dtype=float)
    opacity = 0.12 + 0.88 * np.log1p(counted) / max(np.log1p(counted).max(initial=0), 1e-9)
    cells.set_array(None)
    cells.set_facecolor(shade(SERIES[0], opacity))
    cells.set_edgecolor("none")
