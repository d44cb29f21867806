"""Results in words: verdicts against baselines, sentences, and checks that earn a warning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from aam.report.run_files import Distances, to_float

NOTHING = "\N{EN DASH}"
"""Stands for a number that is not there."""
MINUS = "\N{MINUS SIGN}"

SAME_SCORE, SAME_ERROR = 5e-4, 0.01
"""Scores that differ by less, and errors that differ by a smaller share, are equal."""
COLLAPSE = 0.5
"""Predicted distances hardly differ where their spread is below this share of the true one."""


@dataclass(frozen=True)
class Result:
    """One line of the result table.

    Attributes:
        name: of the metric.
        key: the metric's name in ``metrics.csv``, as far as it has one.
        part: ``validation`` as a rule.
        value: NaN where undefined.
        unit: of the value, may be empty.
        higher_is_better: the direction.
        baselines: by name, NaN where undefined.
    """

    name: str
    key: str
    part: str
    value: float
    unit: str
    higher_is_better: bool
    baselines: Mapping[str, float]

    @property
    def best(self) -> tuple[str, float] | None:
        """Name and value of the best baseline that is defined."""
        defined = [(value, name) for name, value in self.baselines.items() if math.isfinite(value)]
        if not defined:
            return None
        value, name = (max if self.higher_is_better else min)(defined, key=lambda pair: pair[0])
        return name, value

    @property
    def verdict(self) -> Literal["better", "worse", "equal", "undefined", "no baseline"]:
        """Against the best baseline, at the precision that matters."""
        if not math.isfinite(self.value):
            return "undefined"
        if self.best is None:
            return "no baseline"
        best = self.best[1]
        ahead = self.value - best if self.higher_is_better else best - self.value
        same = SAME_SCORE * max(1.0, abs(best)) if self.higher_is_better else SAME_ERROR * abs(best)
        if abs(ahead) <= same:
            return "equal"
        return "better" if ahead > 0 else "worse"


def read_results(summary: Mapping[str, Any]) -> list[Result]:
    """The results of a summary; entries that are no results are left out."""
    found = []
    target = summary.get("target")
    column = str(target.get("column") or "") if isinstance(target, Mapping) else ""
    for entry in summary.get("results") or []:
        if isinstance(entry, Mapping) and "name" in entry:
            found.append(
                Result(
                    name=str(entry["name"]),
                    key=metric_key(str(entry["name"]), column),
                    part=str(entry.get("part") or ""),
                    value=to_float(entry.get("value")),
                    unit=str(entry.get("unit") or ""),
                    higher_is_better=bool(entry.get("higher_is_better", True)),
                    baselines={
                        str(k): to_float(v) for k, v in (entry.get("baselines") or {}).items()
                    },
                )
            )
    return found


def number(value: Any) -> str:
    """A number for people: three decimals, fewer where large, two digits where small, or a dash."""
    if isinstance(value, bool) or value is None:
        return NOTHING if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}".replace("-", MINUS)
    value = to_float(value)
    if not math.isfinite(value):
        return NOTHING
    size = abs(value)
    if size >= 1000 or (size >= 100 and value == int(value)):
        text = f"{value:,.0f}"
    elif size >= 100:
        text = f"{value:.1f}"
    elif size >= 10:
        text = f"{value:.2f}"
    else:
        text = f"{value:.1e}" if 0 < size < 1e-5 else f"{value:.{_decimals(size)}f}"
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


def _decimals(size: float) -> int:
    return max(3, 1 - math.floor(math.log10(size))) if size else 3


def duration(seconds: Any) -> str:
    """Seconds as ``1 h 5 min``, ``5 min 3 s`` or ``3.2 s``."""
    seconds = to_float(seconds)
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def metric_key(name: str, column: str = "") -> str:
    """The name that ``metrics.csv`` gives to what a result calls ``Mantel r`` or ``age R2``."""
    if column and name.startswith(f"{column} "):
        name = name[len(column) + 1 :]
    key = name.lower().replace("\N{SUPERSCRIPT TWO}", "2").replace("-", "_").replace(" ", "_")
    return _KEYS.get(key, key)


_KEYS = {
    "masked_nucleotide_accuracy": "nucleotide_accuracy",
    "masked_nucleotide_accuracy,_asvs_not_in_training": "nucleotide_accuracy",
    "clade_memberships_of_new_asvs,_jaccard": "clade_jaccard",
    "the_same,_more_than_6_edits_from_any_known_one": "clade_jaccard_far",
}
_PERCENT = (
    "nucleotide_accuracy", "clade_jaccard", "clade_jaccard_far", "r2", "faith_pd_r2", "accuracy"
)  # fmt: skip


def sentence(result: Result, target: str) -> str:
    """What a result says, in plain words, beside the best baseline.

    Args:
        result: with a finite value.
        target: name of the predicted column, or empty.
    """
    value, unit = number(result.value), f" {result.unit}" if result.unit else ""
    share = _percent(result.value)
    held_out = "held-out samples" if result.part != "train" else "training samples"
    new = " of ASVs not in training" if "not in training" in result.name else ""
    named = {
        "mantel_r": f"Predicted and true distances between {held_out} correlate with r = {value}",
        "mantel_r_between_groups": f"Between {held_out} of different groups r is {value}",
        "distance_mae": f"Predicted distances between {held_out} are off by {value} on average",
        "weighted_normalised_distance_mae": (
            f"Weighted normalised UniFrac between {held_out} is off by {value} on average"
        ),
        "faith_pd_r2": f"The model explains {share} of the variance of Faith PD of {held_out}",
        "clade_jaccard": (
            f"Predicted and true clades of ASVs not in training agree to {share} (mean Jaccard)"
        ),
        "clade_jaccard_far": (
            f"More than 6 edits from any known ASV, predicted and true clades agree to {share}"
        ),
        "nucleotide_accuracy": f"The model names {share} of the masked nucleotides{new}",
        "r2": f"The model explains {share} of the variance of {target}",
        "mae": f"Predictions of {target} are off by {value}{unit} on average",
        "accuracy": f"The model names the right {target} for {share} of samples",
        "balanced_accuracy": f"Balanced accuracy of {target} is {value}",
        "auc": f"The area under the ROC curve of {target} is {value}",
    }
    if result.value < 0:
        named["r2"] = f"Predictions of {target} are worse than its mean (r2 {value})"
        named["faith_pd_r2"] = f"Predictions of Faith PD are worse than its mean (r2 {value})"
    said = named.get(result.key, f"{result.name[:1].upper()}{result.name[1:]} is {value}{unit}")
    if result.best is None:
        return f"{said}."
    name, best = result.best
    shown = _percent(best) if result.key in _PERCENT else f"{number(best)}{unit}"
    link = {"better": "better than", "worse": "worse than", "equal": "no better than"}
    return f"{said}: {link[result.verdict]} the best baseline ({name}, {shown})."


def distance_warnings(distances: Distances | None) -> list[str]:
    """Where predicted distances have collapsed to nearly one number."""
    if distances is None:
        return []
    finite = np.isfinite(distances.true) & np.isfinite(distances.predicted)
    if not finite.any():
        return []
    true, predicted = float(distances.true[finite].std()), float(distances.predicted[finite].std())
    if predicted >= COLLAPSE * true:
        return []
    return [
        f"Predicted distances hardly differ: their spread is {number(predicted)}, that of the true "
        f"ones {number(true)}."
    ]


def _percent(value: float) -> str:
    text = f"{100 * value:.1f} %"
    return text.replace("-", MINUS, 1)
