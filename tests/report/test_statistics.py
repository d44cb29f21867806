"""The computations behind the figures and the words."""

import numpy as np
import pytest

from aam.report import results, statistics


def test_principal_coordinates_give_euclidean_distances_back():
    points = np.random.default_rng(0).normal(size=(20, 2)) * [3, 1]
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    found, share = statistics.principal_coordinates(distances)
    again = np.linalg.norm(found[:, None] - found[None], axis=-1)
    np.testing.assert_allclose(again, distances, atol=1e-9)
    assert share.sum() == pytest.approx(1.0) and share[0] > 0.7


def test_procrustes_undoes_a_turn_a_mirror_and_a_scale():
    target = np.random.default_rng(1).normal(size=(15, 2))
    source = target @ np.array([[0.6, -0.8], [-0.8, -0.6]]) * 7 + 3
    aligned, correlation = statistics.procrustes(target, source)
    np.testing.assert_allclose(aligned, target, atol=1e-9)
    assert correlation == pytest.approx(1.0)
    assert statistics.procrustes(target, np.ones((15, 2)))[1] == 0.0


def test_roc_curve_equals_scikit_learn_with_ties():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(2)
    positive = rng.random(60) < 0.4
    score = (rng.random(60) + 0.2 * positive).round(1)
    false_rate, true_rate, area = statistics.roc_curve(score, positive)
    assert area == pytest.approx(roc_auc_score(positive, score))
    assert (false_rate[0], true_rate[0], false_rate[-1], true_rate[-1]) == (0, 0, 1, 1)
    assert statistics.roc_curve(score, np.ones(60, dtype=bool)) is None


def test_thin_keeps_the_mean_and_the_order():
    step = np.arange(1000)[::-1]
    thinned, value = statistics.thin(step, 2.0 * step, 100)
    assert len(thinned) == 100 and (np.diff(thinned) > 0).all()
    np.testing.assert_allclose(value, 2.0 * thinned)
    assert value.mean() == pytest.approx(999.0)
    assert len(statistics.thin(step[:7], step[:7], 100)[0]) == 7


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.93812, "0.938"), (-0.5872, "−0.587"), (5.91, "5.910"), (42.0, "42.00"), (42, "42"),
        (123.45, "123.5"), (2345678, "2,345,678"), (12345.6, "12,346"), (0, "0"), (0.0, "0.000"),
        (3.2e-6, "3.2e-06"), (9.5e-5, "0.000095"), (-0.00408, "−0.0041"), (0.0123, "0.012"),
        (None, "–"), (float("nan"), "–"), ("0.5", "0.500"), ("x", "–"),
    ],
)  # fmt: skip
def test_numbers_for_people(value, text):
    assert results.number(value) == text


@pytest.mark.parametrize(
    ("value", "higher", "baselines", "verdict"),
    [
        (0.9, True, {"a": 0.8, "b": 0.7}, "better"),
        (0.75, True, {"a": 0.8, "b": 0.7}, "worse"),
        (0.75, False, {"a": 0.8, "b": 0.7}, "worse"),
        (0.6, False, {"a": 0.8, "b": None}, "better"),
        (0.8001, True, {"a": 0.8}, "equal"),
        (0.998, True, {"a": 0.997}, "better"),
        (0.004, False, {"a": 0.0042}, "better"),
        (0.0003, False, {"a": 0.0002}, "worse"),
        (5.91, False, {"a": 5.95}, "equal"),
        (0.9, True, {"a": None}, "no baseline"),
        (None, True, {"a": 0.8}, "undefined"),
    ],
)
def test_verdict_is_against_the_best_baseline(value, higher, baselines, verdict):
    entry = {"name": "x", "value": value, "higher_is_better": higher, "baselines": baselines}
    assert results.read_results({"results": [entry]})[0].verdict == verdict


def test_names_of_results_find_their_curve():
    for name, key in {
        "Mantel r": "mantel_r",
        "Masked nucleotide accuracy": "nucleotide_accuracy",
        "distance MAE": "distance_mae",
        "age R2": "r2",
        "age mae": "mae",
        "R²": "r2",
        "Faith PD R2": "faith_pd_r2",
        "balanced accuracy": "balanced_accuracy",
        "masked-nucleotide accuracy, ASVs not in training": "nucleotide_accuracy",
        "clade memberships of new ASVs, Jaccard": "clade_jaccard",
    }.items():
        assert results.metric_key(name, "age") == key
