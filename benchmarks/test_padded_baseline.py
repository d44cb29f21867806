"""The baseline must be a right model: a comparison with a broken one would mean nothing."""

import torch

from benchmarks.baselines import padded_transformer
from benchmarks.baselines.padded_transformer import (
    LAST_BASE,
    PaddedTransformer,
    mask_nucleotides,
    pad_batch,
    predicted_distances,
    training_step,
)

TOKENS = torch.tensor([5, 1, 2, 3, 5, 4, 4, 5, 1, 1])
TOKEN_OFFSETS = torch.tensor([0, 4, 7, 10])
SLOTS, SLOT_OFFSETS = torch.tensor([0, 2, 1, 2, 0]), torch.tensor([0, 2, 3, 5])


def small(**options) -> PaddedTransformer:
    torch.manual_seed(3)
    return PaddedTransformer(dim=16, heads=2, layers=2, max_bp=8, token_limit=6, **options)


def batch(limit: int):
    return pad_batch(TOKENS, TOKEN_OFFSETS, SLOTS, SLOT_OFFSETS, limit)


def test_padding_spreads_each_asv_over_its_slots():
    padded = batch(3)
    assert padded.tokens.tolist() == [
        [[5, 1, 2, 3], [5, 1, 1, 0], [0, 0, 0, 0]],
        [[5, 4, 4, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[5, 1, 1, 0], [5, 1, 2, 3], [0, 0, 0, 0]],
    ]
    assert abs(padded.real_share - 17 / 36) < 1e-6


def test_padding_changes_no_embedding():
    model = small().eval()
    with torch.no_grad():
        few, _ = model(batch(3).tokens, batch(3).present)
        many, _ = model(batch(6).tokens, batch(6).present)
    torch.testing.assert_close(few, many, rtol=1e-5, atol=1e-6)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointed in [(), ("nucleotide", "sample", "unifrac")]:
        model = small(checkpointed=checkpointed, dropout=0.3)
        torch.manual_seed(4)
        model(batch(3).tokens, batch(3).present)[0].square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed)


def test_only_bases_are_masked():
    torch.manual_seed(5)
    tokens = batch(3).tokens
    masked, chosen = mask_nucleotides(tokens, 0.5)
    assert chosen.any() and ((tokens[chosen] >= 1) & (tokens[chosen] <= 4)).all()
    assert (masked[chosen] == 6).all() and (masked[~chosen] == tokens[~chosen]).all()


def test_steps_reduce_the_loss():
    model = small(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    distances = torch.tensor([[0.0, 0.9, 0.1], [0.9, 0.0, 0.8], [0.1, 0.8, 0.0]])
    torch.manual_seed(6)
    losses = [training_step(model, optimizer, [(batch(3), distances)]) for _ in range(40)]
    assert losses[-1]["unifrac_loss"] < 0.1 * losses[0]["unifrac_loss"]
    with torch.no_grad():
        model.eval()
        order = predicted_distances(model(batch(3).tokens, batch(3).present)[0])
    assert order[0, 2] < order[1, 2] and order[0, 2] < order[0, 1]


def test_a_batch_in_parts_gives_the_average(monkeypatch):
    """The same batch twice weighs as much as once, before gradients are clipped."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    monkeypatch.setattr(
        padded_transformer, "mask_nucleotides", lambda tokens: (tokens, tokens == LAST_BASE)
    )
    found = []
    for parts in (1, 2):
        model = small(dropout=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = training_step(model, optimizer, [(batch(3), torch.full((3, 3), 0.5))] * parts)
        found.append((torch.tensor([*losses.values()]), model.stacks["unifrac"].norm.weight.data))
    assert not torch.equal(found[0][1], torch.ones(16))
    torch.testing.assert_close(*found)
