"""``python -m aam_kernels.tune [--kernel K] [--dtype half|float32] [--width W] [--length L]``.

Measures on this GPU the configurations that each Triton kernel lists as worth trying, and writes a
table of the fastest that are right: to ``--output FILE``, else into the folder named by
``AAM_KERNELS_TABLES``, from where `aam_kernels` then takes it. The shipped tables are left alone.

Every candidate is timed with a cold cache. The fastest few and the present configuration are timed
again in turns, and what is kept must pass the small check against float64, with dropout and
without. A candidate that does not compile or run is skipped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from aam_kernels._quick_check import check
from aam_kernels._runtime import configurations
from aam_kernels._runtime.configurations import Configuration, Tunable, dtype_class, forced
from aam_kernels._runtime.trust import case_of
from aam_kernels._timing import median_seconds, seconds_of, shown

MODULES = {
    "aam_kernels.attention.triton.short": "attention",
    "aam_kernels.attention.triton.long": "attention",
    "aam_kernels.pooling.triton": "pooling",
    "aam_kernels.encoder_layer.triton": "encoder_layer",
}
"""Modules that may have a tuple ``TUNABLES``, and the operation that their kernels belong to."""
DTYPES = {"half": torch.bfloat16, "float32": torch.float32}
"""What stands for a dtype class of the tables."""
FINALISTS, ROUNDS = 3, 9
WORTHWHILE = 1.02  # a new configuration must be so much faster than the present one

Screen = Callable[[Callable[[], object], torch.device], float]
Check = Callable[[str, torch.dtype, int, int], list[str]]
Entry = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What was found for one kernel, dtype class, width and length.

    Attributes:
        kernel: name of the kernel.
        dtype: "half" or "float32".
        width: of the table's entry.
        length: of the table's entry.
        before: the present configuration; None where the table has none.
        after: the one to use; None where no candidate is right.
        seconds_before: median of the present one, None where it does not run.
        seconds_after: median of the one to use.
        skipped: configuration -> why it is out.
        tried: number of candidates.
    """

    kernel: str
    dtype: str
    width: int
    length: int
    before: Configuration | None
    after: Configuration | None
    seconds_before: float | None
    seconds_after: float | None
    skipped: dict[str, str] = field(default_factory=dict)
    tried: int = 0

    def __str__(self) -> str:
        """Old and new configuration and time, and what was skipped."""
        lines = [
            f"{self.kernel} {self.dtype} width {self.width} length {self.length}: "
            f"{self.tried} candidates, {len(self.skipped)} skipped"
        ]
        old = "none" if self.before is None else _name(self.before)
        old_time = "does not run" if self.seconds_before is None else shown(self.seconds_before)
        if self.after is None or self.seconds_after is None:
            lines.append(f"  {old}: {old_time} -> no candidate is right")
        else:
            new, ratio = f"{_name(self.after)}: {shown(self.seconds_after)}", ""
            if self.seconds_before is not None:
                ratio = f" ({self.seconds_before / self.seconds_after:.2f}x)"
            lines.append(f"  {old}: {old_time} -> {new}{ratio}")
        lines += [f"  skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def tunables() -> dict[str, tuple[Tunable, str]]:
    """Every kernel with configurations to choose from, and its operation."""
    found = {}
    for name, operation in MODULES.items():
        if find_spec(name.rpartition(".")[0]) is None or find_spec(name) is None:
            continue
        for tunable in getattr(importlib.import_module(name), "TUNABLES", ()):
            found[tunable.kernel] = (tunable, operation)
    return found


def tune_case(
    tunable: Tunable,
    architecture: str,
    present: Configuration | None,
    dtype: torch.dtype,
    width: int,
    length: int,
    device: torch.device,
    *,
    screen: Screen,
    one_run: Screen,
    wrong: Check,
) -> Outcome:
    """Chooses a configuration of one kernel for one entry of the table.

    Args:
        tunable: the kernel.
        architecture: whose candidates are tried.
        present: the configuration in use.
        dtype: of the inputs.
        width: of the entry.
        length: of the entry.
        device: where to measure.
        screen: seconds of a call, the median of a few runs.
        one_run: seconds of one run.
        wrong: (kernel, dtype, width, length) -> what diverges, under the forced configuration.
    """
    candidates = tunable.candidates(architecture, dtype, width, length)
    choices = [*([present] if present is not None else []), *candidates]
    skipped: dict[str, str] = {}
    calls: dict[str, Callable[[], object]] = {}
    seconds: dict[str, float] = {}
    for chosen in choices:
        name = _name(chosen)
        if name in seconds or name in skipped:
            continue
        try:
            calls[name] = _forced_call(tunable, chosen, dtype, width, length, device)
            seconds[name] = screen(calls[name], device)
        except Exception as problem:  # compilers and drivers raise what they like: listed
            skipped[name] = _one_line(problem)
            calls.pop(name, None)
    named = {_name(chosen): chosen for chosen in choices}
    order = sorted(seconds, key=seconds.__getitem__)
    old = None if present is None else _name(present)
    finalists: list[str] = []
    for name in order:
        if len(finalists) == FINALISTS and old in (*finalists, None):
            break
        if len(finalists) >= FINALISTS and name != old:
            continue
        with forced(tunable.kernel, named[name]):
            failures = _caught(wrong, tunable.kernel, dtype, width, length)
        if failures:
            skipped[name] = f"wrong: {'; '.join(failures)}"[:300]
        else:
            finalists.append(name)
    medians = _in_turns({name: calls[name] for name in finalists}, one_run, device)
    best = min(medians, key=medians.__getitem__, default=None)
    if best is not None and old in medians and medians[old] < WORTHWHILE * medians[best]:
        best = old
    return Outcome(
        tunable.kernel, dtype_class(dtype), width, length, present,
        None if best is None else named[best],
        None if old is None else medians.get(old), None if best is None else medians[best],
        skipped, len({_name(chosen) for chosen in candidates}),
    )  # fmt: skip


def replaced(table: Mapping[str, list[Entry]], outcomes: list[Outcome]) -> dict[str, list[Entry]]:
    """A table with the entries that were tuned; where nothing is right, without an entry."""
    entries = {kernel: list(rows) for kernel, rows in table.items()}
    for outcome in outcomes:
        place = (outcome.dtype, outcome.width, outcome.length)
        rows = [
            row
            for row in entries.get(outcome.kernel, [])
            if (row["dtype"], row["width"], row["length"]) != place
        ]
        if outcome.after is not None:
            keys = dict(zip(("dtype", "width", "length"), place, strict=True))
            meta, options = dict(outcome.after.meta), dict(outcome.after.options)
            rows.append({**keys, "meta": meta, "options": options})
        rows.sort(key=lambda row: (row["dtype"] != "half", row["width"], row["length"]))
        entries[outcome.kernel] = rows
    return dict(sorted(entries.items()))


def formatted(table: Mapping[str, list[Entry]]) -> str:
    """A table as JSON, one line an entry."""
    kernels = []
    for kernel, rows in table.items():
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        kernels.append(f"  {json.dumps(kernel)}: [\n{lines}\n  ]" if rows else f'  "{kernel}": []')
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def _forced_call(
    tunable: Tunable,
    chosen: Configuration,
    dtype: torch.dtype,
    width: int,
    length: int,
    device: torch.device,
) -> Callable[[], object]:
    with forced(tunable.kernel, chosen):
        example = tunable.example(dtype, width, length, device)

    def call() -> object:
        with forced(tunable.kernel, chosen):
            return example()

    return call


def _in_turns(
    calls: dict[str, Callable[[], object]], one_run: Screen, device: torch.device
) -> dict[str, float]:
    """Median seconds of each, every second round in the opposite order."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(one_run(calls[name], device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _name(chosen: Configuration) -> str:
    return " ".join(f"{key}={x}" for key, x in {**chosen.meta, **chosen.options}.items())


def _one_line(problem: Exception) -> str:
    return f"does not run: {type(problem).__name__}: {' '.join(str(problem).split())}"[:300]


def _caught(wrong: Check, kernel: str, dtype: torch.dtype, width: int, length: int) -> list[str]:
    try:
        return wrong(kernel, dtype, width, length)
    except Exception as problem:  # a crash is a failed check
        return [_one_line(problem)]


def _checker(device: torch.device) -> Check:
    """The small check of the operation that a kernel belongs to, with dropout and without."""
    operations = {kernel: operation for kernel, (_, operation) in tunables().items()}

    def wrong(kernel: str, dtype: torch.dtype, width: int, length: int) -> list[str]:
        operation = operations[kernel]
        shape = (width, max(1, width // 32)) if operation == "encoder_layer" else (width,)
        for dropout_p in (0.0, 0.1) if operation != "pooling" else (0.0,):
            case = case_of(shape, length, dropout_p)
            failures = check(operation, "triton", device, dtype, case)
            if failures:
                return failures
        return []

    return wrong


def _cases(
    options: argparse.Namespace,
) -> Iterator[tuple[Tunable, torch.dtype, int, int]]:
    for kernel, (tunable, _) in tunables().items():
        for name, dtype in DTYPES.items():
            for width in tunable.widths:
                for length in tunable.lengths:
                    asked = (
                        (options.kernel, kernel), (options.dtype, name),
                        (options.width, width), (options.length, length),
                    )  # fmt: skip
                    if all(not wanted or value in wanted for wanted, value in asked):
                        yield tunable, dtype, width, length


def _output(options: argparse.Namespace, architecture: str) -> Path:
    """Where to write.

    Raises:
        ValueError: neither a file nor a folder of the user's own is named.
    """
    if options.output is not None:
        return options.output
    folder = os.environ.get("AAM_KERNELS_TABLES")
    if not folder or Path(folder).resolve() == configurations.TABLES.resolve():
        raise ValueError(
            "nowhere to write: name --output FILE, or set AAM_KERNELS_TABLES to a folder of your "
            "own, from which aam_kernels will then take its tables"
        )
    return Path(folder) / f"{architecture}.json"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m aam_kernels.tune",
        description="Measure configurations of the Triton kernels on this GPU and write a table.",
    )
    parser.add_argument("--kernel", action="append", help="only this one; repeatable")
    parser.add_argument("--dtype", action="append", choices=sorted(DTYPES))
    parser.add_argument("--width", action="append", type=int)
    parser.add_argument("--length", action="append", type=int)
    parser.add_argument("--output", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        if not torch.cuda.is_available():
            raise ValueError("no GPU here: tune measures on a CUDA or ROCm device")
        if find_spec("triton") is None:
            raise ValueError("no Triton here: tune measures Triton kernels")
        architecture = configurations.architecture()
        output = _output(options, architecture)
        cases = list(_cases(options))
        if not cases:
            raise ValueError(f"nothing to tune; there are the kernels {', '.join(tunables())}")
    except (ValueError, RuntimeError) as problem:
        sys.stderr.write(f"error: {problem}\n")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    _tune(cases, architecture, output, device)
    sys.stdout.write(f"written: {output}\n")
    return 0


def _tune(
    cases: list[tuple[Tunable, torch.dtype, int, int]],
    architecture: str,
    output: Path,
    device: torch.device,
) -> None:
    """Tunes case by case; the file is complete after each, so nothing is lost by stopping."""
    wrong = _checker(device)
    table = configurations.load_table(architecture)
    outcomes = []
    for tunable, dtype, width, length in cases:
        present = configurations.configuration(tunable.kernel, dtype, width, length)
        outcome = tune_case(
            tunable, architecture, present, dtype, width, length, device,
            screen=_screen, one_run=seconds_of, wrong=wrong,
        )  # fmt: skip
        outcomes.append(outcome)
        sys.stdout.write(f"{outcome}\n")
        sys.stdout.flush()
        _write(output, formatted(replaced(table, outcomes)))


def _screen(call: Callable[[], object], device: torch.device) -> float:
    return median_seconds(call, device, budget=0.1, cold=True)


if __name__ == "__main__":
    sys.exit(main())
