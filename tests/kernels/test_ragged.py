import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aam_kernels import Ragged

lengths_lists = st.lists(st.integers(0, 7), min_size=1, max_size=8)


def make(lengths, *shape):
    return Ragged.from_list([torch.randn(length, *shape) for length in lengths])


@settings(max_examples=60, deadline=None)
@given(lengths_lists, st.integers(0, 2), st.integers(0, 3))
def test_padded_round_trip(lengths, dims, extra):
    ragged = make(lengths, *([3] * dims))
    padded = ragged.to_padded(float("nan"))
    assert padded.shape == (len(lengths), max(lengths), *([3] * dims))
    widened = torch.cat((padded, padded.new_full((len(lengths), extra, *([3] * dims)), 5.0)), 1)
    back = Ragged.from_padded(widened, ragged.lengths)
    assert torch.equal(back.values, ragged.values)
    assert torch.equal(back.offsets, ragged.offsets)
    assert back.max_length == ragged.max_length == max(lengths)


@settings(max_examples=60, deadline=None)
@given(lengths_lists)
def test_items_are_the_listed_sequences(lengths):
    rows = [torch.randn(length, 2) for length in lengths]
    ragged = Ragged.from_list(rows)
    assert len(ragged) == len(rows)
    for number, row in enumerate(rows):
        assert torch.equal(ragged[number], row)
        assert torch.equal(ragged[number - len(rows)], row)
    assert all(torch.equal(a, b) for a, b in zip(ragged, rows, strict=True))
    assert ragged.lengths.tolist() == lengths


@settings(max_examples=40, deadline=None)
@given(lengths_lists)
def test_padding_passes_gradients_to_real_rows_only(lengths):
    ragged = make(lengths, 2)
    values = torch.cat((ragged.values, torch.full((2, 2), float("nan")))).requires_grad_()
    padded = Ragged(values, ragged.offsets).to_padded()
    padded.sum().backward()
    total = sum(lengths)
    assert torch.equal(values.grad[:total], torch.ones(total, 2))
    assert torch.equal(values.grad[total:], torch.zeros(2, 2))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 9), min_size=1, max_size=6), st.integers(0, 9))
def test_offsets_are_accepted_exactly_when_they_are_right(offsets, total):
    right = offsets[0] == 0 and sorted(offsets) == offsets and offsets[-1] <= total
    tensor = torch.tensor(offsets, dtype=torch.int32)
    if right:
        assert Ragged(torch.zeros(total), tensor).offsets.tolist() == offsets
    else:
        with pytest.raises(ValueError, match="offsets"):
            Ragged(torch.zeros(total), tensor)


@pytest.mark.parametrize(
    ("values", "offsets", "max_length", "error", "message"),
    [
        (torch.zeros(4), torch.tensor([0, 4]), None, TypeError, "int32, got torch.int64"),
        (torch.zeros(4), torch.zeros(2, 2, dtype=torch.int32), None, ValueError, r"\(2, 2\)"),
        (torch.zeros(4), torch.zeros(0, dtype=torch.int32), None, ValueError, r"shape \(0,\)"),
        (torch.zeros(()), torch.zeros(1, dtype=torch.int32), None, ValueError, "0-d"),
        (torch.zeros(4), torch.tensor([0, 4]).int(), 3, ValueError, r"\(4\), got 3"),
        (torch.zeros(4), torch.tensor([0, 3, 1]).int(), None, ValueError, "3 then 1 at position 1"),
        (torch.zeros(4), torch.tensor([0, 5]).int(), None, ValueError, "end at 5.*4 rows"),
        (torch.zeros(4), [0, 4], None, TypeError, "list"),
        (torch.zeros(4, device="meta"), torch.tensor([0, 4]).int(), None, ValueError, "meta"),
    ],
)
def test_wrong_construction_names_the_value(values, offsets, max_length, error, message):
    with pytest.raises(error, match=message):
        Ragged(values, offsets, max_length)


def test_wrong_lengths_and_empty_list():
    with pytest.raises(ValueError, match=r"0\.\.3, got 1\.\.4"):
        Ragged.from_padded(torch.zeros(2, 3), torch.tensor([1, 4]))
    with pytest.raises(ValueError, match=r"lengths \(n,\)"):
        Ragged.from_padded(torch.zeros(2, 3), torch.tensor([1]))
    with pytest.raises(ValueError, match="empty"):
        Ragged.from_list([])
    with pytest.raises(IndexError, match="sequence 1 of 1"):
        make([2])[1]


def test_no_sequences_and_larger_bound():
    empty = Ragged.from_padded(torch.zeros(0, 4, 2), torch.zeros(0, dtype=torch.int64))
    assert len(empty) == 0 and empty.max_length == 0
    assert empty.to_padded().shape == (0, 0, 2)
    bound = Ragged(torch.arange(3.0), torch.tensor([0, 1, 3]).int(), 5)
    assert bound.to_padded(-1).tolist() == [[0, -1, -1, -1, -1], [1, 2, -1, -1, -1]]


def test_dtypes_survive():
    tokens = Ragged.from_list([torch.tensor([5, 1], dtype=torch.uint8)] * 2)
    assert tokens.values.dtype == torch.uint8
    assert tokens.to_padded(6).dtype == torch.uint8
    assert tokens.to("cpu").values.dtype == torch.uint8


def test_with_values_keeps_the_sequences():
    ragged = make([2, 3])
    other = ragged.with_values(torch.zeros(5, 7))
    assert other.values.shape == (5, 7) and other.offsets is ragged.offsets
    with pytest.raises(ValueError, match="expected 5 rows, got 4"):
        ragged.with_values(torch.zeros(4))


def test_nested_round_trip():
    ragged = make([2, 0, 3], 4)
    nested = ragged.to_nested()
    assert torch.equal(nested.to_padded_tensor(0.0), ragged.to_padded())
    back = Ragged.from_nested(nested)
    assert torch.equal(back.values, ragged.values) and torch.equal(back.offsets, ragged.offsets)
    with pytest.raises(ValueError, match="jagged"):
        Ragged.from_nested(torch.zeros(3))


def test_pytree_and_compile():
    ragged = make([2, 0, 3], 4)
    leaves, spec = torch.utils._pytree.tree_flatten(ragged)
    assert [id(leaf) for leaf in leaves] == [id(ragged.values), id(ragged.offsets)]
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert again.max_length == 3

    def double(x):
        return Ragged(x.values * 2, x.offsets, x.max_length)

    compiled = torch.compile(double, backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(ragged).values, ragged.values * 2)
    assert torch.equal(compiled(ragged).to_padded(), ragged.to_padded() * 2)


def test_export_takes_ragged_arguments():
    class Pad(torch.nn.Module):
        def forward(self, x):
            return x.to_padded() + 1

    ragged = make([2, 0, 3], 4)
    exported = torch.export.export(Pad(), (ragged,))
    assert torch.equal(exported.module()(ragged), ragged.to_padded() + 1)
