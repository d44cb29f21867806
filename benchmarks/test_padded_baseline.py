"""The baseline must be a right model: a comparison with a broken one would mean nothing."""

import dataclasses

import torch

from aam.commands.pretrain import FREE_CLADES
from aam.learning.masking import NoisyAsvs
from aam.learning.objective import Work
from aam.model import AsvEncoder, EncoderShape, PretrainedModel
from aam_kernels import Ragged
from benchmarks.baselines import padded_transformer
from benchmarks.baselines.padded_transformer import (
    LAST_BASE,
    PAD,
    PaddedEncoder,
    losses,
    mask_nucleotides,
    pad_batch,
    padded_profiles,
    training_step,
)
from benchmarks.steps import Problem, forward, pair_objective

SHAPE = EncoderShape(embedding_dim=16, wide_dim=24, num_heads=2, num_layers=2, max_bp=8)
TOKENS = Ragged(
    torch.tensor([5, 1, 2, 3, 5, 4, 4, 5, 1, 1], dtype=torch.uint8),
    torch.tensor([0, 4, 7, 10], dtype=torch.int32), 4,
)  # fmt: skip
SLOTS = Ragged(torch.tensor([0, 2, 1, 2, 0]), torch.tensor([0, 2, 3, 5], dtype=torch.int32), 2)


def small(dropout=0.0, **options) -> PretrainedModel:
    torch.manual_seed(3)
    shape = EncoderShape(**{**vars(SHAPE), "dropout": dropout})
    model = PretrainedModel(PaddedEncoder(shape, **options), free_clades=32)
    torch.nn.init.normal_(model.encoder.gate)
    return model


def batch(limit: int):
    return pad_batch(TOKENS, SLOTS, limit)


def profiles(model: PretrainedModel, padded):
    vectors, _ = model.encoder.encode(padded.tokens.flatten(0, 1))
    return padded_profiles(model.pairs, vectors, padded.present)


def test_padding_spreads_each_asv_over_its_slots():
    padded = batch(3)
    assert padded.tokens.tolist() == [
        [[5, 1, 2, 3], [5, 1, 1, 0], [0, 0, 0, 0]],
        [[5, 4, 4, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[5, 1, 1, 0], [5, 1, 2, 3], [0, 0, 0, 0]],
    ]
    assert abs(padded.real_share - 17 / 36) < 1e-6


def test_padding_changes_no_presence():
    model = small().eval()
    torch.testing.assert_close(profiles(model, batch(3)), profiles(model, batch(6)))


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointed in (False, True):
        model = small(checkpointed=checkpointed, dropout=0.3)
        torch.manual_seed(4)
        profiles(model, batch(3)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed)


def test_only_bases_of_a_share_of_the_sequences_are_masked():
    torch.manual_seed(5)
    tokens = batch(3).tokens
    masked, chosen = mask_nucleotides(tokens, 0.5, 1.0)
    assert chosen.any() and ((tokens[chosen] >= 1) & (tokens[chosen] <= 4)).all()
    assert (masked[chosen] == 6).all() and (masked[~chosen] == tokens[~chosen]).all()
    rows = mask_nucleotides(torch.ones(400, 30, dtype=torch.long), 0.5, 0.25)[1].any(-1)
    assert 70 < int(rows.sum()) < 130


def test_steps_reduce_the_loss(monkeypatch):
    monkeypatch.setattr(padded_transformer, "mask_nucleotides", lambda t: (t, t == LAST_BASE))
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    true = torch.tensor([[0.0, 0.3, 0.0], [0.3, 0.0, 0.3], [0.0, 0.3, 0.0]])
    found = [training_step(model, optimizer, [(batch(3), true)]) for _ in range(60)]
    assert found[-1]["unifrac_loss"] < 0.1 * found[0]["unifrac_loss"]
    assert found[-1]["nucleotide_loss"] < 0.1 * found[0]["nucleotide_loss"]


def test_a_batch_in_parts_gives_the_average(monkeypatch):
    """The same batch twice weighs as much as once, before gradients are clipped."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    monkeypatch.setattr(padded_transformer, "mask_nucleotides", lambda t: (t, t == LAST_BASE))
    found = []
    for parts in (1, 2):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        terms = training_step(model, optimizer, [(batch(3), torch.full((3, 3), 0.5))] * parts)
        found.append((torch.tensor([*terms.values()]), model.encoder.stack.norm.weight.data))
    assert not torch.equal(found[0][1], torch.ones(16))
    torch.testing.assert_close(*found)


def test_sequences_of_any_length_are_encoded_as_ours_are():
    torch.manual_seed(8)
    ours, padded = AsvEncoder(SHAPE).eval(), small().encoder.eval()
    torch.nn.init.normal_(ours.gate)
    padded.load_state_dict(ours.state_dict())
    got, want = padded(TOKENS), ours(TOKENS)
    torch.testing.assert_close(got.vectors, want.vectors)
    torch.testing.assert_close(got.hidden, want.hidden)


def test_both_are_the_same_model(real_data):
    """With our weights the baseline gives our losses and gradients."""
    torch.manual_seed(7)
    data = Problem(str(real_data / "ibd"), 16, batch_size=3)
    ours = pair_objective(AsvEncoder(EncoderShape(num_layers=2, dropout=0.0)), data.distances)
    for weight in (ours.encoder.gate, ours.encoder.site_head):
        torch.nn.init.normal_(weight, std=0.1)
    padded = PretrainedModel(PaddedEncoder(ours.encoder.shape), free_clades=FREE_CLADES)
    padded.encoder.load_state_dict(ours.encoder.state_dict())
    padded.pairs.load_state_dict(ours.pairs.state_dict())
    rows = data.batches[0]
    batch, fixed = data.dataset.batch(rows), data.padded(rows)
    asvs = batch.asv_ids[batch.slots.values]
    batch = dataclasses.replace(
        batch, tokens=data.dataset.gather_tokens(asvs.numpy()), asv_ids=asvs,
        slots=batch.slots.with_values(torch.arange(len(asvs))),
    )  # fmt: skip
    true = torch.from_numpy(data.distances.pairwise(rows)).float()

    # Nothing is shared: our rows and their filled slots are the same sequences in one order.
    masked, chosen = mask_nucleotides(fixed.tokens)
    real, values = fixed.tokens != PAD, batch.tokens.values
    noisy = NoisyAsvs(
        batch.tokens.with_values(masked[real].to(values.dtype)),
        chosen[real].nonzero()[:, 0],
        fixed.tokens[chosen],
    )
    want = forward(ours, Work(batch, noisy))
    got = {
        "unifrac_loss": losses(padded, fixed, fixed.tokens, chosen, true)["unifrac_loss"],
        "nucleotide_loss": losses(padded, fixed, masked, chosen, true)["nucleotide_loss"],
    }
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-6)
    sum(got.values()).backward()
    want["loss"].backward()
    theirs = dict(padded.named_parameters())
    for name, weight in ours.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(theirs[name].grad, weight.grad, rtol=1e-3, atol=1e-5)
