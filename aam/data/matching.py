"""Which samples of the table have metadata."""

from __future__ import annotations

from collections.abc import Sequence

from aam.data.facts import DataFact, name_some
from aam.errors import InputError


def match_ids(
    table_ids: Sequence[str],
    metadata_ids: Sequence[str],
    *,
    allow_missing: bool = False,
    table_source: str = "the table",
    metadata_source: str = "the metadata",
) -> tuple[tuple[str, ...], list[DataFact]]:
    """Return the samples of the table that the metadata (or a distance matrix) knows.

    Args:
        table_ids: ids of the table.
        metadata_ids: ids of the other file; it may have more than the table.
        allow_missing: drop the table's samples that are not in the other file, as a counted fact.
        table_source: the table's file, for messages.
        metadata_source: the other file, for messages.

    Returns:
        The ids in both, in the table's order, and the facts.

    Raises:
        InputError: no id matches, or some do not and ``allow_missing`` is False.
    """
    known = set(metadata_ids)
    kept = tuple(one for one in table_ids if one in known)
    lacking = [one for one in table_ids if one not in known]
    if not kept:
        raise InputError(
            f"none of the {len(table_ids)} samples of {table_source} ({name_some(table_ids)}) is "
            f"in {metadata_source} ({name_some(metadata_ids)})"
            f"{_hint(table_ids, metadata_ids)}: the ids must be equal, letter by letter"
        )
    if lacking and not allow_missing:
        raise InputError(
            f"{len(lacking)} of {len(table_ids)} samples of {table_source} are not in "
            f"{metadata_source} ({name_some(lacking)}){_hint(lacking, metadata_ids)}: add them or "
            "drop them with --allow-missing"
        )
    facts = [DataFact(f"samples of {table_source} in {metadata_source}", len(kept))]
    if lacking:
        what = f"samples of {table_source} not in {metadata_source}"
        facts.append(DataFact(what, len(lacking), name_some(lacking), "dropped"))
    extra = len(known) - len(kept)
    if extra:
        facts.append(DataFact(f"rows of {metadata_source} without a sample in the table", extra))
    return kept, facts


def _hint(lacking: Sequence[str], others: Sequence[str]) -> str:
    """Say what a spreadsheet or a careless export may have done to the ids."""
    for change, meaning in (
        (_as_number, "some are equal as numbers: a spreadsheet may have rewritten them"),
        (str.lower, "some differ in upper and lower case only"),
        (lambda one: one.replace("_", ".").replace("-", "."), "some differ in '-', '_', '.' only"),
    ):
        theirs = {change(one) for one in others} - {None}
        if any(change(one) in theirs for one in lacking):
            return f"; {meaning}"
    return ""


def _as_number(name: str) -> float | None:
    try:
        return float(name)
    except ValueError:
        return None
