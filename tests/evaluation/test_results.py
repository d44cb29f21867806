"""What results are made of: what the ordination is coloured by, features that a tree lacks."""

import numpy as np

from aam.data.metadata import read_metadata
from aam.data.samples import Samples
from aam.data.table import read_table
from aam.data.tree import read_tree
from aam.data.unifrac import UniFrac
from aam.evaluation.results import colours, on_tree


def test_colours_are_the_first_column_with_few_classes_else_numbers(community):
    table = read_table(community.table)
    metadata = read_metadata(community.metadata).select(table.sample_ids)
    found = colours(Samples(table, metadata), np.arange(24))
    assert found["kind"] == "classification" and found["column"] == "site"
    assert found["values"][table.sample_ids[3]] == metadata.text("site")[3]
    assert colours(Samples(table), np.arange(24)) is None


def test_features_that_the_tree_lacks_are_not_compared(community):
    table, tree = read_table(community.table), read_tree(community.tree)
    lost = {table.feature_ids[3], table.feature_ids[8]}
    kept = np.array([name not in lost for name in tree.tip_names])
    truth = UniFrac(table, tree.shear(kept), drop_missing=True)
    found = on_tree(table, truth)
    assert set(found.feature_ids) == set(table.feature_ids) - lost
    assert found.counts.sum() == table.counts.sum() - table.counts[:, [3, 8]].sum()
    whole = UniFrac(table, tree)
    assert on_tree(table, whole) is table
    np.testing.assert_allclose(UniFrac(found, tree).pairwise(), truth.pairwise(), atol=1e-12)
