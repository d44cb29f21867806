"""UniFrac of all pairs: here, scikit-bio, and `ssu` of unifrac-tools."""

import subprocess

import h5py
import numpy as np
import pytest

from aam.data.phylogeny import UniFrac
from aam.data.table import read_table
from aam.data.tree import read_tree

SCIKIT_BIO = {"unweighted": "unweighted_unifrac", "weighted-normalized": "weighted_unifrac"}
SSU = {"unweighted": "unweighted_fp64", "weighted-normalized": "weighted_normalized_fp64"}


def read_ssu(path, sample_ids):
    """The matrix of an `ssu` HDF5 file in the order of `sample_ids`."""
    with h5py.File(path) as file:
        order = [name.decode() for name in file["order"][:]]
        rows = [order.index(name) for name in sample_ids]
        return file["matrix"][:][np.ix_(rows, rows)]


@pytest.mark.real
@pytest.mark.parametrize("metric", ["unweighted", "weighted-normalized"])
@pytest.mark.parametrize("data", ["phylogeny-small", "ibd"])
def test_unifrac(compare, timing, full, real_data, require_tool, tmp_path, data, metric):
    if data == "ibd" and not timing:
        pytest.skip("the same numbers are checked on phylogeny-small and in tests/data")
    ssu = require_tool("ssu")
    table_path = real_data / data / ("table.biom" if data != "ibd" else "table-rarefied-5000.biom")
    tree_path, output = real_data / data / "tree.nwk", tmp_path / "ssu.h5"
    table, tree = read_table(table_path), read_tree(tree_path)

    def ours_from_files():
        return UniFrac(read_table(table_path), read_tree(tree_path), metric).all_pairs()

    def ours_computing():
        return UniFrac(table, tree, metric).all_pairs()

    def ssu_from_files():
        command = [ssu, "-i", table_path, "-t", tree_path, "-o", output, "-m", SSU[metric]]
        subprocess.run([*command, "--format", "hdf5_fp64"], check=True, capture_output=True)
        return read_ssu(output, table.sample_ids)

    contestants = {
        "aam, from files": ours_from_files,
        "aam, in memory": ours_computing,
        "ssu, from files": ssu_from_files,
    }
    if data == "phylogeny-small" or full:
        contestants["scikit-bio, in memory"] = scikit_bio(table_path, tree_path, table, metric)
    results, _ = compare(
        f"UniFrac {metric}, {data}, {len(table.sample_ids)} samples",
        contestants,
        reference="ssu, from files",
    )
    for name, distances in results.items():
        np.testing.assert_allclose(distances, results["aam, in memory"], atol=1e-6, err_msg=name)


def scikit_bio(table_path, tree_path, table, metric):
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
