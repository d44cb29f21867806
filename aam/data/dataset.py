"""Samples and distinct ASVs as ragged batches; every ASV of a batch stands once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aam.data.sequences import MappedTokens, ResidentTokens
from aam.data.table import FeatureTable
from aam.data.texts import Texts, offsets_of, ranges
from aam.errors import DataFact, InputError, name_some
from aam_kernels import Ragged

BATCH_TOKENS = 16_384
"""Tokens of a step of ASVs, where no number of ASVs is given."""

_ROWS_AT_ONCE = 4096
"""Samples whose ASVs are looked up together."""


@dataclass(frozen=True)
class Batch:
    """Some samples, their ASVs and what is known of them.

    Attributes:
        rows: ``(n,)`` int64, row of each sample in the dataset.
        tokens: the batch's distinct ASVs: values ``(total_tokens,)`` uint8, one row an ASV.
        asv_ids: ``(distinct,)`` int64, index of each row of ``tokens`` in ``dataset.sequences``.
        slots: the ASVs of each sample: values ``(total_slots,)`` int64, rows of ``tokens``.
        counts: ``(total_slots,)`` float32, reads.
        targets: ``(n,)`` float32, or int64 classes; None without a target.
        categories: ``(n, columns)`` int64, 0 = unknown or missing; None without columns.
    """

    rows: Tensor
    tokens: Ragged
    asv_ids: Tensor
    slots: Ragged
    counts: Tensor
    targets: Tensor | None
    categories: Tensor | None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``."""
        return Batch(
            rows=self.rows.to(device, non_blocking=True),
            tokens=self.tokens.to(device),
            asv_ids=self.asv_ids.to(device, non_blocking=True),
            slots=self.slots.to(device),
            counts=self.counts.to(device, non_blocking=True),
            targets=None if self.targets is None else self.targets.to(device, non_blocking=True),
            categories=(
                None if self.categories is None else self.categories.to(device, non_blocking=True)
            ),
        )


