"""Whole training steps and inference against the padded baselines: time and memory."""

import math

import numpy as np
import pytest
import torch

from aam.model import CommunityEncoder
from aam.model.encoder import EncoderShape
from benchmarks.baselines.padded_transformer import PaddedTransformer
from benchmarks.comparison import Goal
from benchmarks.conftest import MALLOC
from benchmarks.steps import Problem, embeddings, problem

pytestmark = [pytest.mark.real, pytest.mark.steps]
PADDED, KEPT = "padded, checkpointing, dropout 0.1", "padded, kept, dropout 0"
OURS = {
    "aam": ("trainer_step", {}),
    "aam, ASVs not shared": ("trainer_step", {"share_asvs": False}),
    "aam, kept": ("trainer_step", {"recompute": False}),
}
THEIRS = {
    PADDED: ("padded_step", {}),
    KEPT: ("padded_step", {"checkpointed": False, "dropout": 0.0}),
}
MORE = {  # the other two of four; the first keeps some 16 GB
    "padded, kept, dropout 0.1": ("padded_step", {"checkpointed": False}),
    "padded, checkpointing, dropout 0": ("padded_step", {"dropout": 0.0}),
}


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
    batch, fixed = data.dataset.batch(data.batches[0]), data.padded(data.batches[0])
    with torch.no_grad():
        vectors = ours.encode_asvs(batch.tokens)
        got = ours.embed(vectors, batch.slots, batch.counts)
        want, _ = padded(fixed.tokens, fixed.present)
    assert float((got - want).abs().max()) < 1e-4


def check_losses(results):
    """Untrained: distances of any size, nucleotides near ln 7 (not yet below a third of it)."""
    for losses in results.values():
        assert 0 <= losses["unifrac_loss"] <= 1
        assert math.log(7) / 3 < losses["nucleotide_loss"] < 3 * math.log(7)


@pytest.fixture
def measure(compare, small, full, own_process, real_data):
    """Compare contestants, `NAME: (function of benchmarks.steps, arguments)`, in own processes."""

    def run(title, data, contestants, *, environment=None, **options):
        folder, limit = str(real_data / data), 8 if small else 256
        started = {
            name: own_process(
                f"benchmarks.steps:{function}", environment=(environment or {}).get(name),
                folder=folder, token_limit=limit, **arguments,
            )
            for name, (function, arguments) in contestants.items()
        }  # fmt: skip
        size = contestants["aam"][1].get("batch_size", 8)
        results, _ = compare(
            f"{title}, {data}, token limit {limit}", started, rounds=5 if full else 2,
            notes=problem(folder, limit, size).describe(), **{"reference": PADDED, **options},
        )  # fmt: skip
        return results

    return run


@pytest.mark.parametrize("data", ["ibd", "oral"])
def test_step(measure, full, data):
    goals = [
        Goal("aam", 10.0),
        Goal("aam", 4.0, over=KEPT),
        Goal("aam, ASVs not shared", 4.0),
        Goal("aam", 8.0, of="memory"),
    ]
    contestants = OURS | THEIRS | (MORE if full else {})
    check_losses(measure("training step, batch 8", data, contestants, goals=goals))


@pytest.mark.parametrize("data", ["ibd", "oral"])
def test_step_on_one_thread(measure, timing, full, data):
    if not timing or (data == "oral" and not full):
        pytest.skip("minutes, and the same code as with more threads")
    contestants = OURS | THEIRS
    one = {name: {"OMP_NUM_THREADS": "1"} for name in contestants}
    goals = [Goal("aam", 10.0), Goal("aam", 4.0, over=KEPT), Goal("aam, ASVs not shared", 4.0)]
    check_losses(
        measure(
            "training step on one thread, batch 8", data, contestants, environment=one, goals=goals
        )
    )


def test_step_of_32_samples(measure, small):
    """The baseline takes its 32 as four batches of 8: at once they would need 19 GB."""
    size = 8 if small else 32
    contestants = {
        "aam": ("trainer_step", {"batch_size": size}),
        PADDED: ("padded_step", {"batch_size": size, "parts": 4}),
    }
    check_losses(measure("training step, batch 32", "ibd", contestants, goals=[Goal("aam", 20.0)]))


@pytest.mark.parametrize("against", [PADDED, KEPT], ids=["checkpointing", "kept"])
def test_what_the_allocator_does(measure, timing, against):
    """Both sides with glibc's malloc as it is, and told never to give memory back."""
    if not timing:
        pytest.skip("the numbers are those of test_step")
    contestants = {"aam": OURS["aam"], against: THEIRS[against]}
    tuned = {f"{name}, malloc tuned": call for name, call in contestants.items()}
    goal = 10.0 if against == PADDED else 4.0
    measure(
        f"allocator, {against}", "ibd", contestants | tuned, reference=against,
        environment={name: MALLOC for name in tuned},
        goals=[
            Goal("aam", goal),
            Goal("aam, malloc tuned", goal, over=f"{against}, malloc tuned"),
        ],
    )  # fmt: skip


def test_inference(measure):
    """Sample embeddings of four batches of 8; ours encodes each of their ASVs once."""
    contestants = {"aam": ("embeddings", {}), PADDED: ("padded_embeddings", {})}
    results = measure("inference, 32 samples", "ibd", contestants, goals=[Goal("aam", 10.0)])
    assert results["aam"]["samples"] == results[PADDED]["samples"]


def test_threads(compare, own_process, small, real_data):
    """Our step with one and two threads: the same losses in less time."""
    arguments = {"folder": str(real_data / "ibd"), "token_limit": 8 if small else 256}
    contestants = {
        name: own_process(
            "benchmarks.steps:trainer_step", environment={"OMP_NUM_THREADS": threads}, **arguments
        )
        for name, threads in (("1 thread", "1"), ("2 threads", "2"))
    }
    results, _ = compare(
        "training step on 1 and 2 threads, batch 8, ibd", contestants, reference="1 thread",
        rounds=8, goals=[Goal("2 threads", 1.9)],
    )  # fmt: skip
    check_losses(results)


def test_the_batches_are_those_of_an_epoch(real_data):
    data = problem(str(real_data / "oral"), 8)
    rows = np.concatenate(data.batches)
    assert len(rows) == 32 and len(set(rows.tolist())) == 32


def test_the_first_call_is_short_and_then_steps_go_round(real_data):
    data = problem(str(real_data / "ibd"), 8)
    step = embeddings(str(real_data / "ibd"), 8)
    assert [step()["samples"] for _ in range(3)] == [2, 32, 32]
    assert len(data.batches) == 4
