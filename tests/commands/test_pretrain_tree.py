"""What is known and what is left out of a tree, and how much the network counts."""

import numpy as np
import pytest
import torch

from aam.commands import tree_inputs
from aam.commands.pretrain_tree import TreePretraining, calibration_asvs, tree_options
from aam.commands.tree_inputs import distinct_sequences, split_known
from aam.config import OptimizerOptions, from_options
from aam.data.dataset import AsvDataset
from aam.data.metadata import read_metadata
from aam.data.samples import Samples
from aam.data.simulate import simulate_community
from aam.data.table import read_table
from aam.data.texts import Texts
from aam.data.tree import read_tree
from aam.data.unifrac import UniFrac
from aam.evaluation.results import colours, on_tree


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return simulate_community(tmp_path_factory.mktemp("tree"), samples=30, asvs=200,
                              asvs_per_sample=30)  # fmt: skip


@pytest.fixture(scope="module")
def task(study):
    config = from_options(
        "pretrain", table=study.table, rarefy_depth=0, tree=study.tree, validation_fraction=0.5,
        encoder="wide", embedding_dim=8, wide_dim=8, output_dir=study.table.parent / "run",
    )  # fmt: skip
    made = TreePretraining(config, torch.device("cpu"))
    made.build(None)
    return made


def test_sequences_are_left_out_where_they_are_no_dna_or_repeat_another():
    kept, facts = distinct_sequences({"a": "ACGT", "b": "ACNT", "c": "ACGT", "d": "TTTT"}, "f")
    assert kept == {"a": "ACGT", "d": "TTTT"}
    assert [(fact.count, fact.kind) for fact in facts] == [(1, "dropped"), (1, "dropped")]
    assert "'b'" in facts[0].detail and "'c'" in facts[1].detail


def test_epochs_follow_the_tokens_and_what_is_given_stays():
    few, many = (AsvDataset(Texts.of(["ACGTACGTACGT" * 7] * n), 150) for n in (10, 60_000))
    assert tree_options(OptimizerOptions(), few).epochs == 60
    assert tree_options(OptimizerOptions(), many).epochs == 6  # 30 of 5 million tokens each
    given = tree_options(OptimizerOptions(epochs=7, lr=0.1, validate_every=3), few)
    assert (given.epochs, given.lr, given.validate_every) == (7, 0.1, 3)


def test_the_network_counts_only_as_much_as_it_knows(task, monkeypatch):
    """Of its logits: right ones, wrong ones, and noise of the same size."""
    monkeypatch.setattr(task, "calibration", np.arange(0, len(task.dataset), 4))
    clades, tips = task.clades, task.calibration
    true = (tips[:, None] >= clades.start) & (tips[:, None] < clades.stop)
    logits = 10 * true.astype(np.float32) - 5
    weights = {}
    for name, own in {
        "right": logits, "wrong": -logits, "noise": np.random.default_rng(0).permuted(logits)
    }.items():  # fmt: skip
        monkeypatch.setattr(task.placer, "network_logits", lambda near, clades=None, own=own: own)
        task.calibrate()
        weights[name] = task.placer.network_weight
    assert weights["right"] == 1.0 and weights["wrong"] == 0.0 and weights["noise"] < 1.0


def test_pairs_are_no_clade_without_one_of_the_two(task, monkeypatch):
    clades = task.clades
    pair = next(k for k in range(len(clades)) if clades.stop[k] - clades.start[k] == 2)
    tips = np.array([clades.start[pair], clades.start[pair], clades.stop[pair]])
    monkeypatch.setattr(task, "calibration", tips)
    lowest = np.array([pair, clades.parent[pair], pair])
    expected = [clades.parent[pair], clades.parent[pair], pair]
    assert task.without_pairs(lowest).tolist() == expected


def test_calibration_is_few_known_asvs_that_do_not_train(task):
    assert len(calibration_asvs(10_000, 0)) == 250 and len(calibration_asvs(10**6, 0)) == 300
    np.testing.assert_array_equal(calibration_asvs(500, 3), calibration_asvs(500, 3))
    assert len(calibration_asvs(3, 0)) == 0
    assert set(task.rows) | set(task.calibration) == set(range(len(task.dataset)))
    assert len(task.calibration) and not set(task.rows) & set(task.calibration)


def test_communities_are_the_training_samples_by_known_asv(task):
    found, known = task.communities(), task.clades.sequences
    table = task.subset.samples.table
    for row, sample in enumerate(sorted(task.subset.train_rows)):
        assert reads(table.counts, sample, table.feature_ids) == reads(found, row, known)
    new = set(task.left_out)
    assert new == set(table.feature_ids) - set(known) and new
    assert len(task.truth.node) == len(task.unseen) == len(new)


def reads(counts, row, names):
    part = slice(counts.indptr[row], counts.indptr[row + 1])
    entries = zip(counts.indices[part], counts.data[part], strict=True)
    return {names[int(column)]: int(count) for column, count in entries}


def test_what_is_too_much_becomes_a_fact(task, monkeypatch):
    tree = task.subset.truth.tree
    is_known = np.arange(len(tree.tip_names)) % 4 > 0
    known, facts = split_known(tree, is_known, "ASVs", 150)
    assert facts == [] and known.clades.sequences == tree.shear(is_known).tip_names
    monkeypatch.setattr(tree_inputs, "LEFT_OUT", 5)
    monkeypatch.setattr(tree_inputs, "MOST_CLADES", len(known.clades))
    cut, few, unseen = split_known(tree, is_known, "ASVs", 99)[1]
    assert cut.kind == few.kind == unseen.kind == "cut" and few.count > 0
    assert unseen.count == (~is_known).sum() - 5
    samples, rows = task.subset.samples, task.subset.rows
    monkeypatch.setattr(tree_inputs, "MOST_PLACED", 1)
    seen = np.zeros(len(samples.table.feature_ids), dtype=bool)
    assert len(tree_inputs.placed_rows(samples, rows, seen)) == 2
    assert samples.facts[-1].count == len(rows) - 2 and samples.facts[-1].kind == "cut"


def test_colours_are_the_first_column_with_few_classes_else_numbers(study):
    table = read_table(study.table)
    metadata = read_metadata(study.metadata).select(table.sample_ids)
    found = colours(Samples(table, metadata), np.arange(30))
    assert found["kind"] == "classification" and found["column"] == "site"
    assert found["values"][table.sample_ids[3]] == metadata.text("site")[3]
    assert colours(Samples(table), np.arange(30)) is None


def test_features_that_the_tree_lacks_are_not_compared(study):
    table, tree = read_table(study.table), read_tree(study.tree)
    lost = {table.feature_ids[3], table.feature_ids[8]}
    kept = np.array([name not in lost for name in tree.tip_names])
    truth = UniFrac(table, tree.shear(kept), drop_missing=True)
    found = on_tree(table, truth)
    assert set(found.feature_ids) == set(table.feature_ids) - lost
    assert found.counts.sum() == table.counts.sum() - table.counts[:, [3, 8]].sum()
    whole = UniFrac(table, tree)
    assert on_tree(table, whole) is table
    np.testing.assert_allclose(UniFrac(found, tree).pairwise(), truth.pairwise(), atol=1e-12)
