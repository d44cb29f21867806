"""`--benchmark` times; without it each case runs once and checks its numbers.

pytest-benchmark drives the rounds and writes the JSON with machine and commit. It times one
function a test, and comparing two tests compares two moments of a machine; so here a round is every
contestant of a case in turn, timed apart, and the ratios are taken within rounds.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison import (
    Comparison,
    Rounds,
    format_table,
    rounds_within,
    run_once,
    write_plot,
)
from tests.conftest import real_data, require_tool  # noqa: F401

RESULTS = Path(__file__).parent / "results"
SECONDS_A_CASE = {"quick": 8.0, "full": 60.0}
COMPARISONS = pytest.StashKey[list[Comparison]]()


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of this repository")
    group.addoption(
        "--benchmark", action="store_true", help="time the cases; without it each runs once"
    )
    group.addoption(
        "--benchmark-size",
        choices=sorted(SECONDS_A_CASE),
        default="quick",
        help="quick (default): 10 minutes on 2 cores; full: more rounds and more cases",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.stash[COMPARISONS] = []
    if not config.getoption("benchmark"):
        return
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("--benchmark times one case at a time: leave out -n")
    RESULTS.mkdir(exist_ok=True)
    config.option.benchmark_enable = True
    config.option.benchmark_quiet = True  # its table lists whole rounds; ours lists contestants
    config.option.benchmark_json = str(RESULTS / "benchmarks.json")


def pytest_terminal_summary(terminalreporter, config):
    comparisons = config.stash[COMPARISONS]
    if not comparisons:
        return
    import torch

    terminalreporter.section(f"benchmarks, {torch.get_num_threads()} threads")
    terminalreporter.write_line(format_table(comparisons))
    write_plot(comparisons, RESULTS / "speedups.png")
    terminalreporter.write_line(f"\nwritten: {RESULTS}/benchmarks.json, speedups.png")


@pytest.fixture
def timing(request) -> bool:
    """Whether this run times (`--benchmark`)."""
    return request.config.getoption("benchmark")


@pytest.fixture
def full(request) -> bool:
    """Whether `--benchmark-size full` was asked for."""
    return request.config.getoption("benchmark_size") == "full"


@pytest.fixture
def compare(request, timing, benchmark) -> Callable[..., tuple[dict[str, Any], Comparison | None]]:
    """Run contestants in turns.

    `compare(title, contestants, reference=NAME, rounds=None, notes={})` gives every contestant's
    result, and the timings when timing (else None). `rounds` overrides what fits the case's share.
    """

    def run(
        title: str,
        contestants: Mapping[str, Callable[[], Any]],
        *,
        reference: str,
        rounds: int | None = None,
        notes: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], Comparison | None]:
        if not timing:
            return benchmark.pedantic(run_once, args=(contestants,)), None
        results = run_once(contestants)
        one_round = Rounds(contestants)
        start = time.perf_counter()
        if rounds is None:
            run_once(contestants)
            seconds = SECONDS_A_CASE[request.config.getoption("benchmark_size")]
            rounds = rounds_within(seconds, time.perf_counter() - start)
        benchmark.pedantic(one_round, rounds=rounds)
        comparison = Comparison(title, reference, one_round.timings, notes or {})
        benchmark.extra_info.update(comparison=comparison.rows(), notes=comparison.notes)
        request.config.stash[COMPARISONS].append(comparison)
        return results, comparison

    return run
