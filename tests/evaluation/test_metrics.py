"""Metrics: numbers by hand and by scikit-learn, and None where a number is not defined."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from aam.evaluation import metrics


@pytest.fixture
def distances():
    points = np.random.default_rng(0).normal(size=(2, 9, 3))
    return [np.linalg.norm(one[:, None] - one, axis=-1) for one in points]


def test_mantel_r_ignores_scale_and_the_diagonal(distances):
    true, other = distances
    shifted = 3.0 * true + 1.0
    np.fill_diagonal(shifted, 99.0)
    assert metrics.mantel_r(shifted, true) == pytest.approx(1.0)
    assert metrics.mantel_r(-true, true) == pytest.approx(-1.0)
    pairs = np.triu_indices(9, 1)
    expected = np.corrcoef(other[pairs], true[pairs])[0, 1]
    assert metrics.mantel_r(other, true) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"square matrix, got shape \(9, 2\)"):
        metrics.condensed(true[:, :2])


def test_mantel_r_between_groups_leaves_pairs_within_a_group_out(distances):
    true, other = distances
    groups = ["a", "a", "b", "b", "c", None, None, "b", "a"]
    pairs = [
        (i, j)
        for i, j in zip(*np.triu_indices(9, 1), strict=True)
        if groups[i] is None or groups[i] != groups[j]
    ]
    assert (5, 6) in pairs and len(pairs) == 30
    first, second = np.array([(true[p], other[p]) for p in pairs]).T
    found = metrics.distance_metrics(other, true, groups)
    assert found["mantel_r_between"] == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert found["mantel_r"] == metrics.mantel_r(other, true) != found["mantel_r_between"]


def test_errors_by_hand():
    true, predicted = np.array([1.0, 2.0, 3.0, 6.0]), np.array([1.0, 3.0, 3.0, 4.0])
    expected = {"r2": pytest.approx(1 - 5 / 14), "mae": pytest.approx(0.75)}
    assert metrics.target_metrics(predicted, true, 0) == expected
    with pytest.raises(ValueError, match="equal lengths, got 2 and 3"):
        metrics.r2(np.zeros(2), np.zeros(3))


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_class_metrics_are_the_fields(classes):
    rng = np.random.default_rng(classes)
    true = np.concatenate([np.arange(2), rng.integers(0, classes, 25)])
    true[true == classes - 1] = 0 if classes == 4 else classes - 1  # a class that is absent
    probabilities = rng.dirichlet(np.ones(classes), len(true)).round(1)  # rounded: ties
    found = metrics.target_metrics(probabilities, true, classes)
    chosen = probabilities.argmax(axis=1)
    recalls = [(chosen[true == one] == one).mean() for one in np.unique(true)]
    areas = [roc_auc_score(true == one, probabilities[:, one]) for one in np.unique(true)]
    assert found["accuracy"] == (chosen == true).mean()
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert found["auc"] == pytest.approx(areas[1] if classes == 2 else np.mean(areas))
    if classes == 3:
        assert found["balanced_accuracy"] == balanced_accuracy_score(true, chosen)


def test_undefined_numbers_are_none():
    flat, nan = np.ones((4, 4)), np.array([1.0, np.nan])
    line = np.abs(np.arange(4.0)[:, None] - np.arange(4))
    assert metrics.mantel_r(flat, line) is None
    assert metrics.mantel_r(line * np.nan, line) is None
    assert metrics.mantel_r(np.zeros((1, 1)), np.zeros((1, 1))) is None
    assert metrics.r2(np.arange(4.0), flat[0]) is None
    assert metrics.r2(nan, np.arange(2.0)) is None
    assert metrics.mean_absolute_error(np.empty(0), np.empty(0)) is None
    assert set(metrics.target_metrics(np.empty((0, 2)), np.empty(0), 2).values()) == {None}
    for classes in (2, 3):
        found = metrics.target_metrics(np.full((3, classes), 1 / classes), np.zeros(3), classes)
        assert found["auc"] is None and found["accuracy"] == 1
