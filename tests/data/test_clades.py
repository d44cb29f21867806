"""Clades and grafts against brute force: sets of tips, and walks from every tip to the root."""

import numpy as np
import pytest

from aam.data.clades import (
    LEAST_LENGTH,
    LONGEST_WEIGHT,
    Clades,
    Grafts,
    levels_of,
    places_by_tree,
    split_tree,
    true_grafts,
)  # fmt: skip
from aam.data.texts import Texts
from aam.data.unifrac import METRICS, UniFrac
from tests.data.trees import (
    caterpillar,
    check_ranges,
    parse,
    paths,
    random_newick,
    random_table,
    shared_lengths,
    tips_below,
)  # fmt: skip

SEEDS = range(8)


def random_split(seed, tips=24, plain=False):
    generator = np.random.default_rng(seed)
    tree = parse(random_newick(generator, tips, plain=plain))
    known = generator.random(tips) < 0.6
    known[generator.choice(tips, 3, replace=False)] = True
    return generator, tree, known


def sets_of_names(tree, kept):
    """Length of the branches that hold each set of kept tips, of the whole tree."""
    lengths = {}
    for node, below in enumerate(tips_below(tree)[:-1]):
        names = frozenset(tree.tip_names[tip] for tip in below if kept[tip])
        lengths[names] = lengths.get(names, 0.0) + tree.length[node]
    return lengths


# --------------------------------------------------------------------------------------- clades
@pytest.mark.parametrize("seed", SEEDS)
def test_clades_and_pendants_are_the_sets_of_known_tips_with_their_summed_lengths(seed):
    _, tree, known = random_split(seed)
    clades = split_tree(tree, known).clades
    names, count = list(clades.sequences), int(known.sum())
    assert names == [name for name, has in zip(tree.tip_names, known, strict=True) if has]
    lengths = sets_of_names(tree, known)
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
    for clade, held in enumerate(members):
        holders = [k for k, other in enumerate(members) if held < other]
        smallest = min(holders, key=lambda k: len(members[k]), default=-1)
        assert clades.parent[clade] == smallest
        assert clade in levels_of(clades.parent)[len(holders)]
    assert sum(map(len, levels_of(clades.parent))) == len(clades)
    for tip, name in enumerate(names):
        holders = [k for k, held in enumerate(members) if name in held]
        assert clades.lowest[tip] == min(holders, key=lambda k: len(members[k]), default=-1)
    if len(clades):
        weight = clades.length / clades.length.mean()
        np.testing.assert_allclose(clades.weight, np.minimum(weight, LONGEST_WEIGHT))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_near_members_and_sums_along_the_paths(seed):
    generator, tree, known = random_split(seed)
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
    assert [level.tolist() for level in levels_of(clades.parent)] == [
        [k] for k in range(1997, -1, -1)
    ]
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
    tree, _ = clades.graft(Grafts(ends.node, ends.shared, np.array([4.0, 5.0])), ["x", "y"])
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
    """On any branch, the root's too; several at one point; at both ends."""
    tree = clades.tree
    node = generator.integers(0, len(tree), count)
    part = generator.choice([0.0, 1.0, 0.5, generator.random()], count)
    node[1::3] = node[: len(node[1::3])]
    part[1::6] = part[: len(part[1::6])]
    own = generator.choice([0.0, 0.3, generator.random()], count)
    return Grafts(node, part * tree.length[node], own)


def parts_of_ways(clades, grafts):
    """Of each new ASV, ``{node: length}`` of the branches that it shares with the known tree."""
    tree, found = clades.tree, []
    for at, shared in zip(grafts.node.tolist(), grafts.shared, strict=True):
        parts, node = {at: min(max(shared, 0.0), tree.length[at])}, tree.parent[at]
        while node >= 0:
            parts[int(node)], node = tree.length[node], tree.parent[node]
        found.append(parts)
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [0, 1, 17])
def test_grafts_share_with_every_tip_what_lies_above_their_place(seed, count):
    generator, tree, known = random_split(seed, plain=seed % 2 == 0)
    clades = Clades(tree.shear(known))
    old, grafts = clades.tree, random_grafts(generator, clades, count)
    if count:  # beyond its branch: put at its end
        grafts.shared[0] += 9
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


