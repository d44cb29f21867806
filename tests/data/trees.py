"""Random trees and tables, and what walks from tips say: references for trees, UniFrac, clades."""

import numpy as np
import scipy.sparse

from aam.data.distances import write_distances
from aam.data.newick import parse_newick
from aam.data.table import FeatureTable, read_table
from aam.data.tree import Phylogeny, read_tree
from aam.data.unifrac import UniFrac


def parse(text, source="tree.nwk"):
    return Phylogeny(*parse_newick(np.frombuffer(text.encode(), dtype=np.uint8)), source)


def write_unifrac(table, tree, path):
    """The distances of a table's samples in a file."""
    unifrac = UniFrac(read_table(table), read_tree(tree))
    write_distances(path, unifrac.sample_ids, unifrac.pairwise())


def random_newick(generator, tips, *, plain=False):
    """Polytomies, single-child chains (above the root's children too) and lengths 0 and 1e-6.

    plain: binary, all lengths positive.
    """

    def length():
        choices = [generator.random() + 0.01] if plain else [0.0, 1e-6, *generator.random(4)]
        return f":{float(generator.choice(choices))!r}"

    nodes = [f"t{tip}{length()}" for tip in range(tips)]
    while len(nodes) > 1:
        generator.shuffle(nodes)
        width = 2 if plain else min(len(nodes), int(generator.integers(1, 5)))
        nodes = [*nodes[width:], f"({','.join(nodes[:width])}){length()}"]
    return nodes[0].rsplit(":", 1)[0] + ";" if plain else f"({nodes[0]});"


def caterpillar(tips):
    return "(" * (tips - 1) + "t0:1" + "".join(f",t{i}:1):2" for i in range(1, tips))[:-2] + ";"


def paths(tree):
    """Of each tip, the nodes from it to below the root."""
    found = []
    for node in tree.tip_nodes:
        path = []
        while tree.parent[node] >= 0:
            path.append(int(node))
            node = tree.parent[node]
        found.append(path)
    return found


def tips_below(tree):
    """Of each node, the set of its tips; by walks, not by the tree's ranges."""
    below = [set() for _ in range(len(tree))]
    for tip, path in enumerate(paths(tree)):
        for node in [*path, len(tree) - 1]:
            below[node].add(tip)
    return below


def shared_lengths(tree):
    """``(tips, tips)`` length that the ways of two tips to the root share, by name."""
    ways = [set(path) for path in paths(tree)]
    found = [[sum(tree.length[list(a & b)]) for b in ways] for a in ways]
    order = np.argsort(np.array(list(tree.tip_names)), kind="stable")
    return sorted(tree.tip_names), np.array(found)[np.ix_(order, order)]


def check_ranges(tree):
    """Post-order, and the tip ranges are those of the walks."""
    assert (tree.parent[:-1] > np.arange(len(tree) - 1)).all() and tree.parent[-1] == -1
    assert len(tree.tip_nodes) == len(tree.tip_names) == len(set(tree.tip_names))
    for node, below in enumerate(tips_below(tree)):
        assert below == set(range(tree.tip_start[node], tree.tip_stop[node]))


def make_table(counts, features, samples=None):
    counts = scipy.sparse.csr_array(np.asarray(counts, dtype=np.int64))
    counts.eliminate_zeros()
    samples = samples or [f"s{row}" for row in range(counts.shape[0])]
    return FeatureTable(tuple(samples), tuple(features), counts, "table.biom")


def random_table(generator, samples, features, share=0.3):
    counts = generator.integers(1, 50, (samples, len(features)))
    counts *= generator.random(counts.shape) < share
    counts[np.arange(samples), generator.integers(0, len(features), samples)] = 7
    return make_table(counts, features)
