"""The file formats of feature tables, read as they stand; ``table.py`` checks what they hold."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from aam.data.sequences import is_dna, read_qza_member
from aam.errors import InputError, name_some, one_line
from aam.files import check_input

_IN_ARTIFACT = "data/feature-table.biom", "FeatureTable[Frequency]"
# Column names under which TSV tables carry a taxonomy instead of counts.
_ANNOTATIONS = {"taxonomy", "consensus lineage", "consensuslineage"}

# Memory of a table that is read as a whole, at its highest (measured, 10,000 x 100,000).
_BYTES_AN_ENTRY, _BYTES_A_FEATURE = 50, 800


class RawTable(NamedTuple):
    """A table as the file has it: float counts ``(samples, features)``, unchecked."""

    sample_ids: list[str]
    feature_ids: list[str]
    counts: sp.csr_array


def read_raw_table(path: Path) -> RawTable:
    """Read a ``.biom``, ``.qza``, ``.tsv`` or ``.txt`` file; InputError where it is no table."""
    check_input(path, "a feature table (.biom, .qza or .tsv)")
    kind = path.suffix.lower()
    if kind not in (".biom", ".qza", ".tsv", ".txt"):
        raise InputError(
            f"{path}: unknown extension {kind!r}; expected a feature table as .biom, .qza or .tsv"
        )
    try:
        content = path.read_bytes() if kind != ".qza" else read_qza_member(path, *_IN_ARTIFACT)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from error
    return (_read_biom if kind in (".biom", ".qza") else _read_tsv)(content, path)


def size_in_memory(path: Path) -> int | None:
    """About how many bytes a BIOM 2.1 table takes in memory; None for what is no such table."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            entries, features = file["sample/matrix/data"].size, file["observation/ids"].size
    except (OSError, KeyError, AttributeError):
        return None
    return int(_BYTES_AN_ENTRY * entries + _BYTES_A_FEATURE * features)


def check_ids(kind: str, ids: list[str], path: Path) -> None:
    """Raise InputError where an id of this kind stands twice or is blank."""
    twice = [one for one, times in Counter(ids).items() if times > 1]
    if twice:
        raise InputError(
            f"{path}: {len(twice)} {kind} ids stand more than once ({name_some(twice)}): "
            f"every {kind} needs an id of its own"
        )
    if "" in ids:
        raise InputError(f"{path}: a {kind} has a blank id: give every {kind} an id")


def as_raw_table(table: Any, name: Path) -> RawTable:
    """A ``biom.Table`` or a pandas frame (samples x features), as it stands."""
    is_biom = hasattr(table, "matrix_data")
    samples, features = (table.ids(), table.ids("observation")) if is_biom else table.axes
    try:
        counts = table.matrix_data.T if is_biom else table.to_numpy(dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: holds other than numbers ({one_line(error)})") from error
    counts = sp.csr_array(counts, dtype=np.float64)
    return RawTable([str(one) for one in samples], [str(one) for one in features], counts)


def _read_biom(content: bytes, path: Path) -> RawTable:
    """Read BIOM 2.1 or 1.0, told apart by the first bytes."""
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"{path}: the gzip file is damaged ({one_line(error)}): copy it again"
            ) from error
    start = content[:512].lstrip()
    if not start:
        raise InputError(f"{path}: the file is empty; expected a BIOM table")
    is_hdf5 = content.startswith(b"\x89HDF\r\n\x1a\n")
    if not is_hdf5 and not start.startswith(b"{"):
        problem = "not HDF5 (2.1) and not JSON (1.0): a table in text is a .tsv"
        if start.startswith(b"<"):
            problem = "a web page: download the file itself"
        raise InputError(f"{path}: is no BIOM table, it looks like {problem}")
    try:
        return _read_hdf5(content, path) if is_hdf5 else _read_json(content)
    except InputError:
        raise
    except Exception as error:  # h5py raises a dozen kinds on damaged files
        raise InputError(
            f"{path}: is no complete BIOM {'2.1' if is_hdf5 else '1.0'} table "
            f"({one_line(error)}): the file may be truncated, copy or export it again"
        ) from error


