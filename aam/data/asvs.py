"""Distinct ASVs as ragged batches: what is learned of sequences needs no samples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aam.data.texts import Texts
from aam.data.tokens import MappedTokens, ResidentTokens
from aam_kernels import Ragged

BATCH_TOKENS = 16_384
"""Tokens of a step, where no number of ASVs is given."""


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

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> AsvBatch:
        """Gather ASVs by their number in the dataset."""
        wanted = np.asarray(rows, dtype=np.int64)
        tokens = self.gather_tokens(wanted)
        return AsvBatch(torch.from_numpy(wanted), tokens).to(tokens.values.device)

    def gather_tokens(self, rows: NDArray[np.int64]) -> Ragged:
        """Return the tokens of some ASVs, one row each, uint8, on their device."""
        return self.tokens.gather(rows)

    def entries(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the one ASV of each row, as `SampleDataset.entries` does."""
        return np.arange(len(self) + 1), np.arange(len(self))
