"""Clades and grafts against brute force: sets of tips, and walks from every tip to the root."""

import numpy as np
import pytest

from aam.data.clades import LEAST_LENGTH, Clades, Grafts, levels_of, places_by_tree, split_tree
from aam.data.texts import Texts
from tests.data.trees import (
    caterpillar,
    check_ranges,
    parse,
    paths,
    random_newick,
    shared_lengths,
    tips_below,
)  # fmt: skip


@pytest.fixture(params=range(8))
def drawn(request):
    """A generator, a tree of 24 tips, and which of them are known: at least three."""
    generator = np.random.default_rng(request.param)
    tree = parse(random_newick(generator, 24, plain=request.param % 2 == 0))
    known = generator.random(24) < 0.6
    known[generator.choice(24, 3, replace=False)] = True
    return generator, tree, known


# --------------------------------------------------------------------------------------- clades
def test_clades_and_pendants_are_the_sets_of_known_tips_with_their_summed_lengths(drawn):
    _, tree, known = drawn
    clades = split_tree(tree, known).clades
    names, count = list(clades.sequences), int(known.sum())
    assert names == [name for name, has in zip(tree.tip_names, known, strict=True) if has]
    lengths = {}  # of the branches that hold each set of known tips, of the whole tree
    for node, below in enumerate(tips_below(tree)[:-1]):
        held = frozenset(tree.tip_names[tip] for tip in below if known[tip])
        lengths[held] = lengths.get(held, 0.0) + tree.length[node]
    expected = {
        one: length
        for one, length in lengths.items()
        if 1 < len(one) < count and length > LEAST_LENGTH
    }
    members = [frozenset(names[a:b]) for a, b in zip(clades.start, clades.stop, strict=True)]
    assert len(set(members)) == len(members) == len(clades)
    assert dict(zip(members, clades.length, strict=True)) == pytest.approx(expected)
    pendants = dict(zip(names, clades.pendant, strict=True))
    assert pendants == pytest.approx({name: lengths[frozenset([name])] for name in names})
    # Parents, smallest clades and levels are those of the sets.
    levels = levels_of(clades.parent)
    assert sum(map(len, levels)) == len(clades)
    for clade, held in enumerate(members):
        holders = [k for k, other in enumerate(members) if held < other]
        assert clades.parent[clade] == min(holders, key=lambda k: len(members[k]), default=-1)
        assert clade in levels[len(holders)]
    for tip, name in enumerate(names):
        holders = [k for k, held in enumerate(members) if name in held]
        assert clades.lowest[tip] == min(holders, key=lambda k: len(members[k]), default=-1)
    if len(clades):
        weight = clades.length / clades.length.mean()
        np.testing.assert_allclose(clades.weight, np.minimum(weight, 5))


def test_what_is_near_members_and_sums_along_the_paths(drawn):
    generator, tree, known = drawn
    clades = Clades(tree.shear(known))
    tips = np.arange(len(clades.sequences))
    inside = (clades.start <= tips[:, None]) & (tips[:, None] < clades.stop)
    assert np.array_equal(clades.members(clades.lowest), inside)
    assert not clades.members(np.array([-1])).any()
    for size in (0, 1, 3):
        chosen = generator.choice(tips, size, replace=False)
        path = set(np.flatnonzero(inside[chosen].any(axis=0)))
        assert clades.on_paths(chosen).tolist() == sorted(path)
        sisters = {k for k in range(len(clades)) if clades.parent[k] in path | {-1}}
        assert clades.near(chosen).tolist() == sorted(path | sisters)
    length, is_clade = clades.tree.length, np.isin(np.arange(len(clades.tree)), clades.nodes)
    for node, path in zip(clades.tree.tip_nodes, paths(clades.tree), strict=True):
        assert clades.root_distance[node] == pytest.approx(length[path].sum())
        assert clades.depth[node] == pytest.approx(length[path] @ is_clade[path])


