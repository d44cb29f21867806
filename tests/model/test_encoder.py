"""The two paths of the ASV encoder, the clade heads, and the formulas of distances."""

import dataclasses
import math

import pytest
import torch

from aam.model import AsvEncoder, CladeHead, EncoderShape, FreeClades
from aam_kernels import Ragged

SHAPE = EncoderShape(embedding_dim=32, wide_dim=24, num_heads=2, num_layers=1, max_bp=20)
START, MASK = 5, 6


def tokens_of(*sequences):
    """Sequences of A, C, G, T and - (masked), as the encoder gets them."""
    rows = [[START, *("?ACGT?-".index(base) for base in one)] for one in sequences]
    return Ragged.from_list([torch.tensor(row, dtype=torch.uint8) for row in rows])


TOKENS = tokens_of("ACGTACGT", "A", "GGCATTA-CCGTACGATCAG", "TTT")


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return AsvEncoder(dataclasses.replace(SHAPE, **changes))


def randomise(encoder):
    """Gate and nucleotide heads begin at 0: say something with them."""
    with torch.no_grad():
        for one in (encoder.gate, encoder.site_head, encoder.site_bias):
            one.normal_()
    return encoder


def test_the_wide_path_adds_a_vector_for_each_base_at_its_position():
    encoder = make()
    wide, found = encoder.wide, encoder.wide(TOKENS)
    sites = wide.sites.view(21, 7, 24)
    assert (sites[:, MASK] == 0).all(), "what is masked says nothing at first"
    for row in range(len(TOKENS)):
        total = sum(sites[place, base] for place, base in enumerate(TOKENS[row].tolist()))
        expected = wide.project(torch.nn.functional.gelu(wide.norm(total)))
        torch.testing.assert_close(found[row], expected)


def test_the_gate_lets_nothing_through_at_first_and_the_pooled_stack_later():
    encoder = make().eval()
    whole, without = encoder(TOKENS), encoder(TOKENS, stack=False)
    wide = encoder.wide(TOKENS)
    assert torch.equal(whole.vectors, wide) and torch.equal(without.vectors, wide)
    assert whole.hidden.shape == (len(TOKENS.values), 32) and without.hidden is None
    randomise(encoder)
    found = encoder(TOKENS)
    pooled = encoder.pool(TOKENS.with_values(found.hidden))
    torch.testing.assert_close(found.vectors, wide + encoder.gate * pooled)
    assert torch.equal(encoder(TOKENS, stack=False).vectors, wide)


def test_the_wide_path_alone_has_no_other_weights_and_still_tells_nucleotides():
    encoder, both = make(encoder="wide"), make()
    names = {name.split(".")[0] for name, _ in encoder.named_parameters()}
    assert names == {"wide", "site_head", "site_bias"} and not encoder.has_stack
    encoder.load_state_dict(both.state_dict(), strict=False)
    encoded = encoder(TOKENS)
    assert torch.equal(encoded.vectors, both.wide(TOKENS))
    optimizer = torch.optim.Adam(encoder.parameters(), 0.01)
    places, true = torch.arange(1, 9), TOKENS.values[1:9].long() - 1
    for _ in range(60):
        optimizer.zero_grad()
        logits = encoder.nucleotide_logits(encoder(TOKENS), TOKENS, places)
        torch.nn.functional.cross_entropy(logits, true).backward()
        optimizer.step()
    assert torch.equal(logits.argmax(1), true)


@pytest.mark.parametrize("stack", [True, False])
def test_nucleotides_are_told_by_their_position_and_the_stack_there(stack):
    encoder = randomise(make()).eval()
    places = torch.tensor([2, 10, 12, 18, 31])  # in rows 0, 1, 2, 2 and 2
    row, position = [0, 1, 2, 2, 2], [2, 1, 1, 7, 20]
    encoded = encoder(TOKENS, stack=stack)
    found = encoder.nucleotide_logits(encoded, TOKENS, places)
    for one, (place, r, p) in enumerate(zip(places.tolist(), row, position, strict=True)):
        expected = encoder.site_head[p] @ encoded.vectors[r] + encoder.site_bias[p]
        if stack:
            expected = expected + encoder.nucleotide_head(encoded.hidden[place])
        torch.testing.assert_close(found[one], expected)
    none = encoder.nucleotide_logits(encoded, TOKENS, torch.empty(0, dtype=torch.int64))
    assert none.shape == (0, 4)


@pytest.mark.parametrize("kind", ["transformer", "wide"])
def test_a_sequence_does_not_depend_on_the_others_and_there_may_be_none(kind):
    encoder = make(encoder=kind).eval()
    if kind == "transformer":
        randomise(encoder)
    together = encoder(TOKENS).vectors
    for row in range(len(TOKENS)):
        alone = encoder(Ragged.from_list([TOKENS[row]])).vectors
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)
    empty = Ragged(TOKENS.values[:0], TOKENS.offsets[:1], 0)
    assert encoder(empty).vectors.shape == (0, 32)


