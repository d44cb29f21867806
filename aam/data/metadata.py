"""Sample metadata under QIIME 2's rules, ids and cells kept as they are written."""

from __future__ import annotations

import csv
import difflib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from aam.errors import DataFact, InputError, name_some
from aam.files import check_input

# INSDC's terms for missing values; its newer ones, and Qiita's, begin with "missing:".
_MISSING_TERMS = {
    "",
    "missing",
    "not applicable",
    "not collected",
    "not provided",
    "restricted access",
}
_MISSING_PREFIX = "missing:"


@dataclass(frozen=True, eq=False)
class Metadata:
    """What is known of each sample: one row an id, cells as text, missing ones as None.

    Attributes:
        ids: sample ids, in the file's order.
        source: the file, for messages.
        cells: column name -> one text or None an id.
        declared: column name -> ``numeric`` or ``categorical`` where ``#q2:types`` says so.
    """

    ids: tuple[str, ...]
    source: str
    cells: dict[str, tuple[str | None, ...]]
    declared: dict[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names, without the id column."""
        return tuple(self.cells)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)

    def select(self, ids: Sequence[str]) -> Metadata:
        """Return these rows in this order.

        Raises:
            InputError: an id is not in the metadata.
        """
        row_of = {name: row for row, name in enumerate(self.ids)}
        unknown = [name for name in ids if name not in row_of]
        if unknown:
            raise InputError(
                f"{self.source}: {len(unknown)} samples have no metadata ({name_some(unknown)}): "
                "add rows for them or drop them with --allow-missing"
            )
        rows = [row_of[name] for name in ids]
        cells = {name: tuple(column[row] for row in rows) for name, column in self.cells.items()}
        return replace(self, ids=tuple(ids), cells=cells)

    def text(self, column: str) -> list[str | None]:
        """Return the column's cells as they are written, None where missing.

        Raises:
            InputError: there is no such column; the message names the nearest ones.
        """
        if column not in self.cells:
            near = _nearest(column, self.columns)
            known = (
                f"did you mean {name_some(near)}?" if near else f"it has {_listing(self.columns)}"
            )
            raise InputError(f"{self.source}: there is no column {column!r}: {known}")
        return list(self.cells[column])

    def numeric(self, column: str) -> np.ndarray:
        """Return the column as float64, NaN where missing.

        Raises:
            InputError: there is no such column, or a value is not a finite number.
        """
        texts = self.text(column)
        values = [math.nan if one is None else _number(one) for one in texts]
        wrong = [one for one, value in zip(texts, values, strict=True) if value is None]
        if wrong:
            distinct = list(dict.fromkeys(map(str, wrong)))
            raise InputError(
                f"{self.source}: column {column!r} has {len(wrong)} values that are no numbers "
                f"({name_some(distinct)}): leave missing cells blank, or treat it as classes"
            )
        return np.array(values, dtype=np.float64)

    def is_numeric(self, column: str) -> bool:
        """Say whether ``#q2:types`` declares the column numeric or, undeclared, all values are.

        A column without any value is not numeric.
        """
        present = [one for one in self.text(column) if one is not None]
        if column in self.declared:
            return self.declared[column] == "numeric"
        return bool(present) and all(_number(one) is not None for one in present)


def require_values(metadata: Metadata, column: str, *, numeric: bool) -> None:
    """Check that a column can be a target.

    Args:
        metadata: the samples to train on.
        column: the target column.
        numeric: True for a regression (finite numbers), False for classes (two or more).

    Raises:
        InputError: all values are missing, some are no numbers, or there is a single class.
    """
    present = [one for one in metadata.text(column) if one is not None]
    if not present:
        raise InputError(
            f"{metadata.source}: column {column!r} has no value for any of {len(metadata)} "
            "samples: choose another --metadata-column"
        )
    if numeric:
        metadata.numeric(column)
    elif len(set(present)) < 2:
        raise InputError(
            f"{metadata.source}: column {column!r} has a single class ({present[0]!r}) in "
            f"{len(present)} samples: a classification needs two or more"
        )


def read_metadata(path: str | Path) -> Metadata:
    """Read a QIIME 2 sample metadata file (TSV).

    The first column holds the ids under any header that QIIME 2 accepts; a ``#q2:types`` row,
    comment rows and blank cells follow its rules. INSDC's missing terms ("not collected",
    "Missing: Not provided", ...) are missing in every column. Ids and cells stay text.

    Raises:
        InputError: the file is missing or breaks QIIME 2's rules; one line with the remedy.
    """
    path = Path(path)
    declared = _scan(path)
    # scikit-bio's import takes two seconds and there is no lighter door to this class.
    from skbio.metadata import SampleMetadata

    try:
        # As text: numbers would lose how they are written ("01", "1.0").
        types = dict.fromkeys(declared, "categorical")
        frame = SampleMetadata.load(str(path), column_types=types).to_dataframe()
    except Exception as error:  # scikit-bio's MetadataFileError is a bare Exception
        raise InputError(f"{path}: is no QIIME 2 metadata: {_first_paragraph(error)}") from error
    cells = {str(name): tuple(map(_present, frame[name])) for name in frame.columns}
    kinds = {name: kind for name, kind in declared.items() if kind}
    metadata = Metadata(tuple(map(str, frame.index)), str(path), cells, kinds)
    for name, kind in kinds.items():
        if kind == "numeric":
            metadata.numeric(name)
    return metadata


def _scan(path: Path) -> dict[str, str]:
    """Return each column's declared type ("" if none), and check what needs ids to be named.

    scikit-bio reads the file; this finds the columns, so that it can be told to keep text, and
    the repeated ids that its message would list in full.
    """
    check_input(path, "sample metadata as TSV")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, "excel-tab", strict=True)
            rows = [[cell.strip() for cell in row] for row in reader]
            rows = [row for row in rows if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path}: is no readable text ({_first_paragraph(error)}): save it as UTF-8 with tabs"
        ) from error
    at = next((n for n, row in enumerate(rows) if not _is_comment(row)), None)
    if at is None:
        raise InputError(f"{path}: holds no header and no rows; expected sample metadata as TSV")
    header = rows[at]
    if len(header) < 2 and "," in header[0]:
        raise InputError(f"{path}: columns are separated by commas: save it with tabs, as .tsv")
    ids = [row[0] for row in rows[at + 1 :] if row[0] and not row[0].startswith("#")]
    twice = [name for name, times in Counter(ids).items() if times > 1]
    if twice:
        raise InputError(
            f"{path}: {len(twice)} sample ids have more than one row ({name_some(twice)}): "
            "keep one row a sample"
        )
    declared = {name: "" for name in header[1:] if name}
    for row in rows[at + 1 :]:
        if row[0].split(" ")[0] in ("#q2:types", "#sk:types"):
            declared.update(
                (name, kind.lower())
                for name, kind in zip(header[1:], row[1:], strict=False)
                if name and kind
            )
    return declared


def _is_comment(row: list[str]) -> bool:
    """Say whether a row before the header is a comment: ``#`` headers are QIIME 1's ids."""
    first = row[0].lower()
    return first.startswith("#") and first not in (
        "#sampleid",
        "#sample id",
        "#otuid",
        "#otu id",
    )


