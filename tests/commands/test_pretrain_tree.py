"""What is known and what is left out of a tree, and how much the network counts."""

import numpy as np
import pytest
import torch

from aam.commands import tree_inputs
from aam.commands.pretrain_tree import TreePretraining, calibration_asvs, tree_options
from aam.config import OptimizerOptions, from_options
from aam.data.dataset import AsvDataset
from aam.data.simulate import simulate_community
from aam.data.texts import Texts


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    study = simulate_community(folder, samples=30, asvs=200, asvs_per_sample=30)
    config = from_options(
        "pretrain", table=study.table, rarefy_depth=0, tree=study.tree, validation_fraction=0.5,
        encoder="wide", embedding_dim=8, wide_dim=8, output_dir=folder / "run",
    )  # fmt: skip
    made = TreePretraining(config, torch.device("cpu"))
    made.build(None)
    return made


def test_sequences_are_left_out_where_they_are_no_dna_or_repeat_another():
    given = {"a": "ACGT", "b": "ACNT", "c": "ACGT", "d": "TTTT"}
    kept, facts = tree_inputs.distinct_sequences(given, "f")
    assert kept == {"a": "ACGT", "d": "TTTT"}
    found = [(fact.count, fact.kind, fact.detail) for fact in facts]
    assert found == [(1, "dropped", "'b'"), (1, "dropped", "'c'")]


def test_epochs_follow_the_tokens_and_what_is_given_stays():
    few, many = (AsvDataset(Texts.of(["ACGTACGTACGT" * 7] * n), 150) for n in (10, 60_000))
    assert tree_options(OptimizerOptions(), few).epochs == 60
    assert tree_options(OptimizerOptions(), many).epochs == 6  # 30 of 5 million tokens each
    given = tree_options(OptimizerOptions(epochs=7, lr=0.1, validate_every=3), few)
    assert (given.epochs, given.lr, given.validate_every) == (7, 0.1, 3)


def test_the_network_counts_only_as_much_as_it_knows(task, monkeypatch):
    """Of its logits: right ones, wrong ones, and noise of the same size."""
    monkeypatch.setattr(task, "calibration", np.arange(0, len(task.dataset), 4))
    clades, tips = task.clades, task.calibration[:, None]
    right = np.where((tips >= clades.start) & (tips < clades.stop), 5.0, -5.0).astype(np.float32)
    noise, weights = np.random.default_rng(0).permuted(right), []
    for logits in (right, -right, noise):
        monkeypatch.setattr(task.placer, "network_logits", lambda *_, found=logits: found)
        task.calibrate()
        weights.append(task.placer.network_weight)
    assert weights[:2] == [1.0, 0.0] and weights[2] < 1.0


def test_pairs_are_no_clade_without_one_of_the_two(task, monkeypatch):
    clades = task.clades
    pair = np.flatnonzero(clades.stop - clades.start == 2)[0]
    tips = np.array([clades.start[pair], clades.start[pair], clades.stop[pair]])
    monkeypatch.setattr(task, "calibration", tips)
    above = clades.parent[pair]
    assert task.without_pairs(np.array([pair, above, pair])).tolist() == [above, above, pair]


def test_calibration_is_few_known_asvs_that_do_not_train(task):
    assert [len(calibration_asvs(count, 0)) for count in (3, 10_000, 10**6)] == [0, 250, 300]
    np.testing.assert_array_equal(calibration_asvs(500, 3), calibration_asvs(500, 3))
    assert set(task.rows) | set(task.calibration) == set(range(len(task.dataset)))
    assert len(task.calibration) and not set(task.rows) & set(task.calibration)


def test_known_asvs_are_those_of_training_samples_the_others_are_left_out(task):
    table, train = task.subset.samples.table, np.sort(task.subset.train_rows)
    seen = table.counts[train].sum(axis=0) > 0
    known = dict(zip(table.feature_ids, table.counts[train].toarray().T, strict=True))
    found = dict(zip(task.clades.sequences, task.communities().toarray().T, strict=True))
    assert found.keys() == {name for name, one in zip(table.feature_ids, seen, strict=True) if one}
    assert all((known[name] == reads).all() for name, reads in found.items())
    assert set(task.left_out) == known.keys() - found.keys() != set()
    assert len(task.truth.node) == len(task.unseen) == len(task.left_out)


def test_what_is_too_much_becomes_a_fact(task, monkeypatch):
    tree = task.subset.truth.tree
    is_known = np.arange(len(tree.tip_names)) % 4 > 0
    known, facts = tree_inputs.split_known(tree, is_known, "ASVs", 150)
    assert facts == [] and known.clades.sequences == tree.shear(is_known).tip_names
    monkeypatch.setattr(tree_inputs, "LEFT_OUT", 5)
    monkeypatch.setattr(tree_inputs, "MOST_CLADES", len(known.clades))
    cut, few, unseen = tree_inputs.split_known(tree, is_known, "ASVs", 99)[1]
    assert cut.kind == few.kind == unseen.kind == "cut" and few.count > 0
    assert unseen.count == (~is_known).sum() - 5
    samples, rows = task.subset.samples, task.subset.rows
    monkeypatch.setattr(tree_inputs, "MOST_PLACED", 1)
    seen = np.zeros(len(samples.table.feature_ids), dtype=bool)
    assert len(tree_inputs.placed_rows(samples, rows, seen)) == 2
    assert samples.facts[-1].count == len(rows) - 2 and samples.facts[-1].kind == "cut"
