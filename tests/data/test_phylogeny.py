"""The tree and UniFrac against brute force, scikit-bio and ssu."""

import io
import subprocess
import time
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

import aam.data.unifrac as unifrac_module
from aam.data.table import FeatureTable, read_table
from aam.data.tree import read_tree
from aam.data.unifrac import METRICS, UniFrac
from aam.errors import InputError


def make_table(counts, features, samples=None):
    counts = scipy.sparse.csr_array(np.asarray(counts, dtype=np.int64))
    counts.eliminate_zeros()
    samples = samples or [f"s{row}" for row in range(counts.shape[0])]
    return FeatureTable(tuple(samples), tuple(features), counts, "table.biom")


@pytest.fixture
def newick(tmp_path):
    """Write a text as tree.nwk and return the path."""

    def write(text, name="tree.nwk"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


# ------------------------------------------------------------------------------- brute force
def random_tree(generator, tips):
    """Nested (children, length) with 2 to 4 children a node, names t0.. and some zero lengths."""
    nodes = [(f"t{tip}", float(generator.random())) for tip in range(tips)]
    while len(nodes) > 1:
        generator.shuffle(nodes)
        width = min(len(nodes), int(generator.integers(2, 5)))
        length = float(generator.choice([0.0, generator.random()]))
        nodes = [*nodes[width:], (nodes[:width], length)]
    return nodes[0]


def to_newick(node, root=True):
    content, length = node
    if not isinstance(content, str):
        content = "(" + ",".join(to_newick(child, False) for child in content) + ")0.97"
    return content + (";" if root else f":{length!r}")


def branches(node, is_root=True):
    """Every (names of the tips below, length) of a branch; the root's counts as 0."""
    content, length = node
    length = 0.0 if is_root else length
    if isinstance(content, str):
        return [({content}, length)]
    inner = [branches(child, False) for child in content]
    below = set().union(*(names for child in inner for names, _ in child))
    return [branch for child in inner for branch in child] + [(below, length)]


def brute_force(tree, counts, features, metric):
    samples = len(counts)
    result = np.zeros((samples, samples))
    for i in range(samples):
        for j in range(samples):
            different = whole = 0.0
            for names, length in branches(tree):
                a, b = (
                    sum(count for count, name in zip(counts[row], features, strict=True)
                        if name in names)
                    for row in (i, j)
                )  # fmt: skip
                if metric == "unweighted":
                    different += length * abs((a > 0) - (b > 0))
                    whole += length * ((a > 0) or (b > 0))
                else:
                    p, q = a / sum(counts[i]), b / sum(counts[j])
                    different += length * abs(p - q)
                    whole += length * (p + q)
            result[i, j] = different
            if metric != "weighted":
                result[i, j] = different / whole if whole else 0.0
    return result


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tips=st.integers(2, 12), metric=st.sampled_from(METRICS))
def test_unifrac_and_faith_pd_equal_brute_force(tmp_path_factory, seed, tips, metric):
    generator = np.random.default_rng(seed)
    tree = random_tree(generator, tips)
    path = tmp_path_factory.mktemp("tree") / "tree.nwk"
    path.write_text(to_newick(tree))
    # Some tips are not in the table, so that shearing is part of what is checked.
    features = [f"t{tip}" for tip in generator.permutation(tips)[: max(1, tips - 2)]]
    counts = generator.integers(0, 4, (4, len(features))) * generator.integers(0, 2, (4, 1))
    counts[counts.sum(axis=1) == 0, 0] = 1
    unifrac = UniFrac(make_table(counts, features), path, metric)
    expected = brute_force(tree, counts.tolist(), features, metric)
    np.testing.assert_allclose(unifrac.pairwise(), expected, atol=1e-12)
    np.testing.assert_allclose(
        unifrac.cross([2, 0], [1, 3]), expected[[2, 0]][:, [1, 3]], atol=1e-12
    )
    for other in METRICS:
        np.testing.assert_allclose(
            unifrac.by(other).pairwise(),
            brute_force(tree, counts.tolist(), features, other),
            atol=1e-12,
        )
    assert unifrac.metric == metric
    pd = [
        sum(
            length
            for names, length in branches(tree)
            if any(c and f in names for c, f in zip(row, features, strict=True))
        )
        for row in counts
    ]
    np.testing.assert_allclose(unifrac.faith_pd([0, 1, 2, 3]), pd, atol=1e-12)


