"""Distance matrices in files: read, checked and written.

Formats, told apart by the extension: ``.h5`` with the datasets ``order`` (sample ids) and
``matrix``, as ``ssu`` and the unifrac package write; ``.tsv``/``.txt``, the labelled square
matrix of QIIME and scikit-bio; ``.qza`` with one; ``.npy`` with a file of ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aam.data.metadata import match_ids
from aam.data.sequences import read_qza_member
from aam.data.table_distances import PrecomputedDistances
from aam.errors import DataFact, InputError, name_some
from aam.files import atomic_path, check_input

_TOLERANCE = 1e-5  # asymmetry and diagonal that rounding explains (float32, 6 digits)
_CHECKED_ROWS = 512  # at once, so that checking a large matrix holds no copies of it


def read_distances(
    path: str | Path,
    *,
    sample_ids: Sequence[str] | None = None,  # wanted, in this order; None: all, in the file's
    ids_file: str | Path | None = None,  # one id a line in the order of the rows, for .npy alone
    allow_missing: bool = False,  # leave out samples that the file lacks, as a counted fact
    table_source: str = "the table",  # for messages
) -> PrecomputedDistances:
    """Read a square matrix of distances and check it.

    Raises:
        InputError: unreadable file, no or duplicate ids, not square, NaN or infinite or negative
            values, asymmetry, a diagonal that is not zero, samples missing.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise InputError(
            f"{path}: unknown extension {kind!r}; expected a distance matrix as .h5, .tsv, .qza "
            "or .npy with a file of ids"
        )
    check_input(path, "a distance matrix")
    if kind == ".npy" and ids_file is None:
        raise InputError(
            f"{path}: a .npy matrix holds no sample ids, and rows are never matched by position; "
            "give the ids, one a line in the order of the rows, with --unifrac-matrix-ids FILE"
        )
    if kind != ".npy" and ids_file is not None:
        raise InputError(
            f"{ids_file}: ids are given apart only for .npy; {path} holds its own: leave "
            "--unifrac-matrix-ids out"
        )
    reading = path
    try:
        ids, matrix = _READERS[kind](path)
        if ids_file is not None:
            reading = Path(ids_file)
            ids = [one for line in reading.read_text("utf-8").splitlines() if (one := line.strip())]
    except InputError:
        raise
    except (OSError, ValueError, EOFError) as error:
        what = f"cannot be read ({error}); make it again or copy it again"
        raise InputError(f"{reading}: {what}") from error
    if matrix.dtype not in (np.float32, np.float64):
        matrix = matrix.astype(np.float64)
    _check_shape(path, ids, matrix)
    facts: list[DataFact] = []
    if sample_ids is not None:
        row_of = {name: row for row, name in enumerate(ids)}
        sources = {"table_source": table_source, "metadata_source": str(path)}
        wanted, facts = match_ids(sample_ids, ids, allow_missing=allow_missing, **sources)
        if list(wanted) != ids:
            rows = [row_of[name] for name in wanted]
            ids, matrix = list(wanted), matrix[np.ix_(rows, rows)]
    _check_values(path, ids, matrix)
    return PrecomputedDistances(tuple(ids), matrix, facts)


def _read_npy(path: Path) -> tuple[list[str], np.ndarray]:
    matrix = np.load(path, allow_pickle=False)
    if not isinstance(matrix, np.ndarray) or matrix.dtype.kind not in "fiu":
        raise InputError(f"{path}: holds {getattr(matrix, 'dtype', 'no array')}, expected numbers")
    return [], matrix


def _read_hdf5(path: Path) -> tuple[list[str], np.ndarray]:
    import h5py

    with h5py.File(path, "r") as file:
        absent = [name for name in ("order", "matrix") if name not in file]
        if absent:
            raise InputError(
                f"{path}: no dataset {' and '.join(map(repr, absent))} in the file (it has "
                f"{name_some(list(file))}); expected 'order' and 'matrix', as ssu writes"
            )
        ids = [one.decode() if isinstance(one, bytes) else str(one) for one in file["order"]]
        return ids, file["matrix"][()]


