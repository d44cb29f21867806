"""Distances of tables against SciPy and scikit-bio."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist
from skbio.stats.composition import clr

from aam.data.table_distances import TableDistances, bray_curtis, jaccard
from tests.data.trees import make_table, random_table

METRICS = ("jaccard", "bray-curtis", "aitchison")


def reference(counts, metric):
    if metric == "jaccard":
        return cdist(counts > 0, counts > 0, "jaccard")
    if metric == "bray-curtis":
        shares = counts / counts.sum(axis=1, keepdims=True)
        return cdist(shares, shares, "braycurtis")
    logs = clr(counts + 1.0)
    return cdist(logs, logs)


@pytest.fixture(scope="module")
def table():
    table = random_table(np.random.default_rng(0), 30, [f"f{i}" for i in range(80)])
    table.counts.data[::7] *= 1000  # depths and abundances of very different size
    return table


@pytest.mark.parametrize("metric", METRICS)
def test_distances_are_those_of_scipy_and_skbio(table, metric):
    distances = TableDistances.of(table, metric)
    expected = reference(table.counts.toarray().astype(float), metric)
    assert len(distances) == 30 and distances.sample_ids == table.sample_ids
    np.testing.assert_allclose(distances.pairwise(np.arange(30)), expected, atol=1e-9)
    a, b = np.array([3, 3, 29, 0]), np.array([29, 5, 3])
    np.testing.assert_allclose(distances.cross(a, b), expected[np.ix_(a, b)], atol=1e-9)
    assert distances.cross(a, b)[2, 0] == 0 and distances.cross(a, []).shape == (4, 0)


@pytest.mark.parametrize("metric", METRICS)
def test_identical_and_unlike_samples(metric):
    table = make_table([[3, 5, 0, 0], [3, 5, 0, 0], [0, 0, 1, 9], [30, 50, 0, 0]], "ACGT")
    found = TableDistances.of(table, metric).pairwise(range(4))
    assert found[0, 1] == pytest.approx(0, abs=1e-6) and (np.diag(found) == 0).all()
    if metric == "aitchison":
        logs = clr(table.counts.toarray() + 1.0)
        assert found[0, 2] == pytest.approx(np.linalg.norm(logs[0] - logs[2]))
        assert found[0, 3] > 1  # reads + 1: depth is seen
    else:
        assert found[0, 2] == 1 and found[2, 0] == 1
        assert found[0, 3] == pytest.approx(0)  # only shares count


def test_explicit_features_that_no_sample_has_count_for_aitchison_only():
    counts = np.array([[3, 5, 0], [1, 0, 7]])
    wide = np.pad(counts, ((0, 0), (0, 5)))
    for metric in METRICS:
        narrow = TableDistances.of(make_table(counts, "ACG"), metric).pairwise([0, 1])[0, 1]
        found = TableDistances.of(make_table(wide, "ACGTacgt"), metric).pairwise([0, 1])[0, 1]
        assert (found != pytest.approx(narrow)) == (metric == "aitchison")


@pytest.mark.parametrize("metric", [jaccard, bray_curtis])
def test_empty_samples_are_alike_and_stored_zeros_are_no_features(metric):
    counts = csr_array(np.array([[1, 1, 1], [1, 1, 1], [1, 2, 1]]))
    counts.data[:] = [0, 0, 0, 0, 0, 0, 1, 0, 1]
    np.testing.assert_allclose(metric(counts), [[0, 0, 1], [0, 0, 1], [1, 1, 0]])
    np.testing.assert_allclose(metric(counts, counts[:2]), [[0, 0], [0, 0], [1, 1]])
    assert counts.nnz == 9  # the caller's table is left as it was
