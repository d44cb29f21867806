"""Feature tables: BIOM 2.1 (HDF5), BIOM 1.0 (JSON), QIIME 2 artifacts and TSV; rarefaction."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from aam.data.sequences import resolve_sequences
from aam.data.table_files import RawTable, read_raw_table
from aam.data.texts import Texts
from aam.errors import InputError, name_some

# numpy's limit for exact draws without replacement.
_MOST_READS = 1_000_000_000
_DIGEST_BLOCK = 2**16


@dataclass(frozen=True)
class FeatureTable:
    """How many reads of each feature (ASV) each sample has.

    Attributes:
        sample_ids: one string a sample, in the file's order.
        feature_ids: one string a feature; after ``read_table`` its DNA in upper case.
        counts: ``(samples, features)`` integers, no explicit zeros, indices sorted in each row.
        source: the file it came from, for messages.
        by_sequence: whether the features stand in the order of their ids.
    """

    sample_ids: tuple[str, ...]
    feature_ids: Sequence[str]
    counts: sp.csr_array
    source: str
    by_sequence: bool = False

    def select(self, sample_ids: Sequence[str]) -> FeatureTable:
        """Return these samples in this order, without the features that none of them has.

        Raises:
            InputError: an id is not in the table.
        """
        return _without_empty_features(
            tuple(sample_ids), self.feature_ids, self.counts[self.rows_of(sample_ids)], self.source
        )

    def rows_of(self, sample_ids: Sequence[str]) -> np.ndarray:
        """Return the row of each id, int64.

        Raises:
            InputError: an id is not in the table.
        """
        row_of = {name: row for row, name in enumerate(self.sample_ids)}
        unknown = [name for name in sample_ids if name not in row_of]
        if unknown:
            raise InputError(
                f"{self.source}: {len(unknown)} samples are not in the table "
                f"({name_some(unknown)}); it has {name_some(self.sample_ids)}"
            )
        return np.fromiter((row_of[name] for name in sample_ids), np.int64, len(sample_ids))

    def digest(self) -> str:
        """Return a digest of samples, features and counts, whatever the order of the features."""
        sequences, counts = Texts.of(self.feature_ids), self.counts
        if not self.by_sequence:
            order = sequences.order()[0]
            sequences, counts = sequences.take(order), counts[:, order]
            counts.sort_indices()
        digest = hashlib.sha256("\n".join(self.sample_ids).encode() + b"\0")
        for low in range(0, len(sequences), _DIGEST_BLOCK):
            digest.update("\n".join(sequences[low : low + _DIGEST_BLOCK]).encode() + b"\n")
        for numbers in (counts.indptr, counts.indices, counts.data):
            for low in range(0, len(numbers), _DIGEST_BLOCK):
                digest.update(numbers[low : low + _DIGEST_BLOCK].astype(np.int64).tobytes())
        return digest.hexdigest()


def read_table(path: str | Path, *, sequences: str | Path | None = None) -> FeatureTable:
    """Read a feature table whose features are DNA sequences.

    Features that no sample has are left out; annotations such as taxonomy are not read.

    Args:
        path: ``.biom`` (2.1 HDF5 or 1.0 JSON), ``.qza`` with a feature table, or ``.tsv``/``.txt``
            with features as rows (samples as rows where only the header holds DNA).
        sequences: FASTA, or ``.qza`` of sequences, for tables whose ids are not sequences.

    Returns:
        FeatureTable with samples and features in the file's order.

    Raises:
        InputError: the file or its contents cannot be used; one line with the remedy.
    """
    path = Path(path)
    raw = read_raw_table(path)
    counts = _whole_counts(raw, path)
    if counts.nnz == 0:
        raise InputError(
            f"{path}: the table is empty ({counts.shape[0]} samples, {counts.shape[1]} features, "
            "no reads): was everything filtered out?"
        )
    dna = resolve_sequences(
        raw.feature_ids, str(path), None if sequences is None else Path(sequences)
    )
    return _without_empty_features(raw.sample_ids, dna, counts, str(path))


def rarefy(table: FeatureTable, depth: int, seed: int) -> tuple[FeatureTable, tuple[str, ...]]:
    """Draw ``depth`` reads of each sample without replacement.

    A sample's draw depends on ``seed``, its id and its own reads only: not on the order of rows
    and columns, nor on the other samples.

    Args:
        table: raw counts.
        depth: reads to keep a sample, at least 1.
        seed: not negative.

    Returns:
        The rarefied table (samples in order, features that lost their last read left out) and
        the ids of the samples dropped for having fewer than ``depth`` reads.

    Raises:
        InputError: every sample has fewer reads, or ``depth`` or ``seed`` is out of range.
    """
    if depth < 1 or seed < 0:
        raise InputError(f"rarefaction needs depth >= 1 and seed >= 0, got {depth} and {seed}")
    reads = np.asarray(table.counts.sum(axis=1)).ravel()
    check_depth(reads, depth, table.source)
    kept = np.flatnonzero(reads >= depth)
    counts = table.counts[kept]
    # Draws go through each sample's features in the order of their sequences.
    rank = np.argsort(np.argsort(np.array(table.feature_ids, dtype=object)))
    names = [table.sample_ids[row] for row in kept]
    for row, name in enumerate(names):
        start, stop = counts.indptr[row], counts.indptr[row + 1]
        order = start + np.argsort(rank[counts.indices[start:stop]])
        counts.data[order] = draw_reads(counts.data[order], name, depth, seed)
    counts.eliminate_zeros()
    dropped = tuple(table.sample_ids[row] for row in np.flatnonzero(reads < depth))
    return _without_empty_features(tuple(names), table.feature_ids, counts, table.source), dropped


def check_depth(reads: np.ndarray, depth: int, source: str) -> None:
    """Check the samples' reads before a rarefaction.

    Raises:
        InputError: every sample has fewer than ``depth``, or one has more than can be drawn from.
    """
    most = int(reads.max(initial=0))
    if most < depth:
        raise InputError(
            f"{source}: rarefying to {depth} reads drops every one of {len(reads)} samples; "
            f"the largest has {most}: lower --rarefy-depth"
        )
    if most >= _MOST_READS:
        raise InputError(
            f"{source}: a sample has {most} reads; rarefaction takes less than {_MOST_READS}"
        )


def draw_reads(reads: np.ndarray, name: str, depth: int, seed: int) -> np.ndarray:
    """Draw ``depth`` of a sample's reads without replacement.

    Args:
        reads: ``(features,)`` int64 reads of its features, in the order of their sequences.
        name: the sample's id.
        depth: at most the sum of ``reads``.
        seed: not negative.
    """
    generator = np.random.default_rng([seed, *_words_of(name)])
    return generator.multivariate_hypergeometric(reads, depth, method="marginals")


def _words_of(name: str) -> np.ndarray:
    """Return four 32-bit words that stand for a sample's id in a seed."""
    return np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), np.uint32)