def _read_tsv(path: Path) -> tuple[list[str], np.ndarray]:
    """Rows may stand in another order than the columns."""
    if path.suffix.lower() == ".qza":
        text = read_qza_member(path, "data/distance-matrix.tsv", "DistanceMatrix").decode()
    else:
        text = path.read_text(encoding="utf-8")
    first, *lines = [line for line in text.splitlines() if line.strip()] or [""]
    if not first:
        raise InputError(f"{path}: the file is empty; expected a distance matrix")
    columns = [name.strip() for name in first.split("\t")[1:]]
    row_of, values = {}, np.empty((len(lines), len(columns)))
    for row, line in enumerate(lines):
        name, *cells = line.split("\t")
        if len(cells) != len(columns):
            raise InputError(
                f"{path}: row {name!r} has {len(cells)} values, expected {len(columns)}, one for "
                "each id of the first line (separated by tabs)"
            )
        row_of[name.strip()] = row
        numbers: list[float] = []
        try:
            for cell in cells:
                numbers.append(float(cell))
        except ValueError:
            raise InputError(
                f"{path}: row {name!r}, column {columns[len(numbers)]!r}: {cell!r} is not a number"
            ) from None
        values[row] = numbers
    if row_of.keys() != set(columns) or len(values) != len(columns):
        apart = sorted(row_of.keys() ^ set(columns)) or list(row_of)
        raise InputError(
            f"{path}: the ids of the rows are not those of the first line ({len(values)} and "
            f"{len(columns)}; differing: {name_some(apart)}); expected a square matrix"
        )
    return columns, values[[row_of[name] for name in columns]]


_READERS = {
    ".h5": _read_hdf5, ".hdf5": _read_hdf5, ".npy": _read_npy,
    ".tsv": _read_tsv, ".txt": _read_tsv, ".qza": _read_tsv,
}  # fmt: skip


def _check_shape(path: Path, ids: list[str], matrix: np.ndarray) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"{path}: the matrix has the shape {matrix.shape}; expected a square one")
    if len(ids) != len(matrix):
        raise InputError(
            f"{path}: {len(ids)} sample ids for a matrix of {len(matrix)} rows; expected as many"
        )
    if repeated := [name for name, times in Counter(ids).items() if times > 1]:
        raise InputError(
            f"{path}: {len(repeated)} sample ids stand more than once ({name_some(repeated)}); "
            "every sample needs its own id"
        )


def _check_values(path: Path, ids: list[str], matrix: np.ndarray) -> None:
    counts: Counter[str] = Counter()
    first: dict[str, tuple[int, int]] = {}
    for low in range(0, len(matrix), _CHECKED_ROWS):
        block, mirrored = matrix[low : low + _CHECKED_ROWS], matrix[:, low : low + _CHECKED_ROWS].T
        with np.errstate(invalid="ignore"):  # infinite less infinite
            apart = np.abs(block - mirrored) > _TOLERANCE * np.maximum(1.0, np.abs(block))
        itself = np.eye(len(block), len(matrix), low, dtype=bool)
        for problem, bad in (
            ("not a number (NaN)", np.isnan(block)),
            ("infinite", np.isinf(block)),
            ("negative", block < -_TOLERANCE),
            ("a distance of a sample to itself", itself & (np.abs(block) > _TOLERANCE)),
            ("not equal in the two directions", apart & np.isfinite(mirrored)),
        ):
            if bad.any():
                counts[problem] += int(np.count_nonzero(bad))
                row, column = np.argwhere(bad)[0].tolist()
                first.setdefault(problem, (low + row, column))
    for problem, (row, column) in first.items():
        raise InputError(
            f"{path}: {counts[problem]} distances are {problem}: {ids[row]!r} to {ids[column]!r} "
            f"is {matrix[row, column]:.6g} (back: {matrix[column, row]:.6g}); expected a symmetric "
            "matrix of finite distances with a zero diagonal: make it again"
        )


def write_distances(path: Path, sample_ids: Sequence[str], matrix: np.ndarray) -> None:
    """Write a square matrix of distances, whole or not at all.

    ``.h5``: the datasets ``order``, ``matrix`` (float32), ``format`` and ``version``, as ``ssu``
    writes them. Else a labelled square matrix with 9 significant digits, as QIIME exports.
    """
    import h5py

    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".h5":
            with h5py.File(temporary, "w") as file:
                file.create_dataset("order", data=list(sample_ids), dtype=h5py.string_dtype())
                file.create_dataset("matrix", data=matrix, dtype=np.float32)
                file.create_dataset("format", data=np.array([b"BDSM"]))
                file.create_dataset("version", data=np.array([b"2020.12"]))
            return
        with temporary.open("w", encoding="utf-8") as file:
            file.write("\t" + "\t".join(sample_ids) + "\n")
            for name, row in zip(sample_ids, matrix, strict=True):
                file.write(name + "\t" + "\t".join(f"{one:.9g}" for one in row) + "\n")
