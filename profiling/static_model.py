"""How much a program issues: a static model of compiled kernels. No number here is a time.

A compiled kernel is cut into blocks and loops; a block counts as often as the loops around it go
round, and blocks that a typical program does not reach count nothing. For AMD the unit is issue
clocks of one SIMD: a wave of 64 issues an ordinary vector instruction in 4 clocks, a
transcendental or 32-bit integer product in 16; matrix instructions run beside them on their own
unit for ``2 M N K / rate`` clocks, LDS at 128 bytes a clock for four SIMDs. For NVIDIA it is warp
instructions. ``cycles`` is what llvm-mca makes of the AMD code where it is installed; it knows
dependencies within a wave, and no memory.

Good to about 10 %: it ranks variants of a kernel, and kernels against one another.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from profiling.ahead_of_time import architecture_of, instructions, memory_width, vendor

MATRIX_RATE = {  # operations a clock of one SIMD's matrix unit, by operand type
    "gfx90a": {"f32": 64, "half": 256},
    "gfx942": {"f32": 64, "xf32": 256, "half": 512},
    "gfx950": {"f32": 64, "half": 1024},
}
_TRANSCENDENTAL = re.compile(r"^v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_f")
_QUARTER_RATE = re.compile(r"^v_(?:mul_lo_u32|mul_hi_[ui]32|mad_u64_u32|mad_i64_i32|\w+_f64)")


@dataclass(frozen=True)
class Cost:
    """What one warp issues.

    Attributes:
        instructions: all of them.
        issue: AMD: clocks in which vector instructions issue; NVIDIA: instructions.
        matrix: clocks of the matrix unit.
        transcendental: clocks of the transcendental unit (AMD: part of ``issue``).
        shared: AMD: clocks of the LDS, a SIMD's share; NVIDIA: instructions on shared memory.
        memory: instructions on global memory.
        bytes: what they ask for in all lanes, masked or not.
        barriers: barriers.
        exponentials: exponential instructions.
        matrix_instructions: matrix instructions.
        cycles: cycles by llvm-mca; NaN where not asked for or not to be had.
    """

    instructions: float = 0.0
    issue: float = 0.0
    matrix: float = 0.0
    transcendental: float = 0.0
    shared: float = 0.0
    memory: float = 0.0
    bytes: float = 0.0
    barriers: float = 0.0
    exponentials: float = 0.0
    matrix_instructions: float = 0.0
    cycles: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """The sum, unit by unit."""
        names = (unit.name for unit in fields(Cost))
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def __mul__(self, factor: float) -> Cost:
        """The same, ``factor`` times."""
        return Cost(**{unit.name: getattr(self, unit.name) * factor for unit in fields(Cost)})


@dataclass(frozen=True)
class Loop:
    """Blocks that can be left and reached again only through the first of them.

    Attributes:
        head: the block through which it is entered.
        body: its blocks.
        depth: loops around it.
        cost: one turn of it, loops inside it once.
    """

    head: int
    body: frozenset[int]
    depth: int
    cost: Cost

    def __str__(self) -> str:
        """What tells it from its neighbours."""
        c = self.cost
        return (
            f"{'  ' * self.depth}loop of {c.instructions:.0f} instructions, "
            f"{c.matrix_instructions:.0f} matrix, {c.exponentials:.0f} exponentials, "
            f"{c.memory:.0f} memory"
        )


@dataclass(frozen=True)
class Code:
    """A compiled kernel as blocks of instructions and loops over them.

    Attributes:
        architecture: what it was compiled for.
        blocks: instructions of each block, in the order of the code.
        successors: blocks that may follow each block.
        costs: cost of each block.
        loops: outermost first, in the order of the code.
    """

    architecture: str
    blocks: tuple[tuple[str, ...], ...]
    successors: tuple[tuple[int, ...], ...]
    costs: tuple[Cost, ...]
    loops: tuple[Loop, ...]

    def cost(self, trips: Sequence[float], *, cycles: bool = False) -> Cost:
        """What a warp of a typical program issues.

        Args:
            trips: how often each loop goes round each time it is entered; a loop that goes
                round 0 times takes with it the blocks that only lead to it or from it.
            cycles: ask llvm-mca too.

        Raises:
            ValueError: another number of trips than there are loops.
        """
        if len(trips) != len(self.loops):
            found = "\n".join(map(str, self.loops))
            raise ValueError(f"{len(trips)} trips for {len(self.loops)} loops:\n{found}")
        times = [1.0] * len(self.blocks)
        for loop, count in zip(self.loops, trips, strict=True):
            for block in loop.body:
                times[block] *= count
        for block in self._unreached(trips):
            times[block] = 0.0
        total = Cost()
        for cost, count in zip(self.costs, times, strict=True):
            total += cost * count
        return total + Cost(cycles=self._cycles(times) if cycles else float("nan"))

    def _unreached(self, trips: Sequence[float]) -> set[int]:
        """Blocks that serve only loops that go round 0 times."""
        counted = list(zip(self.loops, trips, strict=True))
        run = [loop.head for loop, count in counted if count > 0]
        idle = [loop.head for loop, count in counted if count == 0]
        unreached = {block for loop, count in counted if count == 0 for block in loop.body}
        everywhere = self._reachable(0, set())
        ends = {block for block in everywhere if not self.successors[block]}
        for block in everywhere - {0} if run and idle else ():
            without = self._reachable(0, {block})
            leads_to_idle = any(head not in without for head in idle)
            runs_without = all(head in without for head in run)
            if leads_to_idle and runs_without and ends & self._reachable(run[-1], {block}):
                unreached.add(block)
        return set(range(len(self.blocks))) - self._reachable(0, unreached)

    def _reachable(self, start: int, without: set[int]) -> set[int]:
        seen, waiting = set(), [start]
        while waiting:
            block = waiting.pop()
            if block in seen or block in without:
                continue
            seen.add(block)
            waiting.extend(self.successors[block])
        return seen

    def _cycles(self, times: list[float]) -> float:
        """Blocks that run equally often, next to each other, are one stream to llvm-mca."""
        streams: dict[tuple[float, int], list[str]] = {}
        for block, count in enumerate(times):
            around = [number for number, loop in enumerate(self.loops) if block in loop.body]
            key = (count, around[-1] if around else -1)
            if count:
                streams.setdefault(key, []).extend(self.blocks[block])
        return sum(
            count * _llvm_mca(tuple(lines), self.architecture)
            for (count, _), lines in streams.items()
        )


@lru_cache(maxsize=512)
def _code(architecture: str, lines: tuple[str, ...]) -> Code:
    blocks, starts = _blocks(lines)
    successors = tuple(_successors(block, number, starts, len(blocks))
                       for number, block in enumerate(blocks))  # fmt: skip
    count = _amd_cost if vendor(architecture) == "amd" else _nvidia_cost
    costs = tuple(count(block, architecture) for block in blocks)
    loops = _loops(successors, costs)
    return Code(architecture, tuple(map(tuple, blocks)), successors, costs, loops)


def _loops(successors: Sequence[tuple[int, ...]], costs: Sequence[Cost]) -> tuple[Loop, ...]:
    """Natural loops: an edge back to a block that every way here has passed ends a turn."""
    predecessors: list[set[int]] = [set() for _ in successors]
    for block, following in enumerate(successors):
        for target in following:
            predecessors[target].add(block)
    dominators = _dominators(predecessors)
    bodies: dict[int, set[int]] = {}
    for block, following in enumerate(successors):
        for head in following:
            if not dominators[block] >> head & 1:
                continue
            body, waiting = bodies.setdefault(head, {head}), [block]
            while waiting:
                inside = waiting.pop()
                if inside not in body:
                    body.add(inside)
                    waiting.extend(predecessors[inside])
    loops = []
    for head, body in sorted(bodies.items()):
        turn = _sum(costs[block] for block in sorted(body))
        if turn.instructions > 3:  # not the trap after the end, or a wait for an asynchronous copy
            depth = sum(head in other for other in bodies.values()) - 1
            loops.append(Loop(head, frozenset(body), depth, turn))
    return tuple(loops)


def _dominators(predecessors: Sequence[set[int]]) -> list[int]:
    """For every block the set, as bits, of the blocks that every way from the entry passes."""
    everything = (1 << len(predecessors)) - 1
    found = [1] + [everything] * (len(predecessors) - 1)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(predecessors)):
            common = everything
            for before in predecessors[block]:
                common &= found[before]
            common |= 1 << block
            if common != found[block]:
                found[block], changed = common, True
    # A block that nothing leads to has every bit, and would end loops that do not exist.
    return [
        bits if block == 0 or predecessors[block] else 1 << block
        for block, bits in enumerate(found)
    ]


def code(compiled: Any) -> Code:
    """Blocks and loops of a compiled kernel."""
    return _code(architecture_of(compiled), tuple(instructions(compiled)))


def _sum(costs: Iterable[Cost]) -> Cost:
    total = Cost()
    for cost in costs:
        total += cost
    return total


def _blocks(lines: Iterable[str]) -> tuple[list[list[str]], dict[str, int]]:
    """Instructions between labels and jumps; label -> block."""
    blocks: list[list[str]] = [[]]
    starts: dict[str, int] = {}
    for line in lines:
        if line.endswith(":"):
            if blocks[-1]:
                blocks.append([])
            starts[line[:-1]] = len(blocks) - 1
            continue
        blocks[-1].append(line)
        if _target(line) or _ends(line):
            blocks.append([])
    return blocks, starts


def _target(line: str) -> str | None:
    """The label that an instruction may jump to."""
    found = re.match(r"^s_c?branch\w*\s+(\.LBB\w+)", line)
    found = found or re.search(r"\bBRA\S*\s.*`\((\.L\w+)\)", line)
    return found.group(1) if found else None


def _ends(line: str) -> bool:
    return line.startswith(("s_endpgm", "EXIT", "RET"))


def _successors(
    block: list[str], number: int, starts: dict[str, int], count: int
) -> tuple[int, ...]:
    following = (number + 1,) if number + 1 < count else ()
    if not block or not (target := _target(block[-1])):
        return () if block and _ends(block[-1]) else following
    line = block[-1]
    always = line.startswith("s_branch") or (
        line.startswith("BRA") and not re.search(r"\bU?P\d", line)
    )
    jump = (starts[target],) if target in starts else ()
    return jump if always else jump + following


def _amd_cost(block: Sequence[str], architecture: str) -> Cost:
    total = dict.fromkeys((unit.name for unit in fields(Cost)), 0.0)
    for line in block:
        name = line.split()[0]
        total["instructions"] += 1
        if name.startswith(("v_mfma", "v_smfma")):
            total["matrix"] += _matrix_clocks(name, architecture)
            total["matrix_instructions"] += 1
        elif _TRANSCENDENTAL.match(name):
            total["issue"] += 16
            total["transcendental"] += 16
            total["exponentials"] += name.startswith("v_exp")
        elif name.startswith("v_"):
            total["issue"] += 16 if _QUARTER_RATE.match(name) else 4
        elif name.startswith("ds_"):
            total["shared"] += 64 * _lds_width(name) / 128 * 4
        elif name.startswith(("global_", "buffer_", "flat_", "scratch_")):
            total["memory"] += 1
            total["bytes"] += 64 * memory_width(name)
        elif name == "s_barrier":
            total["barriers"] += 1
    return Cost(**total)


def _lds_width(name: str) -> int:
    bits = re.search(r"b(128|96|64|32|16|8)", name)
    width = max(4, int(bits.group(1)) // 8) if bits else 4
    return 2 * width if re.match(r"ds_(?:read|write|load|store)2", name) else width


def _matrix_clocks(name: str, architecture: str) -> float:
    found = re.match(r"v_s?mfma_\w+?_(\d+)x(\d+)x(\d+)_?(?:(\d+)b_)?(\w+)", name)
    if not found:
        return 0.0
    rows, columns, depth = map(int, found.group(1, 2, 3))
    kind = found.group(5)
    kind = "xf32" if kind.startswith("xf32") else "f32" if kind.startswith("f32") else "half"
    operations = 2 * rows * columns * depth * int(found.group(4) or 1)
    return operations / MATRIX_RATE[architecture][kind]


def _nvidia_cost(block: Sequence[str], architecture: str) -> Cost:
    total = dict.fromkeys((unit.name for unit in fields(Cost)), 0.0)
    for line in block:
        name = re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]
        if name == "NOP":
            continue
        total["instructions"] += 1
        total["issue"] += 1
        if name.startswith("MUFU"):
            total["transcendental"] += 8
            total["exponentials"] += name.startswith("MUFU.EX2")
        elif name.startswith(("HMMA", "HGMMA", "UTC")) and "MMA" in name:
            total["matrix"] += _tensor_clocks(name)
            total["matrix_instructions"] += 1
        elif name.startswith(("LDS", "STS")):
            total["shared"] += 1
        elif name.startswith(("LDG", "STG", "UTMA")):
            total["memory"] += 1
            total["bytes"] += 32 * memory_width(name)
        elif name.startswith("BAR"):
            total["barriers"] += 1
    return Cost(**total)


def _tensor_clocks(name: str) -> float:
    """Clocks of a sub-partition's tensor core, at Hopper's rates."""
    if name.startswith("HMMA.16816"):
        return 4.0
    if name.startswith("HMMA.1688"):
        return 4.0 if "TF32" in name else 2.0
    found = re.match(r"HGMMA\.64x(\d+)x(\d+)", name)
    if not found:
        return 0.0
    columns, depth = map(int, found.groups())  # a warp group: each warp on its own tensor core
    return 64 * columns * depth * 2 / 4096 * (1 if depth >= 16 else 2)


@lru_cache(maxsize=1)
def _llvm_mca_path() -> str | None:
    return shutil.which("llvm-mca-19")


@lru_cache(maxsize=1024)
def _llvm_mca(lines: tuple[str, ...], architecture: str) -> float:
    """Cycles of a stream of AMD instructions; NaN where llvm-mca-19 is not installed or fails."""
    path = _llvm_mca_path()
    if path is None or vendor(architecture) != "amd":
        return float("nan")
    text = [_for_llvm_mca(line) for line in lines]
    text = [line for line in text if line and "@" not in line and "$" not in line]
    if not text:
        return 0.0
    command = [path, "-mtriple=amdgcn-amd-amdhsa", f"-mcpu={architecture}", "-iterations=1"]
    try:
        result = subprocess.run(
            command, input="\n".join(text) + "\n", capture_output=True, text=True, timeout=20
        )
    except subprocess.TimeoutExpired:  # version 19 never ends on some streams
        return float("nan")
    found = re.search(r"Total Cycles:\s+(\d+)", result.stdout)
    return float(found.group(1)) if found else float("nan")


def _for_llvm_mca(line: str) -> str:
    """Without jumps; version 19 crashes on buffer accesses, which become global ones."""
    if re.match(r"^s_c?branch|^s_endpgm|^s_setpc|^s_getpc|^s_code_end", line):
        return ""
    pattern = r"buffer_(load|store)_(\w+) (\S+), (\S+), s\[(\d+):\d+\]"
    if not (found := re.match(pattern, line)):
        return line
    action, kind, value, place, base = found.groups()
    value, place = value.rstrip(","), place.rstrip(",")
    where = f"s[{base}:{int(base) + 1}]"
    first, second = (value, place) if action == "load" else (place, value)
    return f"global_{action}_{kind} {first}, {second}, {where}"
