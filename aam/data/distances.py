"""Distances between samples: precomputed ones read from a file, UniFrac of a table written."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aam.data.distance_files import read_raw_distances
from aam.data.metadata import match_ids
from aam.data.phylogeny import METRICS, UniFrac, read_tree
from aam.data.table import FeatureTable, rarefy, read_table
from aam.errors import DataFact, InputError, name_some

_TOLERANCE = 1e-5
"""Largest asymmetry and diagonal that rounding in a file explains (float32, 6 digits)."""

_CHECKED_ROWS = 512
"""Rows checked at once, so that checking a large matrix does not hold copies of it."""


# ----------------------------------------------------------------------------------- reading
@dataclass(frozen=True, eq=False)
class PrecomputedDistances:
    """Distances between samples, read from a file; used in the place of ``UniFrac``.

    Attributes:
        sample_ids: the samples that the rows of the methods number.
        matrix: (samples, samples) float32 or float64, as the file holds it.
        source: the file, for messages.
        facts: what was left out, as counted facts.
    """

    sample_ids: tuple[str, ...]
    matrix: NDArray[np.floating]
    source: str
    facts: list[DataFact] = field(default_factory=list)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.sample_ids)

    def pairwise(self, rows: ArrayLike) -> NDArray[np.float64]:
        """Distances between the samples ``rows`` (n,): (n, n) float64."""
        return self.cross(rows, rows)

    def cross(self, rows_a: ArrayLike, rows_b: ArrayLike) -> NDArray[np.float64]:
        """Distances from the samples ``rows_a`` (n,) to ``rows_b`` (m,): (n, m) float64."""
        a, b = np.asarray(rows_a, dtype=np.int64), np.asarray(rows_b, dtype=np.int64)
        return self.matrix[np.ix_(a, b)].astype(np.float64)

    def all_pairs(self) -> NDArray[np.float64]:
        """Distances between all samples, (samples, samples) float64."""
        return self.matrix.astype(np.float64)


def read_distances(
    path: str | Path,
    *,
    sample_ids: Sequence[str] | None = None,
    ids_file: str | Path | None = None,
    allow_missing: bool = False,
    table_source: str = "the table",
) -> PrecomputedDistances:
    """Read a square matrix of distances and check it.

    Args:
        path: ``.h5``, ``.tsv``, ``.txt``, ``.qza`` or ``.npy``.
        sample_ids: the samples wanted, in this order; others in the file are not used. None:
            all of the file, in its order.
        ids_file: text file, one sample id a line in the order of the rows; for ``.npy`` alone,
            which holds none.
        allow_missing: leave out samples that are not in the file (counted in ``facts``) instead
            of raising; ``sample_ids`` of the result are those that were found.
        table_source: the table's file, for messages.

    Raises:
        InputError: unreadable file, no or duplicate ids, not square, NaN or infinite or negative
            values, asymmetry, a diagonal that is not zero, samples missing.
    """
    path = Path(path)
    ids, matrix = read_raw_distances(path, None if ids_file is None else Path(ids_file))
    _check_shape(path, ids, matrix)
    facts: list[DataFact] = []
    if sample_ids is not None:
        wanted, facts = match_ids(
            sample_ids,
            ids,
            allow_missing=allow_missing,
            table_source=table_source,
            metadata_source=str(path),
        )
        if list(wanted) != ids:
            row_of = {name: row for row, name in enumerate(ids)}
            rows = [row_of[name] for name in wanted]
            ids, matrix = list(wanted), matrix[np.ix_(rows, rows)]
    _check_values(path, ids, matrix)
    return PrecomputedDistances(tuple(ids), matrix, str(path), facts)


def _check_shape(path: Path, ids: list[str], matrix: NDArray[np.floating]) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"{path}: the matrix has the shape {matrix.shape}; expected a square one")
    if len(ids) != len(matrix):
        raise InputError(
            f"{path}: {len(ids)} sample ids for a matrix of {len(matrix)} rows; expected as many"
        )
    if len(set(ids)) < len(ids):
        repeated = [name for name, times in Counter(ids).items() if times > 1]
        raise InputError(
            f"{path}: {len(repeated)} sample ids stand more than once ({name_some(repeated)}); "
            "every sample needs its own id"
        )


def _check_values(path: Path, ids: list[str], matrix: NDArray[np.floating]) -> None:
    counts: Counter[str] = Counter()
    first: dict[str, tuple[int, int]] = {}
    for low in range(0, len(matrix), _CHECKED_ROWS):
        for problem, bad in _find_problems(matrix, low):
            counts[problem] += int(bad.sum())
            row, column = np.argwhere(bad)[0]
            first.setdefault(problem, (low + int(row), int(column)))
    if first:
        problem, (row, column) = next(iter(first.items()))
        raise InputError(
            f"{path}: {counts[problem]} distances are {problem}: {ids[row]!r} to {ids[column]!r} "
            f"is {matrix[row, column]:.6g} (back: {matrix[column, row]:.6g}); expected a symmetric "
            "matrix of finite distances with a zero diagonal: make it again"
        )


def _find_problems(
    matrix: NDArray[np.floating], low: int
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """What is wrong with the rows from ``low`` on, and where (rows, samples)."""
    block = matrix[low : low + _CHECKED_ROWS]
    mirrored = matrix[:, low : low + _CHECKED_ROWS].T
    finite = np.isfinite(block) & np.isfinite(mirrored)
    difference = np.abs(np.subtract(block, mirrored, where=finite, out=np.zeros_like(block)))
    on_diagonal = np.zeros(block.shape, dtype=bool)
    on_diagonal[np.arange(len(block)), np.arange(low, low + len(block))] = True
    for problem, bad in (
        ("not a number (NaN)", np.isnan(block)),
        ("infinite", np.isinf(block)),
        ("negative", block < -_TOLERANCE),
        ("a distance of a sample to itself", on_diagonal & (np.abs(block) > _TOLERANCE)),
        (
            "not equal in the two directions",
            difference > _TOLERANCE * np.maximum(1.0, np.abs(block)),
        ),
    ):
        if bad.any():
            yield problem, bad


# ----------------------------------------------------------------------------------- writing
def write_distances(
    path: str | Path, sample_ids: Sequence[str], matrix: NDArray[np.floating]
) -> None:
    """Write a square matrix of distances, whole or not at all.

    ``.h5``: the datasets ``order``, ``matrix`` (float32), ``format`` and ``version``, as ``ssu``
    writes them. ``.tsv``: a labelled square matrix with 9 significant digits, as QIIME exports.

    Raises:
        InputError: another extension, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".h5", ".tsv"):
        raise InputError(f"{path}: unknown extension {path.suffix!r}; write to .h5 or .tsv")
    with _replacing(path) as partial:
        if path.suffix.lower() == ".h5":
            _write_hdf5(partial, sample_ids, matrix)
        else:
            with partial.open("w", encoding="utf-8") as file:
                file.write("\t" + "\t".join(sample_ids) + "\n")
                for name, row in zip(sample_ids, matrix, strict=True):
                    file.write(name + "\t" + "\t".join(f"{one:.9g}" for one in row) + "\n")


