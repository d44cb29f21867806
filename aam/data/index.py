"""A feature table on disk: built once from BIOM 2.1, then memory-mapped, whatever its size.

The index of a table is a folder beside it (or where ``--index-dir`` says)::

    table.biom.index/samples-<key>/
        index.json       what it was made from and with, and the sizes of the other files
        sequences.txt    distinct sequences, one a line, each after its line break, in order
        sequence_ends    (sequences,) int64, where each ends in sequences.txt
        sample_ids.json  ids of the table's samples
        reads            (samples of the table,) int64, reads of each before rarefaction
        row_starts       (samples kept + 1,) start of each sample's entries
        columns          (entries,) sequence of each entry, rising in a sample
        counts           (entries,) reads of it

It holds what ``read_table`` and ``rarefy`` give, to the last draw. The key stands for the table's
size, time and both its ends, and for depth, seed and order: another table never finds it. It is
written under another name and renamed when complete, so a killed build leaves nothing behind that
is taken for an index; two processes that build at once wait for each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from aam.data.table import FeatureTable, check_depth
from aam.data.texts import Texts, ranges, row_blocks
from aam.errors import InputError, one_line

FORMAT = 1
DESCRIPTION = "index.json"
_END_BYTES = 2**20
"""Bytes of each end of a file that are hashed, to tell whether it changed."""
_BYTES_AN_ENTRY, _BYTES_A_FEATURE = 50, 800
"""Memory of a table that is read as a whole, at its highest (measured, 10,000 x 100,000)."""


class IndexUnwritableError(InputError):
    """There is no place for an index."""


@dataclass(frozen=True)
class IndexedTable(FeatureTable):
    """A feature table whose counts and sequences are memory-mapped files.

    Attributes:
        folder: where temporary files may lie.
        digest_: of the contents, where it is known; see :meth:`FeatureTable.digest`.
    """

    folder: Path = Path()
    digest_: str = ""

    def digest(self) -> str:
        """The digest made when the files were written, or of a selection."""
        return self.digest_ or super().digest()

    def select(self, sample_ids: Sequence[str]) -> FeatureTable:
        """Return these samples in this order, without the features that none of them has.

        Their entries are copied to a nameless temporary file, not to memory.

        Raises:
            InputError: an id is not in the table, or the disk is full.
        """
        if tuple(sample_ids) == self.sample_ids:
            return self
        rows = self.rows_of(sample_ids)
        starts = self.counts.indptr.astype(np.int64)
        row_starts = np.concatenate(([0], np.cumsum(np.diff(starts)[rows])))
        present = np.zeros(len(self.feature_ids), dtype=bool)
        for part in row_blocks(row_starts):
            entries = ranges(starts[rows[part]], np.diff(row_starts)[part])
            present[self.counts.indices[entries]] = True
        column_of = np.cumsum(present) - 1
        sequences = Texts.of(self.feature_ids).take(present)
        with _writing(self.folder):
            columns = Scratch(self.folder, self.counts.indices.dtype)
            counts = Scratch(self.folder, self.counts.data.dtype)
            for part in row_blocks(row_starts):
                entries = ranges(starts[rows[part]], np.diff(row_starts)[part])
                columns.append(column_of[self.counts.indices[entries]])
                counts.append(self.counts.data[entries])
            matrix = mapped_counts(counts.map(), columns.map(), row_starts, len(sequences))
        return IndexedTable(
            tuple(sample_ids), sequences, matrix, self.source, self.by_sequence, self.folder
        )


@dataclass(frozen=True)
class TableIndex:
    """An open index.

    Attributes:
        table: samples with enough reads, rarefied, sequences in order.
        file_ids: ids of all samples of the file, in its order.
        file_reads: (samples of the file,) int64, their reads before rarefaction.
        depth: reads drawn of each sample; 0: all.
    """

    table: IndexedTable
    file_ids: tuple[str, ...]
    file_reads: NDArray[np.int64]
    depth: int

    def enough_reads(self, ids: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Those of some samples of the file that rarefaction kept, and those it dropped.

        Raises:
            InputError: it dropped them all.
        """
        known = set(self.table.sample_ids)
        kept = tuple(name for name in ids if name in known)
        if not kept:
            row_of = {name: row for row, name in enumerate(self.file_ids)}
            reads = self.file_reads[[row_of[name] for name in ids]]
            check_depth(reads, self.depth, self.table.source)
        return kept, tuple(name for name in ids if name not in known)


