"""UniFrac of all pairs: here, scikit-bio, and `ssu` of unifrac-tools."""

import subprocess

import h5py
import numpy as np
import pytest

from aam.data.table import read_table
from aam.data.tree import read_tree
from aam.data.unifrac import UniFrac

SCIKIT_BIO = {"unweighted": "unweighted_unifrac", "weighted-normalized": "weighted_unifrac"}
SSU = {"unweighted": "unweighted_fp64", "weighted-normalized": "weighted_normalized_fp64"}


def read_ssu(path, sample_ids):
    """The matrix of an `ssu` HDF5 file in the order of `sample_ids`."""
    with h5py.File(path) as file:
        order = [name.decode() for name in file["order"][:]]
        rows = [order.index(name) for name in sample_ids]
        return file["matrix"][:][np.ix_(rows, rows)]


def files_of(folder):
    """Table and tree of a data set."""
    table = "table-rarefied-5000.biom" if folder.name == "ibd" else "table.biom"
    return folder / table, folder / "tree.nwk"


@pytest.mark.real
@pytest.mark.parametrize("metric", ["unweighted", "weighted-normalized"])
@pytest.mark.parametrize("data", ["phylogeny-small", "ibd"])
def test_unifrac_from_files(compare, timing, real_data, require_tool, tmp_path, data, metric):
    if data == "ibd" and not timing:
        pytest.skip("the same numbers are checked on phylogeny-small and in tests/data")
    ssu, output = require_tool("ssu"), tmp_path / "ssu.h5"
    table, tree = files_of(real_data / data)
    sample_ids = read_table(table).sample_ids

    def ours():
        return UniFrac(read_table(table), read_tree(tree)).pairwise(metric=metric)

    def unifrac_tools():
        command = [ssu, "-i", table, "-t", tree, "-o", output, "-m", SSU[metric]]
        subprocess.run([*command, "--format", "hdf5_fp64"], check=True, capture_output=True)
        return read_ssu(output, sample_ids)

    results, _ = compare(
        f"UniFrac {metric}, {data}, {len(sample_ids)} samples, from files",
        {"aam": ours, "ssu": unifrac_tools},
        reference="ssu",
    )
    np.testing.assert_allclose(results["aam"], results["ssu"], atol=1e-6)


@pytest.mark.real
@pytest.mark.parametrize("metric", ["unweighted", "weighted-normalized"])
@pytest.mark.parametrize("data", ["phylogeny-small", "ibd"])
def test_unifrac_in_memory(compare, full, real_data, data, metric):
    if data == "ibd" and not full:
        pytest.skip("scikit-bio takes 13 to 46 s a round: --benchmark-size full")
    table_path, tree_path = files_of(real_data / data)
    table, tree = read_table(table_path), read_tree(tree_path)
    results, _ = compare(
        f"UniFrac {metric}, {data}, {len(table.sample_ids)} samples, in memory",
        {
            "aam": lambda: UniFrac(table, tree).pairwise(metric=metric),
            "scikit-bio": scikit_bio(tree_path, table, metric),
        },
        reference="scikit-bio",
    )
    np.testing.assert_allclose(results["aam"], results["scikit-bio"], atol=1e-6)


def scikit_bio(tree_path, table, metric):
    """scikit-bio on its own objects, made beforehand."""
    import skbio

    tree = skbio.TreeNode.read(str(tree_path), format="newick", convert_underscores=False)
    names = {tip.name.upper(): tip.name for tip in tree.tips()}
    taxa = [names[feature] for feature in table.feature_ids]
    counts, options = table.counts.toarray(), {}
    if metric == "weighted-normalized":
        options["normalized"] = True
    if len(tree.children) > 2:  # scikit-bio asks for a rooted tree: the same root, two children
        rest = skbio.TreeNode(length=0.0, children=tree.children[1:])
        tree = skbio.TreeNode(children=[tree.children[0], rest])

    def call():
        return skbio.diversity.beta_diversity(
            SCIKIT_BIO[metric], counts, table.sample_ids, taxa=taxa, tree=tree, **options
        ).data

    return call