def _write_hdf5(path: Path, sample_ids: Sequence[str], matrix: NDArray[np.floating]) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("order", data=list(sample_ids), dtype=h5py.string_dtype())
        file.create_dataset("matrix", data=matrix, dtype=np.float32)
        file.create_dataset("format", data=np.array([b"BDSM"]))
        file.create_dataset("version", data=np.array([b"2020.12"]))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place when all went well."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


# ------------------------------------------------------------------------------- whole tables
@dataclass(frozen=True)
class UnifracSummary:
    """What ``compute_unifrac`` did.

    Attributes:
        samples: number of samples.
        features: number of features on the tree.
        mean: mean of the distances between different samples, or of Faith PD.
        standard_deviation: their standard deviation.
        seconds: wall time of the parts (``table``, ``tree``, ``distances``, ``write``).
        facts: what was dropped.
    """

    samples: int
    features: int
    mean: float
    standard_deviation: float
    seconds: dict[str, float]
    facts: list[DataFact]


def compute_unifrac(
    table_path: str | Path,
    tree_path: str | Path,
    metric: str,
    output: str | Path,
    *,
    sequences: str | Path | None = None,
    rarefy_depth: int = 0,
    seed: int = 0,
    drop_missing_tips: bool = False,
    overwrite: bool = False,
) -> UnifracSummary:
    """Compute UniFrac between all samples of a table, or their Faith PD, and write it.

    Args:
        table_path: feature table, see ``read_table``.
        tree_path: phylogeny, see ``read_tree``.
        metric: ``unweighted``, ``weighted``, ``weighted-normalized`` or ``faith-pd``.
        output: ``.h5`` or ``.tsv``; Faith PD, one value a sample, ``.tsv`` only.
        sequences: FASTA or ``.qza`` that maps hashed feature ids to sequences.
        rarefy_depth: reads to rarefy every sample to; 0: counts as they are.
        seed: of the rarefaction.
        drop_missing_tips: leave out features that are not in the tree.
        overwrite: replace an output that is already there.

    Raises:
        InputError: any of the files or options cannot be used; nothing is written then.
    """
    output = Path(output)
    check_output(output, metric, overwrite)
    clock = [time.perf_counter()]
    table, facts = read_rarefied(table_path, sequences, rarefy_depth, seed)
    clock.append(time.perf_counter())
    tree = read_tree(tree_path, sequences=sequences)
    clock.append(time.perf_counter())
    base = "unweighted" if metric == "faith-pd" else metric
    unifrac = UniFrac(table, tree, base, drop_missing_tips)
    return write_unifrac(unifrac, metric, output, facts + unifrac.facts, clock)