def test_a_caterpillar_of_two_thousand_tips():
    clades = Clades(parse(caterpillar(2000)))
    assert len(clades) == 1998 and (clades.length == 2).all()
    assert clades.parent.tolist() == [*range(1, 1998), -1]
    assert np.concatenate(levels_of(clades.parent)).tolist() == list(range(1997, -1, -1))
    assert clades.near(np.array([0])).tolist() == list(range(1998))
    assert clades.near(np.array([1999])).tolist() == [1997]
    assert clades.root_distance[0] == 1 + 2 * 1998


def test_a_star_has_no_clades_and_everything_about_them_is_empty():
    clades = Clades(parse("(a:1,b:2,c:3);"))
    assert len(clades) == 0 and levels_of(clades.parent) == [] and len(clades.weight) == 0
    assert clades.pendant.tolist() == [1, 2, 3] and clades.lowest.tolist() == [-1] * 3
    assert clades.near(np.array([0, 2])).tolist() == []
    ends = clades.ends(np.array([-1, -1]))
    assert ends.node.tolist() == [3, 3] and ends.shared.tolist() == [0, 0]
    assert clades.jaccard(ends, ends).tolist() == [1, 1]
    tree, _ = clades.graft(ends._replace(own=np.array([4.0, 5.0])), ["x", "y"])
    names, shared = shared_lengths(tree)
    assert names == list("abcxy") and np.array_equal(shared, np.diag([1.0, 2, 3, 4, 5]))


def test_stems_and_branches_of_next_to_no_length_are_no_clades():
    clades = Clades(parse("((((a:1):1,b:2):0.5):0.25,c:3);").shear(np.ones(3, dtype=bool)))
    assert clades.length.tolist() == [0.75] and clades.pendant.tolist() == [2, 2, 3]
    # A stem below the root is no clade: all are members of it.
    clades = Clades(parse("((a:1,b:2,c:1):7);").shear(np.ones(3, dtype=bool)))
    assert len(clades) == 0 and clades.root_distance[clades.tree.tip_nodes].tolist() == [8, 9, 8]
    clades = Clades(parse("(((a:1,b:1):0.00001,c:1):0.00002,d:1);"))
    assert clades.length.tolist() == [0.00002] and clades.lowest.tolist() == [0, 0, 0, -1]


def test_of_very_many_branches_the_largest_are_clades(monkeypatch):
    tree = parse(random_newick(np.random.default_rng(3), 60))
    whole = Clades(tree)
    monkeypatch.setattr("aam.data.clades.MOST_CLADES", 20)
    part = Clades(tree)
    size = whole.stop - whole.start
    assert len(part) == 20 and (part.stop - part.start).min() >= np.sort(size)[-20]
    assert set(part.nodes) <= set(whole.nodes)
    above = part.parent[part.parent >= 0]
    assert (part.start[above] <= part.start[part.parent >= 0]).all()


# --------------------------------------------------------------------------------------- grafts
def random_grafts(generator, clades, count):
    """On any branch, the root's too; several at one point; at both ends; the first beyond its."""
    tree = clades.tree
    node = generator.integers(0, len(tree), count)
    part = generator.choice([0.0, 1.0, 0.5, generator.random()], count)
    node[1::3] = node[: len(node[1::3])]
    part[1::6] = part[: len(part[1::6])]
    shared = part * tree.length[node]
    shared[:1] += 9
    return Grafts(node, shared, generator.choice([0.0, 0.3, generator.random()], count))


def parts_of_ways(clades, grafts):
    """Of each new ASV, ``{node: length}`` of the branches that it shares with the known tree."""
    tree, found = clades.tree, []
    for at, shared in zip(grafts.node.tolist(), grafts.shared, strict=True):
        parts, node = {at: min(shared, tree.length[at])}, tree.parent[at]
        while node >= 0:
            parts[int(node)], node = tree.length[node], tree.parent[node]
        found.append(parts)
    return found


