"""The cost model against steps of known cost, its calibration, and the budget."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aam.errors import InputError
from aam.learning.calibration import CALIBRATION_STEPS, Calibration
from aam.learning.cost_model import FEATURES, LEAST_MARGIN, CostModel, StepSize, fit, memory_budget

MB = 1e6
RATES = {"tokens": 4000, "masked": 0, "asvs": 3000, "slots": 6000, "samples": 30_000, "squares": 0,
         "cut": 20 * MB}  # fmt: skip
TRUE = CostModel(500 * MB, tuple(float(RATES[name]) for name in FEATURES))


def step(samples, *, pieces=1, richness=100, seed=0):
    """A step as tables have them: the more samples, the more of their ASVs are shared."""
    rng = np.random.default_rng([seed, samples])
    slots = float(np.sum(rng.integers(richness // 2, richness * 3 // 2, samples)))
    asvs = round(0.9 * slots * samples**-0.35)
    return StepSize(
        tokens=101 * asvs, masked=25 * asvs, asvs=asvs, slots=2 * slots, samples=2 * samples,
        longest=1.5 * richness,
    ).split(pieces)  # fmt: skip


LADDER = [(2, 1), (4, 1), (8, 1), (8, 3), (16, 1), (16, 3), (32, 1), (64, 1)]
CALIBRATION = [step(n, pieces=p) for n, p in LADDER]
LATER = [step(n, pieces=p, seed=s) for n in (3, 10, 40, 64) for p in (1, 2, 4) for s in (1, 2)]


def peaks(sizes, noise=0.0, seed=0, model=TRUE):
    factors = 1 + noise * np.random.default_rng(seed).uniform(-1, 1, len(sizes))
    return [model.predict(size) * factor for size, factor in zip(sizes, factors, strict=True)]


def errors(model, sizes, measured):
    return np.array([model.predict(one) for one in sizes]) / measured - 1


@pytest.mark.parametrize("seed", range(5))
def test_eight_steps_predict_others(seed):
    exact = fit(CALIBRATION, peaks(CALIBRATION))
    assert np.abs(errors(exact, LATER, peaks(LATER))).max() < 0.005
    assert exact.margin == LEAST_MARGIN
    noisy = fit(CALIBRATION, peaks(CALIBRATION, 0.02, seed))
    off = np.abs(errors(noisy, LATER, peaks(LATER, 0.02, seed + 10)))
    assert np.quantile(off, 0.95) < 0.1
    assert 0 < noisy.margin < 0.2 and 0 < noisy.error < 0.2


def test_bytes_that_cannot_be_told_apart_are_near_what_is_expected():
    whole = [step(n) for n in (2, 4, 8)]
    model = fit(whole, peaks(whole))
    rates = dict(zip(FEATURES, model.rates, strict=True))
    assert 3000 < rates["tokens"] < 5000 and rates["slots"] < 5 * rates["tokens"]
    half = replace(whole[-1].split(2), cut=0.0)
    assert model.predict(half) == pytest.approx(TRUE.predict(half), rel=0.03)


@pytest.mark.parametrize("true", ["tokens", "slots"])
def test_what_is_measured_outweighs_what_is_expected(true):
    """Even where all bytes are an entry's, or all a token's."""
    model = CostModel(500 * MB, tuple(5e4 * (name == true) for name in FEATURES))
    sizes = [step(n, richness=r) for n in (2, 8, 32) for r in (50, 100, 300)]
    found = fit(sizes, peaks(sizes, model=model), floor=500 * MB)
    assert found.rates[FEATURES.index(true)] == pytest.approx(5e4, rel=0.05)
    assert np.abs(errors(found, LATER, peaks(LATER, model=model))).max() < 0.02


def test_one_step_is_enough_for_a_first_guess():
    model = fit(CALIBRATION[2:3], [800 * MB], floor=500 * MB)
    assert model.predict(CALIBRATION[2]) == pytest.approx(800 * MB, rel=0.01)
    assert model.predict(CALIBRATION[0]) < 700 * MB
    assert model.constant >= 500 * MB
    assert min(model.rates) >= 0


def test_margin_covers_steps_left_out():
    measured = peaks(CALIBRATION, 0.05, 3)
    model = fit(CALIBRATION, measured)
    for i in range(len(LADDER) - 1):  # the last is far larger than the others
        rest = [j for j in range(len(LADDER)) if j != i]
        without = fit([CALIBRATION[j] for j in rest], [measured[j] for j in rest])
        assert measured[i] <= without.predict(CALIBRATION[i]) * (1 + model.margin) * (1 + 1e-9)
    assert model.bound(LATER[0]) == pytest.approx(model.predict(LATER[0]) * (1 + model.margin))


def test_what_never_occurred_costs_nothing():
    model = fit(CALIBRATION, peaks(CALIBRATION))
    assert model.rates[FEATURES.index("squares")] == 0


@pytest.mark.parametrize("bad", [[], [0.0, 1.0], [float("nan"), 1.0], [1.0]])
def test_peaks_that_are_none(bad):
    with pytest.raises(ValueError, match="positive peaks"):
        fit(CALIBRATION[:2], bad)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 200), st.floats(0.51, 3.0))
def test_fewest_pieces_that_fit(samples, gigabytes):
    model, size, budget = replace(TRUE, margin=0.02), step(samples), gigabytes * 1e9
    pieces = model.pieces_that_fit(size, budget)
    if pieces is None:
        assert model.predict(size.split(4096)) > budget
        return
    cost = model.bound if model.bound(size.split(4096)) <= budget else model.predict
    assert cost(size.split(pieces)) <= budget
    assert pieces == 1 or cost(size.split(pieces - 1)) > budget


def test_a_step_that_fits_without_the_margin_is_computed():
    size = step(8)
    budget = 1.05 * TRUE.predict(size.split(4096))
    pieces = replace(TRUE, margin=0.5).pieces_that_fit(size, budget)
    assert pieces == TRUE.pieces_that_fit(size, budget) is not None
    assert TRUE.pieces_that_fit(size, 0.9 * TRUE.constant) is None


def test_a_small_step_that_fits_whole_is_not_refused_for_the_cost_of_pieces():
    size = StepSize(10, 2, 1, 4, 2)
    budget = 1.001 * TRUE.predict(size)
    assert TRUE.predict(size.split(2)) > budget
    assert TRUE.pieces_that_fit(size, budget) == 1


def test_split_divides_what_pieces_divide():
    size = StepSize(1000, 250, 10, 400, 16, squares=90, longest=130)
    assert size.split(1) == size
    assert size.split(2) == StepSize(500, 125, 10, 200, 16, squares=45, cut=1, longest=130)
    assert size.split(10).slots == 130


def test_saved_and_read_again():
    calibration = Calibration(floor=400 * MB)
    for size, peak in zip(CALIBRATION, peaks(CALIBRATION, 0.01), strict=True):
        calibration.add(size, peak)
    again = Calibration.from_dict(json.loads(json.dumps(calibration.to_dict())))
    assert again.model == calibration.model is not None
    assert again.to_dict() == calibration.to_dict()
    changed = replace(TRUE, constant=650 * MB)
    for size, peak in zip(LATER[:4], peaks(LATER[:4], model=changed), strict=True):
        assert again.check(size, peak) == calibration.check(size, peak)
    assert again.model == calibration.model
    assert Calibration.from_dict(json.loads(json.dumps(Calibration().to_dict()))).model is None


@pytest.mark.parametrize(
    "changed",
    [
        replace(TRUE, constant=650 * MB),
        replace(TRUE, rates=tuple(1.4 * rate for rate in TRUE.rates)),
        replace(TRUE, rates=tuple(0.7 * rate for rate in TRUE.rates)),
    ],
)
def test_drift_is_noticed_and_learned(changed):
    calibration = Calibration()
    for size, peak in zip(CALIBRATION, peaks(CALIBRATION, 0.01), strict=True):
        calibration.add(size, peak)
    sizes = [step(24 + i % 5, seed=i) for i in range(20)]
    refits = [calibration.check(*one) for one in zip(sizes, peaks(sizes, 0.01, 1), strict=True)]
    assert not any(refits)
    measured = peaks(sizes, 0.01, 2, changed)
    refits = [calibration.check(*one) for one in zip(sizes, measured, strict=True)]
    assert refits[:3] == [False, False, True]
    assert calibration.refits == sum(refits)
    assert np.abs(errors(calibration.model, sizes, measured)).max() < 0.05
    small = [step(6, seed=seed) for seed in range(5)]
    assert errors(calibration.model, small, peaks(small, model=changed)).min() > -0.05


def test_steps_that_take_less_do_not_make_the_next_ones_larger_at_once():
    calibration = Calibration()
    for size, peak in zip(CALIBRATION, peaks(CALIBRATION, 0.01), strict=True):
        calibration.add(size, peak)
    size, before = step(60), calibration.model.predict(step(60))
    found = [calibration.check(size, 0.9 * before) for _ in range(3)]
    assert found == [False, False, True]
    assert calibration.model.predict(size) == pytest.approx(0.9 * before, rel=0.02)
    assert calibration.model.bound(size) >= 0.999 * before


def test_the_richest_samples_that_fit_are_measured():
    """Even where not two of the very richest do."""
    calibration, rows, tried = Calibration(480 * MB), np.arange(64), []

    def size_of(chosen):
        return step(len(chosen), richness=2000 if min(chosen) < 4 else 100)

    order = rows[::-1]
    for chosen, pieces in calibration.steps(order, rows, size_of, 0.75e9):
        tried.append((chosen.tolist(), pieces))
        calibration.add(size_of(chosen).split(pieces), TRUE.predict(size_of(chosen).split(pieces)))
    assert any(rows[0] == 4 and pieces == 1 for rows, pieces in tried)


def test_one_odd_step_is_no_drift():
    calibration = Calibration()
    for size, peak in zip(CALIBRATION, peaks(CALIBRATION, 0.01), strict=True):
        calibration.add(size, peak)
    before = calibration.model.predict(LATER[0])
    for i in range(12):
        odd = 1.5 if i % 3 == 2 else 1.0
        assert not calibration.check(LATER[0], odd * TRUE.predict(LATER[0]))
    assert calibration.model.predict(LATER[0]) == pytest.approx(before, rel=0.01)
    assert len(calibration.peaks) == len(LADDER) + 9  # with the last odd one; the next step decides


def test_steps_of_training_narrow_the_margin_to_what_they_need():
    """Calibration steps of all sizes differ more than full ones do."""
    calibration = Calibration()
    for size, peak in zip(CALIBRATION, peaks(CALIBRATION, 0.05, 3), strict=True):
        calibration.add(size, peak)
    first = calibration.model
    assert first.margin > 0.05
    sizes = [step(60, seed=seed) for seed in range(200)]
    margins = []
    for size, peak in zip(sizes, peaks(sizes, 0.01, 5), strict=True):
        assert not calibration.check(size, peak)
        margins.append(calibration.model.margin)
    assert margins[6] == first.margin and 0.03 <= margins[7] < 0.04
    assert max(margins[7:]) < 0.04 and calibration.steady == 200 and not calibration.refits
    assert np.abs(errors(calibration.model, sizes, peaks(sizes))).max() < 0.02
    assert len(calibration.sizes) == 64 and calibration.sizes[: len(LADDER)] == CALIBRATION
    assert calibration.sizes[-1] == sizes[-1]


def test_steps_of_training_that_differ_keep_a_wide_margin():
    calibration = Calibration()
    for size, peak in zip(CALIBRATION, peaks(CALIBRATION), strict=True):
        calibration.add(size, peak)
    sizes = [step(60, seed=seed) for seed in range(8)]
    for size, peak in zip(sizes, peaks(sizes, 0.045, 2), strict=True):
        calibration.check(size, peak)
    assert calibration.steady == 8 and calibration.model.margin > 0.03


def test_a_step_far_over_its_bound_raises_the_margin_at_once():
    calibration = Calibration()
    for size, peak in zip(CALIBRATION, peaks(CALIBRATION, 0.01), strict=True):
        calibration.add(size, peak)
    size, model = LATER[0], calibration.model
    assert not calibration.check(size, 1.02 * model.bound(size))
    assert calibration.model == model
    assert not calibration.check(size, model.predict(size))
    assert not calibration.check(size, 1.2 * model.predict(size))
    assert 1.03 * calibration.model.bound(size) == pytest.approx(1.2 * model.predict(size))
    margin = calibration.model.margin
    assert not calibration.check(size, 0.5 * calibration.model.predict(size))
    assert calibration.model.margin == margin


class Fixed:
    """A device with 1 GB in use, 20 GB free, of 24 GB."""

    def now(self):
        return 10**9

    def free(self):
        return 20 * 10**9

    def total(self):
        return 24 * 10**9


def test_budget():
    meter = Fixed()
    assert memory_budget(meter) == 18_000_000_000
    assert memory_budget(meter, max_memory_fraction=0.5) == 11_000_000_000
    assert memory_budget(meter, max_memory_gb=4) == 4_000_000_000
    with pytest.raises(InputError, match=r"--max-memory-gb 32: there are 24 GB"):
        memory_budget(meter, max_memory_gb=32)
    with pytest.raises(InputError, match=r"--max-memory-gb 0\.5: .* already take 1 GB; give more"):
        memory_budget(meter, max_memory_gb=0.5)
    with pytest.raises(InputError, match="give one of them"):
        memory_budget(meter, max_memory_gb=4, max_memory_fraction=0.5)


def calibrate(samples, budget, noise=0.0, most=None):
    """Calibrate on samples of which the second half of the rows has three times the ASVs."""
    calibration, tried = Calibration(480 * MB), []
    rows = np.arange(samples)

    def size_of(chosen):
        return step(len(chosen), richness=250 if samples - 1 in chosen else 100)

    for chosen, pieces in calibration.steps(rows, rows[::-1], size_of, budget, most):
        size = size_of(chosen).split(pieces)
        peak = peaks([size], noise, len(tried))[0]
        assert peak <= budget
        tried.append((chosen.tolist(), pieces))
        calibration.add(size, peak)
    return calibration, tried


@pytest.mark.parametrize("most", [None, 16, 200])
@pytest.mark.parametrize("budget", [0.75e9, 1e9, 1.5e9, 100e9])
def test_calibration_steps_stay_in_the_budget_and_come_near_it(budget, most):
    calibration, tried = calibrate(300, budget, 0.01, most)
    assert tried[0] == ([0, 1], 1) and 6 <= len(tried) <= CALIBRATION_STEPS
    assert sum(pieces == 3 for _, pieces in tried) >= 1
    assert budget < 1e9 or sum(299 in rows for rows, _ in tried) >= 1
    largest = max(p for p, (_, pieces) in zip(calibration.peaks, tried, strict=True) if pieces == 1)
    assert largest > 0.72 * min(budget, TRUE.predict(step(min(most or 128, 128))))
    assert np.abs(errors(calibration.model, LATER, peaks(LATER))).max() < 0.1
    if most is None:
        assert sum(pieces > 1 for _, pieces in tried) == 1, "a filling run needs few of them"
    else:
        assert max(len(rows) for rows, _ in tried) == most
        assert len(tried[-1][0]) == most or max(len(rows) for rows, p in tried if p == 1) == most


def test_steps_of_the_largest_number_are_of_different_samples():
    _, tried = calibrate(300, 1e9)
    largest = max(len(rows) for rows, _ in tried)
    alike = [set(rows) for rows, pieces in tried if len(rows) == largest and pieces == 1]
    assert len(alike) == 3 and not alike[0] & alike[1] and not alike[1] & alike[2]


def test_calibration_of_few_samples_ends():
    _, tried = calibrate(5, 100e9)
    assert [(len(rows), pieces) for rows, pieces in tried] == [(2, 1), (4, 1), (5, 1), (5, 3)]
    _, tried = calibrate(2, 100e9)
    assert [(len(rows), pieces) for rows, pieces in tried] == [(2, 1)]


def test_calibration_measures_the_largest_step_that_fits():
    _, tried = calibrate(300, 0.97 * TRUE.predict(step(16)) / 0.85)
    assert max(len(rows) for rows, pieces in tried if pieces == 1) == 11  # with its margin


def test_a_step_that_is_said_to_fit_in_no_pieces_is_measured_all_the_same():
    """What a few small steps say of far larger ones must not end a run."""
    calibration = Calibration(480 * MB)
    rows, tried = np.arange(400), []
    for chosen, pieces in calibration.steps(
        rows, rows[::-1], lambda chosen: step(len(chosen)), 0.54e9, 400
    ):
        size = step(len(chosen)).split(pieces)
        # Small steps need much for each ASV of the whole step, as if it could not be cut.
        peak = TRUE.predict(size) if len(chosen) == 400 else 0.5e9 + 1e5 * size.asvs
        tried.append((len(chosen), pieces))
        calibration.add(size, peak)
    assert tried[-1] == (400, 64)
    assert calibration.model.pieces_that_fit(step(400), 1e9) is not None


def test_a_step_far_beyond_the_others_does_not_widen_the_margin():
    """Without it a fit has to reach too far, which no plan asks of it."""
    sizes = [step(n, seed=s) for n in (2, 4, 8) for s in (0, 1)] + [step(64)]
    measured = peaks(sizes)
    measured[:6] = [
        one * factor for one, factor in zip(measured[:6], [1.005, 0.995] * 3, strict=True)
    ]
    assert fit(sizes, measured).margin == LEAST_MARGIN
