"""Chooses launch configurations without a device, and writes them into the tables.

``python -m profiling.choose_configurations [--kernel K] [--architecture A] [--dtype half|float32]
[--width W] [--length L] [--exhaustive]``

For every case the candidates of the kernel's `Tunable` are compiled in their order, with dropout
where the kernel has it, and those that spill, use scratch or do not fit are dropped. The first
that is left counts, because candidates come likeliest first; with ``--exhaustive`` it is the one
that issues least by the static model, then the one of which more warps fit. Compiled code is kept
in Triton's cache on disk, so that a second run, or one that was interrupted, is quick. An entry
that says the same as the one for longer rows is left out of the table.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aam_kernels._runtime.configurations import (
    AMD,
    ARCHITECTURES,
    TABLES,
    Configuration,
    Tunable,
)
from aam_kernels.tune import DTYPES
from profiling.ahead_of_time import Resources, resources
from profiling.fake_driver import Launch
from profiling.tunables import compiled_case, tunables
from profiling.work import WORK, cost


@dataclass(frozen=True)
class Case:
    """What one table entry serves."""

    kernel: str
    architecture: str
    dtype: str
    width: int
    length: int

    def __str__(self) -> str:
        """One short line."""
        return f"{self.kernel} {self.architecture} {self.dtype} width {self.width} to {self.length}"


@dataclass(frozen=True)
class Judged:
    """A candidate that may be shipped.

    Attributes:
        chosen: the candidate.
        issued: what the static model says, clocks or instructions; 0 where it does not know.
        resources: what it takes.
    """

    chosen: Configuration
    issued: float
    resources: Resources

    @property
    def order(self) -> tuple[float, float]:
        """The smallest is the best."""
        return self.issued, -self.resources.occupancy


def judge(case: Case, chosen: Configuration) -> Judged | str:
    """Compiles a candidate; a sentence if it may not be shipped.

    With dropout where the kernel has it, which takes more registers, and on AMD for tensors over
    2 GiB too; the report compiles every variant.
    """
    judged = None
    for large in (False, True) if case.architecture in AMD else (False,):
        launch = compiled_case(
            tunables()[case.kernel],
            case.architecture,
            DTYPES[case.dtype],
            case.width,
            case.length,
            chosen,
            dropout=True,
            large=large,
        )
        if launch.error is not None:
            return launch.error
        measured = resources(launch.compiled)
        if broken := measured.broken_limits():
            return ", ".join(broken) + " over 2 GiB" * large
        judged = judged or Judged(chosen, issue(launch, case.length), measured)
    assert judged is not None
    return judged


def issue(launch: Launch, length: int) -> float:
    """Clocks (AMD) or instructions (NVIDIA) of a launch; where they bind, those of the matrix."""
    if launch.kernel not in WORK:
        return 0.0
    done = cost(launch, length)
    return max(done.issue, done.matrix)


def best(case: Case, *, exhaustive: bool) -> tuple[Judged | None, list[str]]:
    """The configuration for a case, and why others were not taken."""
    candidates = tunables()[case.kernel].candidates(
        case.architecture, DTYPES[case.dtype], case.width, case.length
    )
    left, refused = [], []
    for chosen in candidates:
        judged = judge(case, chosen)
        if isinstance(judged, str):
            refused.append(f"{dict(chosen.meta)} {dict(chosen.options)}: {judged}")
            continue
        left.append(judged)
        if not exhaustive:
            break
    return min(left, key=lambda judged: judged.order, default=None), refused


def cases(tunable: Tunable, options: argparse.Namespace) -> Iterator[Case]:
    """The cases of a kernel that were asked for."""
    for architecture in options.architecture or ARCHITECTURES:
        for dtype in options.dtype or tuple(DTYPES):
            for width in options.width or tunable.widths:
                for length in sorted(options.length or tunable.lengths, reverse=True):
                    yield Case(tunable.kernel, architecture, dtype, width, length)


def update_table(case: Case, chosen: Configuration | None) -> None:
    """Replaces the entry of a case in its table; several processes may do so at once."""
    path = TABLES / f"{case.architecture}.json"
    path.touch()
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        table = json.loads(file.read() or "{}")
        entries = [x for x in table.get(case.kernel, []) if not _same_case(x, case)]
        if chosen is not None:
            entry = {"dtype": case.dtype, "width": case.width, "length": case.length}
            entries.append({**entry, "meta": dict(chosen.meta), "options": dict(chosen.options)})
        table[case.kernel] = pruned(entries)
        if not table[case.kernel]:
            del table[case.kernel]
        file.seek(0)
        file.truncate()
        file.write(written(table))


def _same_case(entry: dict[str, Any], case: Case) -> bool:
    wanted = (case.dtype, case.width, case.length)
    return (entry["dtype"], entry["width"], entry["length"]) == wanted


def pruned(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without entries that say what the next longer one of their dtype and width says."""
    kept: list[dict[str, Any]] = []
    for entry in sorted(entries, key=lambda x: (x["dtype"], x["width"], -x["length"])):
        longer = kept[-1] if kept else None
        names = ("dtype", "width", "meta", "options")
        if longer is None or any(entry[name] != longer[name] for name in names):
            kept.append(entry)
    return sorted(kept, key=lambda x: (x["dtype"] == "float32", x["width"], x["length"]))


def written(table: dict[str, list[dict[str, Any]]]) -> str:
    """A table as text, one entry a line."""
    kernels = []
    for kernel in sorted(table):
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in table[kernel])
        kernels.append(f" {json.dumps(kernel)}: [\n{lines}\n ]")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 when a case has no configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.choose_configurations",
        description="Choose launch configurations by compiling and a static model.",
    )
    parser.add_argument("--kernel", action="append", choices=sorted(tunables()))
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES)
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES))
    parser.add_argument("--width", action="append", type=int)
    parser.add_argument("--length", action="append", type=int)
    parser.add_argument("--exhaustive", action="store_true", help="compare all candidates")
    parser.add_argument("--dry-run", action="store_true", help="leave the tables as they are")
    options = parser.parse_args(arguments)
    missing = 0
    for tunable in tunables().values():
        if options.kernel and tunable.kernel not in options.kernel:
            continue
        for case in cases(tunable, options):
            started = time.perf_counter()
            found, refused = best(case, exhaustive=options.exhaustive)
            seconds = time.perf_counter() - started
            for line in refused:
                sys.stdout.write(f"    not {line}\n")
            if found is None and not refused:  # the kernel is not offered there
                sys.stdout.write(f"{case}: not offered\n")
            elif found is None:
                missing += 1
                sys.stdout.write(f"{case}: NO CONFIGURATION\n")
            else:
                sys.stdout.write(f"{case}: {_described(found)} ({seconds:.1f} s)\n")
            if not options.dry_run:
                update_table(case, None if found is None else found.chosen)
            sys.stdout.flush()
    return 1 if missing else 0


def _described(found: Judged) -> str:
    used = found.resources
    return (
        f"{dict(found.chosen.meta)} {dict(found.chosen.options)} registers {used.registers} "
        f"occupancy {used.occupancy:g} shared {used.shared} issue {found.issued:.3g}"
    )


if __name__ == "__main__":
    sys.exit(main())
