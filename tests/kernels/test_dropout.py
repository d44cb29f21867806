import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aam_kernels._runtime import dropout
from tests.kernels.contract import numpy_dropped


def placed(seed, first_row=0, first_key_row=None):
    """A seed as operators get it."""
    return dropout.resolve_seed(seed, 0.5, torch.device("cpu"), first_row, first_key_row)


seeds = st.integers(-(1 << 63), (1 << 63) - 1)
rows = st.lists(st.integers(0, 1 << 34), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(seeds, rows, rows, st.integers(1, 4), st.floats(0.0, 0.999))
def test_attention_mask_equals_unsigned_twin(seed, queries, keys, heads, p):
    mask = dropout.attention_dropped(
        placed(seed), torch.tensor(queries), torch.tensor(keys), heads, p
    )
    assert np.array_equal(mask.numpy(), numpy_dropped(seed, queries, keys, range(heads), p))


@settings(max_examples=80, deadline=None)
@given(seeds, rows, st.integers(1, 9), st.integers(0, 7), st.floats(0.0, 0.999))
def test_feature_mask_equals_unsigned_twin(seed, tokens, features, site, p):
    mask = dropout.feature_dropped(placed(seed), torch.tensor(tokens), features, site, p)
    twin = numpy_dropped(seed, tokens, range(features), [0x10000 + site], p)[0]
    assert np.array_equal(mask.numpy(), twin)


def test_known_bits():
    # A change of the hash changes what every seed has ever meant.
    x = torch.tensor([0, 1, 2, 0x7FFFFFFF, -1], dtype=torch.int32)
    mixed = dropout.mix_(x).numpy().view(np.uint32).tolist()
    assert mixed == [0, 0x688990C0, 0xD1132181, 0x8D29FFB8, 0x6768824A]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_share_of_dropped_elements(p):
    size = 400
    mask = dropout.attention_dropped(
        placed(3), torch.arange(size), torch.arange(size), 4, p
    ).double()
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.mean().item() - p) < 4 * deviation
    # Rows, columns and heads each have the right share, and heads do not repeat one another.
    for dim in (0, 1, 2):
        others = [d for d in range(3) if d != dim]
        spread = mask.mean(others).std().item()
        expected = (p * (1 - p) * mask.shape[dim] / mask.numel()) ** 0.5
        if dim:
            assert expected * 0.8 < spread < expected * 1.25
    agree = (mask[0] == mask[1]).double().mean().item()
    assert abs(agree - (p * p + (1 - p) ** 2)) < 0.01


def test_neighbours_are_independent():
    mask = (
        dropout.attention_dropped(placed(11), torch.arange(600), torch.arange(600), 1, 0.5)[
            0
        ].double()
        - 0.5
    )
    for other in (mask.roll(1, 0), mask.roll(1, 1), mask.roll((1, 1), (0, 1)), mask.T):
        assert abs((mask * other).mean().item()) * 4 < 4 / 600
    seed_after = (
        dropout.attention_dropped(placed(12), torch.arange(600), torch.arange(600), 1, 0.5)[
            0
        ].double()
        - 0.5
    )
    assert abs((mask * seed_after).mean().item()) * 4 < 4 / 600


def correlations(z):
    """Variance of all pairs of rows' correlations, over that of independent draws; the largest."""
    rows, columns = z.shape
    gram = (z @ z.T / columns)[torch.triu(torch.ones(rows, rows, dtype=torch.bool), 1)]
    return gram.square().mean().item() * columns, gram.abs().max().item()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rows_columns_and_rectangles_are_as_independent_as_random_draws(p):
    # One product an element: what such a hash could spoil are pairs of rows, and rectangles.
    size, seeds = 151, 60
    found = []
    for seed in range(seeds):
        rows = torch.arange(size) + 977 * seed
        mask = dropout.attention_dropped(placed(seed), rows, rows, 2, p).double()
        z = (mask - p) / (p * (1 - p)) ** 0.5
        corners = z[0, :-1, :-1] * z[0, 1:, :-1] * z[0, :-1, 1:] * z[0, 1:, 1:]
        heads = torch.stack([z[0].flatten(), z[1].flatten()])
        found.append(
            (
                *correlations(z[0]), *correlations(z[0].T), *correlations(heads),
                mask[0].sum(0).var().item() / (size * p * (1 - p)),
                mask[0].sum(1).var().item() / (size * p * (1 - p)), corners.mean().item(),
            )
        )  # fmt: skip
    row, row_peak, column, column_peak, _, head_peak, *variances, corner = torch.tensor(
        found, dtype=torch.float64
    ).T
    assert abs(row.mean() - 1) < 0.03 and abs(column.mean() - 1) < 0.03
    assert row_peak.median() < 0.5 and column_peak.median() < 0.5
    assert head_peak.max() < 5 / size
    assert all(abs(share.mean() - 1) < 0.06 for share in variances)
    assert abs(corner.mean()) < 5 / size / seeds**0.5


def test_high_word_of_the_seed_counts():
    one, other = (
        dropout.attention_dropped(placed(s), torch.arange(50), torch.arange(50), 1, 0.5)
        for s in (5, 5 + (1 << 32))
    )
    assert 0.4 < (one != other).double().mean() < 0.6


def test_feature_dropout_blocks_and_backward():
    # More rows than a block holds; applied twice it is its own backward.
    x = torch.rand(3000, 64) + 1
    token_rows = torch.arange(100, 3100)
    seed = placed(9)
    dropped = dropout.feature_dropout_(x.clone(), token_rows, 2, 0.25, seed)
    mask = dropout.feature_dropped(seed, token_rows, 64, 2, 0.25)
    assert torch.equal(dropped == 0, mask)
    assert torch.equal(dropped, (x * (1 / 0.75)).masked_fill(mask, 0))
    part = dropout.feature_dropout_(x[1000:1010].clone(), token_rows[1000:1010], 2, 0.25, seed)
    assert torch.equal(part, dropped[1000:1010])
    assert torch.equal(dropout.feature_dropout_(x.clone(), token_rows, 2, 0.0, None), x)


def test_resolve_seed():
    device = torch.device("cpu")
    assert dropout.resolve_seed(5, 0.0, device) is None
    assert dropout.resolve_seed(-1, 0.5, device).tolist() == [-1, 0, 0]
    assert dropout.resolve_seed((1 << 64) - 1, 0.5, device, 3).tolist() == [-1, 3, 3]
    assert dropout.resolve_seed(torch.tensor([7]), 0.5, device, 1 << 40, 0).tolist() == [
        7,
        1 << 40,
        0,
    ]
    torch.manual_seed(4)
    drawn = dropout.resolve_seed(None, 0.5, device)
    torch.manual_seed(4)
    assert torch.equal(drawn, dropout.resolve_seed(None, 0.5, device))
    assert not torch.equal(drawn, dropout.resolve_seed(None, 0.5, device))


@pytest.mark.parametrize(
    ("seed", "p", "error", "message"),
    [
        (1, 1.0, ValueError, "got 1.0"),
        (1, -0.1, ValueError, "got -0.1"),
        (1, float("nan"), ValueError, "got nan"),
        (1.5, 0.1, TypeError, "float"),
        (True, 0.1, TypeError, "bool"),
        (torch.tensor(1.5), 0.1, TypeError, "float32"),
        (torch.tensor([1, 2]), 0.1, ValueError, r"\(2,\)"),
    ],
)
def test_wrong_seed_or_probability(seed, p, error, message):
    with pytest.raises(error, match=message):
        dropout.resolve_seed(seed, p, torch.device("cpu"))
