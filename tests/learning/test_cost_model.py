"""What steps are predicted to take, against ones of known cost."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aam.learning.cost_model import LEAST_MARGIN, CostModel, StepContents, StepSize

MB = 1e6
BASE = 500 * MB
TRUE = CostModel(BASE, (4000.0, 6000.0, 3000.0, 0.0, 10 * MB))


def step(samples, *, count=1, richness=100, seed=0):
    """A step as tables have them: the more samples, the more of their ASVs are shared."""
    rng = np.random.default_rng([seed, samples])
    slots = float(np.sum(rng.integers(richness // 2, richness * 3 // 2, samples)))
    asvs = round(0.9 * slots * samples**-0.35)
    return StepSize(101 * asvs, slots, asvs, longest=1.5 * richness).split(count)


SIZES = [*map(step, (2, 8, 32)), step(16, richness=250), step(32, count=3)]
LATER = [
    step(n, count=count, seed=s) for n in (3, 10, 40, 64) for count in (1, 2, 4) for s in (1, 2)
]


def held(sizes, noise=0.0, seed=0, model=TRUE):
    """Bytes beside the base, their peaks off by some noise."""
    factors = 1 + noise * np.random.default_rng(seed).uniform(-1, 1, len(sizes))
    return [model.predict(one) * by - BASE for one, by in zip(sizes, factors, strict=True)]


def errors(model, sizes, true=TRUE):
    return np.array([model.predict(one) / true.predict(one) - 1 for one in sizes])


@pytest.mark.parametrize("seed", range(3))
def test_five_steps_predict_others(seed):
    exact = CostModel.fit(SIZES, held(SIZES), BASE)
    assert np.abs(errors(exact, LATER)).max() < 0.02 and exact.margin == LEAST_MARGIN
    noisy = CostModel.fit(SIZES, held(SIZES, 0.05, seed), BASE)
    assert np.quantile(np.abs(errors(noisy, LATER)), 0.95) < 0.1
    assert min(noisy.rates) >= 0 and noisy.constant >= BASE
    off = np.abs(errors(noisy, SIZES)) / (1 + 0.05)
    assert noisy.margin > off.max() * 0.5 and noisy.margin < 0.2
    assert noisy.bound(SIZES[0]) == pytest.approx(noisy.predict(SIZES[0]) * (1 + noisy.margin))


def test_bytes_that_cannot_be_told_apart_are_near_what_is_expected():
    whole = [step(n) for n in (2, 4, 8)]
    model = CostModel.fit(whole, held(whole), BASE)
    token, slot, *_ = model.rates
    assert 3000 < token < 6000 and slot < 10 * token
    half = whole[-1].split(2)
    assert model.predict(half) == pytest.approx(TRUE.predict(half), rel=0.03)
    one = CostModel.fit(whole[1:2], held(whole[1:2]), BASE)
    assert one.predict(whole[1]) == pytest.approx(TRUE.predict(whole[1]), rel=0.01)
    assert one.predict(whole[0]) < 0.98 * TRUE.predict(whole[1])


@pytest.mark.parametrize("thing", [0, 1])
def test_what_is_measured_outweighs_what_is_expected(thing):
    """Even where all bytes are a token's, or all a slot's."""
    true = CostModel(BASE, tuple(5e4 * (number == thing) for number in range(5)))
    sizes = [step(n, richness=r) for n in (2, 8, 32) for r in (50, 100, 300)]
    found = CostModel.fit(sizes, held(sizes, model=true), BASE)
    assert found.rates[thing] == pytest.approx(5e4, rel=0.3)
    assert np.abs(errors(found, LATER, true)).max() < 0.05


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 200), st.floats(0.51, 3.0))
def test_fewest_micro_batches_that_fit(samples, gigabytes):
    model, size, budget = replace(TRUE, margin=0.02), step(samples), gigabytes * 1e9
    count = model.micro_batches(size, budget)
    if count is None:
        assert model.predict(size.split(4096)) > budget
        return
    cost = model.bound if model.bound(size.split(4096)) <= budget else model.predict
    assert cost(size.split(count)) <= budget
    assert count == 1 or cost(size.split(count - 1)) > budget


def test_a_step_that_fits_without_the_margin_is_computed():
    size = step(8)
    budget = 1.05 * TRUE.predict(size.split(4096))
    count = replace(TRUE, margin=0.5).micro_batches(size, budget)
    assert count == replace(TRUE, margin=0.0).micro_batches(size, budget) is not None
    assert TRUE.micro_batches(size, 0.9 * TRUE.constant) is None


def followed(model, sizes, true):
    """Check steps of another cost; says how often the model has moved."""
    peaks = [BASE + one for one in held(sizes, 0.01, 1, true)]
    return sum(model.check(size, peak) for size, peak in zip(sizes, peaks, strict=True))


@pytest.mark.parametrize(
    "true",
    [
        replace(TRUE, base=BASE + 60 * MB),
        replace(TRUE, rates=tuple(1.4 * rate for rate in TRUE.rates)),
    ],
)
def test_predictions_follow_what_steps_take_more(true):
    model, sizes = replace(TRUE), [step(24 + i % 5, seed=i) for i in range(20)]
    assert not followed(model, sizes, TRUE) and model.base == BASE
    assert 1 <= followed(model, sizes, true) <= 3
    assert np.abs(errors(model, sizes, true)).max() < 0.05
    followed(model, sizes, TRUE)
    assert model.base < BASE + 20 * MB, "back to what was measured"
    followed(model, sizes, replace(TRUE, base=0.8 * BASE))
    assert model.base == pytest.approx(BASE), "and never below: a run may begin with less"


def test_a_step_over_its_bound_is_followed_at_once():
    model, size = replace(TRUE), step(30)
    peak = 1.01 * model.bound(size)
    assert model.check(size, peak) and model.predict(size) > TRUE.predict(size)
    assert model.bound(size) >= peak
    assert not model.check(size, model.predict(size))


def test_a_step_holds_shared_asvs_once_and_ranks_share_it():
    starts, asvs, lengths = (
        np.array([0, 2, 5]),
        np.array([0, 1, 1, 2, 3]),
        np.array([10, 20, 30, 40]),
    )
    size = StepContents(starts, asvs, lengths).size([0, 1])
    assert size == StepSize(tokens=100, slots=5, asvs=4, longest=3)
    assert size.split(1) == size
    assert size.split(2) == StepSize(tokens=50, slots=3, asvs=4, longest=3), "no sample is cut"
    halves = StepContents(starts, asvs, lengths, ranks=2).size([0, 1])
    assert halves == StepSize(tokens=50, slots=3, asvs=4, longest=3)
