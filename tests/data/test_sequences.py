"""Nucleotide tokens against a plain Python rendering of the rules."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aam.data.sequences import MASK, START, A, C, G, T, tokenize
from aam.data.table import read_table
from aam.data.texts import Texts
from aam.errors import InputError


@given(
    st.lists(st.text("ACGTacgt", max_size=12), max_size=8), st.integers(min_value=1, max_value=10)
)
def test_tokens_follow_the_rules(dna, max_bp):
    tokens = tokenize(dna, max_bp)
    rows = [[START, *("ACGT".index(b) + A for b in one.upper()[:max_bp])] for one in dna]
    assert [tokens[row].tolist() for row in range(len(tokens))] == rows
    assert tokens.max_length == max(map(len, rows), default=0)
    assert tokens.values.dtype == torch.uint8 and tokens.offsets.dtype == torch.int32
    some = Texts.of(["TTT", *dna]).take(np.arange(len(dna), 0, -1))
    assert tokenize(some, max_bp).values.tolist() == [one for row in rows[::-1] for one in row]


def test_the_vocabulary_is_the_documented_one():
    assert (A, C, G, T, START, MASK) == (1, 2, 3, 4, 5, 6)
    assert tokenize(["ACGT", "tttta"], max_bp=4).values.tolist() == [5, 1, 2, 3, 4, 5, 4, 4, 4, 4]


@pytest.mark.parametrize("wrong", ["ACGN", "AC-GT", "ACGU", "AC GT", "ACGé"])
def test_other_letters_are_refused(wrong):
    with pytest.raises(InputError, match="besides A, C, G and T"):
        tokenize(["ACGT", wrong])


@pytest.mark.real
def test_real_sequences_round_trip(real_data):
    table = read_table(real_data / "phylogeny-small" / "table.biom")
    tokens = tokenize(table.feature_ids)
    assert len(tokens) == 1040 and tokens.max_length == 91
    letters = np.array(list("?ACGT^"))[tokens.values.numpy()]
    assert "".join(letters).split("^")[1:] == list(table.feature_ids)