def test_a_clade_head_begins_at_the_shares_and_answers_for_some_clades():
    torch.manual_seed(0)
    head = CladeHead(32, 3)
    head.begin_at(torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64))
    assert head.bias[:2].tolist() == pytest.approx([math.log(1 / 3), 0.0])
    assert torch.isfinite(head.bias).all()
    vectors = torch.randn(5, 32)
    expected = vectors @ head.weight.T + head.bias
    torch.testing.assert_close(head(vectors), expected)
    torch.testing.assert_close(head(vectors, torch.tensor([2, 0])), expected[:, [2, 0]])


SLOTS = Ragged(torch.tensor([0, 3, 1, 4, 2, 0]), torch.tensor([0, 2, 5, 6], dtype=torch.int32), 3)
COUNTS = torch.tensor([1.0, 5.0, 2.0, 2.0, 4.0, 9.0])


def free_clades(abundance, exponent=0.0):
    torch.manual_seed(0)
    pairs = FreeClades(8, 6, abundance=abundance)
    pairs.unit.fill_(3.0)
    with torch.no_grad():
        pairs.norm.weight.normal_()
        pairs.log_scale.fill_(-0.3)
        pairs.exponent.fill_(exponent)
    return pairs


@pytest.mark.parametrize("abundance", [False, True])
def test_free_clades_compute_their_formulas(abundance):
    pairs, vectors = free_clades(abundance, 0.7), torch.randn(5, 8)
    found = pairs.profiles(vectors, SLOTS, COUNTS).detach()
    rows = []
    for low, high in [(0, 2), (2, 5), (5, 6)]:
        own, counts = vectors[SLOTS.values[low:high]], COUNTS[low:high]
        power = (counts / counts.sum()) ** 0.7 if abundance else torch.ones(high - low)
        mean = (power[:, None] * pairs.mean(own)).sum(0) / power.sum()
        rows.append(torch.cat([pairs.strongest(own).max(0).values, mean]))
    torch.testing.assert_close(found, pairs.norm(torch.stack(rows)).detach())
    z = found.double().numpy()
    distances = pairs.distances(found[:2], found).detach()
    for i in range(2):
        for j in range(3):
            shared, own, other = (float(z[a] @ z[b]) for a, b in ((i, j), (i, i), (j, j)))
            expected = 3.0 * math.exp(-0.3) * (1 - shared / (own + other - shared))
            assert distances[i, j].item() == pytest.approx(expected, abs=1e-5)
    assert pairs.exponent.requires_grad == abundance


def test_distances_are_symmetric_zero_to_oneself_and_blind_to_order():
    pairs, vectors = free_clades(True, 0.5), torch.randn(5, 8)
    profiles = pairs.profiles(vectors, SLOTS, COUNTS).detach()
    everything = torch.cat([profiles, torch.eye(12)[:2]])  # the last two share nothing
    found = pairs.distances(everything, everything).detach()
    torch.testing.assert_close(found, found.T)
    assert found.diagonal().abs().max() < 1e-5 and found.min() > -1e-5
    assert found[3, 4].item() == pytest.approx(3.0 * math.exp(-0.3))
    order = torch.tensor([1, 0, 4, 2, 3, 5])  # within samples
    other = SLOTS.with_values(SLOTS.values[order])
    torch.testing.assert_close(pairs.profiles(vectors, other, COUNTS[order]), profiles)


@pytest.mark.parametrize(
    ("abundance", "exponent", "same"), [(False, 0.5, True), (True, 0.5, False), (True, 0, True)]
)
def test_free_clades_see_counts_only_where_they_may(abundance, exponent, same):
    pairs, vectors = free_clades(abundance, exponent), torch.randn(5, 8)
    one, two = (pairs.profiles(vectors, SLOTS, counts) for counts in (COUNTS, COUNTS.flip(0)))
    assert torch.allclose(one, two, atol=1e-6) == same


def test_gradients_of_free_clades_are_finite_even_between_equal_samples():
    pairs = free_clades(True, 0.5)
    vectors = torch.randn(5, 8, requires_grad=True)
    slots = Ragged(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2, 3], dtype=torch.int32), 1)
    profiles = pairs.profiles(vectors, slots, torch.ones(3))
    pairs.distances(profiles, profiles).square().sum().backward()
    assert torch.isfinite(vectors.grad).all() and vectors.grad[:2].abs().max() > 0
    for name, one in pairs.named_parameters():
        assert torch.isfinite(one.grad).all(), name