def _read_hdf5(content: bytes, path: Path) -> RawTable:
    import h5py

    with h5py.File(io.BytesIO(content), "r") as file:
        if "sample/ids" not in file:
            raise InputError(
                f"{path}: is HDF5 but no BIOM table (it holds {name_some(list(file))}): "
                "expected a feature table"
            )
        samples, features = (
            [id_text(one) for one in file[f"{axis}/ids"][()]] for axis in ("sample", "observation")
        )
        # Counts alone: HDF5 may crash, not raise, in damaged attributes and annotations, which
        # biom-format reads too.
        matrix = file["sample/matrix"]
        data = np.asarray(matrix["data"], dtype=np.float64)
        indices, starts = np.asarray(matrix["indices"]), np.asarray(matrix["indptr"])
    counts = sp.csr_array((data, indices, starts), shape=(len(samples), len(features)))
    counts.check_format(full_check=True)
    counts.sum_duplicates()
    return RawTable(samples, features, counts)


def _read_json(content: bytes) -> RawTable:
    # Not with biom-format: it takes a table without any count for one with repeated ids.
    document = json.loads(content)
    samples = [id_text(one["id"]) for one in document["columns"]]
    features = [id_text(one["id"]) for one in document["rows"]]
    data = np.asarray(document["data"], dtype=np.float64)
    shape = (len(features), len(samples))
    if document.get("matrix_type", "sparse") == "sparse":
        row, column, value = data.reshape(-1, 3).T
        counts = sp.coo_array((value, (row.astype(np.int64), column.astype(np.int64))), shape)
    else:
        counts = sp.coo_array(data.reshape(shape))
    return RawTable(samples, features, sp.csr_array(counts.T))


def id_text(name: Any) -> str:
    """An id of a BIOM table."""
    return name.decode("utf-8") if isinstance(name, bytes) else str(name)


def _read_tsv(content: bytes, path: Path) -> RawTable:
    """Features are rows; samples are where the header's ids are DNA and the first column's not."""
    (_, *columns), *rows = _tsv_lines(content, path)
    names = [row[0] for row in rows]
    if columns[-1].lower() in _ANNOTATIONS:
        del columns[-1]
    cells = [row[1 : len(columns) + 1] for row in rows]
    counts = _tsv_numbers(cells, names, columns, path)
    if all(map(is_dna, columns)) and not all(map(is_dna, names)):
        return RawTable(names, columns, sp.csr_array(counts))
    return RawTable(columns, names, sp.csr_array(counts.T))


def _tsv_lines(content: bytes, path: Path) -> list[list[str]]:
    """The cells of the header and of each row, all equally many.

    The header is the last line starting with ``#`` before the data where that has tabs, else the
    first line.
    """
    try:
        text = io.StringIO(content.decode("utf-8-sig"))
        lines = [
            (number, [cell.strip() for cell in row])
            for number, row in enumerate(csv.reader(text, "excel-tab"), start=1)
            if any(row)
        ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path}: is no readable text ({one_line(error)}): save it as UTF-8"
        ) from error
    comments = list(itertools.takewhile(lambda line: line[1][0].startswith("#"), lines))
    at = len(comments) - 1 if comments and len(comments[-1][1]) > 1 else len(comments)
    if at >= len(lines) or len(lines[at][1]) < 2:
        raise InputError(
            f"{path}: is no TSV table (no header with tabs): expected '#OTU ID' and one column "
            "a sample, separated by tabs"
        )
    width = len(lines[at][1])
    for number, row in lines[at + 1 :]:
        if len(row) != width:
            raise InputError(
                f"{path}: line {number} has {len(row)} cells, the header has {width}: "
                "the file may be truncated, or cells are not separated by tabs"
            )
    return [row for _, row in lines[at:]]


def _tsv_numbers(
    cells: list[list[str]], rows: list[str], columns: list[str], path: Path
) -> NDArray[np.float64]:
    """Cells as numbers (rows, columns); InputError names the first that is none."""
    try:
        return np.array(cells, dtype=np.float64).reshape(len(rows), len(columns))
    except ValueError:
        for row, column in np.ndindex(len(rows), len(columns)):
            cell = cells[row][column]
            try:
                float(cell)
            except ValueError:
                raise InputError(
                    f"{path}: row {rows[row]!r}, column {columns[column]!r}: {cell!r} is no "
                    "count; expected whole numbers, 0 where there are none"
                ) from None
        raise
