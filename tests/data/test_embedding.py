"""Vectors of samples: their products are the lengths that samples share."""

import numpy as np
import pytest
import scipy.sparse

from aam.data import embedding
from aam.data.clades import Clades, Grafts, split_tree
from aam.data.embedding import Embedding
from aam.data.table import read_table
from aam.data.tree import read_tree
from aam.data.unifrac import UniFrac
from tests.data.trees import make_table, parse, random_newick, random_table

WIDE = 2**20
"""Numbers for the pendants among which hardly two fall on one place."""


def shared(table, tree):
    """``(n, n)`` length that samples share, by UniFrac: u = 1 - S / (PD + PD' - S)."""
    unifrac = UniFrac(table, tree)
    faith = unifrac.faith_pd(range(len(unifrac)))
    apart = unifrac.pairwise()
    return (1 - apart) * (faith[:, None] + faith) / (2 - apart), faith, apart


def vectors_of(own, table, clades, grafted=None, dimensions=WIDE):
    if grafted is None:
        grafted = clades.graft(Grafts(*(np.empty(0, dtype=np.int64),) * 3), [])
    blocks = list(own.rows(table, clades, grafted, dimensions))
    return tuple(np.concatenate(part) for part in zip(*blocks, strict=True))


def no_communities(clades):
    return scipy.sparse.csr_array((0, len(clades.tree.tip_names)))


@pytest.fixture(scope="module")
def small():
    generator = np.random.default_rng(0)
    tree = parse(random_newick(generator, 60, plain=True))
    known = generator.random(60) < 0.7
    split = split_tree(tree, known)
    return generator, split, Embedding.fit(split.clades, no_communities(split.clades), 0)


def test_products_of_all_directions_are_the_shared_lengths(small):
    generator, split, own = small
    clades = split.clades
    count = ((clades.tree.tip_stop - clades.tree.tip_start > 1) & (clades.tree.length > 0)).sum()
    assert own.directions.shape == (count, count) and own.most == 2 * count
    np.testing.assert_allclose(own.directions @ own.directions.T, np.eye(count), atol=1e-5)
    table = random_table(generator, 12, list(clades.sequences))
    vectors, faith = vectors_of(own, table, clades)
    expected, true_faith, _ = shared(table, clades.tree)
    assert vectors.dtype == np.float32 and vectors.shape == (12, WIDE)
    np.testing.assert_allclose(faith, true_faith, rtol=1e-12)
    np.testing.assert_allclose(vectors @ vectors.T, expected, rtol=1e-4, atol=1e-4)


def test_new_asvs_are_embedded_by_the_tree_that_they_were_grafted_on(small):
    """Places on whole branches only: there the products stay exact."""
    generator, split, own = small
    clades = split.clades
    node = generator.integers(0, len(clades.tree), 9)
    grafts = Grafts(node, clades.tree.length[node], generator.random(9))
    names = [f"x{i}" for i in range(9)]
    grown = clades.graft(grafts, names)
    table = random_table(generator, 12, [*clades.sequences, *names])
    vectors, faith = vectors_of(own, table, clades, grown)
    expected, true_faith, _ = shared(table, grown[0])
    np.testing.assert_allclose(faith, true_faith, rtol=1e-12)
    np.testing.assert_allclose(vectors @ vectors.T, expected, rtol=1e-4, atol=1e-4)


def test_a_part_of_a_pendant_that_a_new_asv_shares_counts_as_what_it_is():
    clades = Clades(parse("((a:4,b:1):2,c:3);"))
    own = Embedding.fit(clades, no_communities(clades), 0)
    grown = clades.graft(Grafts(np.array([0]), np.array([3.0]), np.array([0.5])), ["x"])
    table = make_table(np.eye(4, dtype=int), ["a", "b", "c", "x"])
    vectors, faith = vectors_of(own, table, clades, grown)
    assert faith.tolist() == [6, 3, 3, 5.5]
    expected = np.array([[6, 2, 0, 5], [2, 3, 0, 2], [0, 0, 3, 0], [5, 2, 0, 2 + 9 / 4 + 0.5]])
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-5)


