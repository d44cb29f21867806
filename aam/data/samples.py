"""The samples of a run: a table, its metadata, and what is known of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aam.data.dataset import SampleDataset
from aam.data.mapped import MappedTable, Source, UnwritableError, open_mapped
from aam.data.metadata import Metadata, as_metadata, match_ids, read_metadata, require_values
from aam.data.table import FeatureTable, rarefy, read_table
from aam.data.table_files import size_in_memory
from aam.errors import DataFact, InputError, dropped, log, name_some
from aam.files import refuse_breaks

if TYPE_CHECKING:
    from aam.config import TableOptions

LARGE_TABLE = 500 * 10**6  # bytes in memory from which on a table is kept on disk (--on-disk auto)


@dataclass
class Samples:
    """A table ready for a dataset, and what is known of its samples."""

    table: FeatureTable
    metadata: Metadata | None = None  # rows of exactly these samples
    facts: list[DataFact] = field(default_factory=list)  # what was read, dropped and cut
    warnings: list[str] = field(default_factory=list)  # what to know before trusting a number

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

    def _lacking(self, column: str) -> list[str]:
        """The samples without a value in a metadata column."""
        assert self.metadata is not None
        values = zip(self.ids, self.metadata.text(column), strict=True)
        return [name for name, value in values if value is None]

    def keep_with(self, column: str, task: str, *, allow_missing: bool) -> list[str] | None:
        """Go on with the samples that have a value of a target; the others are counted.

        The result is the class of each sample that is left, None where the target is a number.
        """
        metadata, lacking = self.metadata, self._lacking(column)
        assert metadata is not None
        numeric = metadata.is_numeric(column) if task == "auto" else task == "regression"
        require_values(metadata, column, numeric=numeric)
        if lacking and not allow_missing:
            raise InputError(
                f"{metadata.source}: column {column!r} has no value for {len(lacking)} of "
                f"{len(self.ids)} samples ({name_some(lacking)}): fill them in or leave these "
                "samples out with --allow-missing"
            )
        self.facts += dropped(f"samples without a value of {column!r}", lacking)
        gone = set(lacking)
        self.keep([name for name in self.ids if name not in gone])
        if numeric:
            return None
        classes = [one for one in metadata.text(column) if one is not None]
        refuse_breaks(sorted(set(classes)), metadata.source, f"values of column {column!r}")
        return classes

    def groups(self, column: str | None) -> list[str] | None:
        """Each sample's group, which none may lack, or None without a group column."""
        if column is None:
            return None
        if self.metadata is None:
            raise InputError("--group-column needs --metadata")
        lacking = self._lacking(column)
        if lacking:
            raise InputError(
                f"{self.metadata.source}: column {column!r} is missing for {len(lacking)} samples "
                f"({name_some(lacking)}): fill it in or leave --group-column out"
            )
        return [str(value) for value in self.metadata.text(column)]

    def category_codes(self, classes: Mapping[str, Sequence[str]]) -> np.ndarray:
        """Codes (samples, columns) int64 of categorical columns, 1 for a column's first class.

        0 stands for a missing value and for one that is no class; these are counted.
        """
        codes = np.zeros((len(self.ids), len(classes)), dtype=np.int64)
        for place, (column, names) in enumerate(classes.items()):
            if self.metadata is not None:
                known: dict[Any, int] = {name: code for code, name in enumerate(names, 1)}
                codes[:, place] = [known.get(one, 0) for one in self.metadata.text(column)]
            unknown = int((codes[:, place] == 0).sum())
            if unknown:
                what = f"samples whose {column!r} is missing or was not in training"
                self.facts.append(DataFact(what, unknown, "taken as unknown"))
        return codes

    def category_keys(self, columns: Sequence[str]) -> np.ndarray:
        """(samples,) strings that name the values of a sample in all categorical columns."""
        assert self.metadata is not None
        texts, rows = [self.metadata.text(column) for column in columns], range(len(self.ids))
        keys = ["\x1f".join(text[row] or "" for text in texts) for row in rows]
        return np.array(keys, dtype=object)

    def dataset(self, options: Any, **known: Any) -> SampleDataset:
        """These samples as a dataset; what is cut is added to the facts."""
        names = ("max_bp", "token_limit", "asv_sampling")
        made = SampleDataset(self.table, **{one: getattr(options, one) for one in names}, **known)
        self.facts += made.facts
        return made


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
        metadata: path or frame; samples without a row are an error or, on request, dropped.
        keep_unmatched: keep samples without a row instead: all their cells are missing.
    """
    index = open_on_disk(options, seed) if table is None else None
    if index is None:
        table = read_table(options.table if table is None else table, sequences=options.sequences)
    else:
        table = index.table
    kept = ids = table.sample_ids if index is None else index.file_ids
    refuse_breaks(ids, table.source, "sample ids")
    samples = Samples(table, facts=[DataFact("samples in the table", len(ids), table.source)])
    if metadata is not None:
        is_file = isinstance(metadata, (str, Path))
        known = read_metadata(metadata) if is_file else as_metadata(metadata)
        kept, facts = match_ids(
            ids, known.ids, allow_missing=options.allow_missing, table_source=table.source,
            metadata_source=known.source,
        )  # fmt: skip
        if keep_unmatched:
            kept = ids
            frame = known.frame.reindex(dict.fromkeys([*known.ids, *ids]))
            known = replace(known, frame=frame)
            facts = [_as_unknown(fact) if fact.kind == "dropped" else fact for fact in facts]
        samples.facts += facts
        samples.metadata = known
    too_few: Sequence[str] = ()
    if index is not None:
        kept, too_few = index.enough_reads(kept)
    samples.keep(kept)
    if index is None and options.rarefy_depth:
        samples.table, too_few = rarefy(samples.table, options.rarefy_depth, seed)
        samples.keep(samples.ids)
    what = f"samples with fewer than {options.rarefy_depth} reads (--rarefy-depth)"
    samples.facts += dropped(what, too_few)
    samples.facts.append(DataFact("samples used", len(samples.ids)))
    samples.facts.append(DataFact("distinct ASVs", len(samples.table.feature_ids)))
    return samples


def _as_unknown(fact: DataFact) -> DataFact:
    return replace(fact, kind="info", detail=f"kept as unknown: {fact.detail}")


def open_on_disk(options: TableOptions, seed: int) -> MappedTable | None:
    """The table's index on disk, or None where the table is to be read into memory."""
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