class Scratch:
    """Numbers appended to a file and mapped back; a file without a name goes with its process."""

    def __init__(self, place: Path, dtype: Any, name: str | None = None) -> None:
        """Open ``place / name``, or a nameless file in the folder ``place``."""
        self.dtype, self.count = np.dtype(dtype), 0
        # Closed by `map`, or with the object: the caller decides when all is written.
        self.file: IO[bytes] = (
            tempfile.TemporaryFile(dir=place)  # noqa: SIM115
            if name is None
            else (place / name).open("w+b")
        )

    def append(self, values: NDArray[Any]) -> None:
        """Write values at the end, as the file's type."""
        self.file.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.count += len(values)

    def map(self) -> NDArray[Any]:
        """All that was written, mapped to memory; nothing can be added then."""
        self.file.flush()
        mapped = _map(self.file, self.dtype, self.count)
        self.file.close()
        return mapped


def size_in_memory(path: Path) -> int | None:
    """About how many bytes a BIOM 2.1 table takes in memory; None for what is no such table."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            entries, features = (
                file["sample/matrix/data"].shape[0],
                file["observation/ids"].shape[0],
            )
    except (OSError, KeyError, AttributeError, IndexError):
        return None
    return int(_BYTES_AN_ENTRY * entries + _BYTES_A_FEATURE * features)


def open_index(
    path: Path, options: dict[str, Any], folder: Path | None, notice: Callable[[str], None]
) -> TableIndex:
    """Open the index of a table; build it where there is none that fits.

    Args:
        path: BIOM 2.1 table.
        options: ``sequences`` (path or None), ``depth``, ``seed``, ``by_sequence``: whether
            features are ordered by sequence or as in the file.
        folder: where indexes are kept; None: beside the table.
        notice: is told in one line what is built and why.

    Raises:
        InputError: the table cannot be used, as `read_table` and `rarefy` say.
        IndexUnwritableError: the index cannot be written.
    """
    from aam.data.index_build import build

    made_of = _describe(path, options)
    home = (folder or path.parent) / f"{path.name}.index"
    target = home / f"samples-{_key(made_of)}"
    found = _open(target, made_of, path)
    if found is not None:
        return found
    with _writing(home), _alone(home, notice):
        found = _open(target, made_of, path)  # another process may have been quicker
        if found is None:
            stale = _clear(home, made_of, target)
            why = "the table has changed" if stale else "once"
            notice(f"building the index of {path} in {home} ({why})")
            with _replacing(target) as partial:
                sizes = build(path, partial, options)
                _write_description(partial, {**made_of, **sizes})
            for one in stale:
                shutil.rmtree(one, ignore_errors=True)
            found = _open(target, made_of, path)
    if found is None:
        raise InputError(f"{target}: cannot be read back: remove it and try again")
    return found


def mapped_counts(
    counts: NDArray[Any], columns: NDArray[Any], row_starts: NDArray[Any], width: int
) -> sp.csr_array:
    """Mapped arrays as a sparse matrix ``(samples, width)``, without a copy."""
    shape = (len(row_starts) - 1, width)
    matrix = sp.csr_array((counts, columns, row_starts.astype(columns.dtype)), shape=shape)
    matrix.has_sorted_indices = matrix.has_canonical_format = True  # known, not looked up
    return matrix


def _describe(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What an index is made of and with."""
    sequences = options["sequences"]
    depth = options["depth"]
    return {
        "format": FORMAT,
        "table": fingerprint_file(path),
        "sequences": None if sequences is None else fingerprint_file(sequences),
        "depth": depth,
        "seed": options["seed"] if depth else None,
        "by_sequence": options["by_sequence"],
    }


