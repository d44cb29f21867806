"""What a model is measured by, each number beside what simple methods reach: screen and summary."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aam.config import NucleotideOptions
from aam.data.clades import Clades, Grafts
from aam.data.dataset import AsvDataset, SampleDataset
from aam.data.embedding import Embedding
from aam.data.samples import Samples
from aam.data.table import FeatureTable
from aam.data.texts import Texts
from aam.data.unifrac import UniFrac
from aam.evaluation import baselines, metrics
from aam.evaluation.baselines import CHECK_SEED, EvaluationSubset
from aam.evaluation.metrics import Measured, condensed, distance_metrics, target_metrics
from aam.evaluation.outputs import check_nucleotides
from aam.evaluation.placer import Placed, Placer, sample_vectors, unifrac_by_model
from aam.learning.run import Run
from aam.learning.targets import TargetInfo
from aam.model import AsvEncoder

FAR = 6  # edits from any known ASV
MOST_COLOURS = 7  # classes of a metadata column that the ordination may be coloured by
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


# ------------------------------------------------------------- of a model that a tree has taught
def sample_results(
    placer: Placer,
    subset: EvaluationSubset,
    run: Run | None = None,
    vectors: Embedding | None = None,
) -> Results:
    """Distances and Faith PD of samples whose ASVs are placed, beside those by the whole tree.

    `subset.truth` is UniFrac by it. In a run the pairs and the samples' vectors are written.
    """
    assert isinstance(subset.truth, UniFrac)
    table = on_tree(subset.samples.table, subset.truth).select(subset.ids)
    placed = placer.place(table.feature_ids)
    nearest = placer.nearest_neighbour().place(table.feature_ids)
    true = _unifrac(subset.truth, subset.rows)

    def measure(by: Placed) -> tuple[np.ndarray, Measured]:
        found = unifrac_by_model(table, placer.clades, by)
        distances, weighted, faith = _unifrac(found, np.arange(len(subset.rows)))
        return distances, distance_metrics(distances, true[0], subset.groups) | {
            "weighted_mae": metrics.mean_absolute_error(condensed(weighted), condensed(true[1])),
            "faith_r2": metrics.r2(faith, true[2]),
        }

    distances, measured = measure(placed)
    if run is not None:
        write_pairs(run, subset, distances, true[0])
    if run is not None and vectors is not None:
        frame = sample_vectors(placer, table, placed, vectors, vectors.most)
        rows = (
            [name, "validation", *(f"{one:.6g}" for one in vector)]
            for name, _, *vector in frame.itertuples(name=None)
        )
        run.write_table("embeddings.tsv", ["sample-id", "part", *frame.columns[1:]], rows)
    simple = {"placement": measure(nearest)[1], **baselines.distance_baselines(subset, true[0])}
    return compare(measured, simple)


def _unifrac(source: UniFrac, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unweighted and weighted normalised distances (n, n), and Faith PD (n,)."""
    weighted = source.pairwise(rows, "weighted-normalized")
    return source.pairwise(rows), weighted, source.faith_pd(rows)


def on_tree(table: FeatureTable, truth: UniFrac) -> FeatureTable:
    """The table without features that the tree does not have: truth knows nothing of them."""
    kept = np.flatnonzero(truth.tip_of_column >= 0)
    if len(kept) == len(truth.tip_of_column):
        return table
    counts = table.counts[:, kept]
    counts.sort_indices()
    names = Texts.of(table.feature_ids).take(kept)
    return FeatureTable(table.sample_ids, names, counts, table.source)


def membership_results(
    placer: Placer, sequences: Sequence[str], placed: Placed, truth: Grafts, run: Run | None = None
) -> Results:
    """Jaccard of the memberships of new ASVs, all and far ones; written where there is a run."""
    found, copied = jaccards(placer.clades, placed, truth)
    if run is not None:
        names = placer.clades.sequences
        rows = (
            [
                sequences[i], names[int(tip)] if tip >= 0 else "", f"{placed.distance[i]:.3f}",
                f"{placed.support[i]:.4f}", f"{found[i]:.4f}", f"{copied[i]:.4f}",
            ]
            for i, tip in enumerate(placed.nearest)
        )  # fmt: skip
        header = ["sequence", "nearest", "edits", "support", "jaccard", "jaccard_of_nearest"]
        run.write_table("placements.tsv", header, rows)
    parts = {"clade_jaccard": np.ones(len(found), dtype=bool)}
    if (far := placed.distance > FAR).any():
        parts["clade_jaccard_far"] = far
    model: Measured = {metric: float(found[part].mean()) for metric, part in parts.items()}
    nearest: Measured = {metric: float(copied[part].mean()) for metric, part in parts.items()}
    return compare(model, {"nearest known ASV": nearest})


def jaccards(clades: Clades, placed: Placed, truth: Grafts) -> list[np.ndarray]:
    """Jaccard of the clades of new ASVs, and where they get those of their nearest known one."""
    copied = np.append(clades.lowest, -1)[placed.nearest]
    return [clades.jaccard(clades.ends(lowest), truth) for lowest in (placed.clade, copied)]


def colours(samples: Samples, rows: np.ndarray) -> dict[str, Any] | None:
    """A metadata column to colour samples by: the first with a few classes, else with numbers."""
    metadata, numeric = samples.metadata, None
    if metadata is None:
        return None
    for column in metadata.columns:
        texts = metadata.text(column)
        named = {samples.ids[row]: texts[row] or "" for row in rows}
        present = len(set(named.values()) - {""})
        if not metadata.is_numeric(column) and 1 < present <= MOST_COLOURS:
            return {"column": column, "kind": "classification", "values": named}
        if numeric is None and metadata.is_numeric(column) and present > MOST_COLOURS:
            numeric = {"column": column, "kind": "regression", "values": named}
    return numeric
