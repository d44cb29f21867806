"""What a model that a tree taught is measured by, beside nearest-neighbour placement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aam.data.clades import Grafts
from aam.data.embedding import Embedding
from aam.data.samples import Samples
from aam.data.table import FeatureTable
from aam.data.texts import Texts
from aam.data.unifrac import UniFrac
from aam.evaluation import baselines
from aam.evaluation.baselines import EvaluationSubset
from aam.evaluation.metrics import Measured, condensed, distance_metrics, mean_absolute_error, r2
from aam.evaluation.placer import Placed, Placer, sample_vectors, unifrac_by_model
from aam.evaluation.results import Results, compare, write_pairs
from aam.learning.run import Run

FAR = 6  # edits from any known ASV
MOST_COLOURS = 7  # classes of a metadata column that the ordination may be coloured by


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
            "weighted_mae": mean_absolute_error(condensed(weighted), condensed(true[1])),
            "faith_r2": r2(faith, true[2]),
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
    found, copied = jaccards(placer, placed, truth)
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
    model, nearest = (
        {metric: float(one[part].mean()) for metric, part in parts.items()}
        for one in (found, copied)
    )
    return compare({**model}, {"nearest known ASV": {**nearest}})


def jaccards(placer: Placer, placed: Placed, truth: Grafts) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard of the clades of new ASVs, and where they get those of their nearest known one."""
    clades = placer.clades
    lowest = np.where(placed.nearest >= 0, clades.lowest[placed.nearest], -1)
    return (
        clades.jaccard(clades.ends(placed.clade), truth),
        clades.jaccard(clades.ends(lowest), truth),
    )


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
