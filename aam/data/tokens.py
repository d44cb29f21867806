"""Tokens of a table's sequences: all in memory, or made from a mapped file when asked for."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aam.data.rows import offsets_of, ranges
from aam.data.sequences import START, TOKEN_OF_BYTE, tokenize
from aam.data.texts import Texts
from aam_kernels import Ragged

# A sequence in the index stands after a line break, which becomes its START.
_TOKEN_OF_LINE = TOKEN_OF_BYTE.copy()
_TOKEN_OF_LINE[ord("\n")] = START


class ResidentTokens:
    """Tokens of all sequences, on one device.

    Attributes:
        lengths: ``(sequences,)`` int64, tokens of each sequence, START included.
    """

    def __init__(self, sequences: Any, max_bp: int) -> None:
        """Tokenise all sequences, cut at ``max_bp`` bases."""
        self.tokens = tokenize(sequences, max_bp)[0]
        self.lengths: NDArray[Any] = np.diff(self.tokens.offsets.numpy().astype(np.int64))

    @property
    def device(self) -> torch.device:
        """Where tokens are given."""
        return self.tokens.values.device

    def to(self, device: torch.device | str) -> ResidentTokens:
        """The same, held on ``device``."""
        other = copy.copy(self)
        other.tokens = self.tokens.to(device)
        return other

    def gather(self, asv_ids: NDArray[np.int64]) -> Ragged:
        """Tokens of some sequences, one row each, uint8."""
        lengths = self.lengths[asv_ids]
        offsets = offsets_of(lengths).to(self.device, non_blocking=True)
        wanted = torch.from_numpy(np.asarray(asv_ids)).to(self.device, non_blocking=True)
        if len(self.lengths) and (self.lengths == self.tokens.max_length).all():
            # Amplicons cut to one length: whole rows are copied.
            values = self.tokens.values.view(-1, self.tokens.max_length)[wanted].flatten()
        else:
            shift = self.tokens.offsets[wanted] - offsets[:-1]
            total = int(lengths.sum())
            values = self.tokens.values[
                shift.repeat_interleave(offsets.diff(), output_size=total)
                + torch.arange(total, device=self.device)
            ]
        return Ragged(values, offsets, int(lengths.max(initial=0)))


class MappedTokens:
    """Tokens made from a mapped file of sequences whenever they are asked for.

    Attributes:
        lengths: ``(sequences,)`` int64, tokens of each sequence, START included.
        device: where tokens are given.
    """

    def __init__(self, sequences: Texts, max_bp: int) -> None:
        """Look at the sequences of an index, each after a line break."""
        self.buffer, self.starts = sequences.buffer, sequences.starts - 1
        self.lengths: NDArray[np.int64] = np.minimum(sequences.lengths, max_bp) + 1
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> MappedTokens:
        """The same, given on ``device``; the file stays where it is."""
        other = copy.copy(self)
        other.device = torch.device(device)
        return other

    def gather(self, asv_ids: NDArray[np.int64]) -> Ragged:
        """Tokens of some sequences, one row each, uint8."""
        lengths = self.lengths[asv_ids]
        values = _TOKEN_OF_LINE[self.buffer[ranges(self.starts[asv_ids], lengths)]]
        most = int(lengths.max(initial=0))
        return Ragged(torch.from_numpy(values), offsets_of(lengths), most).to(self.device)
