"""What is known and what is left out of a tree, and how much the network counts."""

import numpy as np
import pytest
import torch

from aam.commands import pretrain_tree
from aam.commands.pretrain import communities, limit_facts
from aam.commands.pretrain_tree import TreeTask, calibration_tips, distinct_sequences, tree_options
from aam.config import OptimizerOptions, OptionalTableOptions, PretrainConfig, RunOptions
from aam.data.clades import split_tree
from aam.data.dataset import AsvDataset
from aam.data.phylogeny import UniFrac
from aam.data.samples import Samples
from aam.data.simulate import simulate_community
from aam.data.table import read_table
from aam.data.tree import read_tree
from aam.evaluation.tree_results import EvaluationSubset, colours, on_tree
from aam.model import AsvEncoder, EncoderShape, PretrainedModel


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return simulate_community(tmp_path_factory.mktemp("tree"), samples=30, asvs=200,
                              asvs_per_sample=30)  # fmt: skip


@pytest.fixture
def task(study):
    tree = read_tree(study.tree)
    known = np.random.default_rng(0).random(len(tree.tip_names)) < 0.8
    split = split_tree(tree, known)
    shape = EncoderShape(encoder="wide", embedding_dim=8, wide_dim=8)
    model = PretrainedModel(AsvEncoder(shape), clades=len(split.clades))
    config = PretrainConfig(
        data=OptionalTableOptions(table=study.table), run=RunOptions(output_dir=study.table.parent)
    )
    tips = calibration_tips(len(split.clades.sequences), 0)
    return TreeTask(model, split, AsvDataset(split.unseen, 150), tips, config, None)


def test_sequences_are_left_out_where_they_are_no_dna_or_repeat_another():
    kept, facts = distinct_sequences({"a": "ACGT", "b": "ACNT", "c": "ACGT", "d": "TTTT"}, "f")
    assert kept == {"a": "ACGT", "d": "TTTT"}
    assert [(fact.count, fact.kind) for fact in facts] == [(1, "dropped"), (1, "dropped")]
    assert "'b'" in facts[0].detail and "'c'" in facts[1].detail


def test_epochs_follow_the_tokens_and_what_is_given_stays():
    few, many = (AsvDataset(_texts(count), 150) for count in (10, 60_000))
    assert tree_options(OptimizerOptions(), few).epochs == 60
    assert tree_options(OptimizerOptions(), many).epochs == 6  # 30 of 5 million tokens each
    given = tree_options(OptimizerOptions(epochs=7, lr=0.1, validate_every=3), few)
    assert (given.epochs, given.lr, given.validate_every) == (7, 0.1, 3)


def _texts(count):
    from aam.data.texts import Texts

    return Texts.of(["ACGTACGTACGT" * 7] * count)


def test_the_network_counts_only_as_much_as_it_knows(task, monkeypatch):
    """Of its logits: right ones, noise of the same size, and none."""
    clades, tips = task.split.clades, torch.from_numpy(task.calibration)
    start, stop = torch.from_numpy(clades.start), torch.from_numpy(clades.stop)
    true = (tips[:, None] >= start) & (tips[:, None] < stop)
    logits = 10.0 * true.float().numpy() - 5
    said = {"right": logits, "wrong": -logits, "noise": np.random.default_rng(0).permuted(logits)}
    weights = {}
    for name, own in said.items():
        monkeypatch.setattr(task.placer, "network_logits", lambda near, clades=None, own=own: own)
        task.calibrate()
        weights[name] = task.placer.network_weight
    assert weights["right"] == 1.0 and weights["wrong"] == 0.0 and weights["noise"] < 1.0


def test_pairs_are_no_clade_without_one_of_the_two(task):
    clades = task.split.clades
    pair = next(k for k in range(len(clades)) if clades.stop[k] - clades.start[k] == 2)
    task.calibration = np.array([clades.start[pair], clades.start[pair], clades.stop[pair]])
    lowest = np.array([pair, clades.parent[pair], pair])
    expected = [clades.parent[pair], clades.parent[pair], pair]
    assert task.without_pairs(lowest).tolist() == expected


def test_calibration_is_few_known_asvs_the_same_ones_every_time():
    assert len(calibration_tips(10_000, 0)) == 250 and len(calibration_tips(10**6, 0)) == 300
    np.testing.assert_array_equal(calibration_tips(500, 3), calibration_tips(500, 3))
    assert len(calibration_tips(3, 0)) == 0


def test_communities_are_the_training_samples_by_known_asv(study):
    table, tree = read_table(study.table), read_tree(study.tree)
    truth, rows = UniFrac(table, tree), np.arange(0, 30, 2)
    samples = Samples(table)
    split = pretrain_tree.split_by_samples(samples, truth, rows)
    judged = EvaluationSubset(samples, truth, np.arange(1, 30, 2), rows, None)
    found = communities(split.clades, judged)
    for row, sample in enumerate(rows):
        own = {
            table.feature_ids[c]: v for c, v in zip(*_entries(table.counts, sample), strict=True)
        }
        names = split.clades.sequences
        assert own == {names[int(c)]: v for c, v in zip(*_entries(found, row), strict=True)}
    new = set(split.unseen)
    assert new == set(table.feature_ids) - set(split.clades.sequences) and new


def _entries(counts, row):
    part = slice(counts.indptr[row], counts.indptr[row + 1])
    return counts.indices[part], counts.data[part]


def test_colours_are_the_first_column_with_few_classes_else_numbers(study):
    from aam.data.metadata import read_metadata

    metadata = read_metadata(study.metadata)
    samples = Samples(read_table(study.table), metadata.select(read_table(study.table).sample_ids))
    found = colours(samples, np.arange(30))
    assert found["kind"] == "classification" and found["column"] == "site"
    assert found["values"][samples.ids[3]] == metadata.select(samples.ids).text("site")[3]
    assert colours(Samples(samples.table), np.arange(30)) is None


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
    np.testing.assert_allclose(UniFrac(found, tree).all_pairs(), truth.all_pairs(), atol=1e-12)


def test_what_is_too_much_is_said(task, monkeypatch):
    assert limit_facts(task.split) == []
    monkeypatch.setattr("aam.commands.pretrain.LEFT_OUT", 5)
    monkeypatch.setattr("aam.commands.pretrain.MOST_CLADES", len(task.split.clades))
    few, unseen = limit_facts(task.split)
    assert few.kind == unseen.kind == "cut" and few.count > 0
    assert unseen.count == len(task.split.unseen) - 5
