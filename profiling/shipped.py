"""The checked-in report: resources of every kernel, table entry and architecture that is shipped.

``kernel_report.json`` holds them with a fingerprint of what was compiled: the source of the kernel
and of every function it calls, the configuration, the types and constants of its launch, and
Triton's version. The fingerprint is known without compiling, so the tests can say in seconds that
the report is complete and belongs to this source; writing compiles only what has changed.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.language import constexpr
from triton.runtime.jit import JITCallable

from aam_kernels._runtime.configurations import AMD, ARCHITECTURES, Configuration, load_table
from aam_kernels.tune import DTYPES
from profiling.ahead_of_time import Resources, resources
from profiling.fake_driver import Launch
from profiling.tunables import compiled_case, takes_dropout, tunables

REPORT = Path(__file__).parent / "kernel_report.json"
Report = dict[str, dict[str, Any]]
MAIN_TARGETS = ("gfx942", "sm_90")


@dataclass(frozen=True)
class Shipped:
    """One variant of a kernel that users may run.

    Attributes:
        kernel: its name.
        architecture: which table.
        entry: the table's entry.
        variant: "", "dropout", or "dropout, 2 GiB": on AMD, where larger tensors are addressed
            in another way.
    """

    kernel: str
    architecture: str
    entry: dict[str, Any]
    variant: str = ""

    @property
    def key(self) -> str:
        """Its name in the report."""
        served = "{dtype} width {width} to {length}".format(**self.entry)
        return f"{self.kernel} {self.architecture} {served} {self.variant}".rstrip()

    def launch(self, *, compiling: bool = True) -> Launch:
        """Its launch on the example of its kernel, compiled or as far as that is not needed."""
        entry = self.entry
        return compiled_case(
            tunables()[self.kernel],
            self.architecture,
            DTYPES[entry["dtype"]],
            entry["width"],
            entry["length"],
            Configuration(entry["meta"], entry["options"]),
            dropout="dropout" in self.variant,
            large="2 GiB" in self.variant,
            compiling=compiling,
        )


def shipped(kernel: str | None = None, architecture: str | None = None) -> Iterator[Shipped]:
    """Everything in the tables, or what of it belongs to one kernel or architecture."""
    for table in (architecture,) if architecture else ARCHITECTURES:
        for name, entries in load_table(table).items():
            if kernel not in (None, name) or name not in tunables():
                continue
            for entry in entries:
                for variant in _variants(name, table):
                    yield Shipped(name, table, entry, variant)


def unknown_kernels() -> list[str]:
    """Kernels in a table that no module calls tunable."""
    names = {name for table in ARCHITECTURES for name in load_table(table)}
    return sorted(names - set(tunables()))


def _variants(kernel: str, architecture: str) -> tuple[str, ...]:
    """With dropout everywhere, as that takes more registers; all there are on the main targets."""
    if not _takes_dropout(kernel):
        return ("",)
    if architecture not in MAIN_TARGETS:
        return ("dropout",)
    return ("", "dropout", "dropout, 2 GiB") if architecture in AMD else ("", "dropout")


@lru_cache(maxsize=64)
def _takes_dropout(kernel: str) -> bool:
    for table in ARCHITECTURES:
        for entry in load_table(table).get(kernel, ()):
            return takes_dropout(Shipped(kernel, table, entry).launch(compiling=False))
    return False


def fingerprint(launch: Launch) -> str:
    """Of everything that decides what is compiled."""
    content = (triton.__version__, source(launch.function), launch.specialisation)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def source(function: JITCallable) -> str:
    """The source of a kernel and of all functions and constants that it uses, without comments."""
    texts: dict[str, str] = {}
    _collect(function, texts)
    return "\n".join(f"{name}: {texts[name]}" for name in sorted(texts))


def _collect(function: JITCallable, texts: dict[str, str]) -> None:
    name = f"{function.__module__}.{function.__name__}"
    if name in texts:
        return
    tree, names = _parsed(function)
    texts[name] = tree
    for word in names:
        value = function.__globals__.get(word)
        if isinstance(value, constexpr):
            texts[f"{function.__module__}.{word}"] = repr(value.value)
        elif isinstance(value, JITCallable) and not value.__module__.startswith("triton."):
            _collect(value, texts)


_PARSED: dict[int, tuple[str, list[str]]] = {}


def _parsed(function: JITCallable) -> tuple[str, list[str]]:
    """A function's source without comments and docstring, and the names in it."""
    found = _PARSED.get(id(function))
    if found is None:
        tree = ast.parse(function.src)
        body = tree.body[0].body  # type: ignore[attr-defined]
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        found = _PARSED[id(function)] = ast.unparse(tree), sorted(names)
    return found


