"""How much of a table a model knows, and whether the model applies to it."""

from __future__ import annotations

import numpy as np

from aam.data.clades import known_sequences
from aam.data.neighbours import Found, Neighbours
from aam.data.samples import Samples
from aam.data.table import FeatureTable
from aam.data.texts import Texts, match_names
from aam.errors import DataFact, name_some
from aam.learning.model_file import SavedModel

LOOKED_AT = 2000  # most new ASVs whose nearest known one is looked for, the most abundant ones
LOST_READS = 0.1  # share of the reads that have no place from which on a warning is due
FAR_EDITS, FAR_READS = 0.1, 0.25  # edits a base, and the share of reads that lie farther


def add_applicability(samples: Samples, saved: SavedModel) -> None:
    """Add to the samples' facts and warnings what a model knows of their table."""
    table, sequences = samples.table, known_sequences(saved.arrays)
    known = match_names(table.feature_ids, sequences)
    new = np.flatnonzero(known < 0)
    reads = np.asarray(table.counts.sum(axis=0)).ravel()[new]
    new = np.sort(new[np.argsort(-reads, kind="stable")][:LOOKED_AT])
    near = Neighbours(sequences).find(Texts.of(table.feature_ids).take(new))
    facts, warnings = applicability(table, known, near, new)
    samples.facts += facts
    samples.warnings += warnings


def applicability(
    table: FeatureTable, known: np.ndarray, near: Found, new: np.ndarray | None = None
) -> tuple[list[DataFact], list[str]]:
    """Shares of ASVs and reads that training knew, distances of the others, and warnings.

    `known` (features,) are the known ASVs that they equal, -1: none; `near` is of the features
    `new` (n,), or of all that are new.
    """
    is_known, reverse, foreign = known >= 0, near.reverse, near.foreign
    new = np.flatnonzero(~is_known) if new is None else new
    reads = np.asarray(table.counts.sum(axis=0), dtype=np.float64).ravel()
    reads /= max(reads.sum(), 1.0)
    count, edits = int(is_known.sum()), near.distance[:, 0]
    detail = f"{is_known.mean():.1%} of {len(is_known)}, {reads[is_known].sum():.1%} of the reads"
    facts, warnings = [DataFact("ASVs that the model knows", count, detail)], []
    placeable = ~(reverse | foreign)
    if placeable.any():
        middle, ninth, most = np.quantile(edits[placeable], (0.5, 0.9, 1.0))
        some = "" if len(new) + count == len(known) else f"of {len(new):,} looked at, "
        detail = (
            f"{some}edits to the nearest known one: median {middle:.1f}, 90 % up to {ninth:.1f}, "
            f"most {most:.1f}"
        )
        facts.append(DataFact("new ASVs", len(known) - count - int((~placeable).sum()), detail))
    for lost, what in (
        (reverse, "reverse complements of what the model knows"),
        (foreign, "near nothing that the model knows (another region or marker)"),
    ):
        share = reads[new[lost]].sum()
        if lost.any():
            names = name_some([table.feature_ids[int(one)] for one in new[lost][:3]])
            detail = f"{share:.1%} of the reads: {names}"
            facts.append(DataFact(f"ASVs that are {what}", int(lost.sum()), detail, "dropped"))
        if share > LOST_READS:
            warnings.append(f"{share:.0%} of the reads are {what}: it does not apply to them")
    lengths = Texts.of(table.feature_ids).lengths[new]
    share = reads[new[placeable & (edits > FAR_EDITS * lengths)]].sum()
    if share > FAR_READS:
        warnings.append(
            f"{share:.0%} of the reads are more than {FAR_EDITS:.0%} of their bases away from all "
            "ASVs that the model knows: what it predicts for them is uncertain"
        )
    return facts, warnings
