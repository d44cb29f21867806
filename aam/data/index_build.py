"""How the index of a table is made: sequences sorted, samples read in blocks and rarefied.

Nothing of the size of the counts or of the sequences is held in memory: a few numbers a feature
and a block of samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from aam.data.index import Scratch, mapped_counts
from aam.data.sequences import read_fasta
from aam.data.table import FeatureTable, check_depth, draw_reads, read_table
from aam.data.table_files import check_ids
from aam.data.texts import Texts, row_blocks
from aam.errors import InputError, one_line

_NAMES_AT_ONCE = 2**16
_ENTRIES_AT_ONCE = 2**20
_CHUNK_CACHE = 64 * 2**20
"""Bytes of HDF5 chunks kept, so that a chunk that two blocks share is unpacked once."""

_LINE_BREAK = ord("\n")
_IS_BASE = np.zeros(256, dtype=bool)
_IS_BASE[list(b"ACGT")] = True


class _Irregular(Exception):
    """The table breaks a rule; reading it as a whole says which one, and where."""


def build(path: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Write the files of an index into an empty folder.

    Args:
        path: BIOM 2.1 table.
        folder: where to.
        options: see `open_index`.

    Returns:
        What belongs into the description: type and size of every array, digest of the contents.

    Raises:
        InputError: the table cannot be used.
        OSError: the folder cannot be written.
    """
    try:
        return _Build(path, folder, options).run()
    except _Irregular as problem:
        read_table(path, sequences=options["sequences"])
        raise InputError(
            f"{path}: cannot be put on disk ({problem}): read it with --on-disk never"
        ) from problem


class _Build:
    """One build; the steps of :meth:`run` hand on what is in the attributes."""

    def __init__(self, path: Path, folder: Path, options: dict[str, Any]) -> None:
        self.path, self.folder = path, folder
        self.sequences: Path | None = options["sequences"]
        self.depth, self.seed = options["depth"], options["seed"]
        self.by_sequence: bool = options["by_sequence"]
        self.arrays: dict[str, tuple[str, int]] = {}

    def run(self) -> dict[str, Any]:
        """Write everything."""
        with _Biom(self.path) as table:
            names = self._read_names(table)
            order, repeats = names.order()
            if repeats:
                raise _Irregular("two features have one sequence")
            rank = np.empty_like(order)
            rank[order] = np.arange(len(order))
            counts, reads = self._read_counts(table, rank)
            sample_ids = table.sample_ids
        (self.folder / "sample_ids.json").write_text(json.dumps(sample_ids), encoding="utf-8")
        self._write("reads", np.int64, [reads])
        # From here on features are numbered among those that have a read.
        present = np.zeros(len(order), dtype=bool)
        for low in range(0, counts.nnz, _ENTRIES_AT_ONCE):
            present[counts.indices[low : low + _ENTRIES_AT_ONCE]] = True
        places = np.flatnonzero(present)  # in the order of sequences
        if not self.by_sequence:
            places = rank[np.sort(order[places])]
        texts = self._write_sequences(names.take(order[places]))
        number = np.full(len(order), -1, dtype=np.int64)
        number[places] = np.arange(len(places))
        counts = self._write_counts(counts, number, len(places))
        kept = tuple(name for name, n in zip(sample_ids, reads, strict=True) if n >= self.depth)
        whole = FeatureTable(kept, texts, counts, str(self.path), self.by_sequence)
        return {"arrays": self.arrays, "digest": whole.digest()}

    def _read_names(self, table: _Biom) -> Texts:
        """Each feature's sequence, in the order of the file, in a nameless file."""
        known = None if self.sequences is None else read_fasta(self.sequences)
        text = Scratch(self.folder, np.uint8)
        ends: list[NDArray[np.int64]] = []
        for names in table.names():
            if known is not None:
                names = [known.get(name.decode(), "").encode() for name in names]
            block = np.frombuffer(b"\n" + b"\n".join(names).upper(), dtype=np.uint8)
            breaks = np.flatnonzero(block == _LINE_BREAK)
            if len(breaks) != len(names) or np.count_nonzero(_IS_BASE[block]) + len(names) != len(
                block
            ):
                raise _Irregular("ids that are no sequences")
            ends.append(text.count + np.append(breaks[1:], len(block)))
            text.append(block)
        stops = np.concatenate(ends)
        starts = np.concatenate(([0], stops[:-1])) + 1
        if (starts == stops).any():
            raise _Irregular("a feature without an id")
        return Texts(text.map(), starts, stops)

    def _read_counts(
        self, table: _Biom, rank: NDArray[np.int64]
    ) -> tuple[sp.csr_array, NDArray[np.int64]]:
        """Counts of the samples kept, columns by sequence; and reads of all samples."""
        index = index_type(len(table.indices), len(rank))
        columns, counts = Scratch(self.folder, index), Scratch(self.folder, np.int64)
        row_starts, reads = [np.zeros(1, dtype=np.int64)], []
        for first, block in table.blocks(rank):
            own = np.asarray(block.sum(axis=1)).ravel()
            reads.append(own)
            if self.depth:
                block = self._rarefied(block, own, table.sample_ids[first:])
            row_starts.append(columns.count + block.indptr[1:])
            columns.append(block.indices)
            counts.append(block.data)
        all_reads = np.concatenate(reads)
        if not all_reads.any():
            raise _Irregular("no reads")
        if self.depth:
            check_depth(all_reads, self.depth, str(self.path))
        starts = np.concatenate(row_starts)
        return mapped_counts(counts.map(), columns.map(), starts, len(rank)), all_reads

    def _rarefied(
        self, block: sp.csr_array, reads: NDArray[np.int64], names: list[str]
    ) -> sp.csr_array:
        kept = np.flatnonzero(reads >= self.depth)
        block, starts = sp.csr_array(block[kept]), block[kept].indptr
        for row, at in enumerate(kept):
            part = slice(starts[row], starts[row + 1])
            block.data[part] = draw_reads(block.data[part], names[at], self.depth, self.seed)
        block.eliminate_zeros()
        return block

    def _write_sequences(self, texts: Texts) -> Texts:
        """Write sequences, each after a line break, and return them from there."""
        written = Scratch(self.folder, np.uint8, "sequences.txt")
        for low in range(0, len(texts), _NAMES_AT_ONCE):
            block = texts[low : low + _NAMES_AT_ONCE]
            text = "".join("\n" + one for one in block).encode()
            written.append(np.frombuffer(text, dtype=np.uint8))
        ends = np.cumsum(texts.lengths + 1)
        self.arrays["sequences.txt"] = ("u1", written.count)
        self._write("sequence_ends", np.int64, [ends])
        return Texts(written.map(), np.concatenate(([0], ends[:-1])) + 1, ends)

    def _write_counts(
        self, counts: sp.csr_array, number: NDArray[np.int64], width: int
    ) -> sp.csr_array:
        """Write counts under the features' last numbers, and return them from there."""
        index = index_type(counts.nnz, width)
        columns = Scratch(self.folder, index, "columns")
        reads = Scratch(self.folder, index_type(int(counts.data.max())), "counts")
        starts = counts.indptr
        for rows in row_blocks(starts):
            part = slice(starts[rows.start], starts[rows.stop])
            own_starts = starts[rows.start : rows.stop + 1] - starts[rows.start]
            block = sp.csr_array(
                (counts.data[part].copy(), number[counts.indices[part]], own_starts),
                shape=(len(own_starts) - 1, width),
            )
            block.sort_indices()
            columns.append(block.indices)
            reads.append(block.data)
        self.arrays["columns"] = (index.str, columns.count)
        self.arrays["counts"] = (reads.dtype.str, reads.count)
        self._write("row_starts", index, [starts])
        return mapped_counts(reads.map(), columns.map(), starts, width)

    def _write(self, name: str, dtype: Any, parts: list[NDArray[Any]]) -> None:
        file = Scratch(self.folder, dtype, name)
        for part in parts:
            file.append(part)
        self.arrays[name] = (file.dtype.str, file.count)
        file.file.close()


