"""A small model that a tree taught places the ASVs of tables that training did not see."""

import numpy as np
import pytest

from aam.data.clades import Clades, places_by_tree
from aam.data.table import FeatureTable
from aam.data.texts import Texts
from aam.data.tree import read_tree
from aam.data.unifrac import METRICS, UniFrac
from aam.errors import InputError
from aam.evaluation import placer as placing
from aam.evaluation.applicability import applicability
from aam.evaluation.metrics import condensed
from aam.evaluation.placer import grafted_tree, unifrac_by_model
from aam.evaluation.results import jaccards

COMPLEMENT = str.maketrans("ACGT", "TGCA")


@pytest.fixture(scope="module")
def placer(study):
    return study.model.placer


@pytest.fixture(scope="module")
def new(study, placer):
    """Sequences that only other samples have, and where the tree says that they join."""
    known = set(placer.clades.sequences)
    names = [one for one in study.table.feature_ids if one not in known]
    truth = places_by_tree(read_tree(study.files.tree), placer.clades, Texts.of(names))
    assert len(names) > 30
    return names, truth


def test_the_saved_tree_is_that_of_the_training_asvs(study, placer):
    expected = Clades(UniFrac(study.known, read_tree(study.files.tree)).tree)
    for name in ("parent", "length", "tip_start", "tip_stop"):
        values = (getattr(one.tree, name) for one in (placer.clades, expected))
        np.testing.assert_allclose(*values, atol=1e-12)
    assert len(placer.clades) == len(expected) > 100
    assert set(placer.clades.sequences) == set(study.known.feature_ids)


def test_known_asvs_stand_at_their_own_tips(placer):
    sequences = list(placer.clades.sequences)[::-1]
    placed, own = placer.place(sequences), np.arange(len(sequences))[::-1]
    assert np.array_equal(placed.known, own) and np.array_equal(placed.nearest, own)
    assert np.array_equal(placed.grafts.node, placer.clades.tree.tip_nodes[own])
    assert np.array_equal(placed.clade, placer.clades.lowest[own])
    assert (placed.distance == 0).all() and (placed.support == 1).all() and placed.usable.all()
    assert (placed.grafts.own == 0).all()
    grown, _ = grafted_tree(placer.clades, placed, sequences)
    assert np.array_equal(grown.length, placer.clades.tree.length)
    none = placer.place([])
    assert len(none.grafts.node) == len(none.clade) == len(none.usable) == 0


def test_training_samples_are_as_far_apart_as_on_the_tree(study, placer):
    found = unifrac_by_model(study.known, placer.clades, placer.place(study.known.feature_ids))
    truth = UniFrac(study.known, read_tree(study.files.tree))
    for metric in METRICS:
        own, exact = (one.pairwise(metric=metric) for one in (found, truth))
        np.testing.assert_allclose(own, exact, atol=1e-9)
    np.testing.assert_allclose(found.faith_pd(), truth.faith_pd())


def test_other_samples_are_no_farther_off_than_by_nearest_neighbour_placement(study, placer):
    truth, errors = UniFrac(study.others, read_tree(study.files.tree)), {}
    for one in (placer, placer.nearest_neighbour()):
        placed = one.place(study.others.feature_ids)
        found = unifrac_by_model(study.others, placer.clades, placed)
        for metric in METRICS:
            pairs = [condensed(u.pairwise(metric=metric)) for u in (found, truth)]
            errors[one is placer, metric] = np.abs(pairs[0] - pairs[1]).mean()
            assert np.corrcoef(*pairs)[0, 1] > 0.98
    for metric in METRICS:
        assert errors[True, metric] < 1.1 * errors[False, metric] + 1e-4, errors
    assert 0 < errors[True, "unweighted"] < 0.02


def test_new_asvs_get_the_clades_of_the_tree(placer, new):
    names, truth = new
    placed = placer.place(names)
    found, copied = jaccards(placer.clades, placed, truth)
    assert found.mean() > 0.9 and found.mean() > copied.mean() - 0.02
    assert (placed.known == -1).all() and placed.usable.all()
    assert (placed.distance >= 1).all() and (placed.support > 0.5).mean() > 0.9
    assert (placed.support <= 1).all()
    baseline = placer.nearest_neighbour().place(names)
    assert np.array_equal(baseline.nearest, placed.nearest)
    assert np.array_equal(baseline.clade, placer.clades.lowest[placed.nearest])


