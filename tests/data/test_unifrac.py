"""UniFrac and Faith PD against scikit-bio and ssu."""

import io
import subprocess
import time
import tracemalloc

import h5py
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from skbio import TreeNode
from skbio.diversity import alpha_diversity, beta_diversity

import aam.data.unifrac as unifrac_module
from aam.data.table import FeatureTable, read_table
from aam.data.tree import read_tree
from aam.data.unifrac import METRICS, UniFrac
from aam.errors import InputError
from tests.data.trees import caterpillar, make_table, parse, random_newick, random_table

SCIKIT_BIO = {
    "unweighted": ("unweighted_unifrac", {}),
    "weighted": ("weighted_unifrac", {}),
    "weighted-normalized": ("weighted_unifrac", {"normalized": True}),
}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tips=st.integers(2, 12))
def test_unifrac_and_faith_pd_equal_scikit_bio(seed, tips):
    generator = np.random.default_rng(seed)
    newick = random_newick(generator, tips)
    # Some tips are not in the table, so that shearing is part of what is checked.
    features = [f"t{tip}" for tip in generator.permutation(tips)[: max(1, tips - 2)]]
    counts = generator.integers(0, 4, (4, len(features))) * generator.integers(0, 2, (4, 1))
    counts[counts.sum(axis=1) == 0, 0] = 1
    unifrac = UniFrac(make_table(counts, features), parse(newick))
    tree = TreeNode.read(io.StringIO(newick), format="newick")
    options = {"counts": counts, "tree": tree, "taxa": features, "validate": False}
    for metric, (name, more) in SCIKIT_BIO.items():
        with np.errstate(invalid="ignore"):  # where no branch has a length
            expected = np.nan_to_num(beta_diversity(name, **options, **more).data)
        np.testing.assert_allclose(unifrac.pairwise(metric=metric), expected, atol=1e-12)
        some = unifrac.pairwise([2, 0], metric)
        np.testing.assert_allclose(some, expected[[2, 0]][:, [2, 0]], atol=1e-12)
    pd = alpha_diversity("faith_pd", **options).to_numpy()
    np.testing.assert_allclose(unifrac.faith_pd(), pd, atol=1e-12)
    np.testing.assert_allclose(unifrac.faith_pd([2, 2, 0]), pd[[2, 2, 0]], atol=1e-12)
    assert unifrac.pairwise([]).shape == (0, 0) and unifrac.faith_pd([]).shape == (0,)


def test_a_stem_above_the_samples_counts_and_the_length_of_the_root_does_not():
    """Numbers of ssu 1.2 for this tree; c is not in the table."""
    unifrac = UniFrac(make_table([[1, 0], [1, 3]], "ab"), parse("((a:1,b:2):5,c:1):3;"))
    for metric, expected in zip(METRICS, (2 / 8, 2.25, 2.25 / 12.75), strict=True):
        assert unifrac.pairwise(metric=metric)[0, 1] == pytest.approx(expected, 1e-14)
    assert unifrac.faith_pd().tolist() == [6.0, 8.0]


def test_a_caterpillar_of_50000_tips_and_a_tree_of_one():
    tips = 50_000
    tree = parse(caterpillar(tips).replace(":2", ":1"))
    assert len(tree) == 2 * tips - 1
    # t0 and t1 hang from the deepest node, 49,998 branches below the root; t49999 from the root.
    unifrac = UniFrac(make_table(np.eye(3), ["t0", "t1", f"t{tips - 1}"]), tree)
    assert unifrac.faith_pd().tolist() == [tips - 1, tips - 1, 1]
    np.testing.assert_allclose(unifrac.pairwise()[0], [0, 2 / tips, 1], atol=1e-15)
    unifrac = UniFrac(make_table([[3], [5]], ["a"]), parse("a:7;"))
    assert unifrac.pairwise().tolist() == [[0, 0], [0, 0]]
    assert unifrac.faith_pd().tolist() == [0, 0]


# ---------------------------------------------------------------------------- table and tree
def test_features_missing_in_the_tree_are_an_error_or_a_counted_fact():
    features = ["a", "x1", "b", "x2", "c", "x3", "x4"]
    counts = np.array([[2, 1, 0, 0, 3, 0, 0], [0, 0, 4, 5, 1, 1, 1], [1, 0, 2, 0, 0, 0, 0]])
    table, tree = make_table(counts, features), parse("((a:1,b:2):1,c:4,d:1);")
    expected = r"tree.nwk: 4 of 7 features.*\('x1', 'x2', 'x3', ...\).*--drop-missing-tips"
    with pytest.raises(InputError, match=expected):
        UniFrac(table, tree)
    unifrac = UniFrac(table, tree, drop_missing=True)
    (fact,) = unifrac.facts
    assert (fact.count, fact.kind) == (4, "dropped")
    assert "of 7, 38.10% of the reads" in fact.detail  # 8 of 21
    without = UniFrac(make_table(counts[:, [0, 2, 4]], "abc"), tree)
    assert without.facts == []
    np.testing.assert_array_equal(unifrac.pairwise(), without.pairwise())
    with pytest.raises(InputError, match=r"none of the 2 features.*'ACGT'.*'a'"):
        UniFrac(make_table([[1, 1]], ["ACGT", "TTTT"]), tree, drop_missing=True)


def test_samples_without_reads():
    table = make_table([[1, 1, 0], [0, 0, 7]], "abx", ["one", "two"])
    with pytest.raises(InputError, match=r"1 of 2 samples have no reads on tips .*\('two'\)"):
        UniFrac(table, parse("(a:1,b:2);"), drop_missing=True)
    table = make_table([[1, 1], [0, 0], [0, 0]], "ab", ["one", "two", "three"])
    with pytest.raises(InputError, match=r"2 of 3 samples have no reads \('two', 'three'\)"):
        UniFrac(table, parse("(a:1,b:2);"))


