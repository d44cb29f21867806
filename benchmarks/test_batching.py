"""Memory that is predicted and filled, steps in micro-batches, over ranks: measured."""

import statistics

import numpy as np
import pytest
import torch

from aam.data.table import read_table
from aam.learning.meter import Meter
from benchmarks.batching import GB, read, simulated
from benchmarks.comparison import Figure, Goal
from benchmarks.steps import TABLES

pytestmark = [pytest.mark.real, pytest.mark.batching]
FILLED, FIXED, HALVED = "filled", "largest fixed size", "halving from 1,024"
LARGE = "4 times the fixed size, in micro-batches"
# Budget in GB, samples of an epoch (three to five filled steps), and how the model is trained:
# without recomputation a sample takes many times the memory.
KEPT = {"recompute": False}
BUDGETS: dict[str, tuple[float, int, dict[str, bool]]] = {
    "1 GB": (1.0, 256, {}),
    "2 GB": (2.0, 1600, {}),
    "4 GB, activations kept": (4.0, 512, KEPT),
}
PREDICTED = {  # budget, recomputing or not, steps
    "1 GB": (1.0, True, 4),
    "2 GB": (2.0, True, 3),
    "4 GB, activations kept": (4.0, False, 3),
}
PIECES = 1, 2, 4, 8
FORWARD = "forward only"
ONE, TWO, OWN = "1 rank", "2 ranks", "2 ranks, each its own samples' ASVs"


def errors_of(*results):
    """Relative errors of all steps' predicted peaks."""
    predicted, peaks = (
        np.concatenate([one[key] for one in results]) for key in ("predicted", "peaks")
    )
    return np.abs(predicted - peaks) / peaks


def error_figures(*results):
    errors = errors_of(*results)
    return [
        Figure(f"steps in which a peak was predicted, of {len(results)} runs", len(errors)),
        Figure("median error of a predicted peak", float(np.median(errors))),
        Figure("95th percentile", float(np.quantile(errors, 0.95)), at_most=0.10),
    ]


def rate(result, comparison, name):
    return result["samples"] / statistics.median(comparison.timings[name].wall)


def memory_figures(name, result, budget, *, asked):
    used = np.array(result["peaks"]) / budget
    median = float(np.median(used))
    return [
        Figure(
            f"{name}: largest peak / budget", float(used.max()), at_most=1.03 if asked else None
        ),
        Figure(f"{name}: median peak / budget", median, at_least=0.8 if asked else None),
    ]


@pytest.fixture
def options(small, timing, real_data):
    """Arguments of a contestant: `options(budget, samples)`; small where nothing is timed."""

    def make(budget=0.0, samples=None, **more):
        found = {"folder": str(real_data), **more}
        if small:
            samples, found["token_limit"] = 24, 8
            budget = budget and (0.8 if timing else Meter(torch.device("cpu")).now() / GB + 1)
        return found | {"samples": samples} | ({"budget_gb": budget} if budget else {})

    return make


def second(results, contestants, timing):
    """What the contestants say of their epochs; untimed, `compare` has only prepared them."""
    return results if timing else {name: one() for name, one in contestants.items()}


@pytest.mark.parametrize("data", ["ibd", "oral", "simulated"])
def test_peaks_are_predicted(compare, own_process, options, timing, data):
    if not timing and data == "oral":
        pytest.skip("the same code")
    contestants = {
        name: own_process(
            "benchmarks.batching:filling", name=data, steps=steps, recompute=recompute,
            **options(budget),
        )
        for name, (budget, recompute, steps) in PREDICTED.items()
        if timing or budget == 1
    }  # fmt: skip
    results, _ = compare(
        f"predicted memory, {data}", contestants, reference="1 GB", rounds=1,
        figures=lambda found, _: error_figures(*(found[name] for name in contestants)),
    )  # fmt: skip
    for result in second(results, contestants, timing).values():
        assert errors_of(result).max() < 0.5


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets(compare, own_process, options, timing, small, full, tmp_path, name):
    if small and name != "1 GB":
        pytest.skip("small steps are the same at every budget")
    budget, samples, way = BUDGETS[name]
    arguments = options(budget, samples, name="mixed", **way)
    arguments["keep"] = str(tmp_path / "costs.json")
    budget = arguments["budget_gb"]
    started = {
        FILLED: ("filling", {}),
        FIXED: ("largest_fixed", {}),
        HALVED: ("halving", {}),
        LARGE: ("in_large_steps", {"times": 4}),
    }
    contestants = {
        one: own_process(f"benchmarks.batching:{function}", **arguments, **more)
        for one, (function, more) in started.items()
    }

    def figures(results, comparison):
        filled, halved = results[FILLED], results[HALVED]
        found = memory_figures(FILLED, filled, budget, asked=True) + error_figures(filled)
        found += memory_figures(FIXED, results[FIXED], budget, asked=False)
        found += memory_figures(LARGE, results[LARGE], budget, asked=True)
        found += [
            Figure(f"{one}: samples a second", rate(results[one], comparison, one))
            for one in contestants
        ]
        found += [
            Figure(f"{one}: samples a step", float(np.median(results[one]["sizes"])))
            for one in contestants
        ]
        lost = halved["lost_seconds"]
        seconds = statistics.median(comparison.timings[HALVED].wall) - lost
        return [
            *found,
            Figure(f"{HALVED}: seconds lost in steps that failed", lost),
            Figure(f"{HALVED}: samples a second without these", halved["samples"] / seconds),
        ]

    results, _ = compare(
        f"filling {name}, ibd and oral mixed, {arguments['samples']} samples", contestants,
        reference=FIXED, rounds=3 if full else 1,
        goals=[Goal(FILLED, 1.2), Goal(LARGE, 1.2)], figures=figures,
    )  # fmt: skip
    results = second(results, contestants, timing)
    assert {result["samples"] for result in results.values()} == {arguments["samples"]}
    assert all(sum(result["sizes"]) == result["samples"] for result in results.values())
    assert all(max(results[one]["peaks"]) < 1.2 * budget for one in (FILLED, LARGE))