class SampleDataset:
    """A feature table as tokens: distinct sequences held once, batches gathered from them.

    ASVs are ordered by sequence, so that the order of the table's rows changes nothing; only
    ``asv_sampling="first"`` keeps the table's order, which is what it asks for.

    Attributes:
        sample_ids: ids, row by row, as in the table.
        sequences: distinct sequences, which ``Batch.asv_ids`` index.
        columns: ``(sequences,)`` column of each sequence in the table.
        tokens: their tokens, on the dataset's device or in a mapped file.
        asv_count: ``(samples,)`` int64, ASVs of each sample in a batch (at most ``token_limit``).
        sequence_lengths: ``(sequences,)`` int64, tokens of each sequence, START included.
        facts: sequences cut, samples cut at ``token_limit``.
    """

    unit = "samples"
    fills_memory = True  # where a memory is given, a step holds as many samples as fit
    default_batch = 8

    def __init__(
        self,
        table: FeatureTable,
        *,
        max_bp: int = 150,
        token_limit: int = 1024,
        asv_sampling: Literal["abundance", "first", "random"] = "abundance",
        targets: np.ndarray | Tensor | Sequence[float] | None = None,
        categories: np.ndarray | Tensor | None = None,
        share_asvs: bool = True,
    ) -> None:
        """Tokenise the table's sequences and choose each sample's ASVs.

        Args:
            table: samples and counts; every sample needs a read.
            max_bp: bases kept of a sequence.
            token_limit: ASVs kept of a sample.
            asv_sampling: which ones: the most abundant (ties by sequence), the first of the
                table, or a new random choice in every batch.
            targets: ``(samples,)`` numbers (float32 in a batch) or integer classes (int64).
            categories: ``(samples, columns)`` integers.
            share_asvs: False gives every slot a token row of its own.

        Raises:
            InputError: a sample has no reads, or an option is out of range.
        """
        if token_limit < 1:
            raise InputError(f"token_limit must be at least 1, got {token_limit}")
        if asv_sampling not in ("abundance", "first", "random"):
            raise InputError(
                f"asv_sampling must be abundance, first or random, got {asv_sampling!r}"
            )
        self.sample_ids = table.sample_ids
        self.token_limit = token_limit
        self.asv_sampling = asv_sampling
        self.share_asvs = share_asvs
        counts = table.counts
        self.sequences = table.feature_ids
        self.columns = np.arange(len(self.sequences))
        if asv_sampling != "first" and not table.by_sequence:
            self.columns = Texts.of(table.feature_ids).order()[0]
            self.sequences = tuple(table.feature_ids[int(column)] for column in self.columns)
            counts = counts[:, self.columns]
        counts.sort_indices()
        self._check_reads(counts, table.source)
        self.tokens: ResidentTokens | MappedTokens = (
            MappedTokens(self.sequences, max_bp)
            if isinstance(self.sequences, Texts)
            else ResidentTokens(self.sequences, max_bp)
        )
        self.sequence_lengths = self.tokens.lengths
        self._row_starts = counts.indptr.astype(np.int64)
        self._asvs, self._counts = counts.indices, counts.data  # of every entry
        full = np.diff(self._row_starts)
        self.facts = self._describe(max_bp, full)
        self.asv_count = np.minimum(full, token_limit)
        self._targets = _as_tensor(targets, len(self), "targets")
        self._categories = _as_tensor(categories, len(self), "categories")

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.sample_ids)

    @property
    def device(self) -> torch.device:
        """Where the tokens are held and batches are made."""
        return self.tokens.device

    def to(self, device: torch.device | str) -> SampleDataset:
        """Return the dataset with its tokens on ``device``; everything else stays here."""
        other = copy.copy(self)
        other.tokens = self.tokens.to(device)
        return other

    def batch(
        self, rows: Sequence[int] | np.ndarray | Tensor, *, generator: torch.Generator | None = None
    ) -> Batch:
        """Gather samples.

        Args:
            rows: rows of the dataset, in any order.
            generator: draws the ASVs of ``asv_sampling="random"``; torch's default if None.

        Returns:
            Batch on the dataset's device.

        Raises:
            IndexError: a row is not in the dataset.
        """
        wanted = np.array(rows, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(
                f"rows must lie in 0..{len(self) - 1}, got {wanted.min()}..{wanted.max()}"
            )
        entries, lengths = self._entries(wanted, generator)
        asvs = self._asvs[entries].astype(np.int64)
        if self.share_asvs:
            asv_ids, slots = np.unique(asvs, return_inverse=True)
        else:
            asv_ids, slots = asvs, np.arange(len(asvs))
        picked = torch.from_numpy(wanted)
        batch = Batch(
            rows=picked,
            tokens=self.gather_tokens(asv_ids),
            asv_ids=torch.from_numpy(asv_ids),
            slots=Ragged(torch.from_numpy(slots), offsets_of(lengths), int(lengths.max(initial=0))),
            counts=torch.from_numpy(self._counts[entries].astype(np.float32)),
            targets=None if self._targets is None else self._targets[picked],
            categories=None if self._categories is None else self._categories[picked],
        )
        return batch.to(self.device)

    def _entries(
        self, rows: np.ndarray, generator: torch.Generator | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Entries of some samples, and how many each has: what the token limit leaves of them."""
        starts = self._row_starts[rows]
        lengths = self._row_starts[rows + 1] - starts
        entries = ranges(starts, lengths)
        most = self.asv_count[rows]
        if not (lengths > most).any():
            return entries, lengths
        if self.asv_sampling == "random":
            keys = torch.rand(len(entries), generator=generator, dtype=torch.float64).numpy()
        elif self.asv_sampling == "abundance":
            # Within a sample entries are ordered by sequence, and equal keys keep their order.
            keys = -self._counts[entries].astype(np.int64)
        else:
            keys = np.arange(len(entries))
        return entries[_lowest_of_each(keys, lengths, most)], most

    def limit_asvs(self, rows: np.ndarray, most: np.ndarray) -> None:
        """Keep fewer ASVs of some samples from now on, chosen as at the token limit.

        Args:
            rows: ``(n,)`` which samples.
            most: ``(n,)`` ASVs each of them keeps; at least 1.
        """
        self.asv_count[rows] = np.minimum(self.asv_count[rows], most)

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the ASVs of all samples, sample by sample, as the token limit leaves them.

        With ``asv_sampling="random"`` all that may be drawn.

        Returns:
            Starts ``(samples + 1,)`` and indices of ``sequences`` ``(entries,)``.
        """
        if self.asv_sampling == "random" or (self.asv_count == np.diff(self._row_starts)).all():
            return self._row_starts, self._asvs
        starts = np.concatenate([[0], np.cumsum(self.asv_count)])
        return starts, self._asvs[self._entries(np.arange(len(self)), None)[0]]

    def asvs_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the distinct ASVs of some samples, as sorted indices of ``sequences``.

        With ``asv_sampling="random"`` all that may be drawn.
        """
        seen = np.zeros(len(self.sequences), dtype=bool)
        for part in np.array_split(rows, max(1, len(rows) // _ROWS_AT_ONCE)):
            if self.asv_sampling == "random":
                starts = self._row_starts[part]
                entries = ranges(starts, self._row_starts[part + 1] - starts)
            else:
                entries = self._entries(part, None)[0]
            seen[self._asvs[entries]] = True
        return np.flatnonzero(seen)

    def sequences_of(self, asv_ids: np.ndarray) -> Sequence[str]:
        """Return some of ``sequences``; a string is made when it is asked for."""
        return Texts.of(self.sequences).take(asv_ids)

    def gather_tokens(self, asv_ids: np.ndarray) -> Ragged:
        """Return the tokens of ``sequences[asv_ids]``, one row each, uint8, on their device."""
        return self.tokens.gather(asv_ids)

    def _check_reads(self, counts: Any, source: str) -> None:
        empty = [self.sample_ids[row] for row in np.flatnonzero(np.diff(counts.indptr) == 0)]
        if empty:
            raise InputError(
                f"{source}: {len(empty)} samples have no reads ({name_some(empty)}): remove them "
                "or set --rarefy-depth"
            )

    def _describe(self, max_bp: int, full: np.ndarray) -> list[DataFact]:
        facts = []
        texts = Texts.of(self.sequences)
        number_cut = int((texts.lengths > max_bp).sum())
        if number_cut:
            longest, alike = int(texts.lengths.max()), texts.cut(max_bp).order()[1]
            detail = f"longest {longest}, {alike} equal to another after the cut"
            facts.append(DataFact(f"sequences cut at {max_bp} bases", number_cut, detail, "cut"))
        over = full > self.token_limit
        if over.any():
            lost = int((full[over] - self.token_limit).sum())
            facts.append(
                DataFact(
                    f"samples cut at {self.token_limit} ASVs ({self.asv_sampling})",
                    int(over.sum()),
                    f"{lost} of {int(full.sum())} (sample, ASV) entries left out, "
                    f"largest sample {int(full.max())}",
                    "cut",
                )
            )
        return facts


def _lowest_of_each(keys: np.ndarray, lengths: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Return, in order, the entries whose key is among the ``most`` lowest of their segment."""
    segment = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((keys, segment))  # stable: equal keys keep their order
    starts = np.cumsum(lengths) - lengths
    rank = np.arange(len(keys)) - np.repeat(starts, lengths)
    return np.sort(order[rank < most[segment]])


def _as_tensor(values: Any, rows: int, name: str) -> Tensor | None:
    """Return numbers as float32 and integers as int64, one row a sample."""
    if values is None:
        return None
    tensor = torch.as_tensor(values)
    if len(tensor) != rows:
        raise ValueError(f"{name}: expected one row a sample ({rows}), got {len(tensor)}")
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)


@dataclass(frozen=True)
class AsvBatch:
    """Some ASVs.

    Attributes:
        rows: ``(n,)`` int64, which of the dataset's ASVs these are.
        tokens: values ``(total_tokens,)`` uint8, one row an ASV.
    """

    rows: Tensor
    tokens: Ragged

    def __len__(self) -> int:
        """Return the number of ASVs."""
        return len(self.rows)

    def to(self, device: torch.device | str) -> AsvBatch:
        """Return the batch on ``device``."""
        return AsvBatch(self.rows.to(device, non_blocking=True), self.tokens.to(device))


class AsvDataset:
    """Some distinct sequences; what `SampleDataset` is to samples, this is to ASVs.

    Attributes:
        sequence_lengths: ``(asvs,)`` int64, tokens of each, START included.
        default_batch: ASVs of a step of about ``BATCH_TOKENS`` tokens.
    """

    unit = "ASVs"
    fills_memory = False  # steps of one size learn best: memory only decides their pieces
    share_asvs = True

    def __init__(self, sequences: Texts, max_bp: int, *, mapped: bool = False) -> None:
        """Tokenise sequences, cut at ``max_bp`` bases.

        Args:
            sequences: the ASVs 0, 1, ... of the dataset.
            max_bp: bases kept of each.
            mapped: they lie in an index on disk, each after a line break, and stay there.
        """
        self.tokens: ResidentTokens | MappedTokens = (
            MappedTokens(sequences, max_bp) if mapped else ResidentTokens(sequences, max_bp)
        )
        self.sequence_lengths = self.tokens.lengths
        mean = float(self.sequence_lengths.mean()) if len(sequences) else 1.0
        self.default_batch = max(2, round(BATCH_TOKENS / mean))

    def __len__(self) -> int:
        """Return the number of ASVs."""
        return len(self.sequence_lengths)

    def to(self, device: torch.device | str) -> AsvDataset:
        """Return the dataset with its tokens on ``device``."""
        other = copy.copy(self)
        other.tokens = self.tokens.to(device)
        return other

    def batch(
        self, rows: Sequence[int] | NDArray[np.int64], *, generator: torch.Generator | None = None
    ) -> AsvBatch:
        """Gather ASVs by their number in the dataset; nothing of it is random."""
        wanted = np.asarray(rows, dtype=np.int64)
        tokens = self.gather_tokens(wanted)
        return AsvBatch(torch.from_numpy(wanted), tokens).to(tokens.values.device)

    def gather_tokens(self, rows: NDArray[np.int64]) -> Ragged:
        """Return the tokens of some ASVs, one row each, uint8, on their device."""
        return self.tokens.gather(rows)

    def entries(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the one ASV of each row, as `SampleDataset.entries` does."""
        return np.arange(len(self) + 1), np.arange(len(self))