def test_tips_in_lower_case_and_hashed_tips_find_their_sequences(tmp_path):
    table = make_table([[1, 1, 0], [0, 1, 1]], ["ACGT", "TTTT", "GGGG"])
    expected = UniFrac(table, parse("((ACGT:1,TTTT:2):1,GGGG:4);")).pairwise()
    (tmp_path / "rep.fasta").write_text(">h1\nacgt\n>h2\nTTTT\n>h3\nGGGG\n")
    (tmp_path / "tree.nwk").write_text("((h1:1,h2:2):1,h3:4);")
    hashed = read_tree(tmp_path / "tree.nwk", sequences=tmp_path / "rep.fasta")
    for tree in (parse("((acgt:1,tttt:2):1,GGGG:4);"), hashed):
        np.testing.assert_array_equal(UniFrac(table, tree).pairwise(), expected)


# -------------------------------------------------------------------------- real data, oracles
@pytest.mark.parametrize(
    ("metric", "name"),
    [*zip(METRICS, ("unweighted", "weighted_unnormalized", "weighted_normalized"), strict=True)],
)
def test_equal_to_ssu(real_data, require_tool, tmp_path, metric, name):
    folder, output = real_data / "phylogeny-small", tmp_path / "ssu.h5"
    table, tree = read_table(folder / "table.biom"), read_tree(folder / "tree.nwk")
    files = ["-i", folder / "table.biom", "-t", folder / "tree.nwk", "-o", output, "--pcoa", "0"]
    words = [require_tool("ssu"), *files, "-m", f"{name}_fp64", "--format", "hdf5_fp64"]
    subprocess.run(words, check=True, capture_output=True)
    with h5py.File(output) as file:
        order = [one.decode() for one in file["order"]]
        expected = file["matrix"][()]
    rows = [order.index(name) for name in table.sample_ids]
    ours = UniFrac(table, tree).pairwise(metric=metric)
    np.testing.assert_allclose(ours, expected[np.ix_(rows, rows)], atol=1e-10)


@pytest.mark.real
@pytest.mark.parametrize("metric", METRICS)
def test_blocks_batches_and_all_pairs_agree_on_ibd(real_data, metric, monkeypatch):
    table = read_table(real_data / "ibd" / "table-rarefied-5000.biom")
    start = time.process_time()
    unifrac = UniFrac(table, read_tree(real_data / "ibd" / "tree.nwk"))
    whole, faith = unifrac.pairwise(metric=metric), unifrac.faith_pd()
    assert time.process_time() - start < 1.5  # measured 0.1 to 0.3 s
    np.testing.assert_array_equal(whole, whole.T)
    assert not np.diag(whole).any()
    rows = np.random.default_rng(0).choice(len(table.sample_ids), 32, replace=False)
    columns = np.random.default_rng(1).permutation(len(table.feature_ids))
    names = tuple(table.feature_ids[column] for column in columns)
    counts = scipy.sparse.csr_array(table.counts[:, columns] * 7)  # the depth does not matter
    shuffled = UniFrac(FeatureTable(table.sample_ids, names, counts, table.source), unifrac.tree)
    monkeypatch.setattr(unifrac_module, "_FAITH_ROWS", 3)
    for width in (128, 7):
        monkeypatch.setattr(unifrac_module, "_BLOCK_SAMPLES", width)
        for found in (unifrac, shuffled):
            some = found.pairwise(rows, metric)
            np.testing.assert_allclose(some, whole[np.ix_(rows, rows)], atol=1e-13)
            np.testing.assert_allclose(found.faith_pd(rows), faith[rows], rtol=1e-13)


def peak_of(compute):
    tracemalloc.start()
    compute()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_few_samples_cost_what_they_hold_and_not_the_tree():
    """Of 200,000 tips 40 are reached: any array over all branches would be 1.6 MB or more."""
    generator, tips = np.random.default_rng(0), 200_000
    blocks = [",".join(f"t{n}:1" for n in range(low, low + 100)) for low in range(0, tips, 100)]
    tree = parse("(" + ",".join(f"({block}):1" for block in blocks) + ");")
    few = [np.sort(generator.choice(tips, 20, False)) for _ in range(2)]
    reads, reached = np.ones(tips + 40, dtype=np.int64), np.concatenate([*few, np.arange(tips)])
    counts = scipy.sparse.csr_array((reads, reached, [0, 20, 40, tips + 40]), (3, tips))
    names = ("one", "two", "rest"), tuple(f"t{tip}" for tip in range(tips))
    unifrac = UniFrac(FeatureTable(*names, counts, "t"), tree)
    unifrac.pairwise([0, 1], "weighted")
    for metric in METRICS:
        assert peak_of(lambda one=metric: unifrac.pairwise([0, 1], one)) < 0.3e6


def test_memory_follows_the_block_and_not_samples_times_branches():
    """1,200 samples x 4,000 branches would be 38 MB of float64; 20 ASVs a sample are 3 MB."""
    generator = np.random.default_rng(0)
    tree = parse(random_newick(generator, 3000))
    table = random_table(generator, 1200, [f"t{tip}" for tip in range(3000)], share=20 / 3000)
    for metric in METRICS:  # the distances are 12 MB
        assert peak_of(lambda one=metric: UniFrac(table, tree).pairwise(metric=one)) < 28e6
