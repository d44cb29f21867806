"""What a step will need: a measured number of bytes for each kind of thing that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

MOST_MICRO_BATCHES = 4096
LEAST_MARGIN = 0.05  # steps alike differ by that
DRIFT, LATEST = 0.03, 5  # relative median error, of so many steps, that is no longer noise
# Within one table tokens, slots and ASVs grow together. Where few steps cannot tell whose the bytes
# are, rates are taken near these, relative to that of a token.
EXPECTED = np.array([1.0, 4.0, 1.0, 0.0, 100.0])
TIE = 0.02  # relative error of what a step holds that weighs as much as rates of these


class StepSize(NamedTuple):
    """What a step holds in memory at the same time."""

    tokens: float  # of its largest micro-batch of ASVs
    slots: float  # (sample, ASV) pairs of its largest micro-batch of samples
    asvs: float  # distinct ones of the whole step, whose vectors are all held
    longest: float  # slots of its largest sample; no micro-batch is smaller
    step: float = 1.0  # the step itself, whatever it holds

    def split(self, count: int) -> StepSize:
        """The same step in so many micro-batches."""
        slots = max(self.slots / count, self.longest)
        return self._replace(tokens=self.tokens / count, slots=slots)


@dataclass(frozen=True)
class StepContents:
    """What the samples of a dataset hold, and with it any step of them."""

    starts: np.ndarray  # (samples + 1,) int64: entries of sample i are starts[i]:starts[i + 1]
    asvs: np.ndarray  # (entries,) int64, indices of `lengths`
    lengths: np.ndarray  # (distinct ASVs,) tokens to encode; 0 where their vectors are known
    ranks: int = 1  # that share the ASVs and the samples of each step

    @cached_property
    def counts(self) -> np.ndarray:
        """ASVs of each sample, (samples,)."""
        return np.diff(self.starts)

    def of(self, row: int) -> np.ndarray:
        """ASVs of one sample."""
        return self.asvs[self.starts[row] : self.starts[row + 1]]

    def size(self, rows: Sequence[int] | np.ndarray) -> StepSize:
        """What a rank holds of the step of these samples in one micro-batch."""
        distinct, counts = np.unique(np.concatenate([*map(self.of, rows)])), self.counts[rows]
        tokens, longest = float(self.lengths[distinct].sum()), float(counts.max())
        slots = max(float(counts.sum()) / self.ranks, longest)
        return StepSize(tokens / self.ranks, slots, float(len(distinct)), longest)


@dataclass
class CostModel:
    """Peak memory of a step, fitted to measured ones; in bytes."""

    base: float  # in use before a step, now
    rates: tuple[float, ...]  # for each number of a `StepSize`, >= 0
    margin: float = LEAST_MARGIN  # kept free, relative: the largest error of a measured step
    rise: float = 0.0  # of the base since steps were measured
    excess: list[float] = field(default_factory=list)  # of the latest steps over predictions

    @classmethod
    def fit(cls, sizes: Sequence[StepSize], held: Sequence[float], base: float) -> CostModel:
        """Fit non-negative rates to what steps held beside the base."""
        from scipy.optimize import nnls

        things, measured = np.array(sizes), np.maximum(held, 1.0)
        peaks = base + measured
        unit = EXPECTED * measured.max() / (things @ EXPECTED).max()
        tie = TIE * (measured / peaks).max() * np.eye(len(unit))
        matrix = np.vstack([things * unit / peaks[:, None], tie])
        rates = nnls(matrix, np.concatenate([measured / peaks, 0 * unit]))[0] * unit
        error = float(np.abs((things @ rates - measured) / peaks).max())
        return cls(base, tuple(rates.tolist()), max(LEAST_MARGIN, error))

    @property
    def constant(self) -> float:
        """What a step takes that holds nothing: program, data, weights, optimizer state."""
        return self.base + self.rates[-1]

    def predict(self, size: StepSize) -> float:
        """Expected peak."""
        return self.base + float(np.dot(size, self.rates))

    def bound(self, size: StepSize) -> float:
        """Peak to plan with: the expected one and the margin."""
        return self.predict(size) * (1 + self.margin)

    def micro_batches(self, size: StepSize, budget: float) -> int | None:
        """Fewest in which a step stays in the budget; None if no number does.

        With the margin, unless it is the margin alone that does not fit.
        """
        for cost in (self.bound, self.predict):
            for count in range(1, MOST_MICRO_BATCHES + 1):
                if cost(size.split(count)) <= budget:
                    return count
        return None

    def check(self, size: StepSize, peak: float) -> bool:
        """Compare a step of training with its prediction; whether the model has moved.

        What a process holds beside its steps grows: the base follows at once what a step took over
        its bound, and else the median error of five steps where that is above 3 %; back too, but
        never below what was measured.
        """
        self.excess = [*self.excess, peak - self.predict(size)][-LATEST:]
        moved, median = max(0.0, peak - self.bound(size)), float(np.median(self.excess))
        if not moved and len(self.excess) == LATEST and abs(median) > DRIFT * peak:
            moved = max(median, -self.rise)
        if moved:
            self.base, self.rise, self.excess = self.base + moved, self.rise + moved, []
        return bool(moved)
