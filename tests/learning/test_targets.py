"""Targets: transforms and their inverses, classes and their weights."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from aam.errors import InputError
from aam.learning.targets import TargetInfo, TargetTransform, class_weights

NAMES = ("none", "minmax", "zscore", "zscore-category", "log-minmax", "log-zscore")


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.lists(st.floats(-0.5, 1e4), min_size=2, max_size=30),
    st.integers(1, 4),
)
def test_transforms_invert_after_a_round_trip_through_json(name, values, kinds):
    keys = np.array([f"k{n % kinds}" for n in range(len(values))])
    fitted = TargetTransform.fit(name, np.array(values), keys)
    saved = json.loads(json.dumps(asdict(TargetInfo("age", (), fitted))))
    again = TypeAdapter(TargetInfo).validate_python(saved).transform
    assert again == fitted
    back = again.invert(fitted.apply(np.array(values), keys), keys)
    np.testing.assert_allclose(back, values, rtol=1e-6, atol=1e-6)


def test_what_each_transform_makes_of_numbers():
    values = np.array([1.0, 3.0, 8.0])
    logs = np.log1p(values)
    expected = {
        "none": values,
        "minmax": [0, 2 / 7, 1],
        "zscore": (values - 4) / values.std(),
        "log-zscore": (logs - logs.mean()) / logs.std(),
        "log-minmax": (logs - logs.min()) / np.ptp(logs),
    }
    for name, scaled in expected.items():
        assert TargetTransform.fit(name, values).apply(values) == pytest.approx(scaled), name
    assert TargetTransform.fit("zscore", np.full(3, 5.0)).apply([6.0]) == pytest.approx([1])


def test_zscore_category_uses_the_categories_own_mean_where_there_are_two():
    values, keys = np.array([1.0, 3.0, 10.0, 30.0, 99.0]), np.array(["", "", "b", "b", "c"])
    fitted = TargetTransform.fit("zscore-category", values, keys)
    scaled = fitted.apply(values, keys)
    assert scaled[:4] == pytest.approx([-1, 1, -1, 1])
    assert scaled[4] == pytest.approx((99 - values.mean()) / values.std())
    # Predicted without categories: the scale of all samples.
    assert fitted.invert(np.array([0.0]), None) == pytest.approx([values.mean()])


def test_transforms_that_cannot_be():
    with pytest.raises(InputError, match="needs numbers above -1, the smallest is -3"):
        TargetTransform.fit("log-zscore", np.array([1.0, -3.0]))
    fitted = TargetTransform.fit("log-zscore", np.array([1.0, 3.0]))
    with pytest.raises(InputError, match="log-zscore needs numbers above -1, the smallest is -1"):
        fitted.apply(np.array([1.0, -1.0]))


def test_class_weights_are_inverse_frequencies_with_mean_one():
    codes = np.array([0] * 6 + [1] * 3 + [2])
    weights = class_weights(codes, 3)
    assert weights == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert weights[codes].mean() == pytest.approx(1)
