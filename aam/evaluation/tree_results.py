"""What a model that a tree taught is measured by, beside nearest-neighbour placement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from aam.config import MetadataOptions
from aam.data.clades import Clades, Grafts
from aam.data.embedding import Embedding
from aam.data.samples import Samples
from aam.data.table import FeatureTable
from aam.data.texts import Texts
from aam.data.unifrac import UniFrac
from aam.evaluation import metrics
from aam.evaluation.measurements import distance_results, write_pairs
from aam.evaluation.placer import Placed, Placer, grafted_tree, unifrac_by_model
from aam.evaluation.results import result
from aam.learning.run import Run

MOST_COLOURS = 7
"""Classes of a metadata column that the ordination may be coloured by."""


@dataclass(frozen=True)
class EvaluationSubset:
    """The samples of a table whose distances are compared with the tree's.

    Attributes:
        samples: of the table.
        truth: UniFrac by the whole tree.
        rows: which samples are judged.
        train_rows: samples that simple methods may learn from.
        metadata: the group column.
    """

    samples: Samples
    truth: UniFrac
    rows: np.ndarray
    train_rows: np.ndarray
    metadata: MetadataOptions


def colours(samples: Samples, rows: np.ndarray) -> dict[str, Any] | None:
    """A metadata column to colour samples by: the first with a few classes, else with numbers."""
    metadata = samples.metadata
    if metadata is None:
        return None
    numeric = None
    for column in metadata.columns:
        values = [metadata.text(column)[row] for row in rows]
        present = {value for value in values if value is not None}
        named = {samples.ids[row]: value or "" for row, value in zip(rows, values, strict=True)}
        if metadata.is_numeric(column):
            if numeric is None and len(present) > MOST_COLOURS:
                numeric = {"column": column, "kind": "regression", "values": named}
        elif 1 < len(present) <= MOST_COLOURS:
            return {"column": column, "kind": "classification", "values": named}
    return numeric


def sample_results(
    placer: Placer,
    judged: EvaluationSubset,
    run: Run | None = None,
    embedding: Embedding | None = None,
) -> list[dict[str, Any]]:
    """Distances and Faith PD of samples whose ASVs are placed, beside the whole tree's.

    Args:
        placer: of the model.
        judged: the samples.
        run: where pairs and embeddings are written; None: nowhere.
        embedding: gives the embeddings.
    """
    samples, truth, rows = judged.samples, judged.truth, judged.rows
    ids = [samples.ids[row] for row in rows]
    table = on_tree(samples.table, truth).select(ids)
    placed = placer.place(table.feature_ids)
    simple = nearest_neighbour_placement(placer)
    baseline = simple.place(table.feature_ids)
    own = np.arange(len(ids))
    predicted = unifrac_by_model(table, placer.clades, placed)
    nearest = unifrac_by_model(table, placer.clades, baseline)
    matrix, true = predicted.pairwise(own), truth.pairwise(rows)
    groups = samples.groups(judged.metadata.group_column)
    if run is not None:
        within = None if groups is None else [groups[row] for row in rows]
        write_pairs(run, ids, true, matrix, within)
        if embedding is not None:
            write_embeddings(run, placer, table, placed, embedding)
    results = distance_results(
        samples, truth.pairwise, matrix, true, judged.train_rows, rows, groups,
        nearest.pairwise(own),
    )  # fmt: skip
    weighted = truth.by("weighted-normalized").pairwise(rows)
    errors = [
        metrics.mean_absolute_error(
            metrics.condensed(one.by("weighted-normalized").pairwise(own)),
            metrics.condensed(weighted),
        )
        for one in (predicted, nearest)
    ]
    results.append(
        result(
            "weighted normalised distance MAE", errors[0], {"placement": errors[1]},
            higher_is_better=False,
        )
    )  # fmt: skip
    faith = truth.faith_pd(rows)
    explained = [metrics.r2(one.faith_pd(own), faith) for one in (predicted, nearest)]
    results.append(result("Faith PD R2", explained[0], {"placement": explained[1]}))
    return results


def on_tree(table: FeatureTable, truth: UniFrac) -> FeatureTable:
    """The table without features that the tree does not have: truth knows nothing of them."""
    kept = np.flatnonzero(truth.tip_of_column >= 0)
    if len(kept) == len(truth.tip_of_column):
        return table
    counts = table.counts[:, kept]
    counts.sort_indices()
    names = Texts.of(table.feature_ids).take(kept)
    return FeatureTable(table.sample_ids, names, counts, table.source)


def write_embeddings(
    run: Run, placer: Placer, table: FeatureTable, placed: Placed, embedding: Embedding
) -> None:
    """Write the vectors of validation samples, for the report's ordination."""
    grafted = grafted_tree(placer.clades, placed, table.feature_ids)
    blocks = embedding.rows(table, placer.clades, grafted, embedding.most)
    vectors = np.concatenate([block for block, _ in blocks])
    header = ["sample-id", "part", *(f"e{i}" for i in range(vectors.shape[1]))]
    rows = (
        [name, "validation", *(f"{one:.6g}" for one in vector)]
        for name, vector in zip(table.sample_ids, vectors, strict=True)
    )
    run.write_table("embeddings.tsv", header, rows)


def nearest_neighbour_placement(placer: Placer) -> Placer:
    """The baseline: a new ASV gets the clades of its nearest known one."""
    return Placer(None, placer.placement, neighbours=placer.neighbours)


def membership_results(placer: Placer, placed: Placed, truth: Grafts) -> list[dict[str, Any]]:
    """Jaccard of the memberships of new ASVs, all and by distance to the nearest known one."""
    clades = placer.clades
    found, simple = jaccards(clades, placed, truth)
    far = placed.distance > 6
    results = [
        result(
            "clade memberships of new ASVs, Jaccard", float(found.mean()),
            {"nearest known ASV": float(simple.mean())},
        )
    ]  # fmt: skip
    if far.any():
        results.append(
            result(
                "the same, more than 6 edits from any known one", float(found[far].mean()),
                {"nearest known ASV": float(simple[far].mean())},
            )
        )  # fmt: skip
    return results


def jaccards(clades: Clades, placed: Placed, truth: Grafts) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard of the clades of new ASVs, and where they get those of their nearest known one."""
    lowest = np.where(placed.nearest >= 0, clades.lowest[placed.nearest], -1)
    return (
        clades.jaccard(clades.ends(placed.clade), truth),
        clades.jaccard(clades.ends(lowest), truth),
    )


def write_placements(
    run: Run, placer: Placer, sequences: Any, placed: Placed, truth: Grafts
) -> None:
    """Write where left-out ASVs were placed: the figure of memberships by distance."""
    found, simple = jaccards(placer.clades, placed, truth)
    names = placer.clades.sequences
    rows = (
        [
            sequences[i],
            names[int(placed.nearest[i])] if placed.nearest[i] >= 0 else "",
            f"{placed.distance[i]:.3f}",
            f"{placed.support[i]:.4f}",
            f"{found[i]:.4f}",
            f"{simple[i]:.4f}",
        ]
        for i in range(len(found))
    )
    header = ["sequence", "nearest", "edits", "support", "jaccard", "jaccard_of_nearest"]
    run.write_table("placements.tsv", header, rows)
