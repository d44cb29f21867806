"""Is one kernel for half an encoder layer, or a whole one, worth shipping? Asked of the compilers.

``python -m profiling.whole_layer [--architecture A ...] [--all] [--dropout]`` compiles the kernels
of `profiling.half_layer` for rows of 151 tokens (D = 128, 4 heads, 512 hidden features, bfloat16)
ahead of time, prints registers, spills, LDS, occupancy and what the static model counts, beside
the launches that make up the same half in ``impl="triton"``, and a verdict. No number is a time.

Roofline of a launch: the longest of vector (AMD) or warp (NVIDIA) issue, matrix units, and memory;
launches follow one another. ``sum`` adds issue and memory instead, as if nothing overlapped.
MI300A: 228 compute units x 4 SIMDs at 2.1 GHz, 5.3 TB/s. H100 SXM: 132 SMs x 4 at 1.83 GHz,
3.35 TB/s. Memory is every tensor once (x and the result for a fused kernel), weights once. L2
traffic, scratch and weights of every program included, is counted by hand and shown apart: 25.8
TB/s (16 channels of 128 bytes a clock on 6 dies) and 5.5 TB/s (as others have measured).

What this cannot see: bank conflicts, latency (one or two programs a compute unit have little to
hide it with: barriers stop all warps of a program), L2 evictions of the scratch, instruction
caches, clocks under load.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aam_kernels._runtime.configurations import (
    Configuration,
    configuration,
    forced,
)
from aam_kernels._runtime.grouping import Sequences
from aam_kernels.attention import triton as attention
from aam_kernels.encoder_layer.triton.launches import Launcher, Norm
from aam_kernels.encoder_layer.weights import EncoderLayerWeights
from profiling.ahead_of_time import Resources, resources
from profiling.fake_driver import Launch, captured, driving
from profiling.static_model import code
from profiling.tunables import tunables
from profiling.whole_layer_launches import (
    DIM,
    HEADS,
    HIDDEN,
    LENGTH,
    PROGRAMS,
    ROWS,
    attention_candidates,
    feed_forward_candidates,
    run_feed_forward_half,
    run_half_layer,
)
from profiling.work import WORK, work

PASS = ROWS * LENGTH * DIM * 2
"""Bytes of one (total, D) tensor."""


ATTENTION_WEIGHTS, FEED_FORWARD_WEIGHTS = 4 * DIM * DIM * 2, 2 * DIM * HIDDEN * 2


WANTED = 1.4
"""Ratio to the parts from which a fused kernel is worth having."""


@dataclass(frozen=True)
class Machine:
    """Peaks behind the roofline: issue and matrix clocks, bytes; all a second."""

    name: str
    clocks: float
    memory: float
    cache: float


MACHINES = {
    "gfx942": Machine("MI300A", 228 * 4 * 2.1e9, 5.3e12, 25.8e12),
    "sm_90": Machine("H100 SXM", 132 * 4 * 1.83e9, 3.35e12, 5.5e12),
}


# What is tried --------------------------------------------------------------------------------


def example(dropout_p: float) -> tuple[Tensor, Tensor, EncoderLayerWeights, Tensor]:
    """x, offsets, weights, seed: shapes without memory."""
    shapes = (
        (DIM,), (DIM,), (3 * DIM, DIM), (3 * DIM,), (DIM, DIM), (DIM,),
        (DIM,), (DIM,), (HIDDEN, DIM), (HIDDEN,), (DIM, HIDDEN), (DIM,),
    )  # fmt: skip
    with torch.device("meta"):
        weights = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        x = torch.empty(ROWS * LENGTH, DIM, dtype=torch.bfloat16)
        offsets = torch.empty(ROWS + 1, dtype=torch.int32)
        seed = torch.empty((), dtype=torch.int64)
    return x, offsets, EncoderLayerWeights(*weights), seed


# Counting -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """A launch on the example batch.

    Attributes:
        name: what it computes.
        resources: of the compiled kernel.
        issue: issue clocks (AMD) or warp instructions, all programs.
        matrix: clocks of matrix units.
        memory: bytes, every tensor once.
        cache: bytes through L2.
        options: the configuration.
    """

    name: str
    resources: Resources
    issue: float
    matrix: float
    memory: float
    cache: float
    options: str = ""

    def microseconds(self, machine: Machine) -> tuple[float, float, float, float]:
        """Lower bounds by issue, matrix units, memory and L2, in microseconds of the roofline."""
        bounds = (
            self.issue / machine.clocks,
            self.matrix / machine.clocks,
            self.memory / machine.memory,
            self.cache / machine.cache,
        )
        return tuple(1e6 * bound for bound in bounds)  # type: ignore[return-value]


def count(
    name: str, done: Launch, programs: int, trips: list[float], memory: float, cache: float
) -> Counted:
    """Costs of a launch; its loops with products go round ``trips`` times in each program."""
    given, compiled = iter(trips), code(done.compiled)
    turns = [next(given, 1.0) if x.cost.matrix_instructions else 1.0 for x in compiled.loops]
    if next(given, None) is not None or len(trips) != sum(
        x.cost.matrix_instructions > 0 for x in compiled.loops
    ):
        raise ValueError(f"{name}: other loops than expected: {list(map(str, compiled.loops))}")
    total = compiled.cost(turns) * (programs * done.compiled.metadata.num_warps)
    meta = " ".join(f"{key}={value}" for key, value in sorted(done.options.items()) if value)
    sizes = ("RESIDENT", "CHUNK", "BLOCK_M", "BLOCK_ROWS", "BLOCK_N", "BLOCK_HIDDEN", "TILE_0")
    blocks = " ".join(f"{key}={done.constants[key]}" for key in sizes if key in done.constants)
    return Counted(
        name, resources(done.compiled), total.issue, total.matrix, memory, cache, f"{blocks} {meta}"
    )


def half(architecture: str, chosen: Configuration, dropout_p: float, *, whole: bool) -> Counted:
    """The attention half or the whole layer as one launch."""
    x, offsets, weights, seed = example(dropout_p)
    programs = PROGRAMS.get(architecture, 256)
    with captured(architecture) as launches:
        run_half_layer(
            x, offsets, weights, HEADS, dropout_p, seed, LENGTH, chosen,
            whole=whole, programs=programs,
        )  # fmt: skip
    meta = chosen.meta
    tiles = math.ceil(LENGTH / meta["BLOCK_ROWS"])
    if "RESIDENT" not in meta:
        trips, passes, qkv_reads = [HEADS, tiles], 5, 1
    else:
        trips = [math.ceil(LENGTH / meta["BLOCK_M"]), tiles]
        passes, qkv_reads = 7, 1
        if not meta["RESIDENT"]:
            trips, passes, qkv_reads = [1, tiles, *trips], 11, tiles
    cache = PASS * passes + ROWS * ATTENTION_WEIGHTS * (0.75 * qkv_reads + 0.25)
    memory = 2 * PASS + ATTENTION_WEIGHTS
    if whole:
        trips.append(HIDDEN / meta["BLOCK_HIDDEN"])
        cache += ROWS * FEED_FORWARD_WEIGHTS * tiles
        memory += FEED_FORWARD_WEIGHTS
    name = "whole layer" if whole else "attention half"
    return count(name, launches[0], ROWS, trips, memory, cache)


def feed_forward(architecture: str, chosen: Configuration, dropout_p: float) -> Counted:
    """The feed-forward half as one launch."""
    x, offsets, weights, seed = example(dropout_p)
    with captured(architecture) as launches:
        run_feed_forward_half(x, offsets, weights, dropout_p, seed, chosen)
    programs = launches[0].programs
    memory, cache = 2 * PASS + FEED_FORWARD_WEIGHTS, 2 * PASS + programs * FEED_FORWARD_WEIGHTS
    trips = [HIDDEN / chosen.meta["BLOCK_HIDDEN"]]
    return count("feed-forward half", launches[0], programs, trips, memory, cache)


PARTS = ("norm + qkv", "attention", "projection + residual", "norm + ffn in", "ffn out + residual")


def parts(architecture: str, dropout_p: float) -> list[Counted]:
    """The same by single launches: every product with what stands around it, and attention."""
    x, offsets, w, seed = example(dropout_p)
    launcher = Launcher(offsets, dropout_p, seed)
    sequences = Sequences(offsets, max_length=LENGTH)
    with _any_configuration(architecture), captured(architecture) as launches:
        qkv = launcher.product(x, w.qkv_weight, w.qkv_bias, norm=Norm(*w[:2]))
        heads = qkv.unflatten(1, (3, HEADS, DIM // HEADS)).unbind(1)
        attended = torch.empty_like(x)
        attention.forward_into(
            attended.unflatten(1, (HEADS, -1)), *heads, sequences, 0.125, dropout_p, seed
        )
        mid = launcher.product(attended, w.out_weight, w.out_bias, residual=x, output_site=1)
        hidden = launcher.product(
            mid, w.ffn_in_weight, w.ffn_in_bias, norm=Norm(*w[6:8]), gelu=True, output_site=2
        )
        launcher.product(hidden, w.ffn_out_weight, w.ffn_out_bias, residual=mid, output_site=3)
    found = []
    for name, done in zip(PARTS, launches, strict=True):
        tensors = [value for value in done.arguments.values() if isinstance(value, Tensor)]
        memory = sum(
            value.numel() * (2 if value.numel() >= x.numel() else value.element_size())
            for value in tensors
        )
        loops = [x for x in code(done.compiled).loops if x.cost.matrix_instructions]
        if done.kernel in WORK:
            described = work(done, LENGTH)
            programs = described.programs
            known = dict(zip(code(done.compiled).loops, described.trips, strict=True))
            trips = [known[loop] for loop in loops]
        else:
            programs = done.programs
            trips = [done.constants["K"] / done.constants["BLOCK_K"]] * len(loops)
        weight = 0.0
        if "K" in done.constants:
            weight = 2 * done.constants["K"] * min(done.constants["N"], done.constants["BLOCK_N"])
        found.append(count(name, done, programs, trips, memory, memory + programs * weight))
    return found


@contextlib.contextmanager
def _any_configuration(architecture: str) -> Iterator[None]:
    """The tables', or the first candidate of a kernel that they lack."""
    with contextlib.ExitStack() as stack:
        for name, width, length in (("layer_product", DIM, 0), ("short_forward", 32, LENGTH)):
            with driving(architecture):
                known = configuration(name, torch.bfloat16, width, length)
            if known is None:
                tunable = tunables()[name]
                at = next((x for x in sorted(tunable.lengths) if x >= length), length)
                candidates = tunable.candidates(architecture, torch.bfloat16, width, at)
                stack.enter_context(forced(name, candidates[0]))
        yield


