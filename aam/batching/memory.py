"""What a step will need: a cost model fitted to measured steps, and the budget it has to meet.

The peak of a step grows with what it holds: nucleotide tokens, sequences, (sample, ASV) slots.
How many bytes each of them takes depends on the model, the kernels, the optimizer and the device,
so it is measured: a few real steps, a non-negative least-squares fit, and from then on a check of
every step against its prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from aam.batching.meter import Meter
from aam.errors import InputError

GIGABYTE = 1e9
DEFAULT_FRACTION = 0.85  # of what is free
MOST_PIECES = 4096
TOLERANCE = 0.03  # by which a peak may exceed its bound: the batches planned with it stay whole
DRIFT = 0.05  # relative error of a prediction that is no longer noise
DRIFT_STEPS = 3  # in a row, before the model is fitted again
CALIBRATION_STEPS = 10
CALIBRATED_SHARE = 0.85  # of the budget, which no calibration step is predicted to exceed
FASTEST_GROWTH = 64  # times as many samples as in the step before are looked at
FIRST_STEPS = 3  # small ones, whatever they are predicted to take
REPEATED = (3, 6)  # steps that are followed by one in pieces and one of other samples
CALIBRATED_PIECES = 4  # more would take long and say little
REMEMBERED = 64  # steps that a new fit looks at
TIE = 1e-4  # weight of the preference below, far under that of a measurement
# Within one table tokens, ASVs and samples grow together, so few steps cannot always tell whose
# bytes they are. Where they cannot, the bytes are the tokens' and the slots', which hold nearly
# all of them and are what pieces divide.
PREFERENCE = {"tokens": 1.0, "masked": 10.0, "asvs": 10.0, "slots": 1.0, "samples": 10.0,
              "squares": 10.0}  # fmt: skip


@dataclass(frozen=True)
class StepSize:
    """What a step holds in memory at the same time.

    Attributes:
        tokens: nucleotide tokens of its largest piece of ASVs.
        masked: tokens of its largest piece of masked copies.
        asvs: distinct ASVs of the whole step, whose vectors are all held.
        slots: (sample, ASV) entries of its largest piece of samples, mixtures included.
        samples: samples of the whole step, mixtures included.
        squares: sum of squared lengths, for implementations that hold attention matrices.
        longest: slots of its largest sample; no piece is smaller.
    """

    tokens: float
    masked: float
    asvs: float
    slots: float
    samples: float
    squares: float = 0.0
    longest: float = 0.0

    def split(self, pieces: int) -> StepSize:
        """The same step computed in so many pieces."""
        return StepSize(
            tokens=self.tokens / pieces,
            masked=self.masked / pieces,
            asvs=self.asvs,
            slots=max(self.slots / pieces, self.longest),
            samples=self.samples,
            squares=self.squares / pieces,
            longest=self.longest,
        )


FEATURES = tuple(one.name for one in fields(StepSize) if one.name != "longest")


@dataclass(frozen=True)
class CostModel:
    """Peak memory of a step, as a sum of so many bytes for each thing it holds.

    Attributes:
        constant: bytes of a step that holds nothing: program, data, weights, optimizer state.
        rates: bytes for each of ``FEATURES``, all >= 0.
        margin: what `bound` adds to a prediction, relative to it: the largest error of a step left
            out of the fit. Upwards or downwards: so few steps do not tell them apart.
        error: 95th percentile of the relative error of steps left out of the fit.
    """

    constant: float
    rates: tuple[float, ...]
    margin: float = 0.0
    error: float = 0.0

    def predict(self, size: StepSize) -> float:
        """Expected peak, bytes."""
        return float(self.constant + np.dot(self.rates, features(size)))

    def bound(self, size: StepSize) -> float:
        """Peak to plan with, bytes: the expected one and the margin."""
        return self.predict(size) * (1 + self.margin)

    def pieces_that_fit(self, size: StepSize, budget: float) -> int | None:
        """Fewest pieces in which a step stays in the budget; None if no number does.

        With the margin, unless it is the margin alone that fits in no number of pieces.

        Args:
            size: the step in one piece.
            budget: bytes.
        """
        least = size.split(MOST_PIECES)
        cost = self.bound if self.bound(least) <= budget else self.predict
        if cost(least) > budget:
            return None
        if cost(size) <= budget:
            return 1
        low, high = 1, MOST_PIECES  # `low` does not fit, `high` does
        while high - low > 1:
            middle = (low + high) // 2
            if cost(size.split(middle)) <= budget:
                high = middle
            else:
                low = middle
        return high

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; `from_dict` reads it."""
        rates = dict(zip(FEATURES, self.rates, strict=True))
        return {
            "constant": self.constant, "rates": rates, "margin": self.margin, "error": self.error
        }  # fmt: skip

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> CostModel:
        """Read what `to_dict` gave."""
        rates = tuple(float(saved["rates"][name]) for name in FEATURES)
        return cls(saved["constant"], rates, saved["margin"], saved["error"])