@pytest.mark.parametrize("dimensions", [1, 2, 7, "most"])
def test_any_number_of_dimensions(small, dimensions):
    generator, split, own = small
    dimensions = own.most if dimensions == "most" else dimensions
    table = random_table(generator, 5, list(split.clades.sequences))
    vectors, faith = vectors_of(own, table, split.clades, dimensions=dimensions)
    assert vectors.shape == (5, dimensions) and np.isfinite(vectors).all() and len(faith) == 5
    # Half are the first directions, whatever comes after.
    whole, _ = vectors_of(own, table, split.clades)
    half = dimensions // 2
    np.testing.assert_allclose(vectors[:, :half], whole[:, :half], atol=1e-5)


def test_blocks_of_samples_change_nothing(small, monkeypatch):
    generator, split, own = small
    table = random_table(generator, 23, list(split.clades.sequences))
    whole, faith = vectors_of(own, table, split.clades, dimensions=16)
    monkeypatch.setattr(embedding, "_ROWS", 4)
    parts, own_faith = vectors_of(own, table, split.clades, dimensions=16)
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    assert np.array_equal(own_faith, faith)


def test_features_in_another_order_and_others_than_the_tree_has_change_nothing(small):
    generator, split, own = small
    table = random_table(generator, 6, list(split.clades.sequences))
    whole, faith = vectors_of(own, table, split.clades, dimensions=20)
    order = generator.permutation(len(table.feature_ids))
    counts = np.pad(table.counts.toarray()[:, order], ((0, 0), (0, 1)), constant_values=3)
    names = [*(table.feature_ids[at] for at in order), "foreign"]
    again, own_faith = vectors_of(own, make_table(counts, names), split.clades, dimensions=20)
    np.testing.assert_allclose(again, whole, atol=1e-6)
    assert np.array_equal(own_faith, faith)


def test_directions_are_a_function_of_their_arguments_and_come_back_from_a_file(small, tmp_path):
    _, split, own = small
    again = Embedding.fit(split.clades, no_communities(split.clades), 0)
    assert np.array_equal(again.directions, own.directions)
    np.savez(tmp_path / "model.npz", **own.to_arrays())
    with np.load(tmp_path / "model.npz") as arrays:
        assert np.array_equal(Embedding.from_arrays(arrays).directions, own.directions)


@pytest.mark.parametrize("text", ["(a:1,b:2,c:3);", "(a:1,(b:2,c:3):0);"])
def test_a_tree_without_inner_branches_has_only_pendants(text):
    clades = Clades(parse(text))
    own = Embedding.fit(clades, no_communities(clades), 0)
    table = make_table([[1, 0, 0], [1, 1, 0], [0, 1, 1]], list(clades.sequences))
    vectors, faith = vectors_of(own, table, clades)
    np.testing.assert_allclose(vectors @ vectors.T, [[1, 1, 0], [1, 3, 2], [0, 2, 5]], atol=1e-5)
    assert faith.tolist() == [1, 3, 5]


def tanimoto(vectors, faith):
    product = vectors @ vectors.T
    return 1 - product / (faith[:, None] + faith - product)


def test_the_tanimoto_distance_of_short_vectors_follows_unifrac(community):
    table, tree = read_table(community.table), read_tree(community.tree)
    unifrac = UniFrac(table, tree)
    clades = Clades(unifrac.tree)
    place = {name: tip for tip, name in enumerate(clades.sequences)}
    order = np.argsort([place[name] for name in table.feature_ids])
    own = Embedding.fit(clades, scipy.sparse.csr_array(table.counts[:, order]), 0)
    pairs = np.triu_indices(len(table.sample_ids), 1)
    expected = unifrac.pairwise()[pairs]
    vectors, faith = vectors_of(own, table, clades, dimensions=own.most)
    found = tanimoto(vectors, faith)[pairs]
    assert np.corrcoef(found, expected)[0, 1] > 0.95
