"""What a step will need: a cost model fitted to measured steps, and the budget it has to meet.

The peak of a step grows with what it holds: nucleotide tokens, sequences, (sample, ASV) slots.
How many bytes each of them takes depends on the model, the kernels, the optimizer and the device,
so it is measured: a few real steps and a non-negative least-squares fit (`calibration.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from aam.errors import InputError
from aam.learning.meter import Meter

GIGABYTE = 1e9
DEFAULT_FRACTION = 0.85  # of what is free
MOST_PIECES = 4096
LEAST_MARGIN = 0.05  # steps alike differ by that, and so few of them need not show it
BEYOND = 1.25  # times as much as any other step holds is too far to predict it by them
TIE = 1e-3  # weight of the expectation below, under that of a measurement
# Within one table tokens, ASVs and samples grow together, so few steps cannot always tell whose
# bytes they are. Where they cannot, rates are taken near these, relative to that of a token: an
# entry of a sample passes several encoders, a mask is one of four tokens' work, done before.
EXPECTED = {"tokens": 1.0, "masked": 0.1, "asvs": 1.0, "slots": 4.0, "samples": 1.0,
            "squares": 0.01}  # fmt: skip
EXPECTED_OF_CUT = 0.1  # of what the largest step holds


@dataclass(frozen=True)
class StepSize:
    """What a step holds in memory at the same time.

    Attributes:
        tokens: nucleotide tokens of its largest piece of ASVs.
        masked: tokens of its largest piece of masked copies.
        asvs: distinct ASVs of the whole step, whose vectors are all held.
        slots: (sample, ASV) entries of its largest piece of samples.
        samples: samples of the whole step.
        squares: sum of squared lengths, for implementations that hold attention matrices.
        cut: 1 if it is computed in pieces, whose many small tensors leave gaps between them.
        longest: slots of its largest sample; no piece is smaller.
    """

    tokens: float
    masked: float
    asvs: float
    slots: float
    samples: float
    squares: float = 0.0
    cut: float = 0.0
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
            cut=float(pieces > 1),
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
            out of the fit, at least 5 %. Upwards or downwards: so few steps do not tell them apart.
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
        bounded = min(self.bound(size), self.bound(least)) <= budget
        cost = self.bound if bounded else self.predict
        if cost(size) <= budget:
            return 1
        if cost(least) > budget:
            return None
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
    against their own fit would be too small. (Not where the fit would have to reach far beyond
    the other steps.)

    Args:
        sizes: what the steps held; at least one.
        peaks: their peaks, bytes.
        floor: bytes known to be there before a step; the constant is not smaller.

    Raises:
        ValueError: no steps, or a peak that is not a positive number.
    """
    rows, measured = _measured(sizes, peaks)
    solution = _solve(rows, measured, floor)
    errors = np.abs(left_out_errors(sizes, peaks, floor))
    model = CostModel(float(solution[0]), tuple(solution[1:].tolist()))
    if len(rows) == 1:
        return model
    margin, error = max(LEAST_MARGIN, float(errors.max())), float(np.quantile(errors, 0.95))
    return replace(model, margin=margin, error=error)


def left_out_errors(
    sizes: Sequence[StepSize], peaks: Sequence[float], floor: float = 0.0
) -> np.ndarray:
    """By how much each step, (steps,), took more than a fit to the others predicts, relative."""
    rows, measured = _measured(sizes, peaks)
    predicted = [_left_out(rows, measured, floor, i) for i in range(len(rows))]
    return measured / np.array(predicted) - 1


def _measured(sizes: Sequence[StepSize], peaks: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    rows, measured = np.stack([features(one) for one in sizes]), np.asarray(peaks, np.float64)
    if len(rows) != len(measured) or not (np.isfinite(measured) & (measured > 0)).all():
        raise ValueError(f"expected {len(rows)} positive peaks, got {peaks}")
    return rows, measured


def _solve(rows: np.ndarray, peaks: np.ndarray, floor: float) -> np.ndarray:
    """Constant and rates, (1 + features,), of a weighted non-negative fit."""
    from scipy.optimize import nnls

    floor = min(floor, float(peaks.min()))
    held = float(np.max(peaks - floor)) + 1.0
    expected = np.array([EXPECTED.get(name, 0.0) for name in FEATURES])
    expected *= held / max(1.0, float((rows @ expected).max()))
    expected[FEATURES.index("cut")] = EXPECTED_OF_CUT * held
    # In units of the expected rates; the constant is what is there before a step, and little more.
    matrix = np.column_stack([np.full(len(rows), EXPECTED_OF_CUT * held), rows * expected])
    wanted = np.concatenate([(peaks - floor) / peaks, np.zeros(matrix.shape[1])])
    solution, _ = nnls(np.vstack([matrix / peaks[:, None], TIE * np.eye(matrix.shape[1])]), wanted)
    solution = solution * [EXPECTED_OF_CUT * held, *expected]
    solution[1:][rows.max(axis=0) == 0] = 0.0
    solution[0] += floor
    return solution


def _left_out(rows: np.ndarray, peaks: np.ndarray, floor: float, step: int) -> float:
    """Prediction of a step by a fit to the others.

    By the fit to all, if the step holds far more of anything than the others do: steps of training
    lie among those that are measured, and the others alone cannot say what lies beyond them.
    """
    others = np.delete(rows, step, 0)
    if len(others) and (rows[step] <= BEYOND * others.max(axis=0)).all():
        return _predict(_solve(others, np.delete(peaks, step), floor), rows[step])
    return _predict(_solve(rows, peaks, floor), rows[step])


def _predict(solution: np.ndarray, row: np.ndarray) -> float:
    return float(solution[0] + solution[1:] @ row)


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
