"""What a pretrained model is measured by, each number beside what simple methods reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from aam.config import NucleotideOptions
from aam.data.dataset import AsvDataset, SampleDataset
from aam.data.samples import Samples
from aam.evaluation import baselines, metrics
from aam.evaluation.outputs import check_nucleotides, distance_metrics
from aam.evaluation.results import result
from aam.learning.run import Run
from aam.model import AsvEncoder

CHECK_SEED = 20_231
MOST_MASKED = 5000  # sequences whose nucleotides are masked for a result, drawn at random
LISTED_PAIRS = 100_000  # most validation pairs written to distances.tsv

Pairwise = Callable[[np.ndarray], np.ndarray]


def distance_results(
    samples: Samples,
    true_distances: Pairwise,
    predicted: np.ndarray,
    true: np.ndarray,
    train_rows: np.ndarray,
    rows: np.ndarray,
    groups: list[str] | None,
    placement: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Mantel r and mean absolute error beside the simple distances.

    Args:
        samples: of the table.
        true_distances: between rows of the table.
        predicted: (n, n) of the rows that are judged.
        true: (n, n) of the same.
        train_rows: rows that the baselines may learn from; without any there are none.
        rows: (n,) rows that are judged.
        groups: of all samples; Mantel r is then also given for pairs of different groups.
        placement: (n, n) by nearest-neighbour placement, where there is a tree.
    """
    own = None if groups is None else [groups[row] for row in rows]
    simple: dict[str, baselines.DistanceBaseline] = {}
    if placement is not None:
        simple["placement"] = baselines.DistanceBaseline(
            metrics.mantel_r(placement, true),
            metrics.mean_absolute_error(metrics.condensed(placement), metrics.condensed(true)),
            None if own is None else metrics.mantel_r(placement, true, groups=own),
        )
    if len(train_rows):
        simple |= baselines.distance_baselines(
            samples.table.counts,
            true_distances,
            train_rows,
            rows,
            groups=groups,
            sequences=samples.table.feature_ids,
            seed=CHECK_SEED,
        )
    measured = distance_metrics(predicted, true)
    results = [
        result("Mantel r", measured["mantel_r"], {n: b.r for n, b in simple.items()}),
        result(
            "distance MAE",
            measured["distance_mae"],
            {n: b.mae for n, b in simple.items()},
            higher_is_better=False,
        ),
    ]
    if own is not None:
        between = metrics.mantel_r(predicted, true, groups=own)
        results.insert(
            1,
            result("Mantel r between groups", between, {n: b.r_between for n, b in simple.items()}),
        )
    return results


def nucleotide_results(
    encoder: AsvEncoder,
    asvs: SampleDataset | AsvDataset,
    judged: np.ndarray,
    known: SampleDataset | AsvDataset,
    known_ids: np.ndarray,
    options: NucleotideOptions,
) -> list[dict[str, Any]]:
    """Masked-nucleotide accuracy beside the training part's consensus and nearest sequences.

    Args:
        encoder: the model.
        asvs: holds the sequences that are judged.
        judged: which of them; where they are of the training too, new ones are also given apart.
        known: holds the sequences of training.
        known_ids: which of them.
        options: how many are masked.
    """
    known_tokens = known.gather_tokens(known_ids)
    seen = np.isin(judged, known_ids) if asvs is known else np.zeros(len(judged), dtype=bool)
    parts = {"masked-nucleotide accuracy, ASVs not in training": judged[~seen]}
    if seen.any():
        parts = {"masked-nucleotide accuracy": judged, **parts}
    results = []
    for name, chosen in parts.items():
        if not len(chosen):
            continue
        if len(chosen) > MOST_MASKED:
            drawn = np.random.default_rng(CHECK_SEED).permutation(len(chosen))[:MOST_MASKED]
            chosen = chosen[np.sort(drawn)]
        check = check_nucleotides(encoder, asvs, chosen, options, seed=CHECK_SEED)
        where = check.positions, check.bases
        tokens = asvs.gather_tokens(chosen)
        simple: dict[str, float | None] = {}
        if len(known_ids):
            nearest = baselines.nearest_accuracy(known_tokens, tokens, check.rows, *where)
            simple = {
                "consensus": baselines.consensus_accuracy(
                    baselines.consensus_of(known_tokens), *where
                ),
                "nearest known ASV": nearest,
            }
        results.append(result(name, check.accuracy, simple))
    return results


def write_pairs(
    run: Run, ids: list[str], true: np.ndarray, predicted: np.ndarray, groups: list[str] | None
) -> None:
    """Write validation pairs (all, or those of the first samples if they are too many)."""
    count = len(ids)
    while count * (count - 1) // 2 > LISTED_PAIRS:
        count -= 1
    rows = (
        [
            ids[i],
            ids[j],
            repr(float(true[i, j])),
            repr(float(predicted[i, j])),
            "" if groups is None else int(groups[i] == groups[j]),
        ]
        for i in range(count)
        for j in range(i + 1, count)
    )
    run.write_table(
        "distances.tsv", ["sample_a", "sample_b", "true", "predicted", "same_group"], rows
    )