def _without_empty_features(
    sample_ids: tuple[str, ...], feature_ids: Sequence[str], counts: sp.csr_array, source: str
) -> FeatureTable:
    """Build the table from the features that have at least one read."""
    present = np.zeros(counts.shape[1], dtype=bool)
    present[counts.indices] = True
    if not present.all():
        column_of = np.cumsum(present) - 1
        shape = (counts.shape[0], int(present.sum()))
        counts = sp.csr_array(
            (counts.data, column_of[counts.indices].astype(counts.indices.dtype), counts.indptr),
            shape=shape,
        )
        feature_ids = tuple(np.array(feature_ids, dtype=object)[present])
    counts.sort_indices()
    return FeatureTable(sample_ids, feature_ids, counts, source)


def _whole_counts(raw: RawTable, path: Path) -> sp.csr_array:
    """Return int64 counts ``(samples, features)``, or raise where a value is no whole count."""
    counts = raw.counts
    data = counts.data
    with np.errstate(invalid="ignore"):
        problems = (
            ("are not numbers (NaN or infinite)", ~np.isfinite(data), "fill them with 0"),
            ("are negative", data < 0, "give raw read counts"),
            (
                "are not whole numbers",
                data != np.floor(data),
                "give raw read counts, not relative abundances",
            ),
        )
    for problem, wrong, remedy in problems:
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