def test_a_stem_above_the_samples_counts_and_the_length_of_the_root_does_not(newick):
    """Numbers of ssu 1.2 for this tree; c is not in the table."""
    table = make_table([[1, 0], [1, 3]], ["a", "b"])
    tree = read_tree(newick("((a:1,b:2):5,c:1):3;"))
    for metric, expected in zip(METRICS, (2 / 8, 2.25, 2.25 / 12.75), strict=True):
        assert UniFrac(table, tree, metric).pairwise([0, 1])[0, 1] == pytest.approx(expected, 1e-14)
    assert UniFrac(table, tree).faith_pd([0, 1]).tolist() == [6.0, 8.0]


# ---------------------------------------------------------------------------------- the tree
def test_arrays_of_a_tree_with_labels_of_every_kind(newick):
    quoted, plain = "('a b':1e-1,'it''s (x;y)':2)0.93:0.5[note; 1]", "under_score:3"
    tree = read_tree(newick(f"({quoted},{plain},(d:1,e:1,f:1)'g':2)root:9;\n"))
    assert tree.tip_names == ("a b", "it's (x;y)", "under_score", "d", "e", "f")
    assert tree.parent.tolist() == [2, 2, 8, 8, 7, 7, 7, 8, -1]
    assert tree.length.tolist() == [0.1, 2, 0.5, 3, 1, 1, 1, 2, 0]
    assert tree.tip_start.tolist() == [0, 1, 0, 2, 3, 4, 5, 3, 0]
    assert tree.tip_stop.tolist() == [1, 2, 2, 3, 4, 5, 6, 6, 6]


def test_shear_merges_chains_and_keeps_the_root(newick):
    tree = read_tree(newick("(((a:1,b:2):4,x:1):8,(c:16,y:1):32);"))
    sheared = tree.shear(np.array([True, True, False, True, False]))
    assert sheared.tip_names == ("a", "b", "c")
    assert sheared.length.tolist() == [1, 2, 12, 48, 0]
    assert sheared.parent.tolist() == [2, 2, 4, 4, -1]
    single = tree.shear(np.array([False, False, False, True, False]))
    assert single.length.tolist() == [48, 0] and single.parent.tolist() == [1, -1]


def test_a_caterpillar_of_50000_tips(newick):
    tips = 50_000
    inner = "".join(f",t{tip}:1):1" for tip in range(1, tips))
    tree = read_tree(newick("(" * (tips - 1) + "t0:1" + inner[:-2] + ";"))
    assert len(tree) == 2 * tips - 1
    # t0 and t1 hang from the deepest node, 49,998 branches below the root; t49999 from the root.
    table = make_table([[1, 0, 0], [0, 1, 0], [0, 0, 1]], ["t0", "t1", f"t{tips - 1}"])
    unifrac = UniFrac(table, tree)
    assert unifrac.faith_pd([0, 1, 2]).tolist() == [tips - 1, tips - 1, 1]
    np.testing.assert_allclose(unifrac.pairwise()[0], [0, 2 / tips, 1], atol=1e-15)


