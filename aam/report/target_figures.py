"""The figures of a predicted target: scatter, confusion matrix, ROC curve, histogram."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aam.report import statistics
from aam.report.drawing import COLOUR, SERIES, dots, draw, identity, limits, shade, short
from aam.report.figures import Figure
from aam.report.results import MINUS, number
from aam.report.run_files import Predictions, to_float

DOTS = 2_000
CLASSES = 20
"""Classes that a confusion matrix tells apart; rarer ones are one row."""


def target_figures(predictions: Predictions | None, target: Any) -> list[Figure]:
    """Figures of the predictions of a run: none, or what its kind of target allows."""
    if predictions is None:
        return []
    target = target if isinstance(target, Mapping) else {}
    column = short(str(target.get("column") or "target"), 40)
    unit = short(str(target.get("unit") or ""), 20)
    classification = target.get("kind") == "classification" or bool(predictions.classes)
    if not classification:
        found = [_scatter(predictions, column, unit) or _histogram(predictions, column, unit)]
        return [figure for figure in found if figure]
    part, rows = _judged(predictions)
    if not len(rows):
        return [_class_counts(predictions, column)]
    found = [_confusion(predictions, rows, part, column), _roc(predictions, rows, part, target)]
    return [figure for figure in found if figure]


def _judged(predictions: Predictions) -> tuple[str, np.ndarray]:
    """The part that is judged and its rows with a known truth."""
    known = np.array([bool(value) for value in predictions.true])
    for part in ("validation", *sorted(set(predictions.part) - {"train", "validation"}), "train"):
        rows = np.flatnonzero(known & (predictions.part == part))
        if len(rows):
            return part or "all", rows
    return "", np.empty(0, dtype=int)


def _scatter(predictions: Predictions, column: str, unit: str) -> Figure | None:
    true = np.array([to_float(value) for value in predictions.true])
    predicted = np.array([to_float(value) for value in predictions.predicted])
    usable = np.isfinite(true) & np.isfinite(predicted)
    if not usable.any():
        return None
    span = limits(np.concatenate([true[usable], predicted[usable]]))
    parts = {part: np.flatnonzero(usable & (predictions.part == part)) for part in predictions.part}
    held_out = parts.get("validation", np.flatnonzero(usable))

    def plot(axes: Any) -> None:
        colours = {"train": COLOUR["muted"], "validation": SERIES[1]}
        for part in sorted(parts):
            rows = parts[part][statistics.draw_rows(len(parts[part]), DOTS)]
            label = {"train": "training", "validation": "validation"}.get(part, short(part))
            dots(axes, true[rows], predicted[rows], colours.get(part, SERIES[0]), label)
        identity(axes, span)
        suffix = f" ({unit})" if unit else ""
        axes.set(xlabel=f"true {column}{suffix}", ylabel=f"predicted {column}{suffix}")
        if len(parts) > 1:
            axes.legend(loc="upper left", handletextpad=0.2)

    sizes = ", ".join(f"{len(rows):,} {part or 'samples'}" for part, rows in sorted(parts.items()))
    caption = (
        f"Predicted against true {column} ({sizes}); on the dashed line a prediction is right."
    )
    if any(len(rows) > DOTS for rows in parts.values()):
        caption += f" At most {DOTS:,} samples of a part are drawn."
    if not usable.all():
        caption += (
            f" {int((~usable).sum())} samples without a true or predicted number are left out."
        )
    alt = f"Predicted against true {column} of {int(usable.sum())} samples."
    scatter = draw("target-scatter", alt, plot, size=(4.4, 4.2))
    panels = (scatter, _residuals((predicted - true)[held_out], column, unit))
    return Figure("target", f"Predicted {column}", panels, caption)


def _residuals(errors: np.ndarray, column: str, unit: str) -> str:
    def plot(axes: Any) -> None:
        axes.hist(errors, bins=min(30, max(5, len(errors) // 4)), color=SERIES[1], alpha=0.75)
        axes.axvline(0, color=COLOUR["muted"], linestyle=(0, (4, 3)), linewidth=1.1)
        suffix = f" ({unit})" if unit else ""
        axes.set(xlabel=f"predicted {MINUS} true{suffix}", ylabel="held-out samples")

    low, middle, high = np.quantile(errors, [0.1, 0.5, 0.9])
    alt = f"Errors of {column}: median {number(middle)}, 80 % from {number(low)} to {number(high)}."
    return draw("target-errors", alt, plot, size=(4.4, 4.2))


def _histogram(predictions: Predictions, column: str, unit: str) -> Figure | None:
    predicted = np.array([to_float(value) for value in predictions.predicted])
    predicted = predicted[np.isfinite(predicted)]
    if not len(predicted):
        return None

    def plot(axes: Any) -> None:
        axes.hist(predicted, bins=min(40, max(5, len(predicted) // 4)), color=SERIES[0], alpha=0.8)
        axes.set(xlabel=f"predicted {column}" + f" ({unit})" * bool(unit), ylabel="samples")

    caption = f"Predictions for {len(predicted):,} samples; their true {column} is not known."
    alt = f"Histogram of predicted {column}, mean {number(predicted.mean())}."
    return Figure("target", f"Predicted {column}", (draw("target-histogram", alt, plot),), caption)


def _class_counts(predictions: Predictions, column: str) -> Figure:
    names, counts = np.unique(np.array(predictions.predicted, dtype=str), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:CLASSES]

    def plot(axes: Any) -> None:
        axes.barh(range(len(order)), counts[order], color=SERIES[0], alpha=0.8)
        axes.set_yticks(range(len(order)), [short(str(names[index])) for index in order])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="samples predicted")

    caption = f"Predictions for {len(predictions.ids):,} samples; their true {column} is not known."
    if len(names) > CLASSES:
        caption += f" The {CLASSES} most frequent of {len(names)} classes are drawn."
    alt = f"Number of samples by predicted class of {column}."
    size = (5.0, 1.2 + 0.28 * len(order))
    panel = draw("target-counts", alt, plot, size=size)
    return Figure("target", f"Predicted {column}", (panel,), caption)


def _confusion(predictions: Predictions, rows: np.ndarray, part: str, column: str) -> Figure:
    true = [predictions.true[row] for row in rows]
    predicted = [predictions.predicted[row] for row in rows]
    names = sorted(set(true) | set(predicted) | set(predictions.classes))
    rare = len(names) > CLASSES
    if rare:
        names = sorted(sorted(names, key=lambda n: (-true.count(n), n))[: CLASSES - 1])
    labels = [*names, "other classes"] if rare else names
    place = {name: index for index, name in enumerate(names)}
    counts = np.zeros((len(labels), len(labels)), dtype=int)
    for pair in zip(true, predicted, strict=True):
        counts[tuple(place.get(name, len(labels) - 1) for name in pair)] += 1
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    right = int(np.sum(np.array(true, dtype=object) == np.array(predicted, dtype=object)))

    def plot(axes: Any) -> None:
        _matrix(axes, counts, share, [short(name, 18) for name in labels])
        axes.set(xlabel=f"predicted {column}", ylabel=f"true {column}")

    side = 2.0 + 0.55 * len(labels) if len(labels) < 6 else 2.4 + 0.3 * len(labels)
    side = max(side, 3.4)
    alt = f"Confusion matrix of {column}: {right} of {len(true)} samples on the diagonal."
    caption = (
        f"{len(true):,} samples ({part}); {right:,} of them right. A row is a true class; the "
        "stronger its colour, the larger a cell's share of the row."
    )
    if rare:
        caption += f" The {CLASSES - 1} most frequent classes are told apart."
    panel = draw("target-confusion", alt, plot, size=(side + 0.6, side))
    return Figure("confusion", f"True and predicted {column}", (panel,), caption)


def _matrix(axes: Any, counts: np.ndarray, share: np.ndarray, labels: Sequence[str]) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    size = len(labels)
    cells = [Rectangle((j - 0.47, i - 0.47), 0.94, 0.94) for i in range(size) for j in range(size)]
    # Half opacity at most, so that the numbers stay readable on light and on dark paper.
    colours = shade(SERIES[0], 0.06 + 0.5 * share.ravel())
    axes.add_collection(PatchCollection(cells, facecolors=colours, edgecolors="none"))
    for (i, j), count in np.ndenumerate(counts):
        if count or size <= 6:
            axes.text(j, i, f"{count:,}", ha="center", va="center", fontsize=10 if size < 8 else 7)
    turned = 0 if size <= 3 else 60
    axes.set_xticks(range(size), labels, rotation=turned, ha="right" if turned else "center")
    axes.set_yticks(range(size), labels)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal")


def _roc(predictions: Predictions, rows: np.ndarray, part: str, target: Any) -> Figure | None:
    if predictions.probabilities is None or len(predictions.classes) != 2:
        return None
    name = predictions.classes[1]
    positive = np.array([predictions.true[row] == name for row in rows])
    curve = statistics.roc_curve(predictions.probabilities[rows, 1], positive)
    if curve is None:
        return None
    false_rate, true_rate, area = curve

    def plot(axes: Any) -> None:
        axes.fill_between(false_rate, true_rate, color=SERIES[0], alpha=0.12, linewidth=0)
        axes.plot(false_rate, true_rate, color=SERIES[0], label=f"model, area {number(area)}")
        axes.plot([0, 1], [0, 1], color=COLOUR["muted"], linestyle=(0, (4, 3)), label="chance, 0.5")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.set(xlabel="false positive rate", ylabel="true positive rate")
        axes.legend(loc="lower right")

    caption = (
        f"Receiver operating characteristic for class {short(name, 40)!r} ({part}; "
        f"{int(positive.sum())} of {len(rows)} samples): area {number(area)}."
    )
    panel = draw("target-roc", f"ROC curve, area {number(area)}.", plot, size=(4.4, 4.2))
    return Figure("roc", "ROC curve", (panel,), caption)
