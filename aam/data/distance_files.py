"""Distance matrices as files hold them: sample ids and a matrix, unchecked.

Formats, told apart by the extension: ``.h5`` with the datasets ``order`` (sample ids) and
``matrix``, as ``ssu`` and the unifrac package write; ``.tsv``/``.txt``, the labelled square
matrix of QIIME and scikit-bio; ``.qza`` with one; ``.npy`` with a file of ids.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aam.data.sequences import read_qza_member
from aam.errors import InputError, name_some


def read_raw_distances(
    path: Path, ids_file: Path | None = None
) -> tuple[list[str], NDArray[np.floating]]:
    """Read sample ids and the matrix, float32 or float64, as they stand in the file.

    Raises:
        InputError: the file cannot be read as what its extension says; a ``.npy`` without
            ``ids_file``, or another format with one.
    """
    kind = path.suffix.lower()
    if kind not in (".h5", ".hdf5", ".tsv", ".txt", ".qza", ".npy"):
        raise InputError(
            f"{path}: unknown extension {kind!r}; expected a distance matrix as .h5, .tsv, .qza "
            "or .npy with a file of ids"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a distance matrix")
    if kind == ".npy":
        return _read_npy(path, ids_file)
    if ids_file is not None:
        raise InputError(
            f"{ids_file}: ids are given apart only for .npy; {path} holds its own: leave "
            "--unifrac-matrix-ids out"
        )
    return _read_hdf5(path) if kind in (".h5", ".hdf5") else _read_tsv(path)


def _read_hdf5(path: Path) -> tuple[list[str], NDArray[np.floating]]:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            absent = [name for name in ("order", "matrix") if name not in file]
            if absent:
                raise InputError(
                    f"{path}: no dataset {' and '.join(map(repr, absent))} in the file (it has "
                    f"{name_some(list(file))}); expected 'order' and 'matrix', as ssu writes"
                )
            ids = [one.decode() if isinstance(one, bytes) else str(one) for one in file["order"]]
            return ids, _floating(file["matrix"][()])
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: not a readable HDF5 file ({error}); make it again or copy it again"
        ) from error


def _read_tsv(path: Path) -> tuple[list[str], NDArray[np.floating]]:
    try:
        if path.suffix.lower() == ".qza":
            text = read_qza_member(path, "data/distance-matrix.tsv", "DistanceMatrix").decode()
        else:
            text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable text file ({error})") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path}: the file is empty; expected a distance matrix")
    columns = [name.strip() for name in lines[0].split("\t")[1:]]
    rows, values = [], np.empty((len(lines) - 1, len(columns)))
    for number, line in enumerate(lines[1:]):
        name, *cells = line.split("\t")
        if len(cells) != len(columns):
            raise InputError(
                f"{path}: row {name!r} has {len(cells)} values, expected {len(columns)}, one for "
                "each id of the first line (separated by tabs)"
            )
        rows.append(name.strip())
        values[number] = _numbers(path, name, columns, cells)
    return columns, values[_row_order(path, rows, columns)]


def _numbers(path: Path, row: str, columns: list[str], cells: list[str]) -> NDArray[np.float64]:
    try:
        return np.array(cells, dtype=np.float64)
    except ValueError:
        column = next(at for at, cell in enumerate(cells) if not _is_number(cell))
        raise InputError(
            f"{path}: row {row!r}, column {columns[column]!r}: {cells[column]!r} is not a number"
        ) from None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _row_order(path: Path, rows: list[str], columns: list[str]) -> list[int]:
    """Rows in the order of the columns: the file may name them in another one."""
    if rows == columns:
        return list(range(len(rows)))
    if len(rows) != len(set(rows)) or set(rows) != set(columns):
        apart = sorted(set(rows) ^ set(columns)) or rows
        raise InputError(
            f"{path}: the ids of the rows are not those of the first line ({len(rows)} and "
            f"{len(columns)}; differing: {name_some(apart)}); expected a square matrix"
        )
    row_of = {name: row for row, name in enumerate(rows)}
    return [row_of[name] for name in columns]


def _read_npy(path: Path, ids_file: Path | None) -> tuple[list[str], NDArray[np.floating]]:
    if ids_file is None:
        raise InputError(
            f"{path}: a .npy matrix holds no sample ids, and rows are never matched by position; "
            "give the ids, one a line in the order of the rows, with --unifrac-matrix-ids FILE"
        )
    try:
        ids = [line.strip() for line in ids_file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{ids_file}: cannot read the sample ids ({error})") from error
    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable .npy matrix ({error})") from error
    if not isinstance(matrix, np.ndarray) or matrix.dtype.kind not in "fiu":
        raise InputError(f"{path}: holds {getattr(matrix, 'dtype', 'no array')}, expected numbers")
    return [one for one in ids if one], _floating(matrix)


def _floating(matrix: NDArray) -> NDArray[np.floating]:
    matrix = np.asarray(matrix)
    return matrix if matrix.dtype in (np.float32, np.float64) else matrix.astype(np.float64)