def read() -> Report:
    """The checked-in report; empty when there is none."""
    return json.loads(REPORT.read_text())["kernels"] if REPORT.exists() else {}


def write(report: Report) -> None:
    """Replaces the checked-in report, one variant a line."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(report[key])}" for key in sorted(report))
    head = f' "triton": {json.dumps(triton.__version__)},\n "kernels": {{\n'
    REPORT.write_text("{\n" + head + lines + "\n }\n}\n")


def compile_one(variant: Shipped) -> tuple[dict[str, Any] | None, str]:
    """A line of the report, or None and what went wrong."""
    launch = variant.launch()
    if launch.error is not None:
        return None, launch.error
    return {"fingerprint": fingerprint(launch), **resources(launch.compiled).content()}, ""


def update(*, everything: bool, jobs: int, say: Callable[[str], object]) -> list[str]:
    """Compiles what the report lacks, and writes it; returns what is wrong with it then."""
    before, problems = read(), []
    variants = {variant.key: variant for variant in shipped()}
    kept = {
        key: before[key]
        for key, variant in variants.items()
        if key in before and not everything and before[key]["fingerprint"] == _current(variant)
    }
    wanted = [variant for key, variant in variants.items() if key not in kept]
    say(f"{len(kept)} variants are up to date, {len(wanted)} have to be compiled")
    for number, (variant, line, problem) in enumerate(_compiled(wanted, jobs), start=1):
        say(f"{number}/{len(wanted)} {variant.key}: {problem or 'compiled'}")
        if line is None:
            problems.append(f"{variant.key}: {problem}")
        else:
            kept[variant.key] = line
        if number % 10 == 0 or number == len(wanted):  # what was compiled survives an interruption
            write(kept)
    write(kept)
    return problems + broken(kept)


def _compiled(
    wanted: list[Shipped], jobs: int
) -> Iterator[tuple[Shipped, dict[str, Any] | None, str]]:
    """Lines of the report, compiled by ``jobs`` processes."""
    if jobs == 1:
        for variant in wanted:
            yield (variant, *compile_one(variant))
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(compile_one, variant): variant for variant in wanted}
        for done in as_completed(waiting):
            yield (waiting[done], *done.result())


def _current(variant: Shipped) -> str:
    return fingerprint(variant.launch(compiling=False))


def broken(report: Report) -> list[str]:
    """Lines that may not be shipped."""
    return [
        f"{key}: {problem}"
        for key, line in report.items()
        for problem in _resources(line).broken_limits()
    ]


def _resources(line: dict[str, Any]) -> Resources:
    return Resources(**{name: value for name, value in line.items() if name != "fingerprint"})


def stale(report: Report) -> list[str]:
    """Variants that the report lacks, has from other source, or has although they are gone."""
    problems = [f"{name}: in a table, but no module has it" for name in unknown_kernels()]
    seen = set()
    for variant in shipped():
        seen.add(variant.key)
        if variant.key not in report:
            problems.append(f"{variant.key}: missing")
        elif report[variant.key]["fingerprint"] != _current(variant):
            problems.append(f"{variant.key}: compiled from other source")
    problems.extend(f"{key}: no longer shipped" for key in sorted(set(report) - seen))
    return problems


def regressions(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What has become worse between two lines of the report."""
    old, new = _resources(before), _resources(after)
    problems = new.broken_limits()
    if new.registers > old.registers:
        problems.append(f"{new.registers} registers, were {old.registers}")
    if new.occupancy < old.occupancy:
        problems.append(f"occupancy {new.occupancy:g}, was {old.occupancy:g}")
    if old.matrix and not new.matrix:
        problems.append("no matrix instructions any more")
    for what in ("loads", "stores"):
        was, now = _mean_width(getattr(old, what)), _mean_width(getattr(new, what))
        if now < was:
            problems.append(f"{what} of {now:.1f} bytes, were {was:.1f}")
    return problems


def _mean_width(counts: dict[str, int]) -> float:
    widths = {int(width): count for width, count in counts.items()}
    return sum(w * n for w, n in widths.items()) / max(1, sum(widths.values()))


def check(report: Report) -> list[str]:
    """Everything that is wrong with the report; what is stale is compiled and compared."""
    problems = stale(report) + broken(report)
    for variant in shipped():
        line = report.get(variant.key)
        if line is None or line["fingerprint"] == _current(variant):
            continue
        new, problem = compile_one(variant)
        worse = [problem] if new is None else regressions(line, new)
        problems.extend(f"{variant.key}: {text}" for text in worse)
    return problems
