"""Trees: the quick Newick reader against scikit-bio's, what is refused, shearing."""

import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aam.data.newick as newick_module
import aam.data.tree as tree_module
from aam.data.newick import newick, parse_newick
from aam.data.tree import read_tree
from aam.errors import InputError
from tests.data.trees import check_ranges, parse, random_newick


def write(folder, text):
    path = folder / "tree.nwk"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def equal_trees(one, other):
    assert one.tip_names == other.tip_names
    assert np.array_equal(one.parent, other.parent) and np.array_equal(one.length, other.length)


def general(path):
    """The tree by the reader that reads everything."""
    return tree_module._read_any(path, path.read_bytes())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), tips=st.integers(1, 40), labels=st.booleans())
def test_the_quick_reader_reads_what_the_general_one_reads(tmp_path_factory, seed, tips, labels):
    text = random_newick(np.random.default_rng(seed), tips)
    text = text.replace(")", ")'0.97:g__X (y); [z]'" if labels else ")0.97") + "\n" * (seed % 3)
    tree = parse(text)
    equal_trees(tree, general(write(tmp_path_factory.mktemp("tree"), text)))
    check_ranges(tree)
    equal_trees(tree, parse(newick(tree.parent, tree.length, tree.tip_names)))


@pytest.mark.real
@pytest.mark.parametrize("data", ["ibd", "phylogeny-small"])
def test_the_quick_reader_reads_real_trees(real_data, data, monkeypatch):
    path = real_data / data / "tree.nwk"
    expected = general(path)
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


def test_arrays_of_a_tree_with_labels_of_every_kind(tmp_path):
    quoted, plain = "('a b':1e-1,'it''s (x;y)':2)0.93:0.5[note; 1]", "under_score:3"
    tree = read_tree(write(tmp_path, f"({quoted},{plain},(d:1,e:1,f:1)'g':2)root:9;\n"))
    assert tree.tip_names == ("a b", "it's (x;y)", "under_score", "d", "e", "f")
    assert tree.parent.tolist() == [2, 2, 8, 8, 7, 7, 7, 8, -1]
    assert tree.length.tolist() == [0.1, 2, 0.5, 3, 1, 1, 1, 2, 0]
    assert tree.tip_start.tolist() == [0, 1, 0, 2, 3, 4, 5, 3, 0]
    assert tree.tip_stop.tolist() == [1, 2, 2, 3, 4, 5, 6, 6, 6]


def test_shear_merges_chains_and_keeps_the_root():
    tree = parse("(((a:1,b:2):4,x:1):8,(c:16,y:1):32);")
    sheared = tree.shear(np.array([True, True, False, True, False]))
    assert sheared.tip_names == ("a", "b", "c")
    assert sheared.length.tolist() == [1, 2, 12, 48, 0]
    assert sheared.parent.tolist() == [2, 2, 4, 4, -1]
    single = tree.shear(np.array([False, False, False, True, False]))
    assert single.length.tolist() == [48, 0] and single.parent.tolist() == [1, -1]


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
        ("", ["the file is empty"]),
        (b"\x89HDF\xff\xfe", ["not a text file"]),
        (None, ["cannot read the tree: No such file"]),
    ],
)
def test_bad_trees_name_the_file_the_nodes_and_the_remedy(tmp_path, text, fragments):
    path = tmp_path / "tree.nwk" if text is None else write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        read_tree(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(fragment in message for fragment in fragments), message


def test_a_tree_in_a_qiime_artifact(tmp_path):
    with zipfile.ZipFile(tmp_path / "tree.qza", "w") as archive:
        archive.writestr("uuid/metadata.yaml", "uuid: uuid\ntype: Phylogeny[Rooted]\n")
        archive.writestr("uuid/data/tree.nwk", "(a:1,b:2);\n")
    assert read_tree(tmp_path / "tree.qza").length.tolist() == [1, 2, 0]