# The report -----------------------------------------------------------------------------------


def best(
    candidates: list[Configuration],
    counted: Callable[[Configuration], Counted],
    say: Callable[[Counted], object] | None = None,
) -> Counted:
    """Fits and does not spill; then occupancy; then least issue."""
    found = []
    for chosen in candidates:
        try:
            found.append(counted(chosen))
        except Exception as problem:  # what compilers raise on a configuration is not listed
            print(f"    {dict(chosen.meta)}: {' '.join(str(problem).split())[-120:]}")
            continue
        if say:
            say(found[-1])
    return min(
        found,
        key=lambda x: (
            bool(x.resources.broken_limits()), -min(x.resources.occupancy, 2), x.issue
        ),
    )  # fmt: skip


HEADER = (
    f"{'':24}{'regs':>5}{'spill':>6}{'LDS':>7}{'occ':>5}{'issue/k':>9}{'matrix/k':>9}"
    f"{'issue':>8}{'matrix':>8}{'memory':>8}{'L2':>7}   (us of the roofline)"
)


def line(x: Counted, machine: Machine | None, *, options: bool = False) -> str:
    """One launch; issue and matrix clocks also for 1,000 real (query, key, head) triples."""
    r, thousands = x.resources, ROWS * HEADS * LENGTH**2 / 1000
    text = (
        f"{x.name:24}{r.registers:5}{r.spills:6}{r.shared:7}{r.occupancy:5g}"
        f"{x.issue / thousands:9.0f}{x.matrix / thousands:9.0f}"
    )
    if machine:
        text += "{:8.0f}{:8.0f}{:8.0f}{:7.0f}".format(*x.microseconds(machine))
    return f"{text}   {x.options}" if options else text


