"""Targets: transforms and their inverses, classes and their weights."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aam.errors import InputError
from aam.learning.targets import TargetInfo, TargetTransform, class_weights, encode_categories

NAMES = ("none", "minmax", "zscore", "zscore-category", "log-minmax", "log-zscore")


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.lists(st.floats(-0.5, 1e4), min_size=2, max_size=30),
    st.integers(1, 4),
)
def test_transforms_invert_after_a_round_trip_through_json(name, values, kinds):
    keys = [f"k{n % kinds}" for n in range(len(values))]
    fitted = TargetTransform.fit(name, np.array(values), keys)
    saved = json.loads(json.dumps(TargetInfo("age", (), fitted).to_dict()))
    again = TargetInfo.from_dict(saved).transform
    assert again == fitted
    back = again.invert(fitted.apply(np.array(values), keys), keys)
    np.testing.assert_allclose(back, values, rtol=1e-6, atol=1e-6)


def test_what_each_transform_makes_of_numbers():
    values = np.array([1.0, 3.0, 8.0])
    fit = TargetTransform.fit
    assert fit("minmax", values).apply(values) == pytest.approx([0, 2 / 7, 1])
    assert fit("zscore", values).apply(values) == pytest.approx((values - 4) / values.std())
    logs = np.log1p(values)
    assert fit("log-zscore", values).apply(values) == pytest.approx(
        (logs - logs.mean()) / logs.std()
    )
    assert fit("log-minmax", values).apply(np.array([8.0])) == pytest.approx([1])
    assert fit("none", values).apply(values) == pytest.approx(values)
    assert fit("zscore", np.full(3, 5.0)).apply(np.array([6.0])) == pytest.approx([1])


def test_zscore_category_uses_the_categories_own_mean_where_there_are_two():
    values, keys = np.array([1.0, 3.0, 10.0, 30.0, 99.0]), ["a", "a", "b", "b", "c"]
    fitted = TargetTransform.fit("zscore-category", values, keys)
    scaled = fitted.apply(values, keys)
    assert scaled[:4] == pytest.approx([-1, 1, -1, 1])
    assert scaled[4] == pytest.approx((99 - values.mean()) / values.std())
    # Predicted without categories: the scale of all samples.
    assert fitted.invert(np.array([0.0]), None) == pytest.approx([values.mean()])


def test_transforms_that_cannot_be():
    with pytest.raises(InputError, match="needs numbers above -1, the smallest is -3"):
        TargetTransform.fit("log-zscore", np.array([1.0, -3.0]))
    with pytest.raises(InputError, match="needs --categorical-columns"):
        TargetTransform.fit("zscore-category", np.array([1.0, 3.0]))


def test_class_weights_are_inverse_frequencies_with_mean_one():
    codes = np.array([0] * 6 + [1] * 3 + [2])
    weights = class_weights(codes, 3)
    assert weights == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert weights[codes].mean() == pytest.approx(1)


def test_a_category_that_is_missing_or_new_is_unknown():
    column = SimpleNamespace(text=lambda _: ["b", None, "new", "a"])
    samples = SimpleNamespace(ids=("s1", "s2", "s3", "s4"), metadata=column)
    assert encode_categories(samples, {"site": ["a", "b"]}).tolist() == [[2], [0], [0], [1]]
    samples.metadata = None
    assert encode_categories(samples, {"site": ["a", "b"]}).tolist() == [[0]] * 4
