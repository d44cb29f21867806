"""The figures of a run's curves, distances, placements and ordination."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial import procrustes

from aam.report import drawing
from aam.report.drawing import DASHED, MUTED, SERIES, SQUARE, Figure, new_axes, svg_element
from aam.report.results import Result, number

CURVE_POINTS = 300
LOSSES = ("loss", "clade_loss", "unifrac_loss", "nucleotide_loss", "target_loss", "count_loss")
METRICS = {  # that say how good the model is: what results call them
    "clade_jaccard": "clade memberships of new ASVs, Jaccard",
    "mantel_r": "Mantel r",
    "distance_mae": "distance MAE",
    "nucleotide_accuracy": "masked-nucleotide accuracy",
    "r2": "R2",
    "mae": "MAE",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auc": "AUC",
}
PARTS = {"train": ("training", SERIES[0]), "validation": ("validation", SERIES[1])}
EDIT_BINS = {"1": 1.5, "2": 2.5, "3\N{EN DASH}4": 4.5, "5\N{EN DASH}6": 6.5, "7\N{EN DASH}9": 9.5}
SUPPORT_GROUPS, SMALLEST_GROUP = 10, 10


def curves_figures(metrics: pd.DataFrame, results: Sequence[Result]) -> list[Figure]:
    """Losses and metrics over the steps beside the best baselines, and all else that was logged."""
    logged = {*metrics["metric"]}
    losses = [name for name in LOSSES if name in logged]
    if len(losses) == 2 and "loss" in losses:
        losses = ["loss"]  # the other is the total, too
    curves = [_curve(metrics, name, name.replace("_", " ")) for name in losses]
    for metric, name in METRICS.items():
        if metric in logged:
            best = next((one.best for one in results if one.metric.startswith(name)), None)
            curves.append(_curve(metrics, metric, name, best))
    caption = (
        "Training (blue) is measured on each batch, in train mode; validation (orange) on what is "
        f"held out, in eval mode. Long series are means of at most {CURVE_POINTS} equal "
        "stretches. A dashed line is the best baseline. Scales with powers of ten are logarithmic."
    )
    others = sorted(logged.difference(LOSSES, METRICS))
    mechanics = [
        _curve(metrics, name, drawing.short(name.replace("_", " "), 40)) for name in others
    ]
    course = "How the training itself went: step size, size of the gradient, speed."
    found = [
        Figure("curves", "Learning curves", curves, caption),
        Figure("mechanics", "Course of the training", mechanics, course),
    ]
    return [figure for figure in found if figure.panels]


def _curve(
    metrics: pd.DataFrame, metric: str, title: str, baseline: tuple[str, float] | None = None
) -> str:
    rows = metrics[metrics["metric"] == metric]
    axes = new_axes()
    for part, (label, colour) in PARTS.items():
        series = rows.loc[rows["part"] == part, ["step", "value"]]
        if len(series):
            points = drawing.stretches(series, "step", min(len(series), CURVE_POINTS)).mean()
            marker = "o" if len(points) <= 40 else ""
            axes.plot(*points.T.to_numpy(), color=colour, label=label, marker=marker, markersize=3)
    if baseline is not None:
        name, value = baseline
        axes.axhline(value, **DASHED, label=f"{drawing.short(name)} {number(value)}")
    low, high = rows["value"].min(), rows["value"].max()
    if low > 0 and high > 30 * low:
        axes.set_yscale("log")
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5) if high < 300 * low else (1,))
        axes.yaxis.set_minor_formatter("")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.02)
    axes.set(title=title, xlabel="step")
    axes.legend(loc="best")
    last = rows.groupby("part")["value"].last()
    said = "; ".join(f"{part} ends at {number(value)}" for part, value in last.items())
    return svg_element(axes, metric, f"{title} over the training steps; {said}.")


def distances_figure(pairs: pd.DataFrame) -> Figure:
    """Predicted against true distances, pairs within a group told apart."""
    kinds = {"": "all", "0": "between groups", "1": "within a group"}
    groups = {
        label: (SERIES[kind == "1"], pairs[pairs["same_group"] == kind])
        for kind, label in kinds.items()
        if (pairs["same_group"] == kind).any()
    }
    samples = {*pairs["sample_a"], *pairs["sample_b"]}
    caption = (
        f"{len(pairs):,} pairs of {len(samples):,} validation samples; on the dashed line a "
        f"prediction is right. Left: at most {drawing.DOTS:,} pairs of a colour are drawn. "
        "Right: all."
    )
    if "within a group" in groups:
        caption += f" Orange: {len(groups['within a group'][1]):,} pairs within a group."
    true, predicted = (number(pairs[name].mean()) for name in ("true", "predicted"))
    alt = f"{len(pairs)} pairs; mean true distance {true}, mean predicted {predicted}."
    panels = [drawing.scatter("distances", alt, groups, "distance"), _calibration(pairs)]
    return Figure("distances", "Predicted against true distances", panels, caption)


def _calibration(pairs: pd.DataFrame) -> str:
    """Median and spread of the predictions in bins of equal numbers of true distances."""
    bins = drawing.stretches(pairs, "true", int(np.clip(len(pairs) // 5, 1, 12)))
    centre = bins["true"].mean()
    low, middle, high = (bins["predicted"].quantile(level) for level in (0.1, 0.5, 0.9))
    axes = new_axes(*SQUARE)
    axes.fill_between(centre, low, high, color=SERIES[2], alpha=0.25, linewidth=0)
    axes.plot(centre, middle, "o-", color=SERIES[2], markersize=3.5)
    drawing.identity(axes, pairs[["true", "predicted"]].to_numpy())
    axes.set(xlabel="true distance", ylabel="median and 80 % range of predictions")
    return svg_element(axes, "calibration", "Median predicted distance by true distance.")


def placements_figure(placements: pd.DataFrame) -> Figure:
    """Jaccard of the clades of left-out ASVs, of the model and of their nearest known ASV."""
    caption = (
        f"{len(placements):,} ASVs that the model was not trained on. The Jaccard index compares "
        "the clades that an ASV is put in with those that the tree has it in: 1 if they are the "
        "same. Left: its mean by the number of edits to the nearest known ASV (rounded), for the "
        "model and where an ASV gets the clades of its nearest known one; bars are standard "
        "errors. Right: its mean by support, the mean probability that the model gives to the "
        "clades it chose; each dot is a group of about equal number. Below the dashed line the "
        "Jaccard index is lower than the support; unlike the support, it also counts clades that "
        "were missed."
    )
    panels = (_by_distance(placements), _by_support(placements))
    return Figure("placements", "Clade memberships of new ASVs by distance", panels, caption)


def _by_distance(placements: pd.DataFrame) -> str:
    # An ASV without any known one is as far as can be.
    edits = pd.to_numeric(placements["edits"], errors="coerce").fillna(np.inf).clip(upper=99)
    bins = pd.cut(edits, [-1, *EDIT_BINS.values(), 100], labels=[*EDIT_BINS, "10+"], right=False)
    held = placements.groupby(bins, observed=True)
    found = held[["jaccard", "jaccard_of_nearest"]].agg(["mean", "sem"]).fillna(0)
    model, nearest = found["jaccard"], found["jaccard_of_nearest"]
    places = np.arange(len(found))
    axes = new_axes(*SQUARE)
    for values, label, colour, shift, marker in (
        (model, "model", SERIES[0], -0.06, "o"),
        (nearest, "nearest known ASV", SERIES[1], 0.06, "s"),
    ):
        axes.errorbar(
            places + shift, values["mean"], values["sem"], color=colour, label=label,
            marker=marker, markersize=4.5, elinewidth=1.1, capsize=2.5,
        )  # fmt: skip
    axes.set_xticks(places, [f"{name}\n{size:,}" for name, size in held.size().items()])
    axes.set_xlim(-0.5, len(found) - 0.5)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("edits to the nearest known ASV; number of ASVs")
    axes.set_ylabel("mean Jaccard of clades")
    axes.legend(loc="lower left")
    means = zip(found.index, model["mean"], nearest["mean"], strict=True)
    said = "; ".join(
        f"{name} edits: {number(ours)}, {number(simple)}" for name, ours, simple in means
    )
    alt = f"Mean Jaccard of the model, and of the nearest known ASV. {said}."
    return svg_element(axes, "placements-distance", alt)


def _by_support(placements: pd.DataFrame) -> str:
    count = int(np.clip(len(placements) // SMALLEST_GROUP, 1, SUPPORT_GROUPS))
    groups = drawing.stretches(placements, "support", count)
    sure, right = (groups[name].mean().to_numpy() for name in ("support", "jaccard"))
    axes = new_axes(*SQUARE)
    axes.errorbar(
        sure, right, groups["jaccard"].sem(), color=SERIES[2], fmt="o", markersize=5,
        elinewidth=1.1, capsize=2.5,
    )  # fmt: skip
    drawing.identity(axes, np.concatenate([sure, right, [1.0]]))
    axes.set(xlabel="mean support", ylabel="mean Jaccard of clades")
    alt = (
        f"Mean Jaccard by support: {number(right[0])} where support is {number(sure[0])}, "
        f"{number(right[-1])} where it is {number(sure[-1])}."
    )
    return svg_element(axes, "placements-support", alt)


def ordination_figure(pairs: pd.DataFrame, colours: Mapping[str, Any]) -> Figure | None:
    """Maps of the validation samples by true and by predicted distances, if all pairs are there.

    Args:
        pairs: of samples.
        colours: of the summary: a metadata column and its values by sample.
    """
    codes, samples = pd.factorize(pd.concat([pairs["sample_a"], pairs["sample_b"]]))
    first, second = codes.reshape(2, -1)
    distances = np.full((2, len(samples), len(samples)), np.nan)
    distances[:, first, second] = pairs[["true", "predicted"]].T
    distances[:, second, first] = distances[:, first, second]
    distances[:, range(len(samples)), range(len(samples))] = 0.0
    if len(samples) < 3 or not np.isfinite(distances).all() or not distances.any((1, 2)).all():
        return None
    (true, true_share), (predicted, share) = map(principal_coordinates, distances)
    true, predicted, disparity = procrustes(true, predicted)
    by, shades, legend = _sample_colours(colours, samples, true[:, 0])
    caption = (
        f"{len(samples)} validation samples. Left: principal coordinates of the true distances "
        f"({100 * true_share:.0f} % of their variance). Right: those of the predicted ones "
        f"({100 * share:.0f} %), turned onto the left; both scaled to the same size (Procrustes "
        f"correlation {number(math.sqrt(max(0.0, 1 - disparity)))}; 1 is the same picture). {by}"
    )
    reach = 1.08 * np.abs([true, predicted]).max()
    panels = []
    for title, points in (
        ("True distances (PCoA)", true),
        ("Predicted distances (PCoA)", predicted),
    ):
        axes = new_axes(height=4.0 + 0.2 * ((len(legend) + 1) // 2))
        axes.scatter(*points.T, 26, shades, alpha=0.85, linewidths=0.4, edgecolors=drawing.PAPER)
        for label, colour in legend.items():
            axes.plot([], [], "o", color=colour, label=label)
        if legend:  # below the map, where it hides no sample
            axes.figure.legend(loc="outside lower center", ncols=2, handletextpad=0.2)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        axes.set(xlabel="axis 1", ylabel="axis 2", title=title)
        alt = f"{title}: map of {len(points)} samples on two axes."
        panels.append(svg_element(axes, title, alt))
    return Figure("ordination", "Ordination of validation samples", panels, caption)


def principal_coordinates(distances: np.ndarray) -> tuple[np.ndarray, float]:
    """Two principal coordinates (n, 2) of distances (n, n) (Gower 1966), and their share of all."""
    squared = -0.5 * distances**2
    centred = squared - squared.mean(axis=0) - squared.mean(axis=1, keepdims=True) + squared.mean()
    values, vectors = np.linalg.eigh(centred)
    values = np.maximum(values[::-1], 0.0)
    return vectors[:, ::-1][:, :2] * np.sqrt(values[:2]), float(values[:2].sum() / values.sum())


def _sample_colours(
    colours: Mapping[str, Any], samples: Sequence[str], fallback: np.ndarray
) -> tuple[str, list[Any], dict[str, str]]:
    """What colours stand for, one a sample, and a legend (empty for a scale)."""
    from matplotlib import colormaps

    known = pd.Series(colours.get("values") or {}, dtype=str).reindex(samples, fill_value="")
    column = drawing.short(str(colours.get("column")), 40)
    if colours.get("kind") == "classification":
        shade = dict(zip(sorted({*known} - {""}), SERIES, strict=False))
        legend = {drawing.short(name): colour for name, colour in shade.items()}
        if not known.isin(shade).all():
            legend["other or missing"] = MUTED
        shades = [shade.get(name, MUTED) for name in known]
        return f"Colours are classes of {column}.", shades, legend
    numbers = pd.to_numeric(known, errors="coerce")
    if numbers.isna().all():
        numbers = pd.Series(fallback)
        by = "A sample has the same colour in both: its place on the first axis of the left map."
    else:
        ends = f"from {number(numbers.min())} (violet) to {number(numbers.max())} (yellow)"
        unknown = "; grey: not known" if numbers.isna().any() else ""
        by = f"Colours are {column}, {ends}{unknown}."
    placed = 0.15 + 0.77 * (numbers - numbers.min()) / (np.ptp(numbers.dropna()) or 1.0)
    return by, [MUTED if np.isnan(x) else colormaps["viridis"](x) for x in placed], {}
