"""``python -m profiling.kernel_report``: the Triton kernels' resources and a model of their speed.

Without options it prints what attention takes per 1,000 real query-key pairs on MI300A and H100,
ours and the textbook's, then the resources of every shipped kernel. ``--write`` compiles what has
changed and writes ``profiling/kernel_report.json``; ``--check`` says, one line each, what is
missing, stale, spilling or worse than that file, and exits with 1.

Nothing is measured: no number here is a time, and the roofline is a bound from below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

import torch

from aam_kernels._runtime.configurations import ARCHITECTURES
from profiling import shipped
from profiling.ahead_of_time import Resources, vendor
from profiling.speed import KERNELS, Case, Figures, figures

LENGTHS, HEAD_DIMS = (151, 101, 1024), (32, 64)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def speed_cases(options: argparse.Namespace) -> Iterator[Case]:
    """What the speed table has, the baselines after ours."""
    for architecture, dtype, length, head_dim, backward in product(
        options.architecture or ("gfx942", "sm_90"),
        options.dtype or ("bf16", "fp32"),
        options.length or LENGTHS,
        options.head_dim or HEAD_DIMS,
        (False, True),
    ):
        kind = DTYPES[dtype]
        for dropout in (False, True):
            yield Case(architecture, kind, length, head_dim, dropout, backward, "aam_kernels")
        if dtype != "fp32":
            for kernels in KERNELS[1:]:
                yield Case(architecture, kind, length, head_dim, False, backward, kernels)


SPEED_HEAD = (
    "target", "dtype", "L", "d", "pass", "kernels", "launches", "regs", "warps fit", "LDS",
    "issue", "matrix", "llvm-mca", "bytes/min", "bound, us: issue", "matrix", "memory",
)  # fmt: skip


def speed_row(found: Figures) -> tuple[str, ...]:
    """One line of the speed table."""
    case = found.case
    names = {kind: name for name, kind in DTYPES.items()}
    what = "backward" if case.backward else "forward"
    who = case.kernels + (", dropout" if case.dropout else "")
    head = (case.architecture, names[case.dtype], str(case.length), str(case.head_dim), what, who)
    if found.cost is None or found.worst is None:
        return (*head, found.error[:60])
    bounds = found.roofline() or ()
    return (
        *head,
        str(found.launches),
        _registers(found.worst),
        f"{found.worst.occupancy:g}",
        str(found.worst.shared),
        f"{found.cost.issue:,.0f}",
        f"{found.cost.matrix:,.0f}",
        f"{found.cost.cycles:,.0f}" if found.cost.cycles == found.cost.cycles else "",
        f"{found.bytes_ratio:.1f}",
        *(f"{bound:,.0f}" for bound in bounds),
    )


def _registers(used: Resources) -> str:
    spilled = f" +{used.spills} spilled" if used.spills else ""
    return f"{used.registers}{spilled}"


def print_speed(options: argparse.Namespace) -> None:
    """Per 1,000 real pairs: issue clocks of a SIMD (gfx) or warp instructions (sm)."""
    _say(
        "Attention, self, rows of one length, 4 heads: issue (gfx: clocks of a SIMD; sm: warp "
        "instructions), matrix\nand llvm-mca per 1,000 real pairs. Bounds from below for 8,192 "
        "rows on MI300A and H100. Nothing is measured.\n"
    )
    rows = []
    for case in speed_cases(options):
        found = figures(case, cycles=case.architecture == "gfx942")
        rows.append(speed_row(found))
    _say(table(SPEED_HEAD, rows))


RESOURCE_HEAD = (
    "variant", "regs", "scalar", "spills", "scratch", "LDS", "warps", "warps fit", "matrix",
    "loads by bytes", "stores by bytes", "LDS access", "barriers", "exp",
)  # fmt: skip


def print_resources(options: argparse.Namespace) -> None:
    """Every line of the checked-in report."""
    rows = []
    for key, line in shipped.read().items():
        used = Resources(**{name: x for name, x in line.items() if name != "fingerprint"})
        if options.architecture and used.architecture not in options.architecture:
            continue
        scalar = str(used.scalar_registers) if vendor(used.architecture) == "amd" else ""
        numbers = (used.spills, used.scratch, used.shared, used.warps)
        access = (used.shared_access, used.barriers, used.exponentials)
        rows.append(
            (
                key,
                str(used.registers),
                scalar,
                *map(str, numbers),
                f"{used.occupancy:g}",
                *map(_counts, (used.matrix, used.loads, used.stores)),
                *map(str, access),
            )
        )
    _say(f"\n{len(rows)} shipped variants (profiling/kernel_report.json)\n")
    _say(table(RESOURCE_HEAD, rows))


def _counts(counts: dict[str, int]) -> str:
    return " ".join(f"{name.removeprefix('v_mfma_')}:{n}" for name, n in counts.items())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of equal width, two spaces apart."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [
        max(len(line[column]) for line in lines if column < len(line))
        for column in range(len(head))
    ]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip()
        for line in lines
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 when something may not be shipped."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.kernel_report",
        description="Resources of the Triton kernels and a static model of their speed.",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="compile what has changed, and write")
    action.add_argument("--check", action="store_true", help="compare with the checked-in report")
    parser.add_argument("--all", action="store_true", help="with --write: compile everything")
    parser.add_argument("--jobs", type=int, default=1, help="with --write: processes")
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES)
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES))
    parser.add_argument("--length", action="append", type=int)
    parser.add_argument("--head-dim", action="append", type=int)
    options = parser.parse_args(arguments)
    if options.write:
        problems = shipped.update(everything=options.all, jobs=options.jobs, say=_say)
    elif options.check:
        problems = shipped.check(shipped.read())
    else:
        print_speed(options)
        print_resources(options)
        return 0
    for problem in problems:
        _say(problem)
    _say(f"{len(shipped.read())} variants, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
