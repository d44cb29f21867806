"""Large feature tables on disk: made once from BIOM 2.1, then memory-mapped, whatever their size.

A table is a folder of .npy files, ``table.biom.index/depth-5000-seed-0``; docs/guide/files.md lists
them. It holds what ``read_table`` and ``rarefy`` give, to the last draw, and is made in blocks: in
memory are the sequences, a few numbers a feature and a block of samples. It is written under
another name and renamed when complete, so a killed build leaves nothing that is taken for a table.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from aam.data.sequences import resolve_in_blocks
from aam.data.table import FeatureTable, check_depth, rarefied, read_table
from aam.data.table_files import check_ids, id_text
from aam.data.texts import Texts, row_blocks
from aam.errors import InputError, log, one_line

_ARRAYS = ("sample_ids", "reads", "bases", "starts", "position", "data", "indices", "indptr")

_AT_ONCE = 2**14  # names or entries that are held together


class UnwritableError(InputError):
    """There is no place for a table on disk."""


class Source(NamedTuple):
    """A BIOM 2.1 table, and how it is read: see `read_table` and `rarefy`; depth 0 takes all."""

    path: Path
    sequences: Path | None
    depth: int
    seed: int

    def describe(self) -> dict[str, Any]:
        """What tells another table, or another way of reading it, from this one."""
        files = [one.stat() for one in (self.path, self.sequences) if one and one.exists()]
        return {
            "format": 2,
            "files": [[one.st_size, one.st_mtime_ns] for one in files],
            "depth": self.depth,
            "seed": self.seed if self.depth else None,
        }


class MappedTable(NamedTuple):
    """The samples with enough reads, rarefied, and ids and reads of all samples of the file."""

    table: FeatureTable
    file_ids: tuple[str, ...]
    file_reads: NDArray[np.int64]
    depth: int

    def enough_reads(self, ids: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Those of some samples that rarefaction kept, and those it dropped, if not all."""
        known = set(self.table.sample_ids)
        kept = tuple(name for name in ids if name in known)
        if not kept:
            own = np.isin(self.file_ids, list(ids))
            check_depth(self.file_reads[own], self.depth, self.table.source)
        return kept, tuple(name for name in ids if name not in known)


def open_mapped(source: Source, folder: Path | None) -> MappedTable:
    """Open a table on disk, in ``folder`` or beside the table; build it where there is none.

    InputError where the table cannot be used, as `read_table` and `rarefy` say.
    """
    home = (folder or source.path.parent) / f"{source.path.name}.index"
    target = home / (f"depth-{source.depth}-seed-{source.seed}" if source.depth else "all-reads")
    found = _open(target, source)
    if found is None:
        try:
            home.mkdir(parents=True, exist_ok=True)
            with _alone(home):
                if _open(target, source) is None:  # no other process was quicker
                    why = "the table has changed" if target.exists() else "once"
                    log(f"building the index of {source.path} in {home} ({why})")
                    _build(target, source)
        except OSError as error:
            raise UnwritableError(
                f"{home}: the table's index cannot be written "
                f"({error.strerror or one_line(error)}): name a folder for it with --index-dir, "
                "or keep the table in memory with --on-disk never"
            ) from error
        found = _open(target, source)
    if found is None:
        raise InputError(f"{target}: cannot be read back: remove it and try again")
    return found