def alone(tree, known):
    """Known tips so that no two others share a branch with a length and no known tip below."""
    known = known.copy()
    for node, below in enumerate(tips_below(tree)):
        if tree.length[node] > 0 and len(below) > 1 and not known[list(below)].any():
            known[list(below)] = True
    return known


@pytest.mark.parametrize("seed", SEEDS)
def test_unifrac_of_true_grafts_is_that_of_the_whole_tree(seed):
    generator, tree, known = random_split(seed, tips=40, plain=seed % 3 == 0)
    known = alone(tree, known)
    assert (~known).sum() >= 5
    split = split_tree(tree, known)
    grown, _ = split.clades.graft(split.truth, split.unseen)
    check_ranges(grown)
    table = random_table(generator, 9, list(tree.tip_names))
    truth, found = UniFrac(table, tree), UniFrac(table, grown)
    for metric in METRICS:
        pairs = [one.pairwise(metric=metric) for one in (found, truth)]
        np.testing.assert_allclose(*pairs, atol=1e-12)
    np.testing.assert_allclose(found.faith_pd(range(9)), truth.faith_pd(range(9)))


@pytest.mark.parametrize("seed", SEEDS)
def test_true_grafts_leave_the_known_tree_where_the_tips_do(seed):
    _, tree, known = random_split(seed, plain=seed % 2 == 0)
    split = split_tree(tree, known)
    names, whole = shared_lengths(tree)
    unseen = list(split.unseen)
    assert unseen == [name for name, has in zip(tree.tip_names, known, strict=True) if not has]
    old = list(split.clades.sequences)
    for number, name in enumerate(unseen):  # one at a time: exact, whatever the others do
        grown, _ = split.clades.graft(split.truth.take([number]), [name])
        own_names, shared = shared_lengths(grown)
        places = [names.index(one) for one in own_names]
        np.testing.assert_allclose(shared, whole[np.ix_(places, places)], atol=1e-12)
        assert sorted([*old, name]) == own_names


@pytest.mark.parametrize("seed", SEEDS)
def test_jaccard_of_memberships_against_dense_rows(seed):
    generator, tree, known = random_split(seed, plain=seed % 2 == 0)
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


# ---------------------------------------------------------------------------- files and the rest
@pytest.mark.parametrize("seed", [0, 1])
def test_a_tree_finds_the_places_in_a_model_made_from_it(seed, tmp_path):
    _, tree, known = random_split(seed, plain=True)
    upper = parse(random_newick(np.random.default_rng(seed), 24, plain=True).replace("t", "T"))
    split = split_tree(upper, known)
    np.savez(tmp_path / "model.npz", **split.clades.to_arrays())
    with np.load(tmp_path / "model.npz") as arrays:
        clades = Clades.from_arrays(arrays, "model")
    assert clades.sequences == list(split.clades.sequences)
    for name in ("parent", "length"):
        assert np.array_equal(getattr(clades.tree, name), getattr(split.clades.tree, name))
    shuffled = np.random.default_rng(5).permutation(len(split.unseen))
    found = places_by_tree(tree, clades, split.unseen.take(shuffled))  # tips in lower case
    for name in ("node", "shared", "own"):
        np.testing.assert_allclose(getattr(found, name), getattr(split.truth, name)[shuffled])
    assert places_by_tree(upper, clades, Texts.of(["T99"])) is None
    less = upper.shear(np.arange(24) != np.flatnonzero(known)[0])
    assert places_by_tree(less, clades, split.unseen) is None
    longer = parse(random_newick(np.random.default_rng(seed + 7), 24, plain=True))
    assert places_by_tree(longer, clades, split.unseen) is None
    stretched = type(tree)(upper.tip_names, upper.parent, upper.length * 2, "stretched")
    assert places_by_tree(stretched, clades, split.unseen) is None


def test_tips_of_a_kept_tree_join_at_their_own_ends():
    """Of known tips true_grafts says: all of their own branch, nothing beside it."""
    tree = parse("((a:1,b:2):3,c:4);")
    grafts = true_grafts(tree, np.ones(3, dtype=bool), np.arange(3))
    assert grafts.shared.tolist() == [1, 2, 4] and grafts.own.tolist() == [0, 0, 0]
