"""Samples, and distinct ASVs, as ragged batches in which every ASV stands once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self

from aam.data.sequences import ragged_rows, tokenize
from aam.data.table import FeatureTable
from aam.data.texts import Texts, ranges
from aam.errors import DataFact, InputError, name_some
from aam_kernels import Ragged

BATCH_TOKENS = 16_384  # of a step of ASVs, where no number of ASVs is given
_ROWS_AT_ONCE = 4096  # samples whose ASVs are looked up together


@dataclass(frozen=True)
class AsvBatch:
    """Some rows of a dataset, and the tokens of their ASVs."""

    rows: Tensor  # (n,) int64, of each in the dataset
    tokens: Ragged  # the batch's distinct ASVs: values (total_tokens,) uint8, one row an ASV

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str) -> Self:
        """The batch on ``device``."""
        known = {name: one for name, one in vars(self).items() if one is not None}
        moved = {name: one.to(device, non_blocking=True) for name, one in known.items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class Batch(AsvBatch):
    """Some samples, their ASVs and what is known of them."""

    asv_ids: Tensor  # (distinct,) int64, of each row of tokens in dataset.sequences
    slots: Ragged  # the ASVs of each sample: values (total_slots,) int64, rows of tokens
    counts: Tensor  # (total_slots,) float32, reads
    targets: Tensor | None  # (n,) float32, or int64 classes; None without a target
    categories: Tensor | None  # (n, columns) int64, 0 = unknown or missing


class _Tokenized:
    """Distinct sequences, in memory or in a mapped file; tokens are made when asked for."""

    def __init__(self, sequences: Sequence[str], max_bp: int) -> None:
        self.sequences, self.max_bp = Texts.of(sequences), max_bp
        # (sequences,) tokens of each, START included
        self.sequence_lengths = np.minimum(self.sequences.lengths, max_bp) + 1

    def gather_tokens(self, asv_ids: NDArray[np.int64]) -> Ragged:
        """Tokens of ``sequences[asv_ids]``, one row each, uint8."""
        return tokenize(self.sequences.take(asv_ids), self.max_bp)


class AsvDataset(_Tokenized):
    """Some distinct sequences, cut at ``max_bp``; what `SampleDataset` is to samples."""

    unit = "ASVs"
    fills_memory = False  # steps of one size learn best: memory only decides their micro-batches

    def __init__(self, sequences: Sequence[str], max_bp: int) -> None:
        super().__init__(sequences, max_bp)
        mean = float(self.sequence_lengths.mean()) if len(self) else 1.0
        self.default_batch = max(2, round(BATCH_TOKENS / mean))

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def batch(
        self, rows: Sequence[int] | NDArray[np.int64], *, generator: torch.Generator | None = None
    ) -> AsvBatch:
        """Gather ASVs by their number in the dataset; nothing of it is random."""
        wanted = np.asarray(rows, dtype=np.int64)
        return AsvBatch(torch.from_numpy(wanted), self.gather_tokens(wanted))

    def entries(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The one ASV of each row, as `SampleDataset.entries` gives them."""
        return np.arange(len(self) + 1), np.arange(len(self))


