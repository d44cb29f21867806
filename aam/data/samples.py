"""The samples of a run: a table, its metadata, and what is known of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from aam.data.facts import DataFact, name_some
from aam.data.metadata import Metadata
from aam.data.table import FeatureTable
from aam.errors import InputError


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
        place = {name: row for row, name in enumerate(self.ids)}
        return np.array([place[name] for name in ids], dtype=np.int64)

    def keep(self, ids: Sequence[str]) -> None:
        """Go on with some of the samples."""
        if len(ids) < len(self.ids):
            self.table = self.table.select(ids)
        if self.metadata is not None:
            self.metadata = self.metadata.select(self.ids)

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
