"""Measured steps: which to take first, the model fitted to them, and when it no longer holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from aam.learning.cost_model import CostModel, StepSize, fit, left_out_errors

TOLERANCE = 0.03  # by which a peak may exceed its bound: the batches planned with it stay whole
DRIFT = 0.05  # relative error of a prediction that is no longer noise
DRIFT_STEPS = 3  # in a row, before the model is fitted again
LEARNING_STEPS = 8  # of training that were as predicted: they say more of the next than others do
LEARNED_MARGIN = 0.03  # least margin that they leave
CALIBRATED_SHARE = 0.85  # of the budget, which no calibration step is predicted to exceed
FASTEST_GROWTH = 64  # times as many samples as in the step before are looked at
GROWING_STEPS = 5  # that hold more and more samples
FIRST_STEPS = 3  # of them, which are taken whatever so few of them predict
OTHER_STEPS = 2  # of as many samples as the largest: what a step takes beyond what it holds
MANY_PIECES = 64  # of a step of which so few steps say that it fits in no number of pieces
CALIBRATION_STEPS = GROWING_STEPS + OTHER_STEPS + 3
REMEMBERED = 64  # steps that a new fit looks at


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
        self.steady = 0  # steps of training since the last drift that were as predicted
        self._calibrated = 0  # of the remembered steps, those before training
        self._off: list[float] = []  # excess of the last steps, while all of them were off

    def add(self, size: StepSize, peak: float) -> None:
        """Take a calibration step and fit the model again."""
        self.sizes.append(size)
        self.peaks.append(float(peak))
        self._calibrated = len(self.sizes)
        self.model = fit(self.sizes, self.peaks, self.floor)

    def steps(
        self,
        order: np.ndarray,
        richest: np.ndarray,
        size_of: Callable[[np.ndarray], StepSize],
        budget: float,
        most: int | None = None,
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Samples and pieces of the steps to measure; `add` each before the next.

        First the number of samples grows up to the largest that is predicted to fit. Then come
        other samples, as many, whose peaks show how far alike steps differ; those with the most
        ASVs, which share fewer: that tells tokens from slots; and one step in three pieces, which
        tells what pieces do not divide. The last is a step of `most`, in the pieces it needs.

        Args:
            order: rows of the dataset, at random.
            richest: the same rows, those with the most ASVs first.
            size_of: the step of some rows in one piece.
            budget: bytes.
            most: samples of a step of training; None: as many as fit.
        """
        budget *= CALIBRATED_SHARE
        whole = min(most or len(order), len(order))
        grown = [min(2, whole)]
        yield order[: grown[0]], 1
        while len(grown) < GROWING_STEPS and grown[-1] < whole:
            count = self._next(grown, order[:whole], size_of, budget)
            if count < 1.1 * grown[-1]:
                break
            grown.append(count)
            yield order[:count], 1
        largest = grown[-1]
        for number in range(1, OTHER_STEPS + 1):
            if largest < len(order):
                yield np.roll(order, -number * largest)[:largest], 1
        for left_out in (0, len(order) // 16, len(order) // 4):  # the very richest, if need be
            rich = richest[left_out:]
            few = self._largest(rich, 1, min(largest, len(rich)) + 1, size_of, budget)
            if largest < len(order) and few >= min(2, whole):
                yield rich[:few], 1
                break
        if largest > 2:
            yield order[: grown[-2]] if len(grown) > FIRST_STEPS else order[:largest], 3
        if most is not None and largest < whole and self.model is not None:
            size = size_of(order[:whole])
            yield order[:whole], self.model.pieces_that_fit(size, budget) or MANY_PIECES

    def _next(
        self,
        grown: list[int],
        order: np.ndarray,
        size_of: Callable[[np.ndarray], StepSize],
        budget: float,
    ) -> int:
        """How many samples the next growing step has."""
        last, most = grown[-1], len(order)
        fits = self._largest(order, last, min(FASTEST_GROWTH * last, most) + 1, size_of, budget)
        if len(grown) < FIRST_STEPS:
            fits = max(fits, min(2 * last, most))
        if len(grown) == GROWING_STEPS - 1:
            return fits
        return min(fits, max(2 * last, round((last * fits) ** 0.5)))

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

        A step more than 3 % above its bound raises the margin at once. After 8, 16, 32, ... steps
        that were as predicted the model is fitted to them too, and keeps only the margin that they
        need.

        Returns:
            Whether the model no longer held and was fitted again: after three steps in a row that
            were off by more than 5 %.
        """
        if self.model is None:
            self.add(size, peak)
            return False
        predicted = self.model.predict(size)
        excess = peak - predicted
        if peak > (1 + TOLERANCE) * self.model.bound(size):
            self.model = replace(self.model, margin=peak / (1 + TOLERANCE) / predicted - 1)
        off = abs(excess) / predicted > DRIFT
        if not off:
            self._forget_odd()
        self.sizes.append(size)
        self.peaks.append(float(peak))
        if len(self.sizes) > REMEMBERED:
            del self.sizes[self._calibrated], self.peaks[self._calibrated]
        if off:
            self._off.append(excess)
            if len(self._off) == DRIFT_STEPS:
                self._refit()
                return True
            return False
        self.steady += 1
        if self.steady >= LEARNING_STEPS and self.steady & (self.steady - 1) == 0:
            self._learn()
        return False

    def _forget_odd(self) -> None:
        """Drop steps that were off, but not in a row of them."""
        kept = len(self.sizes) - len(self._off)
        del self.sizes[kept:], self.peaks[kept:]
        self._off.clear()

    def _learn(self) -> None:
        """Fit to the steps of training too; their errors are those of the steps to come."""
        errors = left_out_errors(self.sizes, self.peaks, self.floor)[self._calibrated :]
        margin = max(LEARNED_MARGIN, float(np.abs(errors).max()))
        self.model = replace(fit(self.sizes, self.peaks, self.floor), margin=margin)

    def _refit(self) -> None:
        """Fit to the steps that were off and to the earlier ones, as they would be now.

        Where steps take more than predicted, what the process holds beside them has mostly grown:
        earlier peaks are moved by the median excess. It does not shrink: where steps take less,
        what they hold themselves was overestimated, and earlier peaks are scaled above the
        constant. Larger steps may take as much again, so the margin is what was overestimated:
        steps do not grow before more of them have been seen. If that is not how it was, the new
        steps say so, and further ones if it takes more than one fit.
        """
        assert self.model is not None
        old, new, constant = self.model, len(self._off), self.model.constant
        shift, scale = max(0.0, float(np.median(self._off))), 1.0
        sizes = self.sizes[-new:]
        if shift == 0:
            own = np.array([old.predict(one) for one in sizes]) - constant + 1.0
            scale = max(0.0, 1 + float(np.median(self._off / own)))
        self.floor += shift
        earlier = [
            shift + min(one, constant) + scale * max(0.0, one - constant)
            for one in self.peaks[:-new]
        ]
        self.peaks = earlier + self.peaks[-new:]
        self.model = fit(self.sizes, self.peaks, self.floor)
        over = max(old.predict(one) / self.model.predict(one) - 1 for one in sizes)
        self.model = replace(self.model, margin=max(self.model.margin, over))
        self.refits += 1
        self.steady = 0
        self._off.clear()

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: saved with the run, so that a resumed one plans alike."""
        return {
            "floor": self.floor,
            "refits": self.refits,
            "steady": self.steady,
            "calibrated": self._calibrated,
            "off": list(self._off),
            "steps": [asdict(one) for one in self.sizes],
            "peaks": list(self.peaks),
            "model": None if self.model is None else self.model.to_dict(),
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Calibration:
        """Read what `to_dict` gave."""
        one = cls(saved["floor"])
        one.refits, one.steady = saved["refits"], saved["steady"]
        one._calibrated, one._off = saved["calibrated"], list(saved["off"])
        one.sizes = [StepSize(**size) for size in saved["steps"]]
        one.peaks = list(saved["peaks"])
        one.model = None if saved["model"] is None else CostModel.from_dict(saved["model"])
        return one
