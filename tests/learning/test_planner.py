"""The order of an epoch: every sample once, no batch of one, a function of (seed, epoch)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aam.errors import InputError
from aam.learning.planner import EpochPlan


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 120), st.integers(2, 20), st.integers(0, 5), st.integers(0, 5))
def test_every_sample_once_and_never_alone(count, size, seed, epoch):
    rows = np.arange(count) * 3 + 1
    if size > count:
        with pytest.raises(InputError, match=f"--batch-size {size} is larger than the {count}"):
            EpochPlan(rows, size, seed)
        return
    plan = EpochPlan(rows, size, seed)
    batches = plan.batches(epoch)
    assert sorted(np.concatenate(batches).tolist()) == rows.tolist()
    assert len(batches) == len(plan)
    sizes = [len(one) for one in batches]
    assert min(sizes) >= 2 and max(sizes) <= size + 1
    assert all(one == size for one in sizes[:-1])


def test_order_is_a_function_of_seed_and_epoch():
    rows = np.arange(40)

    def order(seed, epoch):
        return np.concatenate(EpochPlan(rows, 8, seed).batches(epoch)).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_impossible_batches():
    with pytest.raises(InputError, match="--batch-size 1: at least 2"):
        EpochPlan(np.arange(9), 1, 0)
    with pytest.raises(InputError, match="1 training samples: at least 2"):
        EpochPlan(np.arange(1), 2, 0)
