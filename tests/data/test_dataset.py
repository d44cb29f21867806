"""Ragged batches against a plain loop over the table, and what must not change them."""

import time

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from aam.data.dataset import AsvDataset, SampleDataset
from aam.data.sequences import tokenize
from aam.data.table import FeatureTable, read_table
from aam.errors import InputError


def random_table(samples=9, features=40, seed=0, lengths=(3, 12)):
    generator = np.random.default_rng(seed)
    dna = set()
    while len(dna) < features:
        dna.add("".join(generator.choice(list("ACGT"), generator.integers(*lengths))))
    counts = generator.integers(1, 9, (samples, features))
    counts[generator.random(counts.shape) < 0.5] = 0
    counts[:, 0] = 1
    names = tuple(f"s{n}" for n in range(samples))
    return FeatureTable(names, tuple(generator.permutation(sorted(dna)).tolist()),
                        sp.csr_array(counts), "random")  # fmt: skip


def table_of(counts, dna):
    names = tuple(f"s{n}" for n in range(len(counts)))
    return FeatureTable(names, tuple(dna), sp.csr_array(counts), "t")


def permuted(table, seed=1):
    columns = np.random.default_rng(seed).permutation(len(table.feature_ids))
    return table_of(table.counts.toarray()[:, columns], (table.feature_ids[c] for c in columns))


def read_back(dataset, batch):
    """For each sample of the batch {sequence: count} from its tensors."""
    result = []
    for at in range(len(batch)):
        start, stop = batch.slots.offsets[at : at + 2].tolist()
        rows = batch.slots.values[start:stop].tolist()
        asvs = [dataset.sequences[int(batch.asv_ids[row])] for row in rows]
        for row, asv in zip(rows, asvs, strict=True):
            assert batch.tokens[row].tolist() == tokenize([asv]).values.tolist()
        result.append(dict(zip(asvs, batch.counts[start:stop].tolist(), strict=True)))
    return result


def in_table(table, row):
    counts = table.counts.toarray()[row]
    return {one: float(c) for one, c in zip(table.feature_ids, counts, strict=True) if c}


@pytest.mark.parametrize("lengths", [(3, 12), (8, 9)])
def test_a_batch_says_what_the_table_says(lengths):
    table = random_table(lengths=lengths)
    dataset = SampleDataset(table)
    rows = [4, 0, 7, 4]
    batch = dataset.batch(rows)
    assert read_back(dataset, batch) == [in_table(table, row) for row in rows]
    assert batch.rows.tolist() == rows and len(batch) == 4
    assert batch.tokens.values.dtype == torch.uint8
    assert batch.slots.values.dtype == batch.asv_ids.dtype == torch.int64
    assert batch.counts.dtype == torch.float32
    assert batch.targets is None and batch.categories is None
    distinct = {one for row in rows for one in in_table(table, row)}
    assert len(batch.tokens) == len(batch.asv_ids) == len(distinct)
    empty = dataset.batch([])
    assert len(empty) == 0 and len(empty.tokens) == 0 and empty.slots.max_length == 0


