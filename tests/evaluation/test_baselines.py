"""Baselines: distances that are calibrated on training pairs, consensus by hand, forests."""

import time

import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array

from aam.data.metadata import as_metadata, read_metadata
from aam.data.samples import Samples
from aam.data.sequences import tokenize
from aam.data.table import FeatureTable, read_table
from aam.data.table_distances import PrecomputedDistances, jaccard
from aam.evaluation import baselines, metrics


@pytest.fixture
def gradient():
    return np.sort(np.random.default_rng(3).random(30))


@pytest.fixture
def counts(gradient):
    """30 samples whose 200 features turn over along a gradient."""
    rng = np.random.default_rng(4)
    rate = 20 * np.exp(-(((gradient[:, None] - rng.random(200)) / 0.15) ** 2))
    return csr_array(rng.poisson(rate))


def distance_baselines(counts, gradient, train, rows, groups=None):
    """Of the gradient's distances; and how many rows were asked for."""
    true, asked, generator = np.abs(gradient[:, None] - gradient), [], np.random.default_rng(0)

    class Gradient:
        def pairwise(self, rows):
            asked.append(len(rows))
            return true[np.ix_(rows, rows)]

    dna = ["".join(generator.choice(list("ACGT"), 20)) for _ in range(counts.shape[1])]
    ids = tuple(map(str, range(len(gradient))))
    own = zip(rows, groups or ["same"] * len(rows), strict=True)
    cells = dict.fromkeys(ids, "same") | {ids[row]: group for row, group in own}
    metadata = as_metadata(pd.DataFrame({"group": cells}))
    samples = Samples(FeatureTable(ids, dna, counts, "table"), metadata)
    column = "group" if groups else None
    subset = baselines.EvaluationSubset(samples, Gradient(), rows, train, column)
    return baselines.distance_baselines(subset, true[np.ix_(rows, rows)]), asked


def test_distances_are_calibrated_on_training_pairs(counts, gradient):
    train, rows = np.arange(0, 30, 2), np.arange(1, 30, 2)
    groups = [str(int(gradient[row] * 5)) for row in rows]
    found, _ = distance_baselines(counts, gradient, train, rows, groups)
    squares = [np.abs(gradient[part][:, None] - gradient[part]) for part in (train, rows)]
    known, true = map(metrics.condensed, squares)
    assert found["constant"]["mantel_r"] is None
    assert found["constant"]["distance_mae"] == pytest.approx(np.abs(true - known.mean()).mean())
    own = jaccard(counts[rows])
    line = np.polyfit(metrics.condensed(jaccard(counts[train])), known, 1)
    predicted = np.polyval(line, metrics.condensed(own))
    assert found["Jaccard"]["distance_mae"] == pytest.approx(np.abs(predicted - true).mean())
    assert found["Jaccard"]["mantel_r"] == pytest.approx(np.corrcoef(predicted, true)[0, 1])
    assert found["Jaccard"]["mantel_r"] > 0.7
    between = metrics.mantel_r(own, squares[1], groups=groups)
    assert found["Jaccard"]["mantel_r_between"] == between
    assert list(found)[1:] == ["richness difference", "Bray-Curtis", "Jaccard", "12-mer Jaccard"]


def test_at_most_some_training_samples_calibrate_and_one_cannot(counts, gradient, monkeypatch):
    monkeypatch.setattr(baselines, "CALIBRATING", 8)
    assert distance_baselines(counts, gradient, np.arange(20), np.arange(20, 30))[1] == [8]
    found = distance_baselines(counts, gradient, np.arange(1), np.arange(1, 30))[0]
    assert found["constant"]["distance_mae"] is None and found["Jaccard"]["distance_mae"] is None
    assert found["Jaccard"]["mantel_r"] > 0.7


def test_kmers_are_told_apart_by_their_position():
    counts = csr_array(np.eye(4, dtype=np.int64))
    profile = baselines.kmer_profile(counts, ["ACGTA", "ACGTC", "TACGT", "AC"], length=4)
    distance = jaccard(profile)
    assert distance[0, 1] == pytest.approx(1 - 1 / 3)  # ACGT at 0 is shared, the next is not
    assert distance[0, 2] == 1.0  # ACGT stands at another position
    assert baselines.richness_difference(profile)[0].tolist() == [0, 0, 0, 2]