def test_the_network_alone_has_learned_the_known_clades(placer):
    """Known ASVs, looked at as new ones: by the network's logits, without a vote."""
    clades = placer.clades
    logits = placer.network_logits(placer.neighbours.find(clades.sequences))
    tips = np.arange(len(clades.sequences))[:, None]
    member = (clades.start <= tips) & (tips < clades.stop)
    right = ((logits > 0) == member) * clades.length
    always = np.maximum(member.mean(axis=0), 1 - member.mean(axis=0)) @ clades.length
    wrong = 1 - right.sum(axis=1).mean() / clades.length.sum()
    assert wrong < 0.5 * (1 - always / clades.length.sum())


def test_the_order_and_the_company_of_sequences_change_nothing(placer, new, monkeypatch):
    names, whole = new[0], placer.place(new[0])
    order = np.random.default_rng(0).permutation(len(names))
    monkeypatch.setattr(placing, "ASVS_AT_ONCE", 3)
    monkeypatch.setattr(placing, "LOGITS_AT_ONCE", 7 * len(placer.clades))
    parts = placer.place([*placer.clades.sequences[:5], *(names[at] for at in order)])
    assert np.array_equal(parts.clade[5:], whole.clade[order])
    assert np.array_equal(parts.grafts.node[5:], whole.grafts.node[order])
    for name in ("shared", "own"):
        found, expected = (getattr(one.grafts, name) for one in (parts, whole))
        np.testing.assert_allclose(found[5:], expected[order], atol=1e-5)
    assert (parts.known[:5] == np.arange(5)).all() and (parts.known[5:] < 0).all()


def test_of_very_many_clades_those_of_candidates_are_enough(placer, new, monkeypatch):
    whole = placer.place(new[0])
    monkeypatch.setattr(placing, "MOST_DENSE", 20)
    monkeypatch.setattr(placing, "LOGITS_AT_ONCE", 40)  # two ASVs at once
    some = placer.place(new[0])
    assert (some.clade == whole.clade).mean() > 0.95
    found, expected = (jaccards(placer.clades, one, new[1])[0] for one in (some, whole))
    assert found.mean() == pytest.approx(expected.mean(), abs=0.01)


def test_trimmed_sequences_are_placed_near_their_whole_ones(placer, new):
    names, truth = new
    trimmed = placer.place([one[3:-4] for one in names])
    assert trimmed.usable.all()
    found, whole = (
        jaccards(placer.clades, one, truth)[0] for one in (trimmed, placer.place(names))
    )
    assert found.mean() > whole.mean() - 0.05
    # A known ASV that was trimmed is new, at no edit from itself.
    again = placer.place([one[2:] for one in placer.clades.sequences])
    assert (again.known == -1).all() and (again.distance < 1).all()
    assert (again.nearest == np.arange(len(again.nearest))).mean() > 0.9


def test_sequences_near_nothing_have_no_place_and_facts_say_so(study, placer, new):
    generator = np.random.default_rng(0)
    foreign = ["".join(generator.choice(list("ACGT"), 100)) for _ in range(5)]
    reverse = [one.translate(COMPLEMENT)[::-1] for one in placer.clades.sequences[:4]]
    features = [*foreign, *placer.clades.sequences[10:30], *reverse, *new[0][:7]]
    counts = type(study.table.counts)(np.eye(36, dtype=int) + 1)
    table = FeatureTable(tuple(f"s{at}" for at in range(36)), features, counts, "odd.biom")
    found = placer.find(features)
    placed = placer.place(features, found)
    assert placed.foreign.tolist() == [True] * 5 + [False] * 31
    assert placed.reverse.tolist() == [False] * 25 + [True] * 4 + [False] * 7
    facts, warnings = applicability(table, *found)
    assert [(fact.count, fact.kind) for fact in facts] == [
        (20, "info"), (7, "info"), (4, "dropped"), (5, "dropped"),
    ]  # fmt: skip
    assert len(warnings) == 2 and "11% of the reads are reverse" in warnings[0]
    assert np.isfinite(unifrac_by_model(table, placer.clades, placed).pairwise()).all()
    for names, reason in ((reverse, "reverse complements: turn"), (foreign, "another region")):
        ones = type(counts)(np.ones((1, len(names)), dtype=int))
        part = FeatureTable(("s",), names, ones, "turned.biom")
        with pytest.raises(InputError, match=f"turned.biom: none of its .*{reason}"):
            unifrac_by_model(part, placer.clades, placer.place(names))
    lost = type(counts)(np.array([[1, 0], [0, 1]]))
    part = FeatureTable(("a", "b"), [foreign[0], *new[0][:1]], lost, "mixed.biom")
    with pytest.raises(InputError, match=r"1 of 2 samples \('a'\) have no ASV near"):
        unifrac_by_model(part, placer.clades, placer.place(part.feature_ids))
