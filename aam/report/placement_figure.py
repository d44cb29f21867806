"""The figure of left-out ASVs: how right their clades are, by distance and by support."""

from __future__ import annotations

from typing import Any

import numpy as np

from aam.report.drawing import SERIES, draw, identity, limits
from aam.report.figures import Figure
from aam.report.results import number
from aam.report.run_files import Placements

BINS = ("1", "2", "3\N{EN DASH}4", "5\N{EN DASH}6", "7\N{EN DASH}9", "10+")
EDGES = (1.5, 2.5, 4.5, 6.5, 9.5)
GROUPS, SMALLEST_GROUP = 10, 10
"""Most groups by support, and the ASVs that one holds at least."""


def placement_figure(placements: Placements | None) -> Figure | None:
    """Jaccard of the clades of left-out ASVs, of the model and of their nearest known ASV."""
    if placements is None:
        return None
    usable = ~np.isnan(placements.edits)
    for values in (placements.support, placements.jaccard, placements.nearest):
        usable &= np.isfinite(values)
    if not usable.any():
        return None
    edits, support, jaccard, nearest = (
        values[usable]
        for values in (
            placements.edits, placements.support, placements.jaccard, placements.nearest
        )
    )  # fmt: skip
    caption = (
        f"{len(edits):,} ASVs that the model was not trained on. The Jaccard index compares the "
        "clades that an ASV is put in with those that the tree has it in: 1 if they are the same. "
        "Left: its mean by the number of edits to the nearest known ASV (rounded), for the model "
        "and where an ASV gets the clades of its nearest known one; bars are standard errors. "
        "Right: its mean by support, the mean probability that the model gives to the clades it "
        "chose; each dot is a group of about equal number. Below the dashed line the Jaccard index "
        "is lower than the support; unlike the support, it also counts clades that were missed."
    )
    if not usable.all():
        caption += f" {int((~usable).sum()):,} ASVs without a finite number are left out."
    panels = (_by_distance(edits, jaccard, nearest), _by_support(support, jaccard))
    return Figure("placements", "Clade memberships of new ASVs by distance", panels, caption)


def _by_distance(edits: np.ndarray, jaccard: np.ndarray, nearest: np.ndarray) -> str:
    bins = np.digitize(edits, EDGES)
    held = [(label, bins == i) for i, label in enumerate(BINS) if (bins == i).any()]
    place = np.arange(len(held))
    ours, theirs = (np.array([_mean(v[rows]) for _, rows in held]) for v in (jaccard, nearest))

    def plot(axes: Any) -> None:
        for label, found, colour, shift, marker in (
            ("model", ours, SERIES[0], -0.06, "o"),
            ("nearest known ASV", theirs, SERIES[1], 0.06, "s"),
        ):
            axes.errorbar(
                place + shift, *found.T, color=colour, label=label,
                marker=marker, markersize=4.5, elinewidth=1.1, capsize=2.5,
            )  # fmt: skip
        axes.set_xticks(place, [f"{label}\n{int(rows.sum()):,}" for label, rows in held])
        axes.set_xlim(-0.5, len(held) - 0.5)
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="edits to the nearest known ASV; number of ASVs")
        axes.set(ylabel="mean Jaccard of clades")
        axes.legend(loc="lower left")

    said = "; ".join(
        f"{label} edits: {number(model)}, {number(copied)}"
        for (label, _), model, copied in zip(held, ours[:, 0], theirs[:, 0], strict=True)
    )
    alt = f"Mean Jaccard of the model, and of the nearest known ASV. {said}."
    return draw("placements-distance", alt, plot, size=(4.4, 4.2))


def _by_support(support: np.ndarray, jaccard: np.ndarray) -> str:
    count = int(np.clip(len(support) // SMALLEST_GROUP, 1, GROUPS))
    groups = np.array_split(np.argsort(support, kind="stable"), count)
    sure = np.array([support[rows].mean() for rows in groups])
    right, error = np.array([_mean(jaccard[rows]) for rows in groups]).T

    def plot(axes: Any) -> None:
        axes.errorbar(
            sure, right, error, color=SERIES[2], fmt="o", markersize=5, elinewidth=1.1, capsize=2.5
        )
        identity(axes, limits(np.concatenate([sure, right, [1.0]])))
        axes.set(xlabel="mean support", ylabel="mean Jaccard of clades")

    alt = (
        f"Mean Jaccard by support: {number(right[0])} where support is {number(sure[0])}, "
        f"{number(right[-1])} where it is {number(sure[-1])}."
    )
    return draw("placements-support", alt, plot, size=(4.4, 4.2))


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std() / np.sqrt(len(values)))
