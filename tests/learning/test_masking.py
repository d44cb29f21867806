"""Noise in sequences, by its statistics."""

import re

import numpy as np
import pytest
import torch

from aam.config import PenaltyOptions
from aam.data.sequences import MASK, START, tokenize
from aam.learning.masking import (
    CUT_LENGTH,
    CUT_SHARE,
    SUBSTITUTED_SHARE,
    SUBSTITUTION_RATE,
    mask_tokens,
    noisy_asvs,
    span_hits,
)  # fmt: skip


def rows_of_bases(count=400, length=100, seed=0):
    generator = np.random.default_rng(seed)
    bases = generator.choice(list("ACGT"), (count, length))
    return tokenize(["".join(row) for row in bases], 150)


def test_noise_has_the_asked_shares_and_never_touches_start():
    count, length = 6000, 100
    tokens, rows = rows_of_bases(count, length), torch.arange(count)
    torch.manual_seed(0)
    noisy = noisy_asvs(tokens, rows, PenaltyOptions())
    clean = tokens.values.view(count, length + 1)
    seen = noisy.tokens.values.view(count, length + 1)
    assert torch.equal(seen[:, 0], clean[:, 0]) and (clean[:, 0] == START).all()
    assert torch.equal(noisy.rows, rows)
    # What is asked is masked, and what stood there is known.
    asked = torch.zeros(count * (length + 1), dtype=torch.bool)
    asked[noisy.masked] = True
    assert (noisy.masked.diff() > 0).all()
    assert (noisy.tokens.values[noisy.masked] == MASK).all()
    assert torch.equal(noisy.true, tokens.values[noisy.masked].long())
    asked = asked.view(count, length + 1)
    is_masked = asked.any(1)
    assert is_masked.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert asked[is_masked][:, 1:].float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(seen[is_masked], clean[is_masked].masked_fill(asked[is_masked], MASK))
    # The others: an end or a beginning cut off, bases substituted by others.
    seen, clean = seen[~is_masked][:, 1:], clean[~is_masked][:, 1:]
    cut = seen == MASK
    lengths = cut.sum(1)
    is_cut = lengths > 0
    assert is_cut.float().mean().item() == pytest.approx(CUT_SHARE * (1 - 1 / 30), abs=0.015)
    longest = CUT_LENGTH * length
    assert longest - 3 <= lengths.max() <= longest + 1
    assert lengths[is_cut].float().mean().item() == pytest.approx(longest / 2 + 0.5, rel=0.1)
    at_end, at_start = cut[is_cut][:, -1], cut[is_cut][:, 0]
    assert torch.equal(at_end, ~at_start) and 0.4 < at_end.float().mean() < 0.6
    assert ((cut[:, 1:] != cut[:, :-1]).sum(1) == is_cut.long()).all(), "one run each"
    hit = (seen != clean) & ~cut
    assert set(seen[hit].tolist()) == {1, 2, 3, 4}
    share = hit.float().mean().item() / (~cut).float().mean().item()
    assert share == pytest.approx(SUBSTITUTED_SHARE * SUBSTITUTION_RATE / 2, rel=0.1)
    shift = (seen[hit].long() - clean[hit].long()) % 4
    assert torch.bincount(shift)[1:].min() > 0.28 * len(shift), "each other base as often"
    untouched = ((seen == clean) | cut).all(1).float().mean().item()
    rates = np.linspace(0, SUBSTITUTION_RATE, 1001)
    expected = 1 - SUBSTITUTED_SHARE + SUBSTITUTED_SHARE * np.mean((1 - rates) ** length)
    assert untouched == pytest.approx(expected, abs=0.03)


def test_without_a_nucleotide_penalty_nothing_is_asked():
    tokens = rows_of_bases(50)
    noisy = noisy_asvs(tokens, torch.arange(50), PenaltyOptions(nucleotide_penalty=0.0))
    assert not len(noisy.masked) and not torch.equal(noisy.tokens.values, tokens.values)


@pytest.mark.parametrize("bounds", [(0, 17), (17, 50), (20, 20)])
def test_a_part_of_noisy_sequences_asks_for_its_own_nucleotides(bounds):
    torch.manual_seed(0)
    noisy = noisy_asvs(rows_of_bases(50), torch.arange(50) + 7, PenaltyOptions())
    low, high = bounds
    part = noisy.part(slice(low, high), slice(101 * low, 101 * high))
    inside = (noisy.masked >= 101 * low) & (noisy.masked < 101 * high)
    assert torch.equal(part.masked + 101 * low, noisy.masked[inside])
    assert torch.equal(part.true, noisy.true[inside])
    assert part.rows.tolist() == list(range(low + 7, high + 7)) and len(part.tokens) == high - low


@pytest.mark.parametrize("probability", [0.15, 0.4])
@pytest.mark.parametrize("strategy", ["random", "span"])
def test_masks_cover_the_asked_share_and_never_start(strategy, probability):
    tokens = rows_of_bases()
    torch.manual_seed(0)
    masked, positions = mask_tokens(tokens, probability, strategy)
    hit = masked.values == MASK
    assert torch.equal(hit.nonzero()[:, 0], positions)
    assert torch.equal(masked.values[~hit], tokens.values[~hit])
    assert (tokens.values[hit] != START).all()
    starts = tokens.offsets[:-1].long()
    assert (masked.values[starts] == START).all()
    share = hit.sum().item() / (len(tokens.values) - len(tokens))
    assert share == pytest.approx(probability, abs=0.01 if strategy == "random" else 0.02)


def test_spans_are_runs_of_3_to_5_within_their_row():
    tokens = rows_of_bases(length=60)
    torch.manual_seed(1)
    masked, _ = mask_tokens(tokens, 0.02, "span")  # so few that runs seldom touch
    inner = [
        found.end() - found.start()
        for row in range(len(masked))
        for found in re.finditer("x+", "".join(".x"[one == MASK] for one in masked[row].tolist()))
        if found.start() > 1 and found.end() < 61  # neither cut by START nor by the row's end
    ]
    counts = np.bincount(inner)
    assert counts[:3].sum() == 0
    assert counts[3:6].sum() > 0.95 * counts.sum() > 50
    assert counts[3:6].min() > 0.2 * counts.sum()
    # A run that went on from the row before would cover a row's first position as often as others.
    covered = span_hits(tokens, 0.4).float()
    begins = covered[tokens.offsets[:-1].long()].mean().item()
    assert begins == pytest.approx(1 - 0.6**0.25, abs=0.06)
    assert covered.mean().item() == pytest.approx(0.4, abs=0.03)
