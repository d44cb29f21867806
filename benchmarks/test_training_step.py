"""A whole training step: the trainer's own against the padded baseline, time and peak memory."""

import math

import numpy as np
import pytest
import torch

from aam.model import CommunityEncoder
from aam.model.encoder import EncoderShape
from benchmarks import peak_memory
from benchmarks.baselines.padded_transformer import PaddedTransformer, pad_batch
from benchmarks.steps import Problem, padded_step, problem, trainer_step

pytestmark = pytest.mark.real
PADDED = "padded nn.TransformerEncoder"


def baseline_weights(encoder: CommunityEncoder) -> dict[str, torch.Tensor]:
    """Our weights under the baseline's names."""
    renamed = {
        "asv_encoder.token_embedding": "token_embedding",
        "asv_encoder.position_embedding": "position_embedding",
        "asv_encoder.stack": "stacks.nucleotide",
        "asv_encoder.pool.norm": "asv_pool.norm",
        "asv_encoder.pool.query": "asv_pool.score.weight",
        "asv_encoder.nucleotide_head": "nucleotide_head",
        "sample_encoder.position_embedding": "slot_embedding",
        "sample_encoder.stack": "stacks.sample",
        "unifrac_encoder.stack": "stacks.unifrac",
        "unifrac_encoder.pool.norm": "sample_pool.norm",
        "unifrac_encoder.pool.query": "sample_pool.score.weight",
    }
    weights = {}
    for name, value in encoder.state_dict().items():
        for ours, theirs in renamed.items():
            if name == ours or name.startswith(ours + "."):
                weights[theirs + name[len(ours) :]] = (
                    value[None] if ours.endswith("query") else value
                )
    return weights


def test_both_are_the_same_model(real_data):
    """With the reference's form and our weights the baseline gives our sample embeddings."""
    torch.manual_seed(7)
    data = Problem(str(real_data / "ibd"), 16, batch_size=3)
    shape = EncoderShape(
        num_layers=2, sample_position="slot", sample_embedding="attention",
        nucleotide_embedding="sum", distance_scale=10.0, token_limit=16,
    )  # fmt: skip
    ours = CommunityEncoder(shape).eval()
    padded = PaddedTransformer(layers=2, token_limit=16).eval()
    padded.load_state_dict(baseline_weights(ours))
    batch = data.dataset.batch(data.batches[0])
    fixed = pad_batch(
        batch.tokens.values, batch.tokens.offsets, batch.slots.values, batch.slots.offsets, 16
    )
    with torch.no_grad():
        vectors = ours.encode_asvs(batch.tokens)
        got = ours.embed(vectors, batch.slots, batch.counts)
        want, _ = padded(fixed.tokens, fixed.present)
    assert float((got - want).abs().max()) < 1e-4


def peak_memories(arguments, *, full, checkpointing=True):
    """Both contestants, each in a process of its own.

    The quick run gives the baseline one step only, which leaves out its optimizer state (20 MB).
    """
    ours = peak_memory.growth("benchmarks.steps:trainer_step", recompute=checkpointing, **arguments)
    theirs = peak_memory.growth(
        "benchmarks.steps:padded_step",
        repeats=2 if full else 1, checkpointed=checkpointing, **arguments,
    )  # fmt: skip
    return {
        "peak memory, aam": str(ours),
        f"peak memory, {PADDED}": str(theirs),
        "memory, aam over padded": f"{ours.growth / theirs.growth:.3f}",
    }


def check_losses(results):
    """Untrained: distances of any size, nucleotides near ln 7 (not yet below a third of it)."""
    for losses in results.values():
        assert 0 <= losses["unifrac_loss"] <= 1
        assert math.log(7) / 3 < losses["nucleotide_loss"] < 3 * math.log(7)


@pytest.mark.parametrize("data", ["ibd", "oral"])
def test_step_and_memory_with_checkpointing(compare, timing, full, real_data, data):
    folder, limit = str(real_data / data), 256 if timing else 8
    notes = problem(folder, limit).describe()
    if timing:
        arguments = {"folder": folder, "token_limit": limit}
        notes |= peak_memories(arguments, full=full)
    results, _ = compare(
        f"training step, {data}, batch 8, token limit {limit}, checkpointing",
        {"aam": trainer_step(folder, limit), PADDED: padded_step(folder, limit)},
        reference=PADDED,
        rounds=5 if full else 2,
        notes=notes,
    )
    check_losses(results)


def test_step_without_checkpointing(compare, timing, full, real_data):
    """At 256 slots the baseline would keep about 20 GB: measured at 64, where nothing is padded."""
    folder, limit = str(real_data / "ibd"), 64 if timing else 8
    notes = problem(folder, limit).describe()
    if timing:
        arguments = {"folder": folder, "token_limit": limit}
        notes |= peak_memories(arguments, full=full, checkpointing=False)
    results, _ = compare(
        f"training step, ibd, batch 8, token limit {limit}, no checkpointing",
        {
            "aam": trainer_step(folder, limit, recompute=False),
            PADDED: padded_step(folder, limit, checkpointed=False),
            f"{PADDED}, no dropout": padded_step(folder, limit, checkpointed=False, dropout=0.0),
        },
        reference=PADDED,
        rounds=5 if full else 3,
        notes=notes,
    )
    check_losses(results)


def test_the_batches_are_those_of_an_epoch(real_data):
    data = problem(str(real_data / "oral"), 8)
    rows = np.concatenate(data.batches)
    assert len(rows) == 32 and len(set(rows.tolist())) == 32
