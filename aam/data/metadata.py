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
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aam.errors import DataFact, InputError, name_some
from aam.files import check_input

if TYPE_CHECKING:
    import pandas as pd

# INSDC's terms for missing values; its newer ones, and Qiita's, begin with "missing:".
_MISSING = re.compile(
    "|missing|not applicable|not collected|not provided|restricted access|missing:.*",
    re.IGNORECASE | re.DOTALL,
)
_ID_HEADERS_OF_QIIME_1 = ("#sampleid", "#sample id", "#otuid", "#otu id")


@dataclass(frozen=True, eq=False)
class Metadata:
    """What is known of each sample."""

    frame: pd.DataFrame  # one row an id, in the file's order; cells are text where not missing
    source: str  # the file, for messages
    declared: dict[str, str]  # numeric or categorical, for columns of which #q2:types says so

    @property
    def ids(self) -> tuple[str, ...]:
        """Sample ids."""
        return tuple(self.frame.index)

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names, without the id column."""
        return tuple(self.frame.columns)

    def select(self, ids: Sequence[str]) -> Metadata:
        """These rows in this order."""
        return replace(self, frame=self.frame.loc[list(ids)])

    def text(self, column: str) -> list[str | None]:
        """Cells of a column as they are written, None where missing; InputError names near ones."""
        columns = self.columns
        if column not in columns:
            folded = {one.lower(): one for one in columns}
            near = difflib.get_close_matches(column.lower(), list(folded))
            near += [one for one in folded if column.lower() in one and one not in near]
            hint = f"it has {len(columns) or 'no'} columns"
            hint += f" ({name_some(columns)})" if columns else ""
            if near:
                hint = f"did you mean {name_some([folded[one] for one in near[:3]])}?"
            raise InputError(f"{self.source}: there is no column {column!r}: {hint}")
        return [one if isinstance(one, str) else None for one in self.frame[column]]

    def numeric(self, column: str) -> NDArray[np.float64]:
        """Cells of a column as numbers, NaN where missing; InputError where one is not finite."""
        texts = self.text(column)
        wrong = [one for one in texts if one is not None and _number(one) is None]
        if wrong:
            raise InputError(
                f"{self.source}: column {column!r} has {len(wrong)} values that are no numbers "
                f"({name_some(list(dict.fromkeys(wrong)))}): leave missing cells blank, or treat "
                "it as classes"
            )
        return np.array([math.nan if one is None else float(one) for one in texts])

    def is_numeric(self, column: str) -> bool:
        """Whether a column is declared numeric or, undeclared, has values that are all numbers."""
        present = [one for one in self.text(column) if one is not None]
        if column in self.declared:
            return self.declared[column] == "numeric"
        return bool(present) and all(_number(one) is not None for one in present)


def _number(text: str) -> float | None:
    """A finite number, or None where the text is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def require_values(metadata: Metadata, column: str, *, numeric: bool) -> None:
    """Raise InputError where a column can be no target: finite numbers, or two classes or more."""
    present = [one for one in metadata.text(column) if one is not None]
    if not present:
        raise InputError(
            f"{metadata.source}: column {column!r} has no value for any of "
            f"{len(metadata.frame)} samples: choose another --metadata-column"
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
    comment rows and blank cells follow its rules, of which a breach is an InputError. INSDC's
    missing terms ("not collected", "Missing: Not provided", ...) are missing in every column.
    """
    path = Path(path)
    check_input(path, "sample metadata as TSV")
    types = _scan(path)
    # scikit-bio's import takes two seconds and there is no lighter door to this class.
    from skbio.metadata import SampleMetadata

    try:
        # As text: numbers would lose how they are written ("01", "1.0").
        as_text = dict.fromkeys(types, "categorical")
        frame = SampleMetadata.load(str(path), column_types=as_text).to_dataframe()
    except Exception as error:  # scikit-bio's MetadataFileError is a bare Exception
        raise InputError(f"{path}: is no QIIME 2 metadata: {_first_paragraph(error)}") from error
    declared = {name: kind for name, kind in types.items() if kind}
    metadata = Metadata(frame.map(_present), str(path), declared)
    for name in declared:
        if declared[name] == "numeric":
            metadata.numeric(name)  # refuses what is no number
    return metadata


def as_metadata(frame: pd.DataFrame) -> Metadata:
    """A frame whose index are sample ids, under the rules of a file: its cells as text."""
    twice = frame.index[frame.index.duplicated()]
    if len(twice):
        raise InputError(f"the metadata: ids stand more than once ({name_some(list(twice))})")
    text = frame.astype(str).where(frame.notna(), "").rename(index=str, columns=str)
    return Metadata(text.map(_present), "the metadata", {})


def _present(cell: object) -> str | None:
    return cell if isinstance(cell, str) and not _MISSING.fullmatch(cell.strip()) else None


def _scan(path: Path) -> dict[str, str]:
    """Each column's declared type ("" if none), for scikit-bio to take it as text.

    And the repeated ids, which its message would list in full.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, "excel-tab", strict=True)
            rows = [[cell.strip() for cell in row] for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path}: is no readable text ({_first_paragraph(error)}): save it as UTF-8 with tabs"
        ) from error
    rows = [row for row in rows if any(row)]
    while rows and rows[0][0].startswith("#") and rows[0][0].lower() not in _ID_HEADERS_OF_QIIME_1:
        del rows[0]
    if not rows:
        raise InputError(f"{path}: holds no header and no rows; expected sample metadata as TSV")
    header, *rows = rows
    if len(header) < 2 and "," in header[0]:
        raise InputError(f"{path}: columns are separated by commas: save it with tabs, as .tsv")
    ids = Counter(row[0] for row in rows if row[0] and not row[0].startswith("#"))
    twice = [name for name, times in ids.items() if times > 1]
    if twice:
        raise InputError(
            f"{path}: {len(twice)} sample ids have more than one row ({name_some(twice)}): "
            "keep one row a sample"
        )
    types = {name: "" for name in header[1:] if name}
    for row in rows:
        if row[0].split(" ")[0] in ("#q2:types", "#sk:types"):
            kinds = zip(header[1:], row[1:], strict=False)
            types.update((name, kind.lower()) for name, kind in kinds if name and kind)
    return types


def _first_paragraph(error: Exception) -> str:
    """scikit-bio's message on one line, without its general advice."""
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
    """The samples of the table, in its order, that the metadata (or a matrix) knows, and facts.

    Others are dropped and counted where ``allow_missing`` is True, else an InputError, as is none
    that matches; the metadata may know more.
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
    if len(known) > len(kept):
        what = f"rows of {metadata_source} without a sample in the table"
        facts.append(DataFact(what, len(known) - len(kept)))
    return kept, facts


def _hint(lacking: Sequence[str], others: Sequence[str]) -> str:
    """What a spreadsheet or a careless export may have done to the ids."""
    for change, meaning in (
        (_number, "some are equal as numbers: a spreadsheet may have rewritten them"),
        (str.lower, "some differ in upper and lower case only"),
        (lambda one: re.sub("[-_]", ".", one), "some differ in '-', '_', '.' only"),
    ):
        if {change(one) for one in lacking} & {change(one) for one in others} - {None}:
            return f"; {meaning}"
    return ""
