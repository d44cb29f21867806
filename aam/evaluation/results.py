"""What a model is measured by, each number beside what simple methods reach: screen and summary."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from aam.config import NucleotideOptions
from aam.data.dataset import AsvDataset, SampleDataset
from aam.data.samples import Samples
from aam.evaluation import baselines
from aam.evaluation.baselines import CHECK_SEED, EvaluationSubset
from aam.evaluation.metrics import Measured, distance_metrics, target_metrics
from aam.evaluation.outputs import check_nucleotides
from aam.learning.run import Run
from aam.learning.targets import TargetInfo
from aam.model import AsvEncoder

MOST_MASKED = 5000  # sequences whose nucleotides are masked for a result, drawn at random
LISTED_SAMPLES = 447  # most validation samples whose pairs distances.tsv lists: 99,681 pairs

NAMES = {
    "mantel_r": "Mantel r",
    "mantel_r_between": "Mantel r between groups",
    "distance_mae": "distance MAE",
    "weighted_mae": "weighted normalised distance MAE",
    "faith_r2": "Faith PD R2",
    "clade_jaccard": "clade memberships of new ASVs, Jaccard",
    "clade_jaccard_far": "the same, more than 6 edits from any known one",
    "nucleotide_accuracy": "masked-nucleotide accuracy",
    "nucleotide_accuracy_new": "masked-nucleotide accuracy, ASVs not in training",
    "r2": "R2",
    "mae": "MAE",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auc": "AUC",
}
"""What people call the metrics that results list; others are not listed."""

Results = list[dict[str, Any]]  # as the summary holds them


def compare(measured: Measured, simple: Mapping[str, Measured], column: str = "") -> Results:
    """Each metric of a model beside those of simple methods, as the summary holds it."""
    return [
        {
            "name": f"{column} {NAMES[metric]}".strip(),
            "part": "validation",
            "value": value,
            "unit": "",
            "higher_is_better": not metric.endswith("mae"),
            "baselines": {name: own[metric] for name, own in simple.items() if metric in own},
        }
        for metric, value in measured.items()
        if metric in NAMES
    ]


def print_results(results: Results) -> None:
    """Print the measured numbers on standard output, each beside its baselines, best first."""
    from rich.console import Console
    from rich.table import Column, Table

    def show(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.4f}"  # errors are small

    table = Table("validation", Column("model", no_wrap=True, justify="right"), "baselines")
    for one in results:
        sign = -1 if one["higher_is_better"] else 1
        known = {name: value for name, value in one["baselines"].items() if value is not None}
        ordered = sorted(known.items(), key=lambda pair: sign * pair[1])
        simple = ", ".join(f"{name} {show(value)}" for name, value in ordered)
        table.add_row(one["name"], show(one["value"]), simple)
    Console(highlight=False).print(table)


def distance_results(
    subset: EvaluationSubset, predicted: np.ndarray, run: Run | None = None
) -> Results:
    """Distances (n, n) of a subset beside simple ones; with a run the pairs are written."""
    true = subset.truth.pairwise(subset.rows)
    if run is not None:
        write_pairs(run, subset, predicted, true)
    simple = baselines.distance_baselines(subset, true)
    return compare(distance_metrics(predicted, true, subset.groups), simple)


def nucleotide_results(
    encoder: AsvEncoder,
    asvs: SampleDataset | AsvDataset,
    chosen: np.ndarray,
    known: SampleDataset | AsvDataset,
    known_ids: np.ndarray,
    options: NucleotideOptions,
) -> Results:
    """Masked-nucleotide accuracy beside the training part's consensus and nearest sequences.

    Of the `chosen` ASVs of `asvs`; where some of them are `known_ids`, those of training, the
    others are given apart, too. `options` say how many nucleotides are masked.
    """
    seen = np.isin(chosen, known_ids) if asvs is known else np.zeros(len(chosen), dtype=bool)
    parts = {"nucleotide_accuracy_new": chosen[~seen]}
    if seen.any():
        parts = {"nucleotide_accuracy": chosen, **parts}
    known_tokens = known.gather_tokens(known_ids)
    results: Results = []
    for metric, ids in parts.items():
        if len(ids) > MOST_MASKED:
            drawn = np.random.default_rng(CHECK_SEED).permutation(len(ids))[:MOST_MASKED]
            ids = ids[np.sort(drawn)]
        if len(ids):
            check = check_nucleotides(encoder, asvs, ids, options, seed=CHECK_SEED)
            simple = baselines.nucleotide_baselines(
                known_tokens, asvs.gather_tokens(ids), check.rows, check.positions, check.bases
            )
            methods: dict[str, Measured] = {name: {metric: one} for name, one in simple.items()}
            results += compare({metric: check.accuracy}, methods)
    return results


def target_results(
    target: TargetInfo,
    predicted: np.ndarray,
    truth: np.ndarray,
    samples: Samples,
    train_rows: np.ndarray,
    rows: np.ndarray,
) -> Results:
    """Numbers (n,) or probabilities (n, classes) of `rows` beside a forest and a constant.

    `truth` (samples,) must be known of `rows` and of `train_rows`, which the forest learns from;
    without any of these there are no baselines.
    """
    classes, simple = len(target.classes), {}
    if len(train_rows):
        simple = baselines.target_baselines(
            samples.table.counts, truth, train_rows, rows, classes=classes
        )
    return compare(target_metrics(predicted, truth[rows], classes), simple, target.column)


def write_pairs(
    run: Run, subset: EvaluationSubset, predicted: np.ndarray, true: np.ndarray
) -> None:
    """Write the pairs of the first samples: all, unless they are too many."""
    ids, groups = subset.ids, subset.groups
    rows = (
        [
            ids[i], ids[j], true[i, j], predicted[i, j],
            "" if groups is None else int(groups[i] == groups[j]),
        ]
        for i, j in itertools.combinations(range(min(len(ids), LISTED_SAMPLES)), 2)
    )  # fmt: skip
    header = ["sample_a", "sample_b", "true", "predicted", "same_group"]
    run.write_table("distances.tsv", header, rows)
