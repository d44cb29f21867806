"""Whole training steps and inference against the padded baselines: time and memory."""

import math

import numpy as np
import pytest

from benchmarks.comparison import Goal
from benchmarks.conftest import MALLOC
from benchmarks.steps import distances, problem

pytestmark = [pytest.mark.real, pytest.mark.steps]
PADDED, KEPT = "padded, checkpointing, dropout 0.1", "padded, kept, dropout 0"
OURS = {
    "aam": ("pair_step", {}),
    "aam, kept": ("pair_step", {"recompute": False}),
}
THEIRS = {
    PADDED: ("padded_step", {}),
    KEPT: ("padded_step", {"checkpointed": False, "dropout": 0.0}),
}
WIDE = "aam, the wide path alone"
CLADES = {
    "aam": ("clade_step", {}),
    WIDE: ("clade_step", {"stack": False}),
    PADDED: ("clade_step", {"padded": True}),
    KEPT: ("clade_step", {"padded": True, "recompute": False, "dropout": 0.0}),
}


def check_losses(results, taught="unifrac_loss"):
    """Untrained: distances or clades of any size, nucleotides near ln 4."""
    for losses in results.values():
        assert 0 < losses[taught] < 20
        assert math.log(4) / 3 < losses["nucleotide_loss"] < 3 * math.log(4)


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
def test_step(measure, data):
    goals = [
        Goal("aam", 10.0),
        Goal("aam", 4.0, over=KEPT),
        Goal("aam", 8.0, of="memory"),
    ]
    check_losses(measure("training step, batch 8", data, OURS | THEIRS, goals=goals))


def test_step_on_one_thread(measure, timing):
    if not timing:
        pytest.skip("the same code as with more threads")
    one = {name: {"OMP_NUM_THREADS": "1"} for name in OURS | THEIRS}
    goals = [Goal("aam", 10.0), Goal("aam", 4.0, over=KEPT)]
    title = "training step on one thread, batch 8"
    check_losses(measure(title, "ibd", OURS | THEIRS, environment=one, goals=goals))


def test_step_of_32_samples(measure, small):
    """The baseline takes its 32 as four batches of 8: at once they would need 19 GB."""
    size = 8 if small else 32
    contestants = {
        "aam": ("pair_step", {"batch_size": size}),
        PADDED: ("padded_step", {"batch_size": size, "parts": 4}),
    }
    check_losses(measure("training step, batch 32", "ibd", contestants, goals=[Goal("aam", 20.0)]))


def test_step_of_clades(compare, own_process, small, full, real_data):
    """ASVs of a tree: nothing is shared, and next to nothing padded; the stack is what differs."""
    options = {"folder": str(real_data / "ibd"), "asvs": 8 if small else None}
    contestants = {
        name: own_process(f"benchmarks.steps:{function}", **options, **arguments)
        for name, (function, arguments) in CLADES.items()
    }
    results, _ = compare(
        "training step of clades, ibd", contestants, reference=[PADDED, KEPT],
        rounds=5 if full else 3, goals=[Goal("aam", 1.0)],
    )  # fmt: skip
    check_losses(results, "clade_loss")


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
    """Distances between four batches of 8; ours encodes each of their ASVs once."""
    contestants = {"aam": ("distances", {}), PADDED: ("padded_distances", {})}
    results = measure("inference, 32 samples", "ibd", contestants, goals=[Goal("aam", 10.0)])
    assert results["aam"]["samples"] == results[PADDED]["samples"]


def test_threads(compare, own_process, small, real_data):
    """Our step with one and two threads: the same losses in less time."""
    arguments = {"folder": str(real_data / "ibd"), "token_limit": 8 if small else 256}
    contestants = {
        name: own_process(
            "benchmarks.steps:pair_step", environment={"OMP_NUM_THREADS": threads}, **arguments
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
    step = distances(str(real_data / "ibd"), 8)
    assert [step()["samples"] for _ in range(3)] == [2, 32, 32]
    assert len(data.batches) == 4
