"""The simulated community: the same for a seed, like a real study, and learnable."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.model_selection import GroupKFold, cross_val_predict

from aam.data.metadata import read_metadata
from aam.data.simulate import DIAGNOSES, SITES, simulate_community
from aam.data.table import read_table
from aam.data.tree import read_tree
from aam.data.unifrac import UniFrac
from aam.errors import InputError

TINY = {"samples": 24, "asvs": 60, "asvs_per_sample": 12, "sequence_length": 40, "visits": 2}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The default study, read back through the project's own readers."""
    start = time.process_time()
    files = simulate_community(tmp_path_factory.mktemp("study"))
    seconds = time.process_time() - start
    table, metadata = read_table(files.table), read_metadata(files.metadata)
    metadata = metadata.select(table.sample_ids)
    columns = {one: np.array(metadata.text(one)) for one in ("diagnosis", "subject", "site")}
    unifrac = UniFrac(table, read_tree(files.tree))
    return SimpleNamespace(
        seconds=seconds, table=table, metadata=metadata, present=table.counts.toarray() > 0,
        age=metadata.numeric("age"), unifrac=unifrac, **columns,
    )  # fmt: skip


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
    assert study.present.shape[0] == 240 and 400 <= study.present.shape[1] <= 800
    richness = study.present.sum(axis=1)
    assert 40 <= richness.mean() <= 80
    assert richness.min() >= 5 and richness.max() > 2 * richness.mean()
    depth = np.asarray(study.table.counts.sum(axis=1))
    assert depth.max() > 4 * depth.min() > 4000
    assert study.metadata.is_numeric("age") and not study.metadata.is_numeric("diagnosis")
    assert study.age.mean() - 1.5 * study.age.std() > 15  # years of grown people


def test_asvs_are_distinct_and_tell_where_they_are_in_the_tree(study):
    bases = np.array([list(one) for one in study.table.feature_ids])
    commonest = np.max([(bases == base).mean(axis=0) for base in "ACGT"], axis=0)
    assert 0.7 < commonest.mean() < 0.87  # ibd: 0.79 to 0.81
    assert (commonest > 0.97).mean() > 0.15 and (commonest < 0.6).mean() > 0.1
    different = squareform(pdist(np.searchsorted(["A", "C", "G", "T"], bases), "hamming"))
    nearest = (different + np.eye(len(bases))).min(axis=1)
    assert nearest.min() > 0 and 0.01 <= np.median(nearest) < 0.06  # one to five of 100 nucleotides
    assert different.mean() > 0.2
    # Hamming distance follows the path between two tips: the phylogeny can be learned.
    tree, tips = study.unifrac.tree, study.unifrac.tip_of_column
    above = (tree.tip_start[:, None] <= tips) & (tips < tree.tip_stop[:, None])
    depth, shared = tree.length @ above, above.T @ (tree.length[:, None] * above)
    path, pairs = depth[:, None] + depth - 2 * shared, np.triu_indices(len(tips), 1)
    assert np.corrcoef(path[pairs], different[pairs])[0, 1] > 0.6  # measured 0.72; ibd: 0.34


def test_distances_are_like_those_of_real_data_and_not_only_shared_asvs(study):
    first, second = pairs = np.triu_indices(240, 1)
    distances = study.unifrac.pairwise()[pairs]
    assert 0.5 < distances.mean() < 0.68 and 0.06 < distances.std() < 0.12  # ibd: 0.619, 0.092
    jaccard = pdist(study.present, "jaccard")
    assert 0.7 < np.corrcoef(jaccard, distances)[0, 1] < 0.95  # ibd: 0.90 to 0.96
    prevalence = study.present.mean(axis=0)
    assert 5 <= (prevalence > 0.8).sum() <= 25 and np.median(prevalence) < 0.1  # the core
    generator = np.random.default_rng(0)
    batches = [study.present[generator.choice(240, 8, replace=False)] for _ in range(50)]
    share = np.mean([batch.any(axis=0).sum() / batch.sum() for batch in batches])
    assert 0.42 < share < 0.62  # ibd: 0.53, oral: 0.44
    for same, least in (
        (study.subject[first] == study.subject[second], 1.5),
        (study.diagnosis[first] == study.diagnosis[second], 0.1),
        (np.abs(study.age[first] - study.age[second]) < 5, 0.2),
    ):
        assert distances[~same].mean() - distances[same].mean() > least * distances.std()


def test_a_random_forest_learns_the_metadata_of_new_subjects_but_not_all_of_it(study):
    present, trees = study.present.astype(np.float32), {"min_samples_leaf": 2, "random_state": 0}
    options = {"cv": GroupKFold(4), "groups": study.subject}
    forest = RandomForestRegressor(60, max_features=0.2, **trees)
    residual = study.age - cross_val_predict(forest, present, study.age, **options)
    r2 = 1 - residual.var() / study.age.var()
    assert 0.4 < r2 < 0.8  # measured 0.53 to 0.67 over seeds
    # The site shifts the age that a community stands for: knowing it must help much.
    for site in SITES:
        residual[study.site == site] -= residual[study.site == site].mean()
    assert 1 - residual.var() / study.age.var() > r2 + 0.1
    forest = RandomForestClassifier(60, max_features=0.2, class_weight="balanced", **trees)
    correct = cross_val_predict(forest, present, study.diagnosis, **options) == study.diagnosis
    majority = max((study.diagnosis == one).mean() for one in DIAGNOSES)
    assert 0.45 < majority < 0.55
    assert majority + 0.1 < correct.mean() < 0.95  # measured 0.70 to 0.74


def test_sizes_that_make_no_study_and_folders_that_cannot_be_made(tmp_path):
    for wrong in ({"samples": 1}, {"asvs": 50}, {"sequence_length": 5}, {"visits": 0}):
        with pytest.raises(InputError, match="a simulated study needs"):
            simulate_community(tmp_path / "study", **wrong)
    assert not (tmp_path / "study").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the simulated community"):
        simulate_community(tmp_path / "file" / "study", **TINY)
