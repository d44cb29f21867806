"""Placement of new sequences on a tree whose sequences evolved along it."""

from types import SimpleNamespace

import numpy as np
import pytest

from aam.data.clades import LEAST_LENGTH, Clades, split_tree, true_grafts
from aam.data.neighbours import NEAREST, Found, Neighbours
from aam.data.placement import STEPS, Law, Placement
from aam.data.simulate import simulate_community
from aam.data.tree import read_tree
from tests.data.trees import parse


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A tree of 300 ASVs of which a fifth is placed: neighbours, law, and where they join."""
    files = simulate_community(
        tmp_path_factory.mktemp("study"), samples=4, asvs=300, asvs_per_sample=20, seed=3
    )
    split = split_tree(read_tree(files.tree), np.random.default_rng(0).random(300) < 0.8)
    clades, neighbours = split.clades, Neighbours(split.clades.sequences)
    law = Law.fit(clades, neighbours)
    return SimpleNamespace(
        clades=clades, truth=split.truth, neighbours=neighbours, law=law,
        near=neighbours.find(split.unseen), placement=Placement(clades, law),
        everything=np.arange(len(clades)),
    )  # fmt: skip


def found_at(index, distance):
    """Neighbours as if they had been found."""
    index, none = np.array(index), np.zeros(len(index), dtype=bool)
    return Found(index, np.array(distance, dtype=float), np.zeros((len(index), 1)), none, none)


def ancestors(tree, node):
    found = [int(node)]
    while tree.parent[found[-1]] >= 0:
        found.append(int(tree.parent[found[-1]]))
    return found


def depth_of(clades, grafts):
    """Distance of each place to the root."""
    top = clades.root_distance[grafts.node] - clades.tree.length[grafts.node]
    return top + grafts.shared


# ------------------------------------------------------------------------------------------- law
def test_the_law_is_the_same_each_time_and_comes_back_from_a_file(study, tmp_path, monkeypatch):
    np.savez(tmp_path / "law.npz", **study.law.to_arrays())
    with np.load(tmp_path / "law.npz") as arrays:
        read = Law.from_arrays(arrays)
    for other in (Law.fit(study.clades, study.neighbours), read):
        assert all(map(np.array_equal, study.law, other))
    # At most some thousand tips are taken out, drawn by the seed.
    monkeypatch.setattr("aam.data.placement.CALIBRATED", 50)
    one, same, other = (Law.fit(study.clades, study.neighbours, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.slopes, same.slopes) and not np.allclose(one.slopes, other.slopes)


def test_copied_places_end_the_nearest_ones_clades_and_add_what_steps_of_distance_say(study):
    added, clades = study.law.added, study.clades
    assert added.shape == (len(STEPS),) and (added > 0).all()
    assert added[-1] > 2 * added[0] and np.corrcoef(np.arange(len(added)), added)[0, 1] > 0.8
    placement = Placement(clades, study.law._replace(added=np.arange(len(STEPS))))
    edits = np.array([0, 1, 1.5, 1.75, 2.3, 3, 4.5, 5, 6.5, 7.2, 8.75, 12.5, 13, 40, np.inf])
    tips = np.append(np.arange(14), -1)
    copied = placement.copied(found_at(tips[:, None], edits[:, None]))
    assert copied.own.tolist() == [0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 6, 6, 7, 7, 7]
    expected = [*clades.node_of(clades.lowest[:14]), len(clades.tree) - 1]
    assert copied.node.tolist() == expected
    assert np.array_equal(copied.shared, clades.tree.length[expected])


def test_own_lengths_are_positive_and_bounded_and_known_better_than_by_their_mean(study):
    pendant, truth = study.clades.pendant, study.truth.own
    own, rise = study.law.predict(study.near, pendant[study.near.index[:, :NEAREST]])
    assert (own >= LEAST_LENGTH).all() and (own <= pendant.max()).all() and (rise >= 0).all()
    assert ((own - truth) ** 2).mean() < 0.7 * truth.var()
    far = found_at(np.full((1, NEAREST), -1), np.full((1, NEAREST), np.inf))
    lost, _ = study.law.predict(far, np.zeros((1, NEAREST)))
    assert np.isfinite(lost).all() and lost[0] <= study.law.longest == pendant.max()


def test_what_the_law_is_fitted_to_is_the_tree_without_each_tip(study):
    clades, everyone = study.clades, np.arange(len(study.clades.sequences))
    found = study.neighbours.find(clades.sequences, leave_out=everyone)
    local, rise = [], []
    for tip in everyone:
        rest = everyone != tip
        less = Clades(clades.tree.shear(rest))
        at = found.index[tip, :NEAREST]
        at = at - (at > tip)
        place = true_grafts(clades.tree, rest, np.array([tip]))
        local.append(less.pendant[at].mean())
        depth = found.weights[tip] @ less.root_distance[less.tree.tip_nodes[at]]
        rise.append(depth - depth_of(less, place)[0])
    assert study.law.centre[3] == pytest.approx(np.mean(local))
    assert study.law.levels == pytest.approx([clades.pendant.mean(), np.mean(rise)])


def test_sequences_that_resemble_no_other_teach_a_law_of_nothing():
    names = ["ACGTACGTACGTACGT", "GGGGGGGGGGGGGGGG", "TTTTTTTTTTTTTTTT"]
    clades = Clades(parse(f"(({names[0]}:1,{names[1]}:1):1,{names[2]}:2);"))
    neighbours = Neighbours(clades.sequences)
    placement = Placement(clades, Law.fit(clades, neighbours))
    near = neighbours.find(["ACGTACGTACGTACGA", "CATCATCATCATCATC"])
    for sure in (np.ones((2, 1), np.float32), np.zeros((2, 1), np.float32)):
        grafts = placement.grafts(near, np.array([0, -1]), sure, np.arange(1))
        assert np.isfinite(grafts.own).all() and (grafts.own >= LEAST_LENGTH).all()


# ---------------------------------------------------------------------------------------- places
@pytest.mark.parametrize("chance", [0.0, 0.6, 1.0])
def test_places_lie_on_branches_of_the_way_through_the_decoded_clade(study, chance):
    clades, tree = study.clades, study.clades.tree
    lowest = clades.lowest[study.near.index[:, 2]]  # not always the nearest one's
    sure = np.full((len(lowest), len(clades)), chance, dtype=np.float32)
    grafts = study.placement.grafts(study.near, lowest, sure, study.everything)
    assert (grafts.shared >= 0).all() and (grafts.own > 0).all()
    assert (grafts.shared <= tree.length[grafts.node]).all()
    for node, end in zip(grafts.node, clades.node_of(lowest), strict=True):
        assert end in ancestors(tree, node) or node in ancestors(tree, end)
    # Columns in another order, and clades without one: they have no chance.
    column = np.full(len(clades), -1)
    column[1::2] = np.arange(len(column[1::2]))[::-1]
    sure[:, ::2] = 0.0
    expected = study.placement.grafts(study.near, lowest, sure, study.everything)
    found = study.placement.grafts(study.near, lowest, sure[:, 1::2], column)
    assert np.array_equal(found.node, expected.node)
    np.testing.assert_allclose(found.shared, expected.shared)


def test_sure_clades_keep_the_depth_and_impossible_ones_lead_to_the_root(study):
    clades, near = study.clades, study.near
    index = near.index[:, :NEAREST]
    lowest = clades.lowest[index[:, 0]]
    sure = np.ones((len(lowest), len(clades)), dtype=np.float32)
    grafts, half, none = (
        study.placement.grafts(near, lowest, chance * sure, study.everything)
        for chance in (1.0, 0.5, 0.0)
    )
    own, rise = study.law.predict(near, clades.pendant[index])
    tip_depth = clades.root_distance[clades.tree.tip_nodes[index]]
    wanted = np.maximum((near.weights * tip_depth).sum(axis=1) - rise, 0)
    expected = np.minimum(wanted, tip_depth[:, 0])
    np.testing.assert_allclose(depth_of(clades, grafts), expected, atol=1e-9)
    # What is not passed on of the way is shared between the two: KEPT is no length of its own.
    np.testing.assert_allclose(grafts.own, own + 0.3 * (wanted - expected), atol=1e-6)
    inner = lowest >= 0
    np.testing.assert_allclose(depth_of(clades, none)[inner], 0.0, atol=1e-12)
    np.testing.assert_allclose((none.own - grafts.own)[inner], 0.3 * expected[inner], atol=1e-6)
    top = depth_of(clades, half) / np.maximum(depth_of(clades, grafts), 1e-9)
    np.testing.assert_allclose(top[inner], 0.5, atol=1e-6)


def test_without_a_neighbour_in_the_clade_the_way_ends_at_the_clade():
    clades = Clades(parse("(((a:1,b:1):2,c:3):1,(d:1,e:1):5);"))
    zero = Law(np.zeros(5), np.zeros((2, 5)), np.array([0.5, 0.0]), 1.0, 10.0, np.zeros(len(STEPS)))
    placement, ab = Placement(clades, zero), clades.lowest[0]
    sure, column = np.ones((1, len(clades)), dtype=np.float32), np.arange(len(clades))

    def place(tips, lowest, distance=1.0):
        near = found_at([tips], [[distance] * len(tips)])
        return placement.grafts(near, np.array([lowest]), sure, column)

    grafts = place([3], ab)  # d, at depth 6
    assert depth_of(clades, grafts).tolist() == [3]
    assert clades.nodes[ab] in ancestors(clades.tree, grafts.node[0])
    inside = place([3, 1], ab)
    assert clades.tree.tip_nodes[1] == inside.node[0] and inside.shared.tolist() == [1]
    for tip in (0, 3):  # no clade decoded: the nearest one's way
        root = place([tip], -1)
        assert root.node.tolist() == [clades.tree.tip_nodes[tip]] and root.shared.tolist() == [1]
    assert depth_of(clades, place([-1], -1, np.inf)).tolist() == [0]


def test_votes_are_the_weights_of_the_neighbours_below_and_decode_nearly_the_trees_clades(study):
    clades, near, placement = study.clades, study.near, study.placement
    below = clades.members(clades.lowest)[near.index[:, :NEAREST]]  # (n, NEAREST, clades)
    expected = (below * near.weights[:, :, None]).sum(axis=1)
    vote = placement.vote(near, study.everything)
    np.testing.assert_allclose(vote, expected, atol=1e-5)
    some = np.array([3, 0])
    np.testing.assert_allclose(placement.vote(near, some), expected[:, some], atol=1e-5)
    assert (placement.vote(found_at([[-1] * 3], [[np.inf] * 3]), some) == 0).all()
    grafts = placement.grafts(near, clades.lowest[near.index[:, 0]], vote, study.everything)
    found, copied = (clades.jaccard(one, study.truth) for one in (grafts, placement.copied(near)))
    assert found.mean() > 0.6 and found.mean() > copied.mean() - 0.02
