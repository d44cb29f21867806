"""The samples of a run: a table, its metadata, and what is known of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aam.data.dataset import SampleDataset
from aam.data.mapped import MappedTable, Source, UnwritableError, open_mapped
from aam.data.metadata import Metadata, as_metadata, match_ids, read_metadata
from aam.data.table import FeatureTable, rarefy, read_table
from aam.data.table_files import size_in_memory
from aam.errors import DataFact, InputError, log, name_some
from aam.files import refuse_breaks

if TYPE_CHECKING:
    from aam.config import TableOptions


LARGE_TABLE = 500 * 10**6
"""Bytes in memory from which on a table is kept on disk (--on-disk auto)."""


@dataclass
class Samples:
    """A table ready for a dataset, and what is known of its samples.

    Attributes:
        table: counts; its sample ids are the samples of the run.
        metadata: rows of exactly these samples, or None.
        facts: what was read, dropped and cut on the way.
        warnings: what the user should know before trusting a number.
    """

    table: FeatureTable
    metadata: Metadata | None = None
    facts: list[DataFact] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ids(self) -> tuple[str, ...]:
        """Sample ids."""
        return self.table.sample_ids

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Row of each id in the table."""
        return self.table.rows_of(ids)

    def keep(self, ids: Sequence[str]) -> None:
        """Go on with some of the samples."""
        if len(ids) < len(self.ids):
            self.table = self.table.select(ids)
        if self.metadata is not None:
            self.metadata = self.metadata.select(self.ids)

    def keep_with(self, column: str, *, allow_missing: bool) -> None:
        """Drop and count the samples without a value in a metadata column, where that is allowed.

        Raises:
            InputError: there are some, and it is not.
        """
        assert self.metadata is not None
        values = dict(zip(self.ids, self.metadata.text(column), strict=True))
        lacking = [name for name, value in values.items() if value is None]
        if not lacking:
            return
        if not allow_missing:
            raise InputError(
                f"{self.metadata.source}: column {column!r} has no value for {len(lacking)} of "
                f"{len(values)} samples ({name_some(lacking)}): fill them in or leave these "
                "samples out with --allow-missing"
            )
        what = f"samples without a value of {column!r}"
        self.facts.append(DataFact(what, len(lacking), name_some(lacking), "dropped"))
        self.keep([name for name, value in values.items() if value is not None])

    def groups(self, column: str | None) -> list[str] | None:
        """Each sample's group, or None without a group column.

        Raises:
            InputError: a sample has none.
        """
        if column is None:
            return None
        if self.metadata is None:
            raise InputError("--group-column needs --metadata")
        values = self.metadata.text(column)
        lacking = [name for name, value in zip(self.ids, values, strict=True) if value is None]
        if lacking:
            raise InputError(
                f"{self.metadata.source}: column {column!r} is missing for {len(lacking)} samples "
                f"({name_some(lacking)}): fill it in or leave --group-column out"
            )
        return [str(value) for value in values]

    def category_codes(self, classes: Mapping[str, Sequence[str]]) -> np.ndarray:
        """Codes (samples, columns) int64 of categorical columns, 1 for a column's first class.

        0 stands for a missing value and for one that is no class; these are counted.
        """
        codes = np.zeros((len(self.ids), len(classes)), dtype=np.int64)
        for place, (column, names) in enumerate(classes.items()):
            if self.metadata is not None:
                code_of: dict[str | None, int] = {
                    name: code for code, name in enumerate(names, start=1)
                }
                values = self.metadata.text(column)
                codes[:, place] = [code_of.get(value, 0) for value in values]
            unknown = int((codes[:, place] == 0).sum())
            if unknown:
                what = f"samples whose {column!r} is missing or was not in training"
                self.facts.append(DataFact(what, unknown, "taken as unknown"))
        return codes

    def category_keys(self, columns: Sequence[str]) -> list[str]:
        """One string a sample that names its values in all categorical columns."""
        assert self.metadata is not None
        values = [self.metadata.text(column) for column in columns]
        return ["\x1f".join(value or "" for value in row) for row in zip(*values, strict=True)]