class _Biom:
    """A BIOM 2.1 file, read in blocks; whatever it raises becomes `_Irregular`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Biom:
        import h5py

        try:
            self.file = h5py.File(self.path, "r", rdcc_nbytes=_CHUNK_CACHE)
            self.sample_ids = [_text(one) for one in self.file["sample/ids"][()]]
            check_ids(self.sample_ids, [], self.path)
            self.features = self.file["observation/ids"]
            matrix = self.file["sample/matrix"]
            self.data, self.indices = matrix["data"], matrix["indices"]
            self.starts = np.asarray(matrix["indptr"], dtype=np.int64)
        except InputError:
            raise
        except Exception as error:
            raise _Irregular(one_line(error)) from error
        starts = self.starts
        if (
            len(starts) != len(self.sample_ids) + 1
            or starts[0] != 0
            or (np.diff(starts) < 0).any()
            or not starts[-1] <= min(len(self.data), len(self.indices))
            or not len(self.features)
        ):
            raise _Irregular("samples and entries do not fit")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def names(self) -> Iterator[list[bytes]]:
        """Ids of the features, in parts."""
        for low in range(0, len(self.features), _NAMES_AT_ONCE):
            try:
                block = self.features[low : low + _NAMES_AT_ONCE].tolist()
            except Exception as error:
                raise _Irregular(one_line(error)) from error
            yield [one if isinstance(one, bytes) else str(one).encode() for one in block]

    def blocks(self, rank: NDArray[np.int64]) -> Iterator[tuple[int, sp.csr_array]]:
        """First sample and int64 counts of some samples; columns are ranks of the features."""
        for rows in row_blocks(self.starts):
            part = slice(self.starts[rows.start], self.starts[rows.stop])
            try:
                data = np.asarray(self.data[part], dtype=np.float64)
                features = np.asarray(self.indices[part])
            except Exception as error:
                raise _Irregular(one_line(error)) from error
            if len(features) and not 0 <= features.min() <= features.max() < len(rank):
                raise _Irregular("entries of features that are not there")
            starts = self.starts[rows.start : rows.stop + 1] - self.starts[rows.start]
            block = sp.csr_array((data, rank[features], starts), (len(starts) - 1, len(rank)))
            block.sum_duplicates()
            data = block.data
            if not np.isfinite(data).all() or (data < 0).any() or (data != np.floor(data)).any():
                raise _Irregular("counts that are no whole numbers")
            block = block.astype(np.int64)
            block.eliminate_zeros()
            yield rows.start, block


def index_type(*numbers: int) -> np.dtype[Any]:
    """The smaller of int32 and int64 that holds these numbers."""
    return np.dtype(np.int32 if max(numbers) <= np.iinfo(np.int32).max else np.int64)


def _text(name: Any) -> str:
    return name.decode("utf-8") if isinstance(name, bytes) else str(name)