def test_micro_batches(compare, own_process, options, timing, full):
    """What exact steps in micro-batches cost over one, in forward passes, and what they save."""
    arguments = options(samples=32, name="mixed")
    contestants = {
        f"{count} micro-batch{'es' * (count > 1)}" if count else FORWARD: own_process(
            "benchmarks.batching:in_micro_batches",
            environment={"OMP_NUM_THREADS": "1"},
            count=count,
            **arguments,
        )
        for count in (*PIECES, 0)
    }

    def figures(results, comparison):
        clocks = {one: timing.processor for one, timing in comparison.timings.items()}
        found = []
        for name in [*contestants][1:-1]:
            rounds = zip(clocks[name], clocks["1 micro-batch"], clocks[FORWARD], strict=True)
            extra = statistics.median((cut - whole) / once for cut, whole, once in rounds)
            found.append(
                Figure(f"{name}: CPU time over that of one, in forward passes", extra, at_most=1.5)
            )
        return found + [
            Figure(f"{name}: peak, GB", result["peaks"][0]) for name, result in results.items()
        ]

    results, _ = compare(
        f"a step of {arguments['samples']} samples in micro-batches, ibd and oral mixed, 1 thread",
        contestants,
        reference="1 micro-batch", rounds=5 if full else 3, figures=figures,
    )  # fmt: skip
    results = second(results, contestants, timing)
    losses = [result["loss"] for name, result in results.items() if name != FORWARD]
    assert losses == pytest.approx([results[FORWARD]["loss"]] * len(PIECES), rel=0.02)


@pytest.mark.parametrize(
    ("data", "batch", "samples"),
    [("ibd", 16, 48), ("mixed", 64, 128)],
    ids=lambda value: str(value),
)
def test_ranks(compare, own_process, options, timing, small, full, data, batch, samples):
    """Ranks of one thread each: the same steps as one rank, and as ranks that exchange no ASVs."""
    if not timing and data != "mixed":
        pytest.skip("the same code")
    arguments = options(samples=samples, name=data, batch=8 if small else batch)
    ways = {ONE: (1, True), TWO: (2, True), OWN: (2 if timing else 1, False)}

    contestants = {
        name: own_process(
            "benchmarks.ranked:steps_on_ranks", environment={"OMP_NUM_THREADS": "1"},
            always=ranks > 1, ranks=ranks, exchanged=exchanged, **arguments,
        )
        for name, (ranks, exchanged) in ways.items()
    }  # fmt: skip

    def figures(results, comparison):
        shared, own = (results[name]["asvs_encoded"] for name in (TWO, OWN))
        seconds = {one: statistics.median(comparison.timings[one].wall) for one in contestants}
        return [
            *(
                Figure(f"{one}: samples a second", rate(results[one], comparison, one))
                for one in contestants
            ),
            Figure("ASVs encoded, each once", shared),
            Figure("ASVs encoded by ranks with their own samples' ASVs", own),
            Figure(
                "what encoding each once saves, share of the time", 1 - seconds[TWO] / seconds[OWN]
            ),
        ]

    results, _ = compare(
        f"ranks of one thread, batch {arguments['batch']}, {data}", contestants,
        reference=ONE, rounds=5 if full else 2, goals=[Goal(TWO, 1.7)], figures=figures,
    )  # fmt: skip
    results = second(results, contestants, timing)
    assert results[ONE]["asvs_encoded"] == results[TWO]["asvs_encoded"]
    assert results[OWN]["asvs_encoded"] >= results[TWO]["asvs_encoded"]
    assert results[TWO]["loss"] == pytest.approx(results[ONE]["loss"], rel=1e-3)


def test_tables_are_joined_by_sequence(real_data):
    one, other = (read_table(real_data / name / file) for name, file in TABLES.items())
    both = read(str(real_data), "mixed")
    assert both.counts.shape[0] == len(one.sample_ids) + len(other.sample_ids)
    assert set(both.feature_ids) == set(one.feature_ids) | set(other.feature_ids)
    assert both.counts.sum() == one.counts.sum() + other.counts.sum()
    column = {name: number for number, name in enumerate(both.feature_ids)}
    for table, rows in (
        (one, slice(0, len(one.sample_ids))),
        (other, slice(len(one.sample_ids), None)),
    ):
        own = [column[name] for name in table.feature_ids]
        assert (both.counts[rows][:, own] != table.counts).nnz == 0


def test_simulated_samples_differ_in_size():
    table = simulated(200, 2000)
    sizes = np.diff(table.counts.indptr)
    assert sizes.max() > 20 * sizes.min() and len(set(table.feature_ids)) == 2000
    assert (table.counts.data > 0).all()