def read_samples(
    options: TableOptions,
    seed: int,
    *,
    table: Any = None,
    metadata: Any = None,
    keep_unmatched: bool = False,
) -> Samples:
    """Read a table, rarefy it and match it with metadata.

    Args:
        options: the table's options.
        seed: of the rarefaction.
        table: one in memory, in place of a file; see `read_table`.
        metadata: path or frame of sample metadata; samples without a row are an error or, on
            request, dropped.
        keep_unmatched: keep samples that may lack a row; all their cells are then missing.

    Raises:
        InputError: a file cannot be used, an id is broken, or a sample has no metadata.
    """
    depth = options.rarefy_depth
    index = open_on_disk(options, seed) if table is None else None
    if index is None:
        table = read_table(options.table if table is None else table, sequences=options.sequences)
    else:
        table = index.table
    ids = table.sample_ids if index is None else index.file_ids
    refuse_breaks(ids, table.source, "sample ids")
    samples = Samples(table)
    samples.facts.append(DataFact("samples in the table", len(ids), table.source))
    kept = ids
    if metadata is not None:
        is_file = isinstance(metadata, (str, Path))
        known = read_metadata(metadata) if is_file else as_metadata(metadata)
        kept, facts = match_ids(
            ids,
            known.ids,
            allow_missing=options.allow_missing,
            table_source=table.source,
            metadata_source=known.source,
        )
        if keep_unmatched:
            known, facts = _with_empty_rows(known, ids, facts)
            kept = ids
        samples.facts += facts
        samples.metadata = known
    if index is not None:
        enough, dropped = index.enough_reads(kept)
        samples.keep(enough)
    else:
        samples.keep(kept)
        dropped = ()
        if depth:
            samples.table, dropped = rarefy(samples.table, depth, seed)
            samples.keep(samples.ids)
    if dropped:
        what = f"samples with fewer than {depth} reads (--rarefy-depth)"
        samples.facts.append(DataFact(what, len(dropped), name_some(dropped), "dropped"))
    samples.facts.append(DataFact("samples used", len(samples.ids)))
    samples.facts.append(DataFact("distinct ASVs", len(samples.table.feature_ids)))
    return samples


def open_on_disk(options: TableOptions, seed: int) -> MappedTable | None:
    """The table's index on disk, or None where the table is to be read into memory.

    Raises:
        InputError: the table cannot be used, or cannot be indexed although --on-disk always.
    """
    if options.on_disk == "never":
        return None
    size = size_in_memory(options.table)
    if options.on_disk == "auto" and (size is None or size < LARGE_TABLE):
        return None
    if size is None:
        raise InputError(
            f"--on-disk always: {options.table} is no BIOM 2.1 (HDF5) table: export it as one, "
            "or read it with --on-disk auto"
        )
    source = Source(options.table, options.sequences, options.rarefy_depth, seed)
    try:
        return open_mapped(source, options.index_dir)
    except UnwritableError as error:
        if options.on_disk == "always":
            raise
        log(f"{options.table} is read into memory: {error}")
        return None


def _with_empty_rows(
    metadata: Metadata, ids: Sequence[str], facts: list[DataFact]
) -> tuple[Metadata, list[DataFact]]:
    """Metadata with a row of missing cells for every id that has none, and facts that say so."""
    frame = metadata.frame.reindex(dict.fromkeys([*metadata.ids, *ids]))
    told = [
        replace(one, kind="info", detail=f"kept as unknown: {one.detail}")
        if one.kind == "dropped"
        else one
        for one in facts
    ]
    return replace(metadata, frame=frame), told


def make_dataset(samples: Samples, options: Any, **known: Any) -> SampleDataset:
    """The samples as a dataset; what is cut is added to the facts."""
    dataset = SampleDataset(
        samples.table,
        max_bp=options.max_bp,
        token_limit=options.token_limit,
        asv_sampling=options.asv_sampling,
        **known,
    )
    samples.facts += dataset.facts
    return dataset
