"""Mixtures of a batch's samples: what they hold, and that their distances are the true ones."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from aam.data.dataset import SampleDataset
from aam.data.phylogeny import METRICS, UniFrac
from aam.data.table import FeatureTable, read_table
from aam.training.losses import DistanceLoss
from aam.training.mixtures import add_mixtures, mix_samples


@pytest.fixture(scope="module")
def table(community) -> FeatureTable:
    return read_table(community.table)


@pytest.fixture(scope="module")
def dataset(table) -> SampleDataset:
    return SampleDataset(table)


def rows_of(slots, counts):
    """Each sample as {ASV: reads}."""
    parts = np.split(counts.numpy(), slots.offsets.numpy()[1:-1])
    return [
        dict(zip(asvs.tolist(), reads.tolist(), strict=True))
        for asvs, reads in zip(slots, parts, strict=True)
    ]


def test_a_mixture_holds_asvs_of_two_samples_with_the_sum_of_the_kept_reads(dataset):
    torch.manual_seed(0)
    batch = dataset.batch(np.arange(6))
    samples = rows_of(batch.slots, batch.counts)
    sizes = []
    for mixture in rows_of(*mix_samples(batch.slots, batch.counts, batch.asv_ids, 200)):
        assert mixture
        parents = [
            (one, other)
            for one in range(6)
            for other in range(one)
            if mixture.keys() <= samples[one].keys() | samples[other].keys()
        ]
        assert parents
        assert any(
            all(
                reads in {a.get(asv, 0), b.get(asv, 0), a.get(asv, 0) + b.get(asv, 0)}
                for asv, reads in mixture.items()
            )
            for a, b in ((samples[one], samples[other]) for one, other in parents)
        )
        sizes.append(len(mixture))
    mean = np.mean([len(sample) for sample in samples])
    # p of one and 1 - p of the other, minus those kept from both: fewer than a sample, not by half.
    assert 0.7 * mean < np.mean(sizes) < 1.1 * mean
    assert max(sizes) > 1.3 * min(sizes)


@pytest.mark.parametrize("metric", METRICS)
def test_distances_of_mixtures_are_those_of_a_table_that_holds_them(
    table, dataset, community, metric
):
    torch.manual_seed(1)
    unifrac = UniFrac(table, community.tree, metric)
    loss = DistanceLoss(unifrac, mixtures=1.5, columns=dataset.columns)
    batch = add_mixtures(dataset.batch([5, 2, 9, 0]), loss.mixtures)
    assert len(batch.slots) == 10 and len(batch) == 4
    assert torch.equal(batch.slots.offsets[:5], dataset.batch([5, 2, 9, 0]).slots.offsets)

    names = [dataset.sequences[one] for one in batch.asv_ids.tolist()]
    column = {name: place for place, name in enumerate(table.feature_ids)}
    counts = np.zeros((10, len(table.feature_ids)), dtype=np.int64)
    for row, sample in enumerate(rows_of(batch.slots, batch.counts)):
        for asv, reads in sample.items():
            counts[row, column[names[asv]]] = int(reads)
    ids = tuple("abcdefghij")
    written = FeatureTable(ids, table.feature_ids, sp.csr_array(counts), "mixtures")
    expected = UniFrac(written, community.tree, metric).all_pairs()
    # A table's UniFrac depends on its own tips only through the stem that all of them share.
    found = loss.truth(batch).between(0, 10)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_array_equal(found[:4, :4], unifrac.pairwise([5, 2, 9, 0]))
    for first, last in ((0, 3), (2, 6), (5, 10)):
        part = loss.truth(batch).between(first, last)
        np.testing.assert_allclose(part, expected[first:last, first:], atol=1e-12)


def test_samples_of_one_asv_mix_to_something(community):
    counts = sp.csr_array(np.eye(3, dtype=np.int64))
    tiny = FeatureTable(("a", "b", "c"), ("ACGT", "CCGT", "GCGT"), counts, "tiny")
    batch = SampleDataset(tiny).batch([0, 1, 2])
    torch.manual_seed(2)
    slots, reads = mix_samples(batch.slots, batch.counts, batch.asv_ids, 300)
    assert int(slots.lengths.min()) == 1 and int(slots.lengths.max()) == 2
    assert float(reads.min()) == 1 and float(reads.max()) == 1


def test_mixtures_are_the_same_where_every_slot_has_a_row_of_its_own(table, dataset):
    apart = SampleDataset(table, share_asvs=False)
    found = []
    for data in (dataset, apart):
        batch = data.batch([3, 1, 4])
        torch.manual_seed(3)
        slots, counts = mix_samples(batch.slots, batch.counts, batch.asv_ids, 20)
        found.append((batch.asv_ids[slots.values], slots.offsets, counts))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
