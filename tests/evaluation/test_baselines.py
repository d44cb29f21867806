"""Baselines: distances against scipy, the consensus by hand, forests that find what is there."""

import csv
import time

import numpy as np
import pytest
import scipy.sparse as sparse
from scipy.spatial.distance import pdist, squareform

from aam.data.sequences import tokenize
from aam.evaluation import baselines, metrics


@pytest.fixture
def community():
    """30 samples whose features turn over along a gradient, and the gradient distance."""
    rng = np.random.default_rng(3)
    gradient = np.sort(rng.random(30))
    optimum = rng.random(200)
    rate = 20 * np.exp(-(((gradient[:, None] - optimum[None, :]) / 0.15) ** 2))
    counts = sparse.csr_array(rng.poisson(rate))
    return counts, np.abs(gradient[:, None] - gradient[None, :]), gradient


def test_distances_equal_scipy(community):
    counts = community[0]
    dense = counts.toarray().astype(float)
    shares = dense / dense.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        baselines.jaccard(counts), squareform(pdist(dense > 0, "jaccard")), atol=1e-12
    )
    np.testing.assert_allclose(
        baselines.bray_curtis(counts), squareform(pdist(shares, "braycurtis")), atol=1e-6
    )
    richness = (dense > 0).sum(axis=1)
    assert baselines.richness_difference(counts)[2, 7] == abs(int(richness[2]) - int(richness[7]))


def test_distances_of_empty_samples_are_finite():
    counts = sparse.csr_array(np.array([[0, 0, 0], [0, 0, 0], [1, 2, 0]]))
    for distance in (baselines.jaccard(counts), baselines.bray_curtis(counts)):
        np.testing.assert_allclose(distance, [[0, 0, 1], [0, 0, 1], [1, 1, 0]])


def test_stored_zeros_are_not_features():
    counts = sparse.csr_array(np.array([[1, 1], [1, 1]]))
    counts.data[:] = [1, 0, 1, 1]
    assert baselines.jaccard(counts)[0, 1] == 0.5
    assert counts.nnz == 4  # the caller's table is left as it was


def test_kmer_profile_tells_positions_apart():
    counts = sparse.csr_array(np.eye(3, dtype=np.int64))
    profile = baselines.kmer_profile(counts, ["ACGTA", "ACGTC", "TACGT"], length=4)
    distance = baselines.jaccard(profile)
    assert distance[0, 1] == pytest.approx(1 - 1 / 3)  # ACGT at 0 is shared, the next is not
    assert distance[0, 2] == 1.0  # ACGT stands at another position
    with pytest.raises(ValueError, match="expected 3 sequences, got 1"):
        baselines.kmer_profile(counts, ["ACGTA"])


def test_distance_baselines_calibrate_on_training_pairs_only(community):
    counts, true, _ = community
    train, validation = np.arange(0, 30, 2), np.arange(1, 30, 2)
    found = baselines.distance_baselines(counts, true, train, validation)
    pick = np.ix_(validation, validation)
    mean = metrics.condensed(true[np.ix_(train, train)]).mean()
    judged = metrics.condensed(true[pick])
    assert found["constant"] == baselines.DistanceBaseline(
        None, pytest.approx(np.abs(judged - mean).mean())
    )
    jaccard = baselines.jaccard(counts)
    line = np.polyfit(
        metrics.condensed(jaccard[np.ix_(train, train)]),
        metrics.condensed(true[np.ix_(train, train)]),
        1,
    )
    predicted = np.polyval(line, metrics.condensed(jaccard[pick]))
    assert found["Jaccard"].mae == pytest.approx(np.abs(predicted - judged).mean())
    assert found["Jaccard"].r == pytest.approx(np.corrcoef(predicted, judged)[0, 1])
    assert found["Jaccard"].r > 0.7 and found["Jaccard"].r_between is None


def test_distance_baselines_accept_a_function_and_groups(community):
    counts, true, gradient = community
    groups = [str(int(value * 5)) for value in gradient]
    asked = []

    def pairwise(rows):
        asked.append(len(rows))
        return true[np.ix_(rows, rows)]

    arguments = (np.arange(20), np.arange(20, 30))
    lazy = baselines.distance_baselines(counts, pairwise, *arguments, groups=groups, max_train=8)
    eager = baselines.distance_baselines(counts, true, *arguments, groups=groups, max_train=8)
    assert lazy == eager
    assert asked == [8, 10]
    expected = metrics.mantel_r(baselines.jaccard(counts[20:]), true[20:, 20:], groups=groups[20:])
    assert lazy["Jaccard"].r_between == pytest.approx(expected)


def test_one_training_sample_gives_no_calibration(community):
    counts, true, _ = community
    found = baselines.distance_baselines(counts, true, [0], np.arange(1, 30))
    assert found["constant"].mae is None and found["Jaccard"].mae is None
    assert found["Jaccard"].r > 0.7


def test_consensus_of_many_sequences_is_counted_in_blocks(monkeypatch):
    sequences = ["ACGA", "ACTA", "AGT", "acc", "TTTTTTC", "C"]
    expected = baselines.consensus_bases(sequences).tolist()
    for size in (1, 2, 4):
        monkeypatch.setattr(baselines, "CONSENSUS_BLOCK", size)
        assert baselines.consensus_bases(sequences).tolist() == expected


