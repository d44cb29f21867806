"""The figure of a predicted target: scatter and errors, or confusion matrix and ROC curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from aam.report.drawing import (
    DASHED,
    DOTS,
    MUTED,
    SERIES,
    SQUARE,
    Figure,
    new_axes,
    scatter,
    short,
    svg_element,
)  # fmt: skip
from aam.report.results import MINUS, number

CLASSES = 20  # that a confusion matrix tells apart; rarer ones are one row
OTHER = "other classes"
PROBABILITY = "probability_"


def target_figure(predictions: pd.DataFrame, target: Mapping[str, Any]) -> Figure | None:
    """What was predicted for the samples of a run, beside the truth."""
    column = short(str(target.get("column") or "target"), 40)
    held_out = predictions[predictions["part"] == "validation"]
    if not len(held_out):
        return None
    scores = held_out.filter(regex=f"^{PROBABILITY}").apply(pd.to_numeric, errors="coerce")
    if scores.shape[1]:
        scores.columns = scores.columns.str.removeprefix(PROBABILITY)
        return _classes_figure(held_out["true"], held_out["predicted"], scores, column)
    return _numbers_figure(predictions[predictions["part"] == "train"], held_out, column)


def _numbers_figure(train: pd.DataFrame, held_out: pd.DataFrame, column: str) -> Figure:
    groups = {"training": (MUTED, train), "validation": (SERIES[1], held_out)}
    alt = f"Predicted against true {column} of {len(held_out)} held-out samples."
    errors = held_out["predicted"] - held_out["true"]
    low, middle, high = map(number, errors.quantile([0.1, 0.5, 0.9]))
    axes = new_axes(*SQUARE)
    axes.hist(errors, bins=min(30, max(5, len(errors) // 4)), color=SERIES[1], alpha=0.75)
    axes.axvline(0, **DASHED)
    axes.set(xlabel=f"predicted {MINUS} true", ylabel="held-out samples")
    said = f"Errors of {column}: median {middle}, 80 % from {low} to {high}."
    panels = [scatter("target", alt, groups, column), svg_element(axes, "errors", said)]
    caption = (
        f"Predicted against true {column} ({len(train):,} train, {len(held_out):,} validation); "
        f"on the dashed line a prediction is right. At most {DOTS:,} samples of a part are drawn."
    )
    return Figure("target", f"Predicted {column}", panels, caption)


def _classes_figure(
    true: pd.Series, predicted: pd.Series, scores: pd.DataFrame, column: str
) -> Figure:
    right, total = (true == predicted).sum(), len(true)
    caption = (
        f"{total:,} samples (validation); {right:,} of them right. A row is a true class; the "
        "stronger its colour, the larger a cell's share of the row."
    )
    panels = []
    positive = true == scores.columns[-1]
    if scores.shape[1] == 2 and positive.nunique() == 2 and np.isfinite(scores).all(axis=None):
        panels.append(_roc(positive, scores.iloc[:, 1]))
        name = short(scores.columns[1], 40)
        caption += f" Right: receiver operating characteristic for class {name!r}, "
        caption += f"{positive.sum()} of the samples."
    labels = sorted({*true, *predicted, *scores})
    if len(labels) > CLASSES:
        frequent = sorted(true.value_counts().index[: CLASSES - 1])
        true, predicted = (one.where(one.isin(frequent), OTHER) for one in (true, predicted))
        labels = [*frequent, OTHER]
        caption += f" The {CLASSES - 1} most frequent classes are told apart."
    counts = pd.crosstab(true, predicted).reindex(index=labels, columns=labels, fill_value=0)
    alt = f"Confusion matrix of {column}: {right} of {total} samples on the diagonal."
    panels.insert(0, _confusion(alt, counts, column))
    return Figure("target", f"True and predicted {column}", panels, caption)


def _confusion(alt: str, counts: pd.DataFrame, column: str) -> str:
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    size = len(counts)
    side = max(3.4, 2.0 + 0.55 * size if size < 6 else 2.4 + 0.3 * size)
    axes = new_axes(side + 0.6, side)
    # Half opacity at most, so that the numbers stay readable on light and on dark paper.
    shades = [to_rgba(SERIES[0], opacity) for opacity in (0.06, 0.56)]
    share = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
    axes.pcolormesh(share, cmap=LinearSegmentedColormap.from_list("share", shades), vmin=0, vmax=1)
    for (row, place), count in np.ndenumerate(counts):
        if count or size <= 6:
            at = (place + 0.5, row + 0.5)
            axes.text(*at, f"{count:,}", ha="center", va="center", fontsize=10 if size < 8 else 7)
    labels = [short(name, 18) for name in counts]
    turned = {} if size <= 3 else {"rotation": 60, "ha": "right"}
    axes.set_xticks(np.arange(size) + 0.5, labels, **turned)
    axes.set_yticks(np.arange(size) + 0.5, labels)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    axes.set(aspect="equal", xlabel=f"predicted {column}", ylabel=f"true {column}")
    return svg_element(axes, "confusion", alt)


def _roc(positive: pd.Series, score: pd.Series) -> str:
    from sklearn.metrics import auc, roc_curve

    false_rate, true_rate, _ = roc_curve(positive, score)
    area = number(auc(false_rate, true_rate))
    axes = new_axes(*SQUARE)
    axes.fill_between(false_rate, true_rate, color=SERIES[0], alpha=0.12, linewidth=0)
    axes.plot(false_rate, true_rate, color=SERIES[0], label=f"model, area {area}")
    axes.plot([0, 1], [0, 1], **DASHED, label="chance, 0.5")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.legend(loc="lower right")
    return svg_element(axes, "roc", f"ROC curve, area {area}.")