def _present(cell: object) -> str | None:
    """Return the cell's text, None where it is missing."""
    if not isinstance(cell, str):
        return None
    folded = cell.strip().lower()
    return None if folded in _MISSING_TERMS or folded.startswith(_MISSING_PREFIX) else cell


def _number(text: str) -> float | None:
    """Return a finite number, or None where the text is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def _nearest(name: str, columns: Sequence[str]) -> list[str]:
    """Return up to three column names that look or sound like ``name``."""
    folded = {column.lower(): column for column in columns}
    near = difflib.get_close_matches(name.lower(), list(folded), n=3, cutoff=0.6)
    near += [one for one in folded if name.lower() in one and one not in near]
    return [folded[one] for one in near[:3]]


def _listing(columns: Sequence[str]) -> str:
    return f"{len(columns)} columns ({name_some(columns)})" if columns else "no columns"


def _first_paragraph(error: Exception) -> str:
    """Return scikit-bio's message on one line, without its general advice."""
    text = " ".join(str(error).split("There may be more errors present")[0].split())
    text = text.removeprefix("There was an issue with loading the metadata file: ")
    unknown = re.match(r"Found unrecognized ID column name ('.*?') while", text)
    if unknown:
        return f"the first column is called {unknown.group(1)}: call it 'sample-id'"
    return text[:400]


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
        (_number_of, "some are equal as numbers: a spreadsheet may have rewritten them"),
        (str.lower, "some differ in upper and lower case only"),
        (lambda one: one.replace("_", ".").replace("-", "."), "some differ in '-', '_', '.' only"),
    ):
        theirs = {change(one) for one in others} - {None}
        if any(change(one) in theirs for one in lacking):
            return f"; {meaning}"
    return ""


def _number_of(name: str) -> float | None:
    try:
        return float(name)
    except ValueError:
        return None
