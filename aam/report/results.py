"""Results in words: verdicts against baselines, sentences, and checks that earn a warning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aam.report.run_files import to_float

NOTHING = "\N{EN DASH}"
"""Stands for a number that is not there."""
MINUS = "\N{MINUS SIGN}"

MODE_SHIFT = 0.25
"""Train and eval mode disagree where their means differ by this share of the true spread."""
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
        """Against the best baseline, at the three decimals that are printed."""
        if not math.isfinite(self.value):
            return "undefined"
        if self.best is None:
            return "no baseline"
        ahead = self.value - self.best[1] if self.higher_is_better else self.best[1] - self.value
        if abs(ahead) < 5e-4 * max(1.0, abs(self.best[1])):
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
    """A number for people: three decimals, fewer where large; a dash where there is none."""
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
        text = f"{value:.3f}" if size >= 0.001 or value == 0 else f"{value:.1e}"
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


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
    return "nucleotide_accuracy" if key == "masked_nucleotide_accuracy" else key


def sentence(result: Result, target: str) -> str:
    """What a result says, in plain words, beside the best baseline.

    Args:
        result: with a finite value.
        target: name of the predicted column, or empty.
    """
    value, unit = number(result.value), f" {result.unit}" if result.unit else ""
    share = _percent(result.value)
    held_out = "held-out samples" if result.part != "train" else "training samples"
    named = {
        "mantel_r": f"Predicted and true distances between {held_out} correlate with r = {value}",
        "distance_mae": f"Predicted distances between {held_out} are off by {value} on average",
        "nucleotide_accuracy": f"The model names {share} of the masked nucleotides",
        "r2": f"The model explains {share} of the variance of {target}",
        "mae": f"Predictions of {target} are off by {value}{unit} on average",
        "accuracy": f"The model names the right {target} for {share} of samples",
        "balanced_accuracy": f"Balanced accuracy of {target} is {value}",
        "auc": f"The area under the ROC curve of {target} is {value}",
    }
    if result.value < 0:
        named["r2"] = f"Predictions of {target} are worse than its mean (r2 {value})"
    said = named.get(result.key, f"{result.name[:1].upper()}{result.name[1:]} is {value}{unit}")
    if result.best is None:
        return f"{said}."
    name, best = result.best
    percent = result.key in ("nucleotide_accuracy", "r2", "accuracy")
    shown = _percent(best) if percent else f"{number(best)}{unit}"
    link = {"better": "better than", "worse": "worse than", "equal": "no better than"}
    return f"{said}: {link[result.verdict]} the best baseline ({name}, {shown})."


def distance_warnings(check: Mapping[str, Any] | None) -> list[str]:
    """Where predicted distances of train and eval mode disagree, or have collapsed."""
    if not isinstance(check, Mapping):
        return []
    modes = {}
    for name in ("train_mode", "eval_mode", "true"):
        entry = check.get(name)
        entry = entry if isinstance(entry, Mapping) else {}
        modes[name] = to_float(entry.get("mean")), to_float(entry.get("sd"))
    (train_mean, train_sd), (mean, sd), (true_mean, true_sd) = modes.values()
    found = []
    if true_sd > 0 and abs(train_mean - mean) > MODE_SHIFT * true_sd:
        found.append(
            "Train and eval mode disagree: predicted distances have mean "
            f"{number(train_mean)} in train mode and {number(mean)} in eval mode (true "
            f"{number(true_mean)}). Noise that is drawn anew for each sample, such as dropout, is "
            "being used as distance; the numbers of this report are those of eval mode."
        )
    elif sd > 0 and not 0.67 <= train_sd / sd <= 1.5 and math.isfinite(train_sd):
        found.append(
            f"Train and eval mode disagree: predicted distances have spread {number(train_sd)} in "
            f"train mode and {number(sd)} in eval mode."
        )
    if true_sd > 0 and sd < COLLAPSE * true_sd:
        found.append(
            f"Predicted distances hardly differ: their spread is {number(sd)}, that of the true "
            f"ones {number(true_sd)}."
        )
    return found


def _percent(value: float) -> str:
    text = f"{100 * value:.1f} %"
    return text.replace("-", MINUS, 1)