def test_consensus_by_hand():
    consensus = baselines.consensus_bases(["ACGA", "ACTA", "AGT", "acc"])
    assert consensus.tolist() == [1, 2, 4, 1, 1]  # A C T A, and A wherever nothing reaches
    positions, bases = np.array([0, 1, 2, 3, 9]), np.array([1, 3, 4, 1, 1])
    assert baselines.consensus_accuracy(consensus, positions, bases) == pytest.approx(0.8)
    assert baselines.consensus_accuracy(consensus, positions[:0], bases[:0]) is None
    tokens = np.array([[1, 2, 0], [1, 3, 6]], dtype=np.uint8)
    assert baselines.consensus_bases(tokens).tolist() == [1, 2, 1, 1]


def test_forest_finds_a_gradient_and_the_mean_does_not(community):
    counts, _, gradient = community
    order = np.random.default_rng(0).permutation(30)
    found = baselines.target_baselines(
        counts, 100 * gradient, order[:20], order[20:], kind="regression", trees=50, threads=1
    )
    assert found["r2"]["random forest"] > 0.8
    assert found["mae"]["random forest"] < found["mae"]["mean"]
    expected = np.abs(gradient[order[20:]] - gradient[order[:20]].mean()).mean() * 100
    assert found["mae"]["mean"] == pytest.approx(expected)
    assert found["r2"]["mean"] <= 0.0


def test_forest_classifies_with_a_class_that_training_never_saw(community):
    counts, _, gradient = community
    target = (gradient > 0.5).astype(float)
    target[29] = 2
    train, validation = np.arange(0, 28, 2), np.array([1, 3, 5, 21, 23, 29])
    found = baselines.target_baselines(
        counts, target, train, validation, kind="classification", trees=50, threads=1
    )
    assert found["accuracy"]["random forest"] == pytest.approx(5 / 6)
    assert found["balanced_accuracy"]["random forest"] == pytest.approx(2 / 3)
    majority = np.bincount(target[train].astype(int)).argmax()
    assert found["accuracy"]["majority"] == pytest.approx((target[validation] == majority).mean())
    assert found["auc"]["majority"] == 0.5


def test_target_baselines_repeat_with_a_seed(community):
    counts, _, gradient = community
    arguments = (counts, gradient, np.arange(20), np.arange(20, 30))
    options = {"kind": "regression", "trees": 10, "threads": 1}
    first = baselines.target_baselines(*arguments, **options)
    assert first == baselines.target_baselines(*arguments, **options)
    assert first != baselines.target_baselines(*arguments, **options, seed=1)


@pytest.mark.parametrize(
    ("target", "rows", "kind", "message"),
    [
        ([0.0, 1.0, np.nan], [2], "regression", "1 are missing"),
        ([0.0, 1.0, 2.0], [], "regression", "both parts, got 2, 0"),
        ([0.0, 1.0, 2.0], [2], "ranking", "got 'ranking'"),
    ],
)
def test_target_baselines_refuse(target, rows, kind, message):
    counts = sparse.csr_array(np.eye(3, dtype=np.int64))
    with pytest.raises(ValueError, match=message):
        baselines.target_baselines(counts, np.array(target), [0, 1], rows, kind=kind)


@pytest.mark.real
def test_numbers_and_speed_on_real_data(real_data):
    import biom
    import h5py

    table = biom.load_table(str(real_data / "ibd" / "table-rarefied-5000.biom"))
    ids = [str(name) for name in table.ids()]
    counts = sparse.csr_array(table.matrix_data.T)
    with h5py.File(real_data / "ibd" / "unweighted-unifrac.h5") as file:
        where = {name.decode(): row for row, name in enumerate(file["order"][:])}
        rows = [where[name] for name in ids]
        true = file["matrix"][:][np.ix_(rows, rows)]
    with open(real_data / "ibd" / "metadata.tsv", newline="") as file:
        subject = {row[0]: row for row in csv.reader(file, delimiter="\t")}
    header = next(iter(subject.values()))
    column = header.index("host_subject_id")
    order = np.random.default_rng(0).permutation(len(ids))
    started = time.process_time()
    found = baselines.distance_baselines(
        counts,
        true,
        order[60:],
        order[:60],
        groups=[subject[name][column] for name in ids],
        sequences=[str(name) for name in table.ids("observation")],
    )
    assert time.process_time() - started < 3.0  # 0.3 s; of the processor, which may be shared
    assert 0.85 < found["Jaccard"].r < 0.94
    assert 0.60 < found["Bray-Curtis"].r < 0.80
    assert found["12-mer Jaccard"].r > found["Jaccard"].r > found["Jaccard"].r_between
    assert found["12-mer Jaccard"].mae < found["Jaccard"].mae < 0.045
    assert found["Bray-Curtis"].mae < found["constant"].mae < 0.1


def test_masked_bases_of_the_nearest_sequence(monkeypatch):
    monkeypatch.setattr(baselines, "NEAREST_BLOCK", 2)
    known = tokenize(["ACGTACGT", "TTTTCCCC", "GGGGGGGG"])
    judged = tokenize(["ACGTACGA", "TTTTCC", "GGGGGGGGGG"])
    rows, positions = np.array([0, 0, 1, 2]), np.array([0, 7, 5, 9])
    found = baselines.nearest_accuracy(known, judged, rows, positions, np.array([1, 1, 2, 3]))
    assert found == 0.5  # the second differs, the last is past the end