@pytest.mark.parametrize("count", [0, 1, 17])
def test_grafts_share_with_every_tip_what_lies_above_their_place(drawn, count):
    generator, tree, known = drawn
    clades = Clades(tree.shear(known))
    old, grafts = clades.tree, random_grafts(generator, clades, count)
    new = [f"x{i:02d}" for i in range(count)]
    grown, origin = clades.graft(grafts, new)
    check_ranges(grown)
    assert (grown.length >= 0).all()
    assert grown.length.sum() == pytest.approx(old.length.sum() + grafts.own.sum())
    for node in range(len(old)):
        assert grown.length[origin == node].sum() == pytest.approx(old.length[node])
    assert [name for name in grown.tip_names if name[0] != "x"] == list(clades.sequences)
    ways = dict(zip(new, parts_of_ways(clades, grafts), strict=True))
    for name, path in zip(old.tip_names, paths(old), strict=True):
        ways[name] = {one: old.length[one] for one in path}
    names, found = shared_lengths(grown)
    assert names == sorted(ways)
    expected = [
        [sum(min(a, ways[two].get(node, 0)) for node, a in ways[one].items()) for two in names]
        for one in names
    ]
    places = [names.index(name) for name in new]
    found[places, places] -= grafts.own
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_true_grafts_leave_the_known_tree_where_the_tips_do(drawn):
    _, tree, known = drawn
    split = split_tree(tree, known)
    names, whole = shared_lengths(tree)
    assert set(split.unseen) == set(tree.tip_names) - set(split.clades.sequences)
    for number, name in enumerate(split.unseen):  # one at a time: exact, whatever the others do
        grown, _ = split.clades.graft(split.truth.take(np.array([number])), [name])
        own_names, shared = shared_lengths(grown)
        assert own_names == sorted([*split.clades.sequences, name])
        places = [names.index(one) for one in own_names]
        np.testing.assert_allclose(shared, whole[np.ix_(places, places)], atol=1e-12)


def test_jaccard_of_memberships_against_dense_rows(drawn):
    generator, tree, known = drawn
    clades = Clades(tree.shear(known))

    def held(grafts):  # (n, clades) length of each clade that an ASV holds
        ways = parts_of_ways(clades, grafts)
        return np.array([[way.get(int(node), 0.0) for node in clades.nodes] for way in ways])

    one, other = random_grafts(generator, clades, 60), random_grafts(generator, clades, 60)
    other.node[::4] = one.node[::4]
    a, b = held(one), held(other)
    less, more = np.minimum(a, b).sum(axis=1), np.maximum(a, b).sum(axis=1)
    expected = np.where(more > 0, less / np.where(more > 0, more, 1), 1.0)
    np.testing.assert_allclose(clades.jaccard(one, other), expected, atol=1e-12)
    np.testing.assert_allclose(clades.jaccard(other, one), expected, atol=1e-12)
    np.testing.assert_allclose(clades.jaccard(one, one), 1.0)
    chosen = np.arange(-1, len(clades))  # the ends of clades hold these whole
    assert np.array_equal(held(clades.ends(chosen)) > 0, clades.members(chosen))


def test_a_tree_finds_the_places_in_a_model_made_from_it(tmp_path):
    generator = np.random.default_rng(0)
    text = random_newick(generator, 24, plain=True)
    tree, upper, known = parse(text), parse(text.replace("t", "T")), generator.random(24) < 0.6
    split = split_tree(upper, known)
    np.savez(tmp_path / "model.npz", **split.clades.to_arrays())
    with np.load(tmp_path / "model.npz") as arrays:
        clades = Clades.from_arrays(arrays, "model")
    assert clades.sequences == list(split.clades.sequences)
    assert np.array_equal(clades.tree.parent, split.clades.tree.parent)
    assert np.array_equal(clades.tree.length, split.clades.tree.length)
    shuffled = generator.permutation(len(split.unseen))
    found = places_by_tree(tree, clades, split.unseen.take(shuffled))  # tips in lower case
    assert all(map(np.allclose, found, split.truth.take(shuffled)))
    assert places_by_tree(upper, clades, Texts.of(["T99"])) is None
    less = upper.shear(np.arange(24) != np.flatnonzero(known)[0])
    other = parse(random_newick(generator, 24, plain=True).replace("t", "T"))
    stretched = type(tree)(upper.tip_names, upper.parent, upper.length * 2, "stretched")
    for wrong in (less, other, stretched):
        assert places_by_tree(wrong, clades, split.unseen) is None