def features(size: StepSize) -> np.ndarray:
    """``(features,)`` float64, in the order of ``FEATURES``."""
    return np.array([getattr(size, name) for name in FEATURES], dtype=np.float64)


def fit(sizes: Sequence[StepSize], peaks: Sequence[float], floor: float = 0.0) -> CostModel:
    """Fit a cost model to measured steps.

    Relative errors count alike, small step or large. Each step is also predicted by a fit
    without it; those errors give `margin` and `error`, because the errors of so few points
    against their own fit would be too small.

    Args:
        sizes: what the steps held; at least one.
        peaks: their peaks, bytes.
        floor: bytes known to be there before a step; the constant is not smaller.

    Raises:
        ValueError: no steps, or a peak that is not a positive number.
    """
    rows, measured = np.stack([features(one) for one in sizes]), np.asarray(peaks, np.float64)
    if len(rows) != len(measured) or not (np.isfinite(measured) & (measured > 0)).all():
        raise ValueError(f"expected {len(rows)} positive peaks, got {peaks}")
    floor = min(floor, float(measured.min()))
    solution = _solve(rows, measured, floor)
    left_out = np.array(
        [
            _predict(_solve(np.delete(rows, i, 0), np.delete(measured, i), floor), rows[i])
            for i in range(len(rows))
            if len(rows) > 1
        ]
    )
    if not len(left_out):
        return CostModel(float(solution[0]), tuple(solution[1:].tolist()))
    under = measured / left_out - 1
    error = np.quantile(np.abs(left_out / measured - 1), 0.95)
    return CostModel(
        float(solution[0]), tuple(solution[1:].tolist()), float(np.abs(under).max()), float(error)
    )


def _solve(rows: np.ndarray, peaks: np.ndarray, floor: float) -> np.ndarray:
    """Constant and rates, (1 + features,), of a weighted non-negative fit."""
    from scipy.optimize import nnls

    matrix = np.column_stack([np.ones(len(rows)), rows])
    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0] = 1.0
    weighted = matrix / scale / peaks[:, None]
    preference = TIE * np.array([1.0, *(PREFERENCE[name] for name in FEATURES)])
    # A rate's penalty is in units of the share of the peak that it explains.
    penalty = np.diag(preference * weighted.max(axis=0))
    wanted = np.concatenate([(peaks - floor) / peaks, np.zeros(len(penalty))])
    solution, _ = nnls(np.vstack([weighted, penalty]), wanted)
    solution = solution / scale
    solution[1:][rows.max(axis=0) == 0] = 0.0
    solution[0] += floor
    return solution


def _predict(solution: np.ndarray, row: np.ndarray) -> float:
    return float(solution[0] + solution[1:] @ row)


