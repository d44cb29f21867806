"""The order of an epoch: every sample once, a pure function of (seed, epoch)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aam.errors import InputError

MINIMUM_BATCH = 2  # a distance needs a pair


@dataclass(frozen=True)
class EpochPlan:
    """Random batches of a fixed number of samples.

    A remainder of one sample joins the batch before it, since one sample has no distances.
    """

    rows: np.ndarray  # (n,) rows of the dataset
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < MINIMUM_BATCH:
            raise InputError(
                f"--batch-size {self.batch_size}: at least {MINIMUM_BATCH} samples are needed"
            )
        if len(self.rows) < MINIMUM_BATCH:
            raise InputError(
                f"{len(self.rows)} training samples: at least {MINIMUM_BATCH} are needed; "
                "use more samples or a smaller --validation-fraction"
            )
        if self.batch_size > len(self.rows):
            raise InputError(
                f"--batch-size {self.batch_size} is larger than the {len(self.rows)} training "
                "samples; choose a smaller one"
            )

    def __len__(self) -> int:
        """Batches an epoch."""
        full, rest = divmod(len(self.rows), self.batch_size)
        return full + (rest >= MINIMUM_BATCH)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The rows of each batch of an epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        starts = np.arange(1, len(self)) * self.batch_size
        return np.split(order, starts)
