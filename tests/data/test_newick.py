"""The quick Newick reader against the general one, node by node."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aam.data.newick as newick_module
import aam.data.tree as tree_module
from aam.data.newick import parse_newick
from aam.data.tree import Phylogeny, read_tree
from tests.data.test_phylogeny import random_tree, to_newick


def equal_trees(one, other):
    assert one.tip_names == other.tip_names
    for name in ("parent", "length", "tip_start", "tip_stop"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), tips=st.integers(1, 40), labels=st.booleans())
def test_the_quick_reader_reads_what_the_general_one_reads(tmp_path_factory, seed, tips, labels):
    path = tmp_path_factory.mktemp("tree") / "tree.nwk"
    text = to_newick(random_tree(np.random.default_rng(seed), tips)) + "\n" * (seed % 3)
    path.write_text(text.replace(")0.97", ")'0.97:g__X (y); [z]'") if labels else text)
    plain = parse_newick(np.frombuffer(path.read_bytes(), dtype=np.uint8))
    assert plain is not None
    equal_trees(
        Phylogeny(*plain, str(path)), tree_module._read_any(path, np.fromfile(path, dtype=np.uint8))
    )


@pytest.mark.real
@pytest.mark.parametrize("data", ["ibd", "phylogeny-small"])
def test_the_quick_reader_reads_real_trees(real_data, data, monkeypatch):
    path = real_data / data / "tree.nwk"
    expected = tree_module._read_any(path, np.fromfile(path, dtype=np.uint8))
    monkeypatch.setattr(newick_module, "_BLOCK", 1000)
    monkeypatch.setattr(tree_module, "_read_any", None)
    equal_trees(read_tree(path), expected)


@pytest.mark.parametrize(
    "text",
    [
        "(a:1,b:2);(c:1);", "(a:1,b:2)", "(a:1,b:2));", "((a:1,b:2);", "(a:1,b);", "(a:1,:2);",
        "(a:1,a:2);", "(a:1,b:-2);", "(a:1,b:inf);", "(a:1,b:x);", "(a:1:2,b:2);", "(a:1,b:2)[c];",
        "(a:1, b:2);", "('a':1,b:2);", "(a:1,'b c':2);", "(a:1,\u00e9:2);", "x(a:1,b:2);", "",
    "a:1,b:2;", "(a:1,b:2)(c:1);", "(a:1,b:2)c(d:1,e:1);", ";", "(a:1,b:2);x",
    ],
)  # fmt: skip
def test_the_quick_reader_leaves_what_is_not_plain_to_the_general_one(text):
    assert parse_newick(np.frombuffer(text.encode(), dtype=np.uint8)) is None