def test_a_tree_of_one_tip_has_no_distance(newick):
    unifrac = UniFrac(make_table([[3], [5]], ["a"]), newick("a:7;"))
    assert unifrac.pairwise().tolist() == [[0, 0], [0, 0]]
    assert unifrac.faith_pd([0, 1]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("(a:1,b);", ["1 of 2 branches have no branch length", "'b'"]),
        ("((a:1,b:1),c:1);", ["no branch length", "the ancestor of a and b"]),
        ("(a,b,c,d,e);", ["5 of 5 branches", "'a', 'b', 'c', ..."]),
        ("(a:1,b:-0.1);", ["1 of 2 branches have a negative", "'b'", "set negative lengths to 0"]),
        ("(a:1,b:1e999);", ["infinite", "'b'"]),
        ("(a:1,b:nan);", ["no branch length", "'b'"]),
        ("(a:1,a:2,b:1);", ["1 tip names stand more than once ('a')"]),
        ("(a:1,,b:1);", ["1 of 3 tips have no name"]),
        ("(a:1,b:1", ["no ';' at the end", "copied again"]),
        ("(a:1,b:1));", ["not a tree in Newick format"]),
        ("(a:1,b:x);", ["not a tree in Newick format", "x"]),
        ("(a:1,b:1);(c:1,d:1);", ["holds 2 trees"]),
        (" \n", ["the file is empty"]),
    ],
)
def test_bad_trees_name_the_file_the_nodes_and_the_remedy(newick, text, fragments):
    path = newick(text)
    with pytest.raises(InputError) as caught:
        read_tree(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(InputError, match="cannot read the tree: No such file"):
        read_tree(tmp_path / "none.nwk")
    (tmp_path / "binary.nwk").write_bytes(b"\x89HDF\xff\xfe")
    with pytest.raises(InputError, match="not a text file"):
        read_tree(tmp_path / "binary.nwk")


def test_a_tree_in_a_qiime_artifact(tmp_path):
    with zipfile.ZipFile(tmp_path / "tree.qza", "w") as archive:
        archive.writestr("uuid/metadata.yaml", "uuid: uuid\ntype: Phylogeny[Rooted]\n")
        archive.writestr("uuid/data/tree.nwk", "(a:1,b:2);\n")
    assert read_tree(tmp_path / "tree.qza").length.tolist() == [1, 2, 0]


# ---------------------------------------------------------------------------- table and tree
def test_features_missing_in_the_tree_are_an_error_or_a_counted_fact(newick):
    features = ["a", "x1", "b", "x2", "c", "x3", "x4"]
    counts = np.array([[2, 1, 0, 0, 3, 0, 0], [0, 0, 4, 5, 1, 1, 1], [1, 0, 2, 0, 0, 0, 0]])
    table, path = make_table(counts, features), newick("((a:1,b:2):1,c:4,d:1);")
    with pytest.raises(InputError) as caught:
        UniFrac(table, path)
    for fragment in (
        "4 of 7 features",
        "('x1', 'x2', 'x3', ...)",
        "--drop-missing-tips",
        str(path),
    ):
        assert fragment in str(caught.value)
    unifrac = UniFrac(table, path, drop_missing=True)
    (fact,) = unifrac.facts
    assert (fact.count, fact.kind) == (4, "dropped")
    assert "of 7, 38.10% of the reads" in fact.detail  # 8 of 21
    without = UniFrac(make_table(counts[:, [0, 2, 4]], ["a", "b", "c"]), path)
    assert without.facts == []
    np.testing.assert_array_equal(unifrac.pairwise(), without.pairwise())


def test_a_tree_of_another_study_shows_names_of_both(newick):
    table = make_table([[1, 1]], ["ACGT", "TTTT"])
    with pytest.raises(InputError, match=r"none of the 2 features.*'ACGT'.*'otu1'"):
        UniFrac(table, newick("(otu1:1,otu2:1);"), drop_missing=True)


def test_tips_in_lower_case_and_hashed_tips_find_their_sequences(newick, tmp_path):
    table = make_table([[1, 1, 0], [0, 1, 1]], ["ACGT", "TTTT", "GGGG"])
    expected = UniFrac(table, newick("((ACGT:1,TTTT:2):1,GGGG:4);")).pairwise()
    lower = UniFrac(table, newick("((acgt:1,tttt:2):1,gggg:4);"))
    np.testing.assert_array_equal(lower.pairwise(), expected)
    (tmp_path / "rep.fasta").write_text(">h1\nacgt\n>h2\nTTTT\n>h3\nGGGG\n")
    hashed = read_tree(newick("((h1:1,h2:2):1,h3:4);"), sequences=tmp_path / "rep.fasta")
    np.testing.assert_array_equal(UniFrac(table, hashed).pairwise(), expected)


def test_samples_without_reads_are_named(newick):
    path = newick("(a:1,b:2);")
    table = make_table([[1, 1], [0, 0], [0, 0]], ["a", "b"], ["one", "two", "three"])
    with pytest.raises(InputError, match=r"2 of 3 samples have no reads \('two', 'three'\)"):
        UniFrac(table, path)
    table = make_table([[1, 1, 0], [0, 0, 7]], ["a", "b", "x"], ["one", "two"])
    with pytest.raises(InputError, match=r"no reads on tips of the tree \('two'\)"):
        UniFrac(table, path, drop_missing=True)


def test_unknown_metric_and_rows(newick):
    path, table = newick("(a:1,b:2);"), make_table([[1, 1], [0, 2]], ["a", "b"])
    with pytest.raises(InputError, match="unknown UniFrac metric 'bray'; choose unweighted"):
        UniFrac(table, path, "bray")
    unifrac = UniFrac(table, path)
    for rows in ([0, 2], [-1]):
        with pytest.raises(IndexError, match=r"0\.\.1"):
            unifrac.pairwise(rows)
    assert unifrac.pairwise([]).shape == (0, 0)


# -------------------------------------------------------------------------- real data, oracles
@pytest.fixture(scope="module")
def small(real_data):
    folder = real_data / "phylogeny-small"
    return read_table(folder / "table.biom"), folder / "tree.nwk"


def test_equal_to_scikit_bio(small):
    from skbio import TreeNode
    from skbio.diversity import alpha_diversity, beta_diversity

    table, path = small
    tree = TreeNode.read(io.StringIO(path.read_text()), format="newick")
    counts, taxa = table.counts.toarray(), list(table.feature_ids)
    for metric, name, options in (
        ("unweighted", "unweighted_unifrac", {}),
        ("weighted", "weighted_unifrac", {}),
        ("weighted-normalized", "weighted_unifrac", {"normalized": True}),
    ):
        unifrac = UniFrac(table, path, metric)
        expected = beta_diversity(name, counts, tree=tree, taxa=taxa, **options).data
        np.testing.assert_allclose(unifrac.pairwise(), expected, atol=1e-10)
        pd = alpha_diversity("faith_pd", counts, tree=tree, taxa=taxa)
        np.testing.assert_allclose(unifrac.faith_pd(np.arange(len(unifrac))), pd, rtol=1e-10)


def test_equal_to_ssu(small, require_tool, real_data, tmp_path):
    table, path = small
    for metric, name in (
        ("unweighted", "unweighted_fp64"),
        ("weighted", "weighted_unnormalized_fp64"),
        ("weighted-normalized", "weighted_normalized_fp64"),
    ):
        output = tmp_path / f"{metric}.h5"
        biom = real_data / "phylogeny-small" / "table.biom"
        subprocess.run(
            [require_tool("ssu"), "-i", biom, "-t", path, "-o", output, "-m", name,
             "--format", "hdf5_fp64", "--pcoa", "0"],
            check=True, capture_output=True,
        )  # fmt: skip
        with h5py.File(output) as file:
            order = [one.decode() for one in file["order"]]
            expected = file["matrix"][()]
        rows = [order.index(name) for name in table.sample_ids]
        ours = UniFrac(table, path, metric).pairwise()
        np.testing.assert_allclose(ours, expected[np.ix_(rows, rows)], atol=1e-10)


@pytest.fixture(scope="module")
def ibd(real_data):
    return real_data / "ibd", read_table(real_data / "ibd" / "table-rarefied-5000.biom")


@pytest.mark.real
def test_equal_to_ssu_on_ibd_within_two_seconds(ibd):
    import skbio  # noqa: F401  (the goal counts from after the imports)

    folder, table = ibd
    for metric in METRICS:
        start = time.process_time()
        unifrac = UniFrac(
            read_table(folder / "table-rarefied-5000.biom"), read_tree(folder / "tree.nwk"), metric
        )
        distances = unifrac.pairwise()
        assert time.process_time() - start < 2.0  # measured 0.3 to 0.5 s
        if metric != "weighted":
            with h5py.File(folder / f"{metric}-unifrac.h5") as file:
                order = {one.decode(): row for row, one in enumerate(file["order"])}
                rows = [order[name] for name in table.sample_ids]
                expected = file["matrix"][()][np.ix_(rows, rows)]
            assert np.abs(distances - expected).max() < 1e-6  # float32 file: 3e-7


@pytest.mark.real
@pytest.mark.parametrize("metric", METRICS)
def test_blocks_batches_and_all_pairs_agree(ibd, metric, monkeypatch):
    folder, table = ibd
    unifrac = UniFrac(table, folder / "tree.nwk", metric)
    whole = unifrac.pairwise()
    np.testing.assert_array_equal(whole, whole.T)
    assert not np.diag(whole).any()
    rows = np.random.default_rng(0).choice(len(table.sample_ids), 32, replace=False)
    np.testing.assert_allclose(unifrac.pairwise(rows), whole[np.ix_(rows, rows)], atol=1e-13)
    np.testing.assert_allclose(unifrac.cross(rows, [5, 3]), whole[rows][:, [5, 3]], atol=1e-13)
    monkeypatch.setattr(unifrac_module, "_BLOCK_BYTES", 8 * 10_000 * 7)  # 7 samples a block
    np.testing.assert_allclose(unifrac.pairwise(rows), whole[np.ix_(rows, rows)], atol=1e-13)
    np.testing.assert_allclose(unifrac.cross(rows, rows), whole[np.ix_(rows, rows)], atol=1e-13)


@pytest.mark.real
def test_neither_the_order_of_features_nor_the_depth_matters(ibd):
    folder, table = ibd
    tree = read_tree(folder / "tree.nwk")
    columns = np.random.default_rng(1).permutation(len(table.feature_ids))
    shuffled = FeatureTable(
        table.sample_ids,
        tuple(table.feature_ids[column] for column in columns),
        scipy.sparse.csr_array(table.counts[:, columns] * 7),
        table.source,
    )
    for metric in METRICS:
        rows = np.arange(0, 428, 9)
        np.testing.assert_allclose(
            UniFrac(shuffled, tree, metric).pairwise(rows),
            UniFrac(table, tree, metric).pairwise(rows),
            atol=1e-13,
        )


@pytest.mark.parametrize("metric", METRICS)
def test_branches_are_the_same_whether_kept_or_found_for_each_batch(newick, metric, monkeypatch):
    generator = np.random.default_rng(1)
    tree = read_tree(newick(to_newick(random_tree(generator, 300))))
    counts = generator.integers(0, 9, (20, 250)) * (generator.random((20, 250)) < 0.1)
    table = make_table(counts, [f"t{tip}" for tip in generator.permutation(300)[:250]])
    kept = UniFrac(table, tree, metric)
    expected = kept.pairwise()
    monkeypatch.setattr(unifrac_module, "_FAITH_ROWS", 3)
    found = UniFrac(table, tree, metric)
    np.testing.assert_array_equal(found.pairwise(), expected)
    np.testing.assert_allclose(found.pairwise([7, 2]), expected[np.ix_([7, 2], [7, 2])], atol=1e-13)
    np.testing.assert_array_equal(found.faith_pd(range(20)), kept.faith_pd(range(20)))
    np.testing.assert_array_equal(found.faith_pd([]), kept.faith_pd([]))


def test_a_few_samples_cost_what_they_hold_and_not_the_tree(newick):
    """Of 200,000 tips 40 are reached: any array over all branches would be 1.6 MB or more."""
    generator = np.random.default_rng(0)
    tips = 200_000
    blocks = [",".join(f"t{n}:1" for n in range(low, low + 100)) for low in range(0, tips, 100)]
    tree = read_tree(newick("(" + ",".join(f"({block}):1" for block in blocks) + ");"))
    few = [np.sort(generator.choice(tips, 20, False)) for _ in range(2)]
    reads, reached = np.ones(tips + 40, dtype=np.int64), np.concatenate([*few, np.arange(tips)])
    counts = scipy.sparse.csr_array((reads, reached, [0, 20, 40, tips + 40]), (3, tips))
    names = ("one", "two", "rest"), tuple(f"t{tip}" for tip in range(tips))
    table = FeatureTable(*names, counts, "t")
    unifrac = UniFrac(table, tree)
    unifrac.by("weighted").pairwise([0, 1])
    tracemalloc.start()
    unifrac.pairwise([0, 1])
    unifrac.by("weighted").pairwise([0, 1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.3e6


def test_memory_follows_the_block_and_not_samples_times_branches(newick):
    """2,000 samples x 8,000 branches would be 128 MB of float64; 20 ASVs a sample are 4 MB."""
    generator = np.random.default_rng(0)
    tree = read_tree(newick(to_newick(random_tree(generator, 6000))))
    chosen = np.argsort(generator.random((2000, 6000)), axis=1)[:, :20]
    counts = scipy.sparse.csr_array(
        (np.ones(40_000, dtype=np.int64), chosen.ravel(), np.arange(0, 40_001, 20)), (2000, 6000)
    )
    counts.sort_indices()
    names = tuple(f"s{row}" for row in range(2000)), tuple(f"t{tip}" for tip in range(6000))
    table = FeatureTable(*names, counts, "t")
    for metric in METRICS:
        tracemalloc.start()
        unifrac = UniFrac(table, tree, metric)
        unifrac.cross(np.arange(100), np.arange(2000))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert unifrac.tree.length.shape[0] > 7000
        assert peak < 25e6