def read_rarefied(
    path: str | Path, sequences: str | Path | None, depth: int, seed: int
) -> tuple[FeatureTable, list[DataFact]]:
    """A table rarefied to a depth (0: as it is), and the samples that were dropped."""
    table = read_table(path, sequences=sequences)
    if not depth:
        return table, []
    table, dropped = rarefy(table, depth, seed)
    what = f"samples with fewer than {depth} reads"
    facts = [DataFact(what, len(dropped), name_some(dropped), "dropped")] if dropped else []
    return table, facts


def write_unifrac(
    unifrac: UniFrac, metric: str, output: Path, facts: list[DataFact], clock: list[float]
) -> UnifracSummary:
    """Compute all distances, or Faith PD, and write them.

    Args:
        unifrac: of the table, by the metric; unweighted for Faith PD.
        metric: what is written.
        output: the file.
        facts: what was dropped on the way.
        clock: when reading the table began and ended, and the tree was there.
    """
    if metric == "faith-pd":
        values = distances = unifrac.faith_pd(np.arange(len(unifrac)))
    else:
        distances = unifrac.all_pairs()
        values = distances[np.triu_indices(len(distances), 1)]
    clock.append(time.perf_counter())
    if metric == "faith-pd":
        with _replacing(output) as partial:
            lines = [
                f"{name}\t{value:.9g}\n"
                for name, value in zip(unifrac.sample_ids, distances, strict=True)
            ]
            partial.write_text("sample-id\tfaith_pd\n" + "".join(lines), encoding="utf-8")
    else:
        write_distances(output, unifrac.sample_ids, distances)
    clock.append(time.perf_counter())
    return UnifracSummary(
        samples=len(unifrac),
        features=len(unifrac.tree.tip_names),
        mean=float(values.mean()) if len(values) else float("nan"),
        standard_deviation=float(values.std()) if len(values) else float("nan"),
        seconds=dict(
            zip(("table", "tree", "distances", "write"), np.diff(clock).tolist(), strict=True)
        ),
        facts=facts,
    )


def check_output(output: Path, metric: str, overwrite: bool) -> None:
    """Everything about the output that can be known before the work."""
    if metric not in (*METRICS, "faith-pd"):
        raise InputError(f"unknown metric {metric!r}; choose {', '.join(METRICS)} or faith-pd")
    kinds = (".tsv",) if metric == "faith-pd" else (".h5", ".tsv")
    if output.suffix.lower() not in kinds:
        raise InputError(
            f"{output}: unknown extension {output.suffix!r} for {metric}; write to "
            f"{' or '.join(kinds)}"
        )
    if output.exists() and not overwrite:
        raise InputError(f"{output}: already there; choose another name or add --overwrite")
    if not output.parent.is_dir():
        raise InputError(f"{output}: no folder {output.parent}; make it first")
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"{output}: the folder {output.parent} is not writable")
