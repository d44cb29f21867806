"""Results in words: verdicts against baselines, sentences, and numbers for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NOTHING = "\N{EN DASH}"  # stands for a number that is not there
MINUS = "\N{MINUS SIGN}"
SAME_SCORE, SAME_ERROR = 5e-4, 0.01
"""Scores that differ by less, and errors that differ by a smaller share, are equal."""

SENTENCES = {  # by what evaluation calls a metric
    "Mantel r": "Predicted and true distances between held-out samples correlate with r = {value}",
    "Mantel r between groups": "Between held-out samples of different groups r is {value}",
    "distance MAE": "Predicted distances between held-out samples are off by {value} on average",
    "weighted normalised distance MAE": (
        "Weighted normalised UniFrac between held-out samples is off by {value} on average"
    ),
    "Faith PD R2": "The model explains {share} of the variance of Faith PD of held-out samples",
    "clade memberships of new ASVs, Jaccard": (
        "Predicted and true clades of ASVs not in training agree to {share} (mean Jaccard)"
    ),
    "the same, more than 6 edits from any known one": (
        "More than 6 edits from any known ASV, predicted and true clades agree to {share}"
    ),
    "masked-nucleotide accuracy": "The model names {share} of the masked nucleotides",
    "masked-nucleotide accuracy, ASVs not in training": (
        "The model names {share} of the masked nucleotides of ASVs not in training"
    ),
    "R2": "The model explains {share} of the variance of {target}",
    "MAE": "Predictions of {target} are off by {value} on average",
    "accuracy": "The model names the right {target} for {share} of samples",
    "balanced accuracy": "Balanced accuracy of {target} is {value}",
    "AUC": "The area under the ROC curve of {target} is {value}",
}
NEGATIVE = {
    "R2": "Predictions of {target} are worse than its mean (r2 {value})",
    "Faith PD R2": "Predictions of Faith PD are worse than its mean (r2 {value})",
}
LINKS = {"better": "better than", "worse": "worse than", "equal": "no better than"}


@dataclass(frozen=True)
class Result:
    """A line of the result table; values that are not defined are NaN."""

    name: str
    metric: str  # the name without the predicted column
    part: str
    value: float
    higher_is_better: bool
    baselines: Mapping[str, float]

    @property
    def best(self) -> tuple[str, float] | None:
        """Name and value of the best baseline that is defined."""
        defined = [entry for entry in self.baselines.items() if math.isfinite(entry[1])]
        choose = max if self.higher_is_better else min
        return choose(defined, key=lambda entry: entry[1], default=None)

    @property
    def verdict(self) -> str:
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

    @property
    def verdict_in_words(self) -> str:
        """As it stands in the table."""
        if self.verdict == "undefined" or self.best is None:
            return self.verdict.replace("undefined", "not defined")
        name, value = self.best
        if self.verdict == "equal":
            return f"equal to {name}"
        return f"{self.verdict} than {name} by {number(abs(self.value - value))}"

    def sentence(self, target: str) -> str:
        """What a defined value says of a target column, in plain words, and the best baseline."""
        said = SENTENCES.get(self.metric, "{name} is {value}")
        show = _percent if "{share}" in said else number
        if self.value < 0:
            said = NEGATIVE.get(self.metric, said)
        said = said.format(
            name=self.name[:1].upper() + self.name[1:],
            value=number(self.value),
            share=_percent(self.value),
            target=target,
        )
        if self.best is None:
            return f"{said}."
        name, value = self.best
        return f"{said}: {LINKS[self.verdict]} the best baseline ({name}, {show(value)})."


def read_results(summary: Mapping[str, Any]) -> list[Result]:
    """The results of a run's summary."""

    def defined(value: float | None) -> float:
        return math.nan if value is None else float(value)

    column = (summary.get("target") or {}).get("column", "")
    return [
        Result(
            name=entry["name"],
            metric=entry["name"].removeprefix(f"{column} "),
            part=entry["part"],
            value=defined(entry["value"]),
            higher_is_better=entry["higher_is_better"],
            baselines={name: defined(value) for name, value in entry["baselines"].items()},
        )
        for entry in summary.get("results") or []
    ]


def number(value: float | None) -> str:
    """A number for people: three decimals, fewer where large, two digits where small, or a dash."""
    if value is None or not math.isfinite(value):
        return NOTHING
    power = math.floor(math.log10(abs(value))) if value else 0
    decimals = max(3, 1 - power) if power < 0 else max(0, 3 - power)
    if isinstance(value, int):
        decimals = 0
    text = f"{value:.1e}" if power < -5 else f"{value:,.{decimals}f}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def duration(seconds: float) -> str:
    """Seconds as `1 h 5 min`, `5 min 3 s` or `3.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %".replace("-", MINUS)
