"""Vectors of samples: their products are the lengths that samples share."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from aam.data import embedding
from aam.data.clades import Clades, Grafts, split_tree
from aam.data.embedding import Embedding
from aam.data.unifrac import UniFrac
from tests.data.trees import make_table, parse, random_newick, random_table

WIDE = 2**20
"""Numbers for the pendants among which hardly two fall on one place."""


def fit(clades):
    return Embedding.fit(clades, csr_array((0, len(clades.sequences))), 0)


def vectors_of(own, table, clades, grafted=None, dimensions=WIDE):
    none = np.empty(0, dtype=np.int64)
    grafted = grafted or clades.graft(Grafts(none, none, none), [])
    return own.vectors(table, clades, grafted, dimensions)


def check_products(own, table, clades, grafted):
    """S by UniFrac: u = 1 - S / (PD + PD' - S)."""
    unifrac = UniFrac(table, grafted[0])
    expected, apart = unifrac.faith_pd(), unifrac.pairwise()
    vectors, faith = vectors_of(own, table, clades, grafted)
    assert vectors.dtype == np.float32 and vectors.shape == (len(expected), WIDE)
    np.testing.assert_allclose(faith, expected, rtol=1e-12)
    shared = (1 - apart) * (expected[:, None] + expected) / (2 - apart)
    np.testing.assert_allclose(vectors @ vectors.T, shared, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def small():
    generator = np.random.default_rng(0)
    split = split_tree(parse(random_newick(generator, 60, plain=True)), generator.random(60) < 0.7)
    return generator, split.clades, fit(split.clades)


def test_products_of_all_directions_are_the_shared_lengths(small):
    generator, clades, own = small
    count = ((clades.tree.tip_stop - clades.tree.tip_start > 1) & (clades.tree.length > 0)).sum()
    assert own.directions.shape == (count, count) and own.most == 2 * count
    np.testing.assert_allclose(own.directions @ own.directions.T, np.eye(count), atol=1e-5)
    assert np.array_equal(fit(clades).directions, own.directions)
    for new in (0, 9):  # ASVs that are grafted on whole branches: there the products stay exact
        node = generator.integers(0, len(clades.tree), new)
        grafts = Grafts(node, clades.tree.length[node], generator.random(new))
        names = [f"x{i}" for i in range(new)]
        table = random_table(generator, 12, [*clades.sequences, *names])
        check_products(own, table, clades, clades.graft(grafts, names))


def test_a_part_of_a_pendant_that_a_new_asv_shares_counts_as_what_it_is():
    clades = Clades(parse("((a:4,b:1):2,c:3);"))
    grown = clades.graft(Grafts(np.array([0]), np.array([3.0]), np.array([0.5])), ["x"])
    vectors, faith = vectors_of(
        fit(clades), make_table(np.eye(4, dtype=int), "abcx"), clades, grown
    )
    assert faith.tolist() == [6, 3, 3, 5.5]
    expected = np.array([[6, 2, 0, 5], [2, 3, 0, 2], [0, 0, 3, 0], [5, 2, 0, 2 + 9 / 4 + 0.5]])
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-5)


def test_dimensions_are_cut_and_blocks_the_order_and_foreign_features_change_nothing(
    small, monkeypatch
):
    generator, clades, own = small
    table = random_table(generator, 23, list(clades.sequences))
    whole, faith = vectors_of(own, table, clades)
    order = generator.permutation(len(table.feature_ids))
    counts = np.pad(table.counts.toarray()[:, order], ((0, 0), (0, 1)), constant_values=3)
    shuffled = make_table(counts, [*(table.feature_ids[at] for at in order), "foreign"])
    for dimensions in (1, 2, 7, own.most):
        monkeypatch.setattr(embedding, "_ROWS", 512)
        vectors, _ = vectors_of(own, table, clades, dimensions=dimensions)
        assert vectors.shape == (23, dimensions) and np.isfinite(vectors).all()
        half = dimensions // 2  # are the first directions
        np.testing.assert_allclose(vectors[:, :half], whole[:, :half], atol=1e-5)
        monkeypatch.setattr(embedding, "_ROWS", 4)
        again, own_faith = vectors_of(own, shuffled, clades, dimensions=dimensions)
        np.testing.assert_allclose(again, vectors, atol=1e-6)
        assert np.array_equal(own_faith, faith)


@pytest.mark.parametrize("text", ["(a:1,b:2,c:3);", "(a:1,(b:2,c:3):0);"])
def test_a_tree_without_inner_branches_has_only_pendants(text):
    clades = Clades(parse(text))
    table = make_table([[1, 0, 0], [1, 1, 0], [0, 1, 1]], "abc")
    vectors, faith = vectors_of(fit(clades), table, clades)
    np.testing.assert_allclose(vectors @ vectors.T, [[1, 1, 0], [1, 3, 2], [0, 2, 5]], atol=1e-5)
    assert faith.tolist() == [1, 3, 5]


def test_pendants_that_fall_on_one_place_cancel():
    clades = Clades(parse("(" + ",".join(f"t{tip}:1" for tip in range(200)) + ");"))
    table = make_table(np.repeat(np.eye(2, dtype=int), 100, axis=1), list(clades.sequences))
    vectors, _ = vectors_of(fit(clades), table, clades, dimensions=8)
    assert abs(vectors[0] @ vectors[1]) < 150  # 1,250 if all were added