class Calibration:
    """Measured steps, the model fitted to them, and when it no longer holds.

    Attributes:
        model: the current cost model; None before the first step.
        refits: how often drift made a new fit necessary.
    """

    def __init__(self, floor: float = 0.0) -> None:
        """Begin without a measurement.

        Args:
            floor: bytes that are there before a step.
        """
        self.floor = floor
        self.sizes: list[StepSize] = []
        self.peaks: list[float] = []
        self.model: CostModel | None = None
        self.refits = 0
        self._off: list[float] = []  # excess of the last steps, while all of them were off

    def add(self, size: StepSize, peak: float) -> None:
        """Take a calibration step and fit the model again."""
        self.sizes.append(size)
        self.peaks.append(float(peak))
        self.model = fit(self.sizes, self.peaks, self.floor)

    def steps(
        self,
        order: np.ndarray,
        richest: np.ndarray,
        size_of: Callable[[np.ndarray], StepSize],
        budget: float,
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Samples and pieces of the steps to measure; `add` each before the next.

        The number of samples at least doubles, up to the largest that is predicted to fit; larger
        ones follow in pieces. Two steps are repeated in three pieces, which tells what pieces do
        not divide, and two are of the samples with the most ASVs, which share fewer: that tells
        tokens from slots.

        Args:
            order: rows of the dataset, at random.
            richest: the same rows, those with the most ASVs first.
            size_of: the step of some rows in one piece.
            budget: bytes.
        """
        most, count, number = len(order), min(2, len(order)), 0
        budget *= CALIBRATED_SHARE
        while number < CALIBRATION_STEPS:
            rows = order[:count]
            pieces = self._pieces(size_of(rows), budget)
            if pieces is None:
                return
            yield rows, pieces
            number += 1
            if number in REPEATED:
                yield rows, 3
                few = self._largest(richest, 1, count + 1, size_of, budget)
                if few >= min(2, most):
                    yield richest[:few], 1
                number += 2
            if count == most:
                return
            largest = self._largest(
                order, count, min(FASTEST_GROWTH * count, most) + 1, size_of, budget
            )
            wanted = min(2 * count, most)
            if largest > 1.1 * count:
                wanted = min(largest, max(2 * count, round((count * largest) ** 0.5)))
            count = wanted

    def _pieces(self, size: StepSize, budget: float) -> int | None:
        """Fewest pieces for a step to measure; None where it would take too many."""
        if self.model is None or len(self.peaks) < FIRST_STEPS:
            return 1  # the model of so few steps has a margin that says nothing
        pieces = self.model.pieces_that_fit(size, budget)
        return None if pieces is None or pieces > CALIBRATED_PIECES else pieces

    def _largest(
        self,
        order: np.ndarray,
        low: int,
        high: int,
        size_of: Callable[[np.ndarray], StepSize],
        budget: float,
    ) -> int:
        """The largest number of samples from `low` to below `high` that is predicted to fit."""
        assert self.model is not None
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.model.bound(size_of(order[:middle])) <= budget
            low, high = (middle, high) if fits else (low, middle)
        return low

    def check(self, size: StepSize, peak: float) -> bool:
        """Compare a training step with its prediction.

        Args:
            size: what the step held, pieces included.
            peak: its measured peak, bytes.

        Returns:
            Whether the model was fitted again: after three steps in a row that were off by more
            than 5 %. A step more than 3 % above its bound raises the margin at once.
        """
        if self.model is None:
            self.add(size, peak)
            return False
        predicted = self.model.predict(size)
        excess = peak - predicted
        if peak > (1 + TOLERANCE) * self.model.bound(size):
            self.model = replace(self.model, margin=peak / (1 + TOLERANCE) / predicted - 1)
        if abs(excess) / predicted <= DRIFT:
            self._forget_odd()
            return False
        self._off.append(excess)
        self.sizes.append(size)
        self.peaks.append(float(peak))
        if len(self._off) < DRIFT_STEPS:
            return False
        self._refit()
        return True

    def _forget_odd(self) -> None:
        """Drop steps that were off, but not in a row of them."""
        kept = len(self.sizes) - len(self._off)
        del self.sizes[kept:], self.peaks[kept:]
        self._off.clear()

    def _refit(self) -> None:
        """Fit to the steps that were off and to the earlier ones, as they would be now.

        Where steps take more than predicted, what the process holds beside them has mostly grown:
        earlier peaks are moved by the median excess. It does not shrink: where steps take less,
        what they hold themselves was overestimated, and earlier peaks are scaled above the
        constant. If that is not how it was, the new steps say so, and further ones if it takes
        more than one fit.
        """
        assert self.model is not None
        new, constant = len(self._off), self.model.constant
        shift, scale = max(0.0, float(np.median(self._off))), 1.0
        if shift == 0:
            sizes = self.sizes[-new:]
            own = np.array([self.model.predict(one) for one in sizes]) - constant + 1.0
            scale = max(0.0, 1 + float(np.median(self._off / own)))
        self.floor += shift
        earlier = [
            shift + min(one, constant) + scale * max(0.0, one - constant)
            for one in self.peaks[:-new]
        ]
        self.peaks = (earlier + self.peaks[-new:])[-REMEMBERED:]
        self.sizes = self.sizes[-REMEMBERED:]
        self.model = fit(self.sizes, self.peaks, self.floor)
        self.refits += 1
        self._off.clear()

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: saved with the run, so that a resumed one plans alike."""
        return {
            "floor": self.floor,
            "refits": self.refits,
            "steps": [asdict(one) for one in self.sizes],
            "peaks": list(self.peaks),
            "model": None if self.model is None else self.model.to_dict(),
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Calibration:
        """Read what `to_dict` gave."""
        one = cls(saved["floor"])
        one.refits = saved["refits"]
        one.sizes = [StepSize(**size) for size in saved["steps"]]
        one.peaks = list(saved["peaks"])
        one.model = None if saved["model"] is None else CostModel.from_dict(saved["model"])
        return one


def memory_budget(
    meter: Meter, *, max_memory_gb: float | None = None, max_memory_fraction: float | None = None
) -> int:
    """The peak that training may reach, bytes.

    Args:
        meter: of the device; its data and weights should be there already.
        max_memory_gb: 10^9 bytes, of the device or of the whole process on a CPU.
        max_memory_fraction: instead, a share of what is free; 0.85 if neither is given.

    Raises:
        InputError: both are given, or the budget is more than there is or less than is in use.
    """
    if max_memory_gb is not None and max_memory_fraction is not None:
        raise InputError(
            f"--max-memory-gb {max_memory_gb:g} and --max-memory-fraction "
            f"{max_memory_fraction:g}: give one of them"
        )
    used, free = meter.now(), meter.free()
    if max_memory_gb is None:
        return int(used + (max_memory_fraction or DEFAULT_FRACTION) * free)
    budget = max_memory_gb * GIGABYTE
    if budget > meter.total():
        raise InputError(
            f"--max-memory-gb {max_memory_gb:g}: there are {meter.total() / GIGABYTE:.3g} GB; "
            "give less"
        )
    if budget <= used:
        raise InputError(
            f"--max-memory-gb {max_memory_gb:g}: program, data and weights already take "
            f"{used / GIGABYTE:.3g} GB; give more"
        )
    return int(budget)
