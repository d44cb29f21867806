"""Samples of the table against ids of another file."""

import pytest

from aam.data.facts import DataFact
from aam.data.matching import match_ids
from aam.errors import InputError


def test_all_match_in_the_tables_order():
    kept, facts = match_ids(["b", "a"], ["a", "b", "c"], metadata_source="m.tsv")
    assert kept == ("b", "a")
    assert facts == [
        DataFact("samples of the table in m.tsv", 2),
        DataFact("rows of m.tsv without a sample in the table", 1),
    ]


def test_fewer_than_all_is_an_error_unless_allowed():
    table, others = ["a", "b", "c", "d", "e"], ["c"]
    with pytest.raises(InputError) as caught:
        match_ids(table, others, table_source="t.biom", metadata_source="m.tsv")
    message = str(caught.value)
    assert "4 of 5 samples of t.biom are not in m.tsv ('a', 'b', 'd', ...)" in message
    assert "--allow-missing" in message and "\n" not in message
    kept, facts = match_ids(table, others, allow_missing=True)
    assert kept == ("c",)
    assert [(fact.count, fact.kind) for fact in facts] == [(1, "info"), (4, "dropped")]
    assert facts[1].detail == "'a', 'b', 'd', ..."


@pytest.mark.parametrize(
    ("others", "hint"),
    [
        (["x", "y", "z", "w"], ""),
        (["2538.10001", "2538.2"], "equal as numbers"),
        (["AA_1"], "'-', '_', '.'"),
    ],
)
@pytest.mark.parametrize("allow_missing", [False, True])
def test_no_match_shows_three_ids_of_each_side(others, hint, allow_missing):
    table = ["2538.1000100", "aa-1", "c", "d"]
    others = [one.lower() for one in others]
    with pytest.raises(InputError) as caught:
        match_ids(table, others, allow_missing=allow_missing)
    message = str(caught.value)
    assert "none of the 4 samples" in message
    assert "'2538.1000100', 'aa-1', 'c', ..." in message and f"'{others[0]}'" in message
    assert hint in message


def test_numeric_looking_ids_match_as_text_only():
    with pytest.raises(InputError, match=r"1 of 2 samples.*equal as numbers"):
        match_ids(["10", "10.0"], ["10"])
    with pytest.raises(InputError, match="upper and lower case"):
        match_ids(["Gut1"], ["gut1"])
