"""The simulated community: the same for a seed, like a real study, and learnable."""

import time

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform

from aam.data.metadata import read_metadata
from aam.data.simulate import DIAGNOSES, SITES, simulate_community
from aam.data.table import read_table
from aam.data.tree import read_tree
from aam.data.unifrac import UniFrac
from aam.errors import InputError

TINY = {"samples": 24, "asvs": 60, "asvs_per_sample": 12, "sequence_length": 40, "visits": 2}


class Study:
    """The default study, read back through the project's own readers."""

    def __init__(self, folder):
        start = time.process_time()
        files = simulate_community(folder)
        self.seconds = time.process_time() - start
        self.table = read_table(files.table)
        self.metadata = read_metadata(files.metadata).select(self.table.sample_ids)
        self.present = self.table.counts.toarray() > 0
        self.unifrac = UniFrac(self.table, read_tree(files.tree))
        self.pairs = np.triu_indices(240, 1)
        self.distances = self.unifrac.pairwise()[self.pairs]
        self.age = self.metadata.numeric("age")
        self.diagnosis, self.subject, self.site = (
            np.array(self.metadata.text(column)) for column in ("diagnosis", "subject", "site")
        )


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return Study(tmp_path_factory.mktemp("study"))


def test_a_seed_gives_the_same_tiny_study_with_every_class_and_another_one_another(tmp_path):
    studies = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        files = simulate_community(tmp_path / name, seed=seed, **TINY)
        table, metadata = read_table(files.table), read_metadata(files.metadata)
        assert len(table.sample_ids) == 24 and {len(one) for one in table.feature_ids} == {40}
        assert set(metadata.text("diagnosis")) == set(DIAGNOSES)
        assert set(metadata.text("site")) == set(SITES)
        assert len(set(metadata.text("subject"))) == 12
        assert UniFrac(table, read_tree(files.tree)).facts == []
        text = files.tree.read_text(), files.metadata.read_text()
        studies.append((table.feature_ids, table.counts.toarray().tolist(), *text))
    first, same, other = studies
    assert first == same
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_sizes_are_those_of_a_small_study(study):
    assert study.seconds < 5  # measured 0.1 to 0.3 s
    assert study.present.shape[0] == 240
    assert 400 <= study.present.shape[1] <= 800
    richness = study.present.sum(axis=1)
    assert 40 <= richness.mean() <= 80
    assert richness.min() >= 5 and richness.max() > 2 * richness.mean()
    depth = np.asarray(study.table.counts.sum(axis=1))
    assert depth.max() > 4 * depth.min() > 4000
    assert study.metadata.is_numeric("age") and not study.metadata.is_numeric("diagnosis")
    assert study.age.mean() - 1.5 * study.age.std() > 15  # years of grown people


def test_asvs_are_distinct_and_tell_where_they_are_in_the_tree(study):
    sequences = study.table.feature_ids
    assert len(set(sequences)) == len(sequences)
    bases = np.array([list(one) for one in sequences])
    commonest = np.max([(bases == base).mean(axis=0) for base in "ACGT"], axis=0)
    assert 0.7 < commonest.mean() < 0.87  # ibd: 0.79 to 0.81
    assert (commonest > 0.97).mean() > 0.15 and (commonest < 0.6).mean() > 0.1
    codes = np.searchsorted(["A", "C", "G", "T"], bases)
    different = squareform(pdist(codes, "hamming"))
    nearest = (different + np.eye(len(codes))).min(axis=1)
    assert 0.01 <= np.median(nearest) < 0.06  # one to five of 100 nucleotides
    assert different.mean() > 0.2
    # Hamming distance follows the path between two tips: the phylogeny can be learned.
    tree, tips = study.unifrac.tree, study.unifrac.tip_of_column
    above = (tree.tip_start[:, None] <= tips) & (tips < tree.tip_stop[:, None])
    depth, shared = tree.length @ above, above.T @ (tree.length[:, None] * above)
    path, pairs = depth[:, None] + depth - 2 * shared, np.triu_indices(len(tips), 1)
    assert np.corrcoef(path[pairs], different[pairs])[0, 1] > 0.6  # measured 0.72; ibd: 0.34


def test_distances_are_like_those_of_real_data_and_not_only_shared_asvs(study):
    assert 0.5 < study.distances.mean() < 0.68  # ibd: 0.619
    assert 0.06 < study.distances.std() < 0.12  # ibd: 0.092
    jaccard = pdist(study.present, "jaccard")
    assert 0.7 < np.corrcoef(jaccard, study.distances)[0, 1] < 0.95  # ibd: 0.90 to 0.96
    prevalence = study.present.mean(axis=0)
    assert 5 <= (prevalence > 0.8).sum() <= 25  # the core
    assert np.median(prevalence) < 0.1
    generator = np.random.default_rng(0)
    batches = [study.present[generator.choice(240, 8, replace=False)] for _ in range(50)]
    share = np.mean([batch.any(axis=0).sum() / batch.sum() for batch in batches])
    assert 0.42 < share < 0.62  # ibd: 0.53, oral: 0.44
    first, second = study.pairs
    for same, least in (
        (study.subject[first] == study.subject[second], 1.5),
        (study.diagnosis[first] == study.diagnosis[second], 0.1),
        (np.abs(study.age[first] - study.age[second]) < 5, 0.2),
    ):
        gap = study.distances[~same].mean() - study.distances[same].mean()
        assert gap > least * study.distances.std()


def test_a_random_forest_learns_the_metadata_of_new_subjects_but_not_all_of_it(study):
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    from sklearn.model_selection import GroupKFold, cross_val_predict

    options = {"cv": GroupKFold(4), "groups": study.subject}
    trees = {"n_estimators": 60, "min_samples_leaf": 2, "max_features": 0.2, "random_state": 0}
    present = study.present.astype(np.float32)
    forest = RandomForestRegressor(**trees)
    residual = study.age - cross_val_predict(forest, present, study.age, **options)
    r2 = 1 - residual.var() / study.age.var()
    assert 0.4 < r2 < 0.8  # measured 0.53 to 0.67 over seeds
    # The site shifts the age that a community stands for: knowing it must help much.
    for site in SITES:
        residual[study.site == site] -= residual[study.site == site].mean()
    assert 1 - residual.var() / study.age.var() > r2 + 0.1
    forest = RandomForestClassifier(class_weight="balanced", **trees)
    correct = cross_val_predict(forest, present, study.diagnosis, **options) == study.diagnosis
    majority = max((study.diagnosis == one).mean() for one in DIAGNOSES)
    assert 0.45 < majority < 0.55
    assert majority + 0.1 < correct.mean() < 0.95  # measured 0.70 to 0.74


@pytest.mark.parametrize(
    "sizes", [{"samples": 1}, {"asvs": 50}, {"sequence_length": 5}, {"visits": 0}]
)
def test_sizes_that_make_no_study_and_folders_that_cannot_be_made(tmp_path, sizes):
    with pytest.raises(InputError, match="a simulated study needs"):
        simulate_community(tmp_path / "study", **sizes)
    assert not (tmp_path / "study").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the simulated community"):
        simulate_community(tmp_path / "file" / "study", **TINY)