def bound(launches: list[Counted], machine: Machine, *, cache: bool = False) -> float:
    """Roofline of launches that follow one another, with L2 as a further roof on request."""
    return sum(max(x.microseconds(machine)[: 4 if cache else 3]) for x in launches)


def added(launches: list[Counted], machine: Machine) -> float:
    """The same if issue and memory did not overlap."""
    return sum(x.microseconds(machine)[0] + x.microseconds(machine)[2] for x in launches)


def verdict(one: list[Counted], many: list[Counted], machine: Machine) -> str:
    """Ratios, and whether they and the resources allow to ship."""
    ratio = bound(many, machine) / bound(one, machine)
    with_cache = bound(many, machine, cache=True) / bound(one, machine, cache=True)
    problems = [problem for x in one for problem in x.resources.broken_limits()]
    if min(ratio, with_cache) < WANTED:
        problems.append(f"less than {WANTED}")
    return (
        f"{bound(many, machine):6.0f} /{bound(one, machine):5.0f} us = {ratio:.2f}"
        f" {with_cache:6.2f} {added(many, machine) / added(one, machine):6.2f}   "
        + (f"not viable: {', '.join(problems)}" if problems else "viable")
    )


def report(architecture: str, dropout_p: float, everything: bool) -> None:
    """Prints the table of one architecture."""
    machine = MACHINES.get(architecture)
    named = f" ({machine.name})" if machine else ""
    print(f"\n{architecture}{named}, dropout {dropout_p:g}\n{HEADER}")

    def say(x: Counted) -> None:
        print(line(x, machine, options=True), flush=True)

    shown = say if everything else None
    attention = attention_candidates(architecture, everything)
    fused = best(attention, lambda c: half(architecture, c, dropout_p, whole=False), shown)
    ffn = best(
        feed_forward_candidates(architecture),
        lambda c: feed_forward(architecture, c, dropout_p),
        shown,
    )
    layer = best(attention, lambda c: half(architecture, c, dropout_p, whole=True), shown)
    separate = parts(architecture, dropout_p)
    for x in (fused, ffn, layer, *separate):
        print(line(x, machine, options=x not in separate), flush=True)
    if machine is None:
        return
    print("parts / fused: roofline, with L2 as a roof, issue and memory added")
    for name, one, many in (
        ("attention half", [fused], separate[:3]),
        ("feed-forward half", [ffn], separate[3:]),
        ("two halves", [fused, ffn], separate),
        ("whole layer", [layer], separate),
    ):
        print(f"  {name:18} {verdict(one, many, machine)}")
    unfused, epilogues = (1e6 * n * PASS / machine.memory for n in (38, 26))
    print(f"  memory alone of 38 tensor passes {unfused:.0f} us, of 26 {epilogues:.0f} us, "
          f"of 4 {1e6 * 4 * PASS / machine.memory:.0f} us")  # fmt: skip


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="profiling.whole_layer", description=__doc__)
    parser.add_argument(
        "--architecture", nargs="*", default=["gfx942", "gfx950", "sm_90", "sm_100"]
    )
    parser.add_argument("--all", action="store_true", help="print every candidate")
    parser.add_argument("--dropout", action="store_true", help="dropout 0.1 too")
    options = parser.parse_args(arguments)
    for architecture in options.architecture:
        for dropout_p in (0.0, 0.1) if options.dropout else (0.0,):
            report(architecture, dropout_p, options.all)


if __name__ == "__main__":
    main(sys.argv[1:])
