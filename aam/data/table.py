"""Feature tables: checked counts of DNA sequences in samples, and rarefaction."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from aam.data.sequences import resolve_sequences
from aam.data.table_files import RawTable, as_raw_table, check_ids, read_raw_table
from aam.data.texts import Texts
from aam.errors import InputError

# numpy's limit for exact draws without replacement.
_MOST_READS = 1_000_000_000
_DIGEST_BLOCK = 2**14  # strings or numbers


@dataclass(frozen=True)
class FeatureTable:
    """How many reads of each feature (ASV) each sample has."""

    sample_ids: tuple[str, ...]  # in the file's order
    feature_ids: Sequence[str]  # after `read_table` DNA in upper case
    counts: sp.csr_array  # (samples, features) integers, no explicit zeros, rows sorted
    source: str  # the file it came from, for messages
    position: NDArray[np.int64] | None = None
    """``(features,)`` place of each in the file, where they stand in the order of their ids."""

    def rows_of(self, sample_ids: Sequence[str]) -> NDArray[np.int64]:
        """The row of each id."""
        row_of = {name: row for row, name in enumerate(self.sample_ids)}
        return np.array([row_of[name] for name in sample_ids], dtype=np.int64)

    def select(self, sample_ids: Sequence[str]) -> FeatureTable:
        """These samples in this order, without the features that none of them has."""
        return self.with_samples(tuple(sample_ids), self.counts[self.rows_of(sample_ids)])

    def with_samples(self, sample_ids: tuple[str, ...], counts: sp.csr_array) -> FeatureTable:
        """Other samples of the same features, without the features that none of them has."""
        present = np.zeros(counts.shape[1], dtype=bool)
        present[counts.indices] = True
        features = Texts.of(self.feature_ids).take(present)
        position = None if self.position is None else self.position[present]
        return FeatureTable(sample_ids, features, counts[:, present], self.source, position)

    def ordered(self) -> FeatureTable:
        """The same table with its features in the order of their ids."""
        if self.position is not None:
            return self
        features = Texts.of(self.feature_ids)
        position = features.order()
        counts = self.counts[:, position]
        counts.sort_indices()
        return FeatureTable(self.sample_ids, features.take(position), counts, self.source, position)

    def digest(self) -> str:
        """A digest of samples, features and counts, whatever the order of the features."""
        table = self.ordered()
        texts, counts = Texts.of(table.feature_ids), table.counts
        digest = hashlib.sha256("\n".join(table.sample_ids).encode() + b"\0")
        for low in range(0, len(texts), _DIGEST_BLOCK):
            digest.update(texts[low : low + _DIGEST_BLOCK].packed().buffer.tobytes())
        for numbers in (texts.lengths, counts.indptr, counts.indices, counts.data):
            for low in range(0, len(numbers), _DIGEST_BLOCK):
                digest.update(numbers[low : low + _DIGEST_BLOCK].astype(np.int64).tobytes())
        return digest.hexdigest()


def read_table(source: Any, *, sequences: str | Path | None = None) -> FeatureTable:
    """Read a feature table whose features are DNA sequences, in the file's order.

    Features that no sample has are left out; annotations such as taxonomy are not read.
    InputError where the file or its contents cannot be used.

    Args:
        source: path of a ``.biom`` (2.1 HDF5 or 1.0 JSON), a ``.qza`` with a feature table, or a
            ``.tsv``/``.txt`` with features as rows (samples as rows where only the header holds
            DNA); or, in memory, a ``biom.Table`` or a pandas frame (samples x features).
        sequences: FASTA, or ``.qza`` of sequences, for tables whose ids are not sequences.
    """
    if isinstance(source, FeatureTable):
        return source
    in_memory = not isinstance(source, (str, Path))
    path = Path("the table") if in_memory else Path(source)
    raw = as_raw_table(source, path) if in_memory else read_raw_table(path)
    check_ids("sample", raw.sample_ids, path)
    check_ids("feature", raw.feature_ids, path)
    counts = _whole_counts(raw, path)
    if counts.nnz == 0:
        raise InputError(
            f"{path}: the table is empty ({counts.shape[0]} samples, {counts.shape[1]} features, "
            "no reads): was everything filtered out?"
        )
    fasta = None if sequences is None else Path(sequences)
    dna = resolve_sequences(raw.feature_ids, str(path), fasta)
    samples = tuple(raw.sample_ids)
    return FeatureTable(samples, dna, counts, str(path)).with_samples(samples, counts)


def _whole_counts(raw: RawTable, path: Path) -> sp.csr_array:
    """Counts ``(samples, features)`` as int64; InputError where a value is no whole count."""
    counts = raw.counts
    data = counts.data
    for wrong, problem, remedy in (
        (~np.isfinite(data), "are not numbers (NaN or infinite)", "fill them with 0"),
        (data < 0, "are negative", "give raw read counts"),
        (data != np.floor(data), "are not whole numbers",
         "give raw read counts, not relative abundances"),
    ):  # fmt: skip
        if wrong.any():
            at = int(np.argmax(wrong))
            sample = raw.sample_ids[int(np.searchsorted(counts.indptr, at, side="right")) - 1]
            raise InputError(
                f"{path}: {int(wrong.sum())} counts {problem} "
                f"(sample {sample!r}: {data[at]:g}): {remedy}"
            )
    counts = sp.csr_array((data.astype(np.int64), counts.indices, counts.indptr), counts.shape)
    counts.eliminate_zeros()
    counts.sort_indices()
    return counts


def rarefy(table: FeatureTable, depth: int, seed: int) -> tuple[FeatureTable, tuple[str, ...]]:
    """The table with ``depth`` reads of each sample, and the ids of the samples that have fewer.

    Reads are drawn without replacement; features stand by sequence then. A sample's draw depends
    on ``seed``, its id and its own reads only: not on the order of rows and columns, nor on the
    other samples. InputError where none has enough reads, or one more than can be drawn from.
    """
    table = table.ordered()
    reads = table.counts.sum(axis=1)
    check_depth(reads, depth, table.source)
    dropped = tuple(table.sample_ids[row] for row in np.flatnonzero(reads < depth))
    kept, counts = rarefied(table.counts, table.sample_ids, depth, seed, table.source)
    return table.with_samples(tuple(table.sample_ids[row] for row in kept), counts), dropped


def check_depth(reads: NDArray[np.int64], depth: int, source: str) -> None:
    """Raise InputError where every sample has fewer reads than it is to be rarefied to."""
    most = int(reads.max(initial=0))
    if most < depth:
        raise InputError(
            f"{source}: rarefying to {depth} reads drops every one of {len(reads)} samples; "
            f"the largest has {most}: lower --rarefy-depth"
        )


def rarefied(
    counts: sp.csr_array, names: Sequence[str], depth: int, seed: int, source: str
) -> tuple[NDArray[np.int64], sp.csr_array]:
    """Rows of ``counts`` with enough reads, and ``depth`` reads of each drawn by `rarefy`'s rules.

    ``names`` are the rows' sample ids; columns stand in the order of their sequences.
    """
    reads = counts.sum(axis=1)
    most = int(reads.max(initial=0))
    if most >= _MOST_READS:
        raise InputError(
            f"{source}: a sample has {most} reads; rarefaction takes less than {_MOST_READS}"
        )
    kept = np.flatnonzero(reads >= depth)
    counts = sp.csr_array(counts[kept])
    for row, at in enumerate(kept.tolist()):
        # Four 32-bit words stand for the sample's id in the seed.
        digest = hashlib.blake2b(names[at].encode(), digest_size=16).digest()
        generator = np.random.default_rng([seed, *np.frombuffer(digest, np.uint32)])
        own = slice(counts.indptr[row], counts.indptr[row + 1])
        counts.data[own] = generator.multivariate_hypergeometric(
            counts.data[own], depth, method="marginals"
        )
    counts.eliminate_zeros()
    return kept, counts
