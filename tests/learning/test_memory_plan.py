"""Batches that fill the memory: every sample once, never alone, never over the budget unasked."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aam.errors import InputError
from aam.learning.cost_model import CostModel
from aam.learning.planner import Contents, MemoryPlan

MODEL = CostModel(1000.0, (2.0, 0.5, 30.0, 8.0, 5.0, 0.0, 0.0), margin=0.02)
SHAPES = {
    "equal": lambda n, rng: np.full(n, 50),
    "one giant": lambda n, rng: np.r_[np.full(n - 1, 5), 4000],
    "bimodal": lambda n, rng: rng.choice([1, 1000], n),
    "mostly giants": lambda n, rng: rng.choice([1, 1000], n, p=[0.1, 0.9]),
    "power law": lambda n, rng: np.minimum(1 + rng.pareto(1.0, n) * 3, 3000).astype(int),
    "ordinary": lambda n, rng: rng.integers(10, 120, n),
}


def make_contents(shape, n, seed, *, pool=5000, lengths=(101, 102)):
    rng = np.random.default_rng(seed)
    samples = [np.unique(rng.integers(pool, size=count)) for count in SHAPES[shape](n, rng)]
    indptr = np.concatenate([[0], np.cumsum([len(one) for one in samples])])
    lengths = rng.integers(*lengths, pool)
    return Contents(indptr, np.concatenate(samples), lengths, masked_share=0.25)


def budget_for(contents, rows, times):
    """Room for so many times the largest sample."""
    plan = MemoryPlan(rows, contents, MODEL, 1e15, 0)
    return (MODEL.constant + times * float(plan.alone[rows].max())) * (1 + MODEL.margin)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from([2, 3, 4, 7, 31, 101, 211]),
    st.sampled_from([0.3, 1.01, 1.5, 3.0, 20.0]),
    st.integers(0, 3),
    st.sampled_from([None, 5]),
)
def test_every_sample_once_and_no_more_than_fit(shape, n, times, seed, most):
    contents = make_contents(shape, n, seed)
    rows = np.random.default_rng(seed).permutation(n)
    budget = budget_for(contents, rows, times)
    plan = MemoryPlan(rows, contents, MODEL, budget, seed, most=most)
    batches = plan.batches(seed)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    assert min(map(len, batches)) >= 2
    if most is not None:
        assert max(map(len, batches)) <= most + 1
    over = [one for one, used in zip(batches, plan.used(batches), strict=True) if used > 1 + 1e-9]
    for one in over:  # a pair that does not fit, or one sample left when all others are in pairs
        assert len(one) == 2 or (len(one) == 3 and all(len(other) <= 3 for other in batches))
        pieces = MODEL.pieces_that_fit(contents.size(one), budget)
        assert pieces is None or pieces > 1
    assert sum(len(one) == 3 for one in over) <= 1
    again = MemoryPlan(rows, contents, MODEL, budget, seed, most=most)
    assert [one.tolist() for one in again.batches(seed)] == [one.tolist() for one in batches]


@pytest.mark.parametrize(
    ("shape", "times"), [("equal", 12), ("bimodal", 4), ("power law", 2), ("ordinary", 6)]
)
def test_budget_is_used(shape, times):
    contents = make_contents(shape, 2000, 1, pool=60_000, lengths=(30, 400))
    rows = np.arange(2000)
    plan = MemoryPlan(rows, contents, MODEL, budget_for(contents, rows, times), 3)
    used = plan.used(plan.batches(0))
    assert len(used) > 3 and used.max() <= 1 + 1e-9
    assert used[:-1].min() > 0.8 and used[:-1].mean() > 0.9


def test_epochs_differ():
    contents = make_contents("ordinary", 100, 0)
    plan = MemoryPlan(np.arange(100), contents, MODEL, budget_for(contents, np.arange(100), 5), 0)
    orders = {tuple(np.concatenate(plan.batches(epoch)).tolist()) for epoch in range(5)}
    assert len(orders) == 5


def test_oversize_samples_are_named_with_what_fits():
    contents = make_contents("one giant", 40, 0, lengths=(30, 400))
    rows = np.arange(40)
    budget = budget_for(contents, rows, 0.6)
    plan = MemoryPlan(rows, contents, MODEL, budget, 0)
    (giant,) = plan.oversize()
    assert (giant.row, giant.asvs) == (39, contents.counts[39])
    smallest = int(np.argmin(plan.alone[:39]))
    assert giant.needed == pytest.approx(MODEL.bound(contents.size([39, smallest])))
    assert giant.needed > budget
    kept = contents.of(39)[: giant.keep]
    cut = Contents(
        np.r_[contents.indptr[:40], contents.indptr[39] + giant.keep],
        np.r_[contents.asvs[: contents.indptr[39]], kept],
        contents.lengths, 0.25,
    )  # fmt: skip
    assert 0.5 < MODEL.bound(cut.size([39, smallest])) / budget <= 1
    assert MemoryPlan(rows, cut, MODEL, budget, 0).oversize() == []


def test_nothing_fits():
    contents = make_contents("ordinary", 10, 0)
    with pytest.raises(InputError, match=r"9e-07 GB.* 1.02e-06 GB: give more"):
        MemoryPlan(np.arange(10), contents, MODEL, 900, 0)
    with pytest.raises(InputError, match="1 training samples"):
        MemoryPlan(np.arange(1), contents, MODEL, 1e9, 0)


def test_size_counts_shared_asvs_once():
    contents = Contents(
        np.array([0, 2, 5]), np.array([0, 1, 1, 2, 3]), np.array([10, 20, 30, 40]), 0.5, True
    )
    size = contents.size([0, 1])
    assert (size.tokens, size.masked, size.asvs) == (100, 50, 4)
    assert (size.slots, size.samples, size.longest) == (5, 2, 3)
    assert size.squares == 100 + 400 + 900 + 1600 + 4 + 9


def test_shares_divide_what_processes_share():
    one = make_contents("ordinary", 200, 0)
    four = replace(one, shares=4)
    rows = np.arange(20)
    whole, own = one.size(rows), four.size(rows)
    assert own == replace(
        whole, tokens=whole.tokens / 4, masked=whole.masked / 4, slots=whole.slots / 4
    )
    rows = np.arange(200)
    budget = budget_for(one, rows, 4)
    used = {}
    for contents in (one, four):
        plan = MemoryPlan(rows, contents, MODEL, budget, 0)
        batches = plan.batches(0)
        used[contents.shares] = len(batches)
        assert plan.used(batches).max() <= 1 + 1e-9
    assert used[4] < 0.5 * used[1]
