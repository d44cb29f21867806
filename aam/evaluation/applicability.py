"""How much of a table a model knows, and whether the model applies to it."""

from __future__ import annotations

import numpy as np

from aam.data.clades import known_sequences
from aam.data.neighbours import Neighbours
from aam.data.samples import Samples
from aam.data.table import FeatureTable
from aam.data.texts import Texts, match_names
from aam.errors import DataFact, name_some
from aam.evaluation.placer import Placed
from aam.learning.model_file import SavedModel

LOOKED_AT = 2000  # most new ASVs whose nearest known one is looked for, the most abundant ones
LOST_READS = 0.1  # share of the reads that have no place from which on a warning is due
FAR_EDITS, FAR_READS = 0.1, 0.25  # edits a base, and the share of reads that lie farther


def of_placed(table: FeatureTable, placed: Placed) -> tuple[list[DataFact], list[str]]:
    """Facts and warnings about a table whose ASVs were placed."""
    new = np.flatnonzero(placed.known < 0)
    reverse, foreign = placed.reverse[new], placed.foreign[new]
    return _describe(table, placed.known >= 0, new, placed.distance[new], reverse, foreign)


def add_applicability(samples: Samples, saved: SavedModel) -> None:
    """Add to the samples' facts and warnings what a model knows of their table."""
    table, known = samples.table, known_sequences(saved.arrays)
    is_known = match_names(table.feature_ids, known) >= 0
    new = np.flatnonzero(~is_known)
    new = np.sort(new[np.argsort(-_reads(table)[new], kind="stable")][:LOOKED_AT])
    near = Neighbours(known).find(Texts.of(table.feature_ids).take(new))
    edits = near.distance[:, 0]
    facts, warnings = _describe(table, is_known, new, edits, near.reverse, near.foreign)
    samples.facts += facts
    samples.warnings += warnings


def _describe(
    table: FeatureTable,
    is_known: np.ndarray,
    new: np.ndarray,
    edits: np.ndarray,
    reverse: np.ndarray,
    foreign: np.ndarray,
) -> tuple[list[DataFact], list[str]]:
    """Shares of ASVs and reads that training knew, distances of the others, and warnings.

    Args:
        table: the samples.
        is_known: (features,) bool.
        new: (n,) features that are not known, all or some of them.
        edits: (n,) distance of each to the nearest known one.
        reverse: (n,) bool, reverse complements of known ones.
        foreign: (n,) bool, near to none.
    """
    reads = _reads(table) / max(table.counts.sum(), 1)
    known = int(is_known.sum())
    detail = f"{is_known.mean():.1%} of {len(is_known)}, {reads[is_known].sum():.1%} of the reads"
    facts, warnings = [DataFact("ASVs that the model knows", known, detail)], []
    placeable = ~(reverse | foreign)
    if placeable.any():
        middle, ninth, most = np.quantile(edits[placeable], (0.5, 0.9, 1.0))
        some = "" if len(new) + known == len(is_known) else f"of {len(new):,} looked at, "
        detail = (
            f"{some}edits to the nearest known one: median {middle:.1f}, 90 % up to {ninth:.1f}, "
            f"most {most:.1f}"
        )
        facts.append(DataFact("new ASVs", len(is_known) - known - int((~placeable).sum()), detail))
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


def _reads(table: FeatureTable) -> np.ndarray:
    """Reads of each feature, (features,)."""
    return np.asarray(table.counts.sum(axis=0), dtype=np.float64).ravel()
