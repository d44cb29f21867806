"""`--benchmark` times; without it each case runs once and checks its numbers.

A case is a test. A round is every contestant of a case in turn, timed apart, and ratios are taken
within rounds: timing one contestant after the other would compare two moments of a machine.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.comparison import (
    Comparison,
    Contestants,
    Figure,
    Goal,
    Rounds,
    Work,
    fastest,
    format_comparison,
    format_goals,
    rounds_within,
)
from benchmarks.plot import write_plot
from benchmarks.worker import Worker, prepare
from tests.conftest import real_data, require_tool  # noqa: F401

RESULTS = Path(__file__).parent / "results"
SECONDS_A_CASE = {"smoke": 0.0, "quick": 3.0, "full": 60.0}
COMPARISONS = pytest.StashKey[list[Comparison]]()
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""glibc's malloc as training would like it: memory once asked for is never given back."""


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of this repository")
    group.addoption(
        "--benchmark", action="store_true", help="time the cases; without it each runs once"
    )
    group.addoption(
        "--benchmark-size",
        choices=sorted(SECONDS_A_CASE),
        default="quick",
        help="full: more rounds and cases; smoke: small steps, to see that everything runs",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.stash[COMPARISONS] = []
    config.addinivalue_line("markers", "kernels: attention, pooling and layer, in 2 minutes")
    config.addinivalue_line("markers", "scaling: the layer by threads, tokens and variant")
    config.addinivalue_line("markers", "steps: whole training steps and inference; takes long")
    config.addinivalue_line(
        "markers", "batching: steps that fill memory, in micro-batches, over ranks"
    )
    if config.getoption("benchmark") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--benchmark times one case at a time: leave out -n")


def pytest_terminal_summary(terminalreporter, config):
    comparisons = config.stash[COMPARISONS]
    if not comparisons:
        return
    terminalreporter.section("benchmarks")
    for name, value in machine.facts().items():
        terminalreporter.write_line(f"  {name}: {value}")
    if machine.native() is None:
        terminalreporter.write_line("  no FMA peak was measured: aam_kernels._native is not built")
    for comparison in comparisons:
        terminalreporter.write_line(format_comparison(comparison))
    terminalreporter.write_line(format_goals(comparisons))
    write_plot(comparisons, RESULTS / "speedups.png")
    terminalreporter.write_line(f"\nwritten: {results(config)}, speedups.png")


def results(config: pytest.Config) -> Path:
    """Where numbers are kept: of all runs, the last of each case."""
    smoke = config.getoption("benchmark_size") == "smoke"
    return RESULTS / ("smoke.json" if smoke else "benchmarks.json")


def keep(comparison: Comparison, facts: Mapping[str, Any], path: Path) -> None:
    """Write a case into the file of results, in place of what an earlier run says of it."""
    path.parent.mkdir(exist_ok=True)
    cases = json.loads(path.read_text()) if path.exists() else {}
    cases[comparison.title] = {"machine": facts, **comparison.to_dict()}
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(cases, indent=1))
    os.replace(unfinished, path)


@pytest.fixture
def timing(request) -> bool:
    """Whether this run times (`--benchmark`)."""
    return request.config.getoption("benchmark")


@pytest.fixture
def full(request) -> bool:
    """Whether `--benchmark-size full` was asked for."""
    return request.config.getoption("benchmark_size") == "full"


@pytest.fixture
def small(request, timing) -> bool:
    """Whether steps are small: nothing is timed, or `--benchmark-size smoke`."""
    return not timing or request.config.getoption("benchmark_size") == "smoke"


@pytest.fixture
def own_process(timing):
    """Contestants in processes of their own, ended with the test.

    `own_process("module:function", environment={...}, **arguments)`. Without `--benchmark` the
    work runs in this process (unless `always`), where it only has to give the right numbers.
    """
    workers = []

    def start(
        target: str,
        *,
        environment: Mapping[str, str] | None = None,
        always: bool = False,
        **arguments: Any,
    ):
        if not timing and not always:
            return prepare(target, arguments)
        workers.append(Worker(target, environment=environment, **arguments))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


@pytest.fixture
def compare(request, timing) -> Callable[..., tuple[dict[str, Any], Comparison | None]]:
    """Run contestants in turns.

    `compare(title, contestants, reference=NAME)` gives every contestant's result, and the timings
    when timing (else None).

    * `reference`: what speeds are taken over; of several names, the fastest.
    * `rounds`: in place of as many as fit the case's seconds.
    * `work`: operations and bytes by contestant; where given, the machine's limits take part
      (`limits=False` leaves them out).
    * `goals`, `notes`: see `Comparison`.
    * `figures`: makes those of `Comparison` from every contestant's last result and the timings.
    """

    def run(
        title: str,
        contestants: Contestants,
        *,
        reference: str | Sequence[str],
        rounds: int | None = None,
        work: Mapping[str, Work] | None = None,
        limits: bool = True,
        goals: Sequence[Goal] = (),
        notes: Mapping[str, str] | None = None,
        figures: Callable[[dict[str, Any], Comparison], Sequence[Figure]] | None = None,
    ) -> tuple[dict[str, Any], Comparison | None]:
        if not timing:
            return {name: contestant() for name, contestant in contestants.items()}, None
        facts, work, notes = machine.facts(), dict(work or {}), dict(notes or {})
        one_round = Rounds({**contestants, **(machine.limits() if work and limits else {})})
        one_round.warm_up()
        if rounds is None:
            start = time.perf_counter()
            one_round.warm_up()
            seconds = SECONDS_A_CASE[request.config.getoption("benchmark_size")]
            rounds = rounds_within(seconds, time.perf_counter() - start)
        for _ in range(rounds):
            one_round()
        names = [reference] if isinstance(reference, str) else reference
        if "thread" not in title:
            title += f", {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
        comparison = Comparison(
            title, fastest(one_round.timings, names), one_round.timings, work, goals=list(goals),
            notes=notes | one_round.refused,
        )  # fmt: skip
        for name, contestant in one_round.contestants.items():
            if isinstance(contestant, Worker):
                comparison.memory[name] = contestant.memory
                comparison.faults[name] = contestant.faults
            if name in (machine.PEAK, machine.COPY):
                comparison.work[name] = Work(**one_round.results[name])
        if figures is not None:
            comparison.figures += figures(one_round.results, comparison)
        keep(comparison, facts, results(request.config))
        request.config.stash[COMPARISONS].append(comparison)
        return {name: one_round.results[name] for name in contestants}, comparison

    return run
