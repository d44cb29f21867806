"""Nucleotide tokens against a plain Python rendering of the rules."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aam.data import sequences
from aam.data.sequences import START, tokenize
from aam.errors import InputError


def plain_tokens(sequence, max_bp):
    return [5] + ["ACGT".index(base) + 1 for base in sequence.upper()[:max_bp]]


def test_the_vocabulary_is_the_documented_one():
    names = ("PAD", "A", "C", "G", "T", "START", "MASK")
    assert [getattr(sequences, name) for name in names] == [0, 1, 2, 3, 4, 5, 6]
    assert sequences.VOCABULARY == 7


def test_tokens_of_three_sequences():
    tokens, number_cut = tokenize(["ACGT", "tttta", "G"], max_bp=4)
    assert tokens.values.tolist() == [5, 1, 2, 3, 4, 5, 4, 4, 4, 4, 5, 3]
    assert tokens.values.dtype == torch.uint8 and tokens.offsets.dtype == torch.int32
    assert tokens.offsets.tolist() == [0, 5, 10, 12]
    assert tokens.max_length == 5
    assert number_cut == 1


@given(
    st.lists(st.text("ACGTacgt", max_size=12), max_size=8), st.integers(min_value=1, max_value=10)
)
def test_tokens_follow_the_rules(dna, max_bp):
    tokens, number_cut = tokenize(dna, max_bp)
    assert len(tokens) == len(dna)
    for row, sequence in enumerate(dna):
        assert tokens[row].tolist() == plain_tokens(sequence, max_bp)
    assert number_cut == sum(len(sequence) > max_bp for sequence in dna)


def test_no_sequences_and_an_empty_one():
    tokens, number_cut = tokenize([])
    assert len(tokens) == 0 and tokens.max_length == 0 and number_cut == 0
    assert tokenize([""])[0].values.tolist() == [START]


@pytest.mark.parametrize("wrong", ["ACGN", "AC-GT", "ACGU", "AC GT", "ACGé"])
def test_other_letters_are_refused(wrong):
    with pytest.raises(InputError, match="besides A, C, G and T"):
        tokenize(["ACGT", wrong])


def test_max_bp_has_to_be_positive():
    with pytest.raises(InputError, match="at least 1, got 0"):
        tokenize(["ACGT"], max_bp=0)


@pytest.mark.real
def test_real_sequences_round_trip(real_data):
    from aam.data.table import read_table

    table = read_table(real_data / "phylogeny-small" / "table.biom")
    tokens, number_cut = tokenize(table.feature_ids)
    assert len(tokens) == 1040 and tokens.max_length == 91 and number_cut == 0
    letters = np.array(list("?ACGT^"))[tokens.values.numpy()]
    back = "".join(letters).split("^")[1:]
    assert tuple(back) == table.feature_ids
