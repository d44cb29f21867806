"""Rows of unequal length, packed as `aam_kernels` takes them and padded as torch does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rows:
    """Rows of unequal length, packed and padded.

    Attributes:
        lengths: of the rows.
        device: where they lie.
        dtype: of the values.
    """

    lengths: tuple[int, ...]
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    @property
    def longest(self) -> int:
        """Slots of a padded row."""
        return max(self.lengths)

    @property
    def equal(self) -> bool:
        """Whether nothing is padded."""
        return min(self.lengths) == self.longest

    @property
    def offsets(self) -> Tensor:
        """(n + 1,) int32."""
        return torch.tensor((0, *self.lengths)).cumsum(0).to(self.device, torch.int32)

    @property
    def real(self) -> Tensor:
        """(rows, longest) bool, True where a slot is filled."""
        slots = torch.arange(self.longest)
        return (slots < torch.tensor(self.lengths)[:, None]).to(self.device)

    def draw(self, *shape: int) -> Tensor:
        """(total, *shape) from a fixed seed."""
        generator = torch.Generator().manual_seed(11)
        values = torch.randn(sum(self.lengths), *shape, generator=generator)
        return values.to(self.device, self.dtype)

    def pad(self, packed: Tensor) -> Tensor:
        """(total, ...) -> (rows, longest, ...), 0 where there is no row."""
        padded = packed.new_zeros(len(self.lengths), self.longest, *packed.shape[1:])
        padded[self.real] = packed
        return padded


def between(shortest: int, longest: int, count: int) -> tuple[int, ...]:
    """Lengths drawn from a fixed seed; the first is the longest."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(shortest, longest + 1, (count - 1,), generator=generator)
    return (longest, *drawn.tolist())