def test_masked_bases_by_the_consensus_and_the_nearest_sequence(monkeypatch):
    known = tokenize(["ACGTACGT", "ACTTCCCC", "AGGGGGGG"])
    masked = tokenize(["ACGTACGA", "ACTTCC", "GGGGGGGGGG"])
    rows, positions = np.array([0, 0, 1, 2]), np.array([0, 7, 5, 9])
    bases = np.array([1, 1, 2, 3])
    for size in (1, 2, 9):
        monkeypatch.setattr(baselines, "KNOWN_AT_ONCE", size)
        found = baselines.nucleotide_baselines(known, masked, rows, positions, bases)
        # The last is past the end of all: of all bases G is the most frequent.
        assert found == {"consensus": 0.75, "nearest known ASV": 0.5}
    assert baselines.nucleotide_baselines(tokenize([]), masked, rows, positions, bases) == {}


def test_a_forest_finds_a_gradient_and_the_mean_does_not(counts, gradient, monkeypatch):
    order = np.random.default_rng(0).permutation(30)
    train, rows, age = order[:20], order[20:], 100 * gradient
    options = {"classes": 0, "trees": 50}
    found = baselines.target_baselines(counts, age, train, rows, **options)
    assert found["random forest"]["r2"] > 0.8 and found["mean"]["r2"] <= 0.0
    expected = np.abs(age[rows] - age[train].mean()).mean()
    assert found["random forest"]["mae"] < found["mean"]["mae"] == pytest.approx(expected)
    assert found == baselines.target_baselines(counts, age, train, rows, **options)
    assert found != baselines.target_baselines(counts, age, train, rows, **options, seed=1)
    monkeypatch.setattr(baselines, "MOST_DENSE", 0)  # large tables stay sparse
    sparse = baselines.target_baselines(counts, age, train, rows, **options)
    assert sparse["random forest"]["r2"] > 0.8 and sparse["mean"] == found["mean"]


def test_a_forest_classifies_with_a_class_that_training_never_saw(counts, gradient):
    target = (gradient > 0.5).astype(float)
    target[29] = 2
    train, rows = np.arange(0, 28, 2), np.array([1, 3, 5, 21, 23, 29])
    found = baselines.target_baselines(counts, target, train, rows, classes=3, trees=50)
    assert found["random forest"]["accuracy"] == pytest.approx(5 / 6)
    assert found["random forest"]["balanced_accuracy"] == pytest.approx(2 / 3)
    majority = np.bincount(target[train].astype(int)).argmax()
    assert found["majority"]["accuracy"] == pytest.approx((target[rows] == majority).mean())
    assert found["majority"]["auc"] == 0.5


@pytest.mark.real
def test_numbers_and_speed_on_real_data(real_data):
    table = read_table(real_data / "ibd" / "table-rarefied-5000.biom")
    metadata = read_metadata(real_data / "ibd" / "metadata.tsv").select(table.sample_ids)
    with h5py.File(real_data / "ibd" / "unweighted-unifrac.h5") as file:
        where = {name.decode(): row for row, name in enumerate(file["order"][:])}
        chosen = [where[name] for name in table.sample_ids]
        true = file["matrix"][:][np.ix_(chosen, chosen)]
    order = np.random.default_rng(0).permutation(len(chosen))
    distances = PrecomputedDistances(table.sample_ids, true, "ibd")
    subset = baselines.EvaluationSubset(
        Samples(table, metadata), distances, order[:60], order[60:], "host_subject_id"
    )
    started = time.process_time()
    found = baselines.distance_baselines(subset, distances.pairwise(order[:60]))
    assert time.process_time() - started < 3.0  # 0.3 s; of the processor, which may be shared
    r = {name: own["mantel_r"] for name, own in found.items()}
    mae = {name: own["distance_mae"] for name, own in found.items()}
    assert r["12-mer Jaccard"] > r["Jaccard"] > found["Jaccard"]["mantel_r_between"]
    assert 0.85 < r["Jaccard"] < 0.94 and 0.60 < r["Bray-Curtis"] < 0.80
    assert mae["12-mer Jaccard"] < mae["Jaccard"] < 0.045
    assert mae["Bray-Curtis"] < mae["constant"] < 0.1