def fingerprint_file(path: Path) -> dict[str, Any]:
    """Size, time of the last change and a digest of both ends of a file.

    Raises:
        InputError: there is no such file.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            digest = hashlib.sha256(file.read(_END_BYTES))
            file.seek(max(0, status.st_size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return {
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "ends": digest.hexdigest(),
    }


def _key(made_of: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def _open(target: Path, made_of: dict[str, Any], path: Path) -> TableIndex | None:
    """The index in a folder, or None where there is none that is whole and of this table."""
    try:
        known = json.loads((target / DESCRIPTION).read_text(encoding="utf-8"))
        if {name: known.get(name) for name in made_of} != made_of:
            return None
        arrays = {}
        for name, (dtype, count) in known["arrays"].items():
            with (target / name).open("rb") as file:
                arrays[name] = _map(file, np.dtype(dtype), count)
        file_ids = tuple(json.loads((target / "sample_ids.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError):  # ValueError: a file is shorter than it should be
        return None
    ends = np.asarray(arrays["sequence_ends"])
    sequences = Texts(arrays["sequences.txt"], np.concatenate(([0], ends[:-1])) + 1, ends)
    counts = mapped_counts(arrays["counts"], arrays["columns"], arrays["row_starts"], len(ends))
    reads = np.asarray(arrays["reads"])
    kept = np.flatnonzero(reads >= made_of["depth"])
    ids = tuple(file_ids[row] for row in kept)
    by_sequence = bool(made_of["by_sequence"])
    table = IndexedTable(
        ids, sequences, counts, str(path), by_sequence, _scratch_folder(target), known["digest"]
    )
    return TableIndex(table, file_ids, reads, made_of["depth"])


def _map(file: IO[bytes], dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """``count`` numbers of a file, read when they are looked at."""
    if count == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(file, dtype=dtype, mode="r", shape=(count,)).view(np.ndarray)


def _scratch_folder(target: Path) -> Path:
    """Where temporary files of the size of the index can lie."""
    return target.parent if os.access(target.parent, os.W_OK) else Path(tempfile.gettempdir())


def _write_description(folder: Path, description: dict[str, Any]) -> None:
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Make the folder, and say in one line why nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise IndexUnwritableError(
            f"{folder}: the table's index cannot be written ({error.strerror or one_line(error)}): "
            "name a folder for it with --index-dir, or keep the table in memory with "
            "--on-disk never"
        ) from error


@contextlib.contextmanager
def _alone(home: Path, notice: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder's lock; another process that builds there is waited for.

    Where the file system has no locks two processes build at once, and the first to end wins.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    handle = os.open(home, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notice(f"another process builds an index in {home}: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def _clear(home: Path, made_of: dict[str, Any], target: Path) -> list[Path]:
    """Remove what killed builds left; return indexes of earlier states of the table."""
    stale = []
    options = {name: made_of[name] for name in ("depth", "seed", "by_sequence")}
    for folder in home.iterdir():
        if folder.name.startswith(f".partial-{platform.node()}-"):
            if not _is_running(int(folder.name.rsplit("-", 2)[1])):
                shutil.rmtree(folder, ignore_errors=True)
        elif folder == target:  # damaged, or it would have been opened
            shutil.rmtree(folder)
        elif folder.name.startswith("samples-"):
            with contextlib.suppress(OSError, ValueError):
                known = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
                if {name: known.get(name) for name in options} == options:
                    stale.append(folder)
    return stale


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A folder to write to, which takes the name ``target`` when all went well."""
    partial = Path(
        tempfile.mkdtemp(prefix=f".partial-{platform.node()}-{os.getpid()}-", dir=target.parent)
    )
    try:
        yield partial
        for one in partial.iterdir():
            with one.open("rb") as file:
                os.fsync(file.fileno())
        partial.chmod(0o777 & ~_umask())
        with contextlib.suppress(FileExistsError):  # another process was quicker: the same index
            try:
                partial.rename(target)
            except OSError:
                if not (target / DESCRIPTION).is_file():
                    raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
