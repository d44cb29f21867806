"""Metrics: numbers against scikit-learn and by hand, and None where a number is undefined."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aam.evaluation import metrics


def _distances(rng, n):
    points = rng.normal(size=(n, 3))
    return np.linalg.norm(points[:, None] - points[None, :], axis=-1)


def test_condensed_takes_each_pair_once_in_order():
    matrix = np.arange(9).reshape(3, 3)
    assert metrics.condensed(matrix).tolist() == [1, 2, 5]
    with pytest.raises(ValueError, match=r"square matrix, got shape \(3, 2\)"):
        metrics.condensed(matrix[:, :2])


def test_mantel_r_ignores_scale_and_the_diagonal():
    rng = np.random.default_rng(0)
    true = _distances(rng, 12)
    shifted = 3.0 * true + 1.0
    np.fill_diagonal(shifted, 99.0)
    assert metrics.mantel_r(shifted, true) == pytest.approx(1.0)
    assert metrics.mantel_r(-true, true) == pytest.approx(-1.0)
    noisy = true + rng.normal(size=true.shape)
    pairs = np.triu_indices(12, 1)
    expected = np.corrcoef(noisy[pairs], true[pairs])[0, 1]
    assert metrics.mantel_r(noisy, true) == pytest.approx(expected)


def test_mantel_r_between_groups_leaves_pairs_within_a_group_out():
    rng = np.random.default_rng(1)
    groups = ["a", "a", "b", "b", "c", None, None]
    true, other = _distances(rng, 7), _distances(rng, 7)
    pairs = [
        (i, j)
        for i in range(7)
        for j in range(i + 1, 7)
        if groups[i] is None or groups[i] != groups[j]
    ]
    assert (5, 6) in pairs and len(pairs) == 19
    first, second = np.array([(true[p], other[p]) for p in pairs]).T
    expected = np.corrcoef(first, second)[0, 1]
    assert metrics.mantel_r(other, true, groups=groups) == pytest.approx(expected)


def test_regression_metrics_by_hand():
    true = np.array([1.0, 2.0, 3.0, 6.0])
    predicted = np.array([1.0, 3.0, 3.0, 4.0])
    assert metrics.mean_absolute_error(predicted, true) == pytest.approx(0.75)
    assert metrics.r2(predicted, true) == pytest.approx(1 - 5 / 14)


@given(st.integers(0, 10_000), st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_classification_metrics_equal_scikit_learn(seed, classes):
    from sklearn import metrics as sk

    rng = np.random.default_rng(seed)
    true = np.concatenate([np.arange(classes), rng.integers(0, classes, 25)])
    probabilities = rng.dirichlet(np.ones(classes), len(true)).round(1)  # rounded: ties
    probabilities[:, -1] = 1 - probabilities[:, :-1].sum(axis=1)
    predicted = probabilities.argmax(axis=1)
    assert metrics.accuracy(predicted, true) == pytest.approx(sk.accuracy_score(true, predicted))
    assert metrics.balanced_accuracy(predicted, true) == pytest.approx(
        sk.balanced_accuracy_score(true, predicted)
    )
    expected = np.mean(
        [sk.roc_auc_score(true == k, probabilities[:, k]) for k in range(classes)]
        if classes > 2
        else sk.roc_auc_score(true, probabilities[:, 1])
    )
    assert metrics.auc(probabilities, true) == pytest.approx(expected)


def test_undefined_numbers_are_none():
    flat, nan = np.ones(4), np.array([1.0, np.nan])
    assert metrics.pearson_r(flat, np.arange(4.0)) is None
    assert metrics.pearson_r(nan, np.arange(2.0)) is None
    assert metrics.mantel_r(np.zeros((1, 1)), np.zeros((1, 1))) is None
    assert metrics.r2(np.arange(4.0), flat) is None
    assert metrics.r2(nan, np.arange(2.0)) is None
    assert metrics.mean_absolute_error(np.empty(0), np.empty(0)) is None
    assert metrics.accuracy(np.empty(0), np.empty(0)) is None
    assert metrics.balanced_accuracy(np.empty(0), np.empty(0)) is None
    assert metrics.auc(np.full((3, 2), 0.5), np.zeros(3)) is None
    assert metrics.auc(np.full((3, 3), 1 / 3), np.zeros(3)) is None


def test_unequal_lengths_are_an_error():
    with pytest.raises(ValueError, match="equal lengths, got 2 and 3"):
        metrics.r2(np.zeros(2), np.zeros(3))