def test_lengths_for_the_planner_and_the_distinct_asvs_of_samples():
    table = random_table()
    dataset = SampleDataset(table, token_limit=15)
    full = (table.counts.toarray() > 0).sum(axis=1)
    np.testing.assert_array_equal(dataset.asv_count, np.minimum(full, 15))
    np.testing.assert_array_equal(dataset.sequence_lengths, [len(s) + 1 for s in dataset.sequences])
    dataset.limit_asvs(np.array([2]), np.array([4]))
    starts, asvs = dataset.entries()
    assert np.diff(starts).tolist() == dataset.batch(range(9)).slots.lengths.tolist()
    assert dataset.asv_count[2] == 4
    found = dataset.asvs_of(np.array([3, 5]))
    expected = {*asvs[starts[3] : starts[4]].tolist(), *asvs[starts[5] : starts[6]].tolist()}
    assert found.tolist() == sorted(expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_which_asvs_a_sample_keeps(seed):
    """The most abundant, ties by sequence, whatever the table's order; or its first ones."""
    generator = np.random.default_rng(0)
    dna = sorted({"".join(generator.choice(list("ACGT"), 8)) for _ in range(300)})
    counts = generator.integers(1, 4, (2, len(dna)))
    table = permuted(table_of(counts, dna), seed)
    dataset = SampleDataset(table, token_limit=40)
    for row, found in enumerate(read_back(dataset, dataset.batch([0, 1]))):
        ranked = sorted(range(len(dna)), key=lambda n: (-counts[row, n], dna[n]))
        assert set(found) == {dna[n] for n in ranked[:40]}
    dataset = SampleDataset(table, token_limit=40, asv_sampling="first")
    for found in read_back(dataset, dataset.batch([0, 1])):
        assert set(found) == set(table.feature_ids[:40])


def test_random_sampling_is_seeded_uniform_and_without_repeats():
    dna = [f"{a}{b}" for a in "ACGT" for b in "AC"]
    table = table_of(np.array([[5] * 8, [1, 1] + [0] * 6]), dna)
    dataset = SampleDataset(table, token_limit=3, asv_sampling="random")

    def draw(seed):
        batch = dataset.batch([0, 1], generator=torch.Generator().manual_seed(seed))
        assert batch.slots.lengths.tolist() == [3, 2]
        return tuple(read_back(dataset, batch)[0])

    assert draw(0) == draw(0)
    drawn = [draw(seed) for seed in range(300)]
    assert all(len(one) == 3 for one in drawn)
    times = [sum(name in one for one in drawn) for name in dataset.sequences]
    assert min(times) > 75 and max(times) < 150  # 300 * 3 / 8 = 112
    assert len(dataset.entries()[1]) == 10 and len(dataset.asvs_of(np.array([0]))) == 8


@pytest.mark.parametrize("asv_sampling", ["abundance", "random"])
@pytest.mark.parametrize("token_limit", [7, 1024])
def test_the_order_of_the_tables_features_changes_nothing(asv_sampling, token_limit):
    table = random_table(samples=20, features=60)
    datasets, batches = [], []
    for one in (table, permuted(table)):
        dataset = SampleDataset(one, token_limit=token_limit, asv_sampling=asv_sampling)
        datasets.append(dataset)
        generator = torch.Generator().manual_seed(0)
        batches.append(dataset.batch([3, 11, 5], generator=generator))
    a, b = batches
    assert datasets[0].sequences == datasets[1].sequences
    assert torch.equal(a.tokens.values, b.tokens.values)
    assert torch.equal(a.slots.values, b.slots.values)
    assert torch.equal(a.counts, b.counts) and torch.equal(a.asv_ids, b.asv_ids)


def test_facts_count_what_was_cut():
    table = random_table()
    full = (table.counts.toarray() > 0).sum(axis=1)
    sequences, samples = SampleDataset(table, max_bp=6, token_limit=18).facts
    assert (sequences.count, sequences.kind) == (sum(len(s) > 6 for s in table.feature_ids), "cut")
    alike = 40 - len({one[:6] for one in table.feature_ids})
    assert sequences.what == "sequences cut at 6 bases"
    assert sequences.detail == f"longest 11, {alike} equal to another after the cut"
    assert (samples.count, samples.kind) == (int((full > 18).sum()), "cut")
    assert f"{int((full - 18).clip(0).sum())} of {int(full.sum())}" in samples.detail
    assert SampleDataset(table).facts == []


def test_targets_and_categories_follow_their_samples_to_a_device():
    table = random_table()
    values, categories = np.linspace(0, 1, 9), np.arange(18).reshape(9, 2)
    batch = SampleDataset(table, targets=values, categories=categories).batch([8, 2])
    assert batch.targets.dtype == torch.float32
    np.testing.assert_allclose(batch.targets.numpy(), values[[8, 2]], rtol=1e-6)
    assert batch.categories.tolist() == [[16, 17], [4, 5]]
    classes = SampleDataset(table, targets=np.arange(9, dtype=np.int32)).batch([8, 2]).targets
    assert classes.dtype == torch.int64 and classes.tolist() == [8, 2]
    there = batch.to("meta")
    assert there.tokens.max_length == batch.tokens.max_length
    for tensor in (there.rows, there.tokens.values, there.tokens.offsets, there.asv_ids,
                   there.slots.values, there.counts, there.targets, there.categories):  # fmt: skip
        assert tensor.device.type == "meta"


def test_samples_without_reads():
    table = random_table()
    counts = table.counts.toarray()
    counts[[2, 5]] = 0
    with pytest.raises(InputError, match=r"t: 2 samples have no reads \('s2', 's5'\)"):
        SampleDataset(table_of(counts, table.feature_ids))


def test_asvs_alone_are_batches_too():
    dataset = AsvDataset(["ACGT", "GG", "TTTTT"], 4)
    batch = dataset.batch([2, 0])
    assert batch.rows.tolist() == [2, 0] and len(batch) == 2 and len(dataset) == 3
    assert batch.tokens.values.tolist() == tokenize(["TTTT", "ACGT"]).values.tolist()
    assert [one.tolist() for one in dataset.entries()] == [[0, 1, 2, 3], [0, 1, 2]]
    assert dataset.default_batch == round(16_384 / (13 / 3))


@pytest.mark.real
def test_real_batches_share_their_asvs_and_are_quick(real_data):
    table = read_table(real_data / "ibd" / "table-rarefied-5000.biom")
    dataset = SampleDataset(table)
    generator = np.random.default_rng(0)
    share = {}
    for size in (8, 32):
        batches = [dataset.batch(generator.permutation(428)[:size]) for _ in range(30)]
        share[size] = np.mean([len(b.asv_ids) / len(b.counts) for b in batches])
    assert abs(share[8] - 0.53) < 0.03 and abs(share[32] - 0.28) < 0.02
    rows = generator.permutation(428)[:32]
    times = []
    for _ in range(20):
        start = time.perf_counter()
        dataset.batch(rows)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3
    assert read_back(dataset, dataset.batch(rows[:2])) == [in_table(table, r) for r in rows[:2]]
