"""The harness itself: ratios within rounds, goals, workers, counts of operations."""

import os
import time

import pytest

from benchmarks import machine
from benchmarks.comparison import (
    Comparison,
    Figure,
    Goal,
    Rounds,
    Timing,
    Work,
    format_comparison,
    format_goals,
)
from benchmarks.kernels import attention_work, layer_work
from benchmarks.machine import PEAK
from benchmarks.worker import Memory, Worker


def comparison(goals=()):
    timings = {
        "ours": Timing([1.0, 2.0, 1.0], [1.0, 1.0, 1.0]),
        "theirs": Timing([3.0, 4.0, 9.0], [2.0, 2.0, 2.0]),
        PEAK: Timing([0.5, 1.0, 0.5], [0.5, 0.5, 0.5]),
    }
    work = {"ours": Work(8.0, 1.0, model=6.0), PEAK: Work(8.0)}
    memory = {"ours": Memory(10.0, 30.0), "theirs": Memory(10.0, 170.0)}
    return Comparison("case", "theirs", timings, work, memory, goals=list(goals))


def test_ratios_are_medians_of_rounds():
    found = comparison()
    assert found.ratio("ours") == 3.0  # of 3, 2 and 9
    assert found.ratio("ours", clock="processor") == 2.0
    assert found.ratio("ours", PEAK, of="operations") == 0.5
    assert found.ratio("ours", of="memory") == 8.0
    assert found.ratio("theirs", PEAK, of="operations") is None  # no operations are known
    assert found.ratio("ours", "nobody") is None
    row = found.rows()[0]
    assert row["share_of_fma_peak_by_model_operations"] == 0.5 * 6 / 8


def test_goals_say_whether_they_are_reached():
    goals = [Goal("ours", 3.0), Goal("ours", 0.6, over=PEAK, of="operations"), Goal("nobody", 1.0)]
    found = comparison(goals)
    assert [row["reached"] for row in found.verdicts()] == [True, False]
    lines = format_goals([found]).splitlines()
    assert lines[-2].endswith("reached") and lines[-1].endswith("MISSED")
    assert "theirs" in lines[-2] and "50.0 %" in lines[-1]
    table = format_comparison(found)
    assert "reference" in table and "160" in table and "3 x forward" in table


def test_figures_say_what_was_asked_of_them():
    told, low, high = Figure("a", 2.0), Figure("b", 0.5, at_least=0.8), Figure("c", 2, at_most=2)
    assert [one.reached for one in (told, low, high)] == [None, False, True]
    found = comparison()
    found.figures += [told, low, high]
    lines = format_comparison(found).splitlines()
    assert lines[-3:] == [
        "  a: 2",
        "  b: 0.5  (at least 0.8: MISSED)",
        "  c: 2  (at most 2: reached)",
    ]
    assert [one["reached"] for one in found.to_dict()["figures"]] == [None, False, True]


def test_what_does_not_fit_into_memory_leaves_the_rounds():
    def too_large():
        raise MemoryError("16 GB")

    rounds = Rounds({"a": lambda: 1, "b": too_large})
    rounds.warm_up()
    rounds()
    assert rounds.results == {"a": 1} and rounds.refused == {"b": "n/a: 16 GB"}
    assert len(rounds.timings["a"].wall) == 1 and "b" not in rounds.timings


def busy(megabytes, seconds):
    """Work for a worker; preparing it takes more memory, which is none of the work's."""
    bytearray(2_000_000 * megabytes)

    def work():
        held = bytearray(megabytes * 1_000_000)
        start = time.process_time()
        while time.process_time() - start < seconds:
            held[0] += 1 if held[0] < 255 else -255
        return {"held": float(len(held)), "told": float(os.environ.get("AAM_TOLD", 0))}

    return work


def test_a_worker_has_its_own_clock_memory_and_environment():
    worker = Worker(
        "benchmarks.test_harness:busy", environment={"AAM_TOLD": "3"}, megabytes=50,
        seconds=0.05,
    )  # fmt: skip
    try:
        rounds = Rounds({"worker": worker})
        rounds()
        assert worker() == {"held": 50e6, "told": 3.0}
        assert 45 < worker.memory.growth < 80
        assert 0.05 <= worker.processor < 1 and worker.faults > 10
        assert rounds.timings["worker"].processor[0] >= 0.05
    finally:
        worker.close()


def resetting():
    """Work that begins the high-water mark again, and knows what it was."""
    return lambda: {"peak_megabytes": 1e6}


def test_a_worker_may_say_its_own_peak():
    worker = Worker("benchmarks.test_harness:resetting")
    try:
        worker()
        assert worker.memory.peak == 1e6
    finally:
        worker.close()


def test_a_worker_that_fails_says_why():
    worker = Worker("benchmarks.test_harness:nothing")
    try:
        with pytest.raises(RuntimeError, match="no attribute 'nothing'"):
            worker()
    finally:
        worker.close()


def test_operations_of_a_layer():
    """One row of 2 tokens: 12 D^2 products a token with F = 4 D, and scores and sums of 2 x 2."""
    linear, attention = 2 * 2 * 12 * 128**2, 2 * 2 * 2 * 2 * 128
    forward = layer_work([2], backward=False)
    assert forward.operations == forward.model == linear + attention
    kept = layer_work([2], backward=True)
    assert kept.model == 3 * (linear + attention)
    assert kept.operations == 3 * linear + 3.5 * attention
    again = layer_work([2], backward=True, recompute=True).operations - kept.operations
    assert again == linear + attention - 2 * 2 * 128 * 512
    assert attention_work([2], 128, backward=True).operations == 3.5 * attention


def test_the_machine_tells_what_it_is():
    facts = machine.facts()
    assert facts["cores"] >= 1 and facts["processor"] and facts["commit"]
    if machine.native() is None:
        with pytest.raises(RuntimeError, match="not built"):
            machine.multiply_adds()
    else:
        assert machine.multiply_adds(1)()["operations"] > 1e8