class SampleDataset(_Tokenized):
    """A feature table as samples of ASVs, ordered: the table's order is all the same."""

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
        targets: NDArray[Any] | Tensor | Sequence[float] | None = None,
        categories: NDArray[Any] | Tensor | None = None,
    ) -> None:
        """Order the table's sequences and choose each sample's ASVs; InputError where it has none.

        Args:
            table: samples and counts.
            max_bp: bases kept of a sequence.
            token_limit: ASVs kept of a sample.
            asv_sampling: which ones: the most abundant (ties by sequence), the first of the
                table, or a new random choice in every batch.
            targets: ``(samples,)`` numbers (float32 in a batch) or integer classes (int64).
            categories: ``(samples, columns)`` integers.
        """
        table = table.ordered()
        super().__init__(table.feature_ids, max_bp)
        self.sample_ids, self.asv_sampling = table.sample_ids, asv_sampling
        self._position = table.position
        self._row_starts = table.counts.indptr.astype(np.int64)
        self._asvs, self._counts = table.counts.indices, table.counts.data  # of every entry
        full = np.diff(self._row_starts)  # (samples,) ASVs of each
        empty = [self.sample_ids[row] for row in np.flatnonzero(full == 0)]
        if empty:
            raise InputError(
                f"{table.source}: {len(empty)} samples have no reads ({name_some(empty)}): remove "
                "them or set --rarefy-depth"
            )
        self.asv_count = np.minimum(full, token_limit)  # (samples,) int64, of each in a batch
        self.facts = self._facts_of_cuts(token_limit, full)
        self._targets, self._categories = _as_tensor(targets), _as_tensor(categories)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def batch(
        self, rows: Sequence[int] | NDArray[np.int64], *, generator: torch.Generator | None = None
    ) -> Batch:
        """Gather samples; the generator draws the ASVs of ``asv_sampling="random"``."""
        wanted = np.array(rows, dtype=np.int64)
        entries, lengths = self._entries(wanted, generator)
        asv_ids, slots = np.unique(self._asvs[entries].astype(np.int64), return_inverse=True)
        picked = torch.from_numpy(wanted)
        return Batch(
            rows=picked,
            tokens=self.gather_tokens(asv_ids),
            asv_ids=torch.from_numpy(asv_ids),
            slots=ragged_rows(slots, lengths),
            counts=torch.from_numpy(self._counts[entries].astype(np.float32)),
            targets=None if self._targets is None else self._targets[picked],
            categories=None if self._categories is None else self._categories[picked],
        )

    def _entries(
        self, rows: NDArray[np.int64], generator: torch.Generator | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Entries of some samples, as the token limit leaves them, and how many each has."""
        starts = self._row_starts[rows]
        lengths, most = self._row_starts[rows + 1] - starts, self.asv_count[rows]
        entries = ranges(starts, lengths)
        if not (lengths > most).any():
            return entries, lengths
        if self.asv_sampling == "random":
            keys = torch.rand(len(entries), generator=generator, dtype=torch.float64).numpy()
        elif self.asv_sampling == "abundance":
            # Within a sample entries are ordered by sequence, and equal keys keep their order.
            keys = -self._counts[entries].astype(np.int64)
        else:
            assert self._position is not None
            keys = self._position[self._asvs[entries]]
        return entries[_lowest_of_each(keys, lengths, most)], most

    def limit_asvs(self, rows: NDArray[np.int64], most: NDArray[np.int64]) -> None:
        """Keep at most ``most`` (n,) ASVs of some samples, chosen as at the token limit."""
        self.asv_count[rows] = np.minimum(self.asv_count[rows], most)

    def entries(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Starts ``(samples + 1,)`` and, one after the other, ASVs ``(entries,)`` of all samples.

        As the token limit leaves them; with ``asv_sampling="random"`` all that may be drawn.
        """
        if self.asv_sampling == "random" or (self.asv_count == np.diff(self._row_starts)).all():
            return self._row_starts, self._asvs
        starts = np.concatenate([[0], np.cumsum(self.asv_count)])
        return starts, self._asvs[self._entries(np.arange(len(self)))[0]]

    def asvs_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The distinct ASVs of some samples, as sorted indices of ``sequences``; see `entries`."""
        starts, asvs = self.entries()
        seen = np.zeros(len(self.sequences), dtype=bool)
        for part in np.array_split(rows, len(rows) // _ROWS_AT_ONCE + 1):
            seen[asvs[ranges(starts[part], np.diff(starts)[part])]] = True
        return np.flatnonzero(seen)

    def _facts_of_cuts(self, token_limit: int, full: NDArray[np.int64]) -> list[DataFact]:
        facts = []
        lengths = self.sequences.lengths
        number_cut = int((lengths > self.max_bp).sum())
        if number_cut:
            cut = self.sequences.cut(self.max_bp)
            alike = cut.repeats(cut.order())
            what = f"sequences cut at {self.max_bp} bases"
            detail = f"longest {lengths.max()}, {alike} equal to another after the cut"
            facts.append(DataFact(what, number_cut, detail, "cut"))
        left_out = np.maximum(full - token_limit, 0)
        if left_out.any():
            what = f"samples cut at {token_limit} ASVs ({self.asv_sampling})"
            detail = f"{left_out.sum()} of {full.sum()} (sample, ASV) entries left out, "
            detail += f"largest sample {full.max()}"
            facts.append(DataFact(what, int((left_out > 0).sum()), detail, "cut"))
        return facts


def _lowest_of_each(
    keys: NDArray[Any], lengths: NDArray[np.int64], most: NDArray[np.int64]
) -> NDArray[np.int64]:
    """In order, the entries whose key is among the ``most`` lowest of their segment."""
    segment = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((keys, segment))  # stable: equal keys keep their order
    rank = np.arange(len(keys)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.sort(order[rank < most[segment]])


def _as_tensor(values: Any) -> Tensor | None:
    """Numbers as float32 and integers as int64."""
    if values is None:
        return None
    tensor = torch.as_tensor(values)
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)