def _open(folder: Path, source: Source) -> MappedTable | None:
    """The table in a folder, or None where there is none that is whole and of this file."""
    try:
        if json.loads((folder / "made_from.json").read_bytes()) != source.describe():
            return None
        arrays = [np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _ARRAYS]
        ids, reads, bases, starts, position, *matrix = arrays
        counts = sp.csr_array(tuple(matrix), shape=(len(matrix[2]) - 1, len(starts) - 1))
    except (OSError, ValueError, EOFError):  # a file is missing or shorter than it should be
        return None
    counts.has_sorted_indices = counts.has_canonical_format = True  # known, not looked up
    kept = tuple(ids[reads >= source.depth].tolist())
    names = Texts(bases, starts[:-1], starts[1:])
    table = FeatureTable(kept, names, counts, str(source.path), position)
    return MappedTable(table, tuple(ids.tolist()), reads, source.depth)


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Hold the folder's lock, for which others wait, and remove what killed builds left."""
    import fcntl

    handle = os.open(home, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # without locks two build at once, the first wins
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"another process builds an index in {home}: waiting for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
            for left in home.glob(f".partial-{platform.node()}-*"):
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(handle)


def _build(target: Path, source: Source) -> None:
    """Write the table to a folder, which takes the name ``target`` when complete."""
    import h5py

    partial = target.with_name(f".partial-{platform.node()}-{os.getpid()}")
    made_from = json.dumps(source.describe())
    try:
        partial.mkdir()
        with h5py.File(source.path, "r") as file:
            _write_arrays(file, partial, source)
        (partial / "made_from.json").write_text(made_from, encoding="utf-8")
        for one in partial.iterdir():
            with one.open("rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(target, ignore_errors=True)  # an older state, or another's of this one
        partial.rename(target)
    except Exception as problem:  # h5py raises a dozen kinds on damaged files
        if isinstance(problem, InputError) or getattr(problem, "errno", None):
            raise  # what is wrong is known, or it is the disk
        read_table(source.path, sequences=source.sequences)  # says what is wrong, and where
        raise InputError(
            f"{source.path}: cannot be put on disk ({one_line(problem)}): read it with "
            "--on-disk never"
        ) from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_arrays(file: Any, folder: Path, source: Source) -> None:
    sample_ids = [id_text(one) for one in file["sample/ids"][()]]
    check_ids("sample", sample_ids, source.path)
    names = resolve_in_blocks(file["observation/ids"], source.sequences, _AT_ONCE)
    order = names.order()
    if names.repeats(order):
        raise ValueError("two features have one sequence")
    rank = np.argsort(order)
    reads, present = _write_counts(file["sample/matrix"], folder, rank, sample_ids, source)
    # From here on features are numbered among those that have a read.
    number, position = np.cumsum(present) - 1, order[present]
    columns = np.load(folder / "indices.npy", mmap_mode="r+")
    for low in range(0, len(columns), _AT_ONCE):
        columns[low : low + _AT_ONCE] = number[columns[low : low + _AT_ONCE]]
    with _growing(folder / "bases.npy", np.uint8) as append:
        for low in range(0, len(position), _AT_ONCE):
            append(names.take(position[low : low + _AT_ONCE]).packed().buffer)
    np.save(folder / "starts.npy", np.append(0, np.cumsum(names.lengths[position])))
    np.save(folder / "position.npy", position)
    np.save(folder / "sample_ids.npy", sample_ids)
    np.save(folder / "reads.npy", reads)


def _write_counts(
    matrix: Any, folder: Path, rank: NDArray[np.int64], sample_ids: list[str], source: Source
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Write counts, columns by sequence; return the samples' reads, and which columns have any."""
    data, features = matrix["data"], matrix["indices"]
    starts = np.asarray(matrix["indptr"], dtype=np.int64)
    if len(starts) != len(sample_ids) + 1 or starts[0] or (np.diff(starts) < 0).any():
        raise ValueError("samples and entries do not fit")
    index = np.int32 if max(len(rank), starts[-1]) < 2**31 else np.int64
    reads, lengths, present = [], [np.zeros(1, dtype=index)], np.zeros(len(rank), dtype=bool)
    with (
        _growing(folder / "indices.npy", index) as append_columns,
        _growing(folder / "data.npy", np.int64) as append_counts,
    ):
        for rows in row_blocks(starts):
            own = starts[rows.start : rows.stop + 1]
            columns, values = features[own[0] : own[-1]], data[own[0] : own[-1]]
            is_count = (values >= 0) & (values < np.inf) & (values == np.floor(values))
            if not is_count.all() or columns.min(initial=0) < 0:
                raise ValueError("entries that are no counts of features")
            entries = (values.astype(np.int64), rank[columns], own - own[0])
            block = sp.csr_array(entries, shape=(len(own) - 1, len(rank)))
            block.sum_duplicates()
            block.eliminate_zeros()
            reads.append(block.sum(axis=1))
            if source.depth:
                names = sample_ids[rows]
                block = rarefied(block, names, source.depth, source.seed, str(source.path))[1]
            present[block.indices] = True
            lengths.append(np.diff(block.indptr))
            append_columns(block.indices)
            append_counts(block.data)
    all_reads = np.concatenate(reads)
    if not all_reads.any():
        raise ValueError("no reads")
    check_depth(all_reads, source.depth, str(source.path))
    np.save(folder / "indptr.npy", np.cumsum(np.concatenate(lengths), dtype=index))
    return all_reads, present


@contextlib.contextmanager
def _growing(path: Path, dtype: Any) -> Iterator[Callable[[NDArray[Any]], None]]:
    """A function that appends numbers to a new .npy file."""
    head = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (0,)}
    count = 0

    def append(values: NDArray[Any]) -> None:
        nonlocal count
        file.write(np.ascontiguousarray(values, dtype=dtype).data)
        count += len(values)

    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, head)
        yield append
        file.seek(0)  # numpy leaves room in the header for the longest of shapes
        np.lib.format.write_array_header_1_0(file, {**head, "shape": (count,)})
