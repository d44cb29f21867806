"""Strings in one array of bytes against Python's own."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aam.data import texts
from aam.data.texts import Texts, match_names

# Few letters and multiples of the eight bytes that are compared at once: many ties and prefixes.
NAMES = st.lists(
    st.one_of(st.text("AC", max_size=20), st.text("A", max_size=40), st.text(max_size=5)),
    max_size=40,
).map(lambda names: [name.replace("\0", "") for name in names])


@given(NAMES)
def test_strings_come_back_and_sort_as_python_sorts_them(names):
    own = Texts.of(names)
    assert list(own) == names and own == tuple(names) and len(own) == len(names)
    order = own.order()
    assert [own[at] for at in order] == sorted(names)
    assert own.repeats(order) == len(names) - len(set(names))
    assert own.take(order) == sorted(names)
    assert own[1:3] == names[1:3]


@given(NAMES, NAMES)
def test_names_are_found_where_they_stand(wanted, among):
    among = list(dict.fromkeys(among))
    place = {name: at for at, name in enumerate(among)}
    assert match_names(wanted, among).tolist() == [place.get(name, -1) for name in wanted]


def test_names_of_the_same_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(Texts, "hashes", lambda self: np.zeros(len(self), dtype=np.uint64))
    assert match_names(["c", "x", "a", "cc"], ["a", "b", "c"]).tolist() == [2, -1, 0, -1]


def test_strings_of_very_different_lengths_and_many_blocks(monkeypatch):
    monkeypatch.setattr(texts, "_BLOCK", 7)
    generator = np.random.default_rng(0)
    names = ["".join(generator.choice(list("ACGT"), n)) for n in generator.integers(1, 300, 90)]
    own = Texts.of(names)
    assert [own[at] for at in own.order()] == sorted(names)
    shuffled = generator.permutation(90)
    found = match_names(own.take(shuffled), own)
    assert [names[at] for at in found] == [names[at] for at in shuffled]


def test_equality_upper_case_and_cut():
    own = Texts.of(["acGt", "", "TTT"])
    assert own != ["acGt", ""] and own != ["acGt", "", "TTA"] and own != 3
    assert own.upper() == ["ACGT", "", "TTT"] and own == ["acGt", "", "TTT"]
    assert own.cut(2) == ["ac", "", "TT"] and own.cut(2).lengths.tolist() == [2, 0, 2]
    assert own.joined(Texts.of(["x", "é"])) == ["acGt", "", "TTT", "x", "é"]
    chosen = own.take(np.array([2, 1, 2])).packed()
    assert chosen == ["TTT", "", "TTT"] and bytes(chosen.buffer) == b"TTTTTT"
