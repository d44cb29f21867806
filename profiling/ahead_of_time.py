"""What a compiled kernel takes: registers, spills, shared memory, matrix instructions, load widths.

Read from the assembly that Triton made, which needs no device. An honest gate against regressions
(a spill, a lost vector load, a product that fell back to scalar code), never a statement of speed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton

from profiling.fake_driver import SHARED_LIMIT

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTER_LIMIT = {"amd": 512, "nvidia": 255}
_NVIDIA_SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.

    Attributes:
        architecture: what it was compiled for.
        warps: warps (AMD: waves of 64) of a program.
        registers: vector registers of a thread, accumulators included.
        accumulators: those of AMD's that only matrix instructions reach quickly.
        scalar_registers: AMD's scalar registers.
        spills: vector registers kept in memory for want of room (NVIDIA: instructions for it).
        scalar_spills: scalar registers kept in lanes of vector registers.
        scratch: bytes of private memory of a thread.
        shared: bytes of shared memory (LDS) of a program.
        occupancy: warps that fit on a quarter of a compute unit at once (SIMD, sub-partition).
        matrix: matrix instruction -> count.
        loads: bytes of a global load -> count.
        stores: bytes of a global store -> count.
        shared_access: instructions that read or write shared memory.
        barriers: barriers of a program.
        exponentials: exponential instructions.
        instructions: instructions in all.
    """

    architecture: str
    warps: int
    registers: int
    accumulators: int
    scalar_registers: int
    spills: int
    scalar_spills: int
    scratch: int
    shared: int
    occupancy: float
    matrix: dict[str, int]
    loads: dict[str, int]
    stores: dict[str, int]
    shared_access: int
    barriers: int
    exponentials: int
    instructions: int

    def broken_limits(self) -> list[str]:
        """What a shipped kernel may not do."""
        broken = []
        if self.spills:
            broken.append(f"{self.spills} spills")
        if self.scratch:
            broken.append(f"{self.scratch} bytes of scratch")
        if self.shared > SHARED_LIMIT[self.architecture]:
            limit = SHARED_LIMIT[self.architecture]
            broken.append(f"{self.shared} bytes of shared memory, there are {limit}")
        return broken

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def vendor(architecture: str) -> str:
    """Who makes it, "amd" or "nvidia"."""
    return "amd" if architecture.startswith("gfx") else "nvidia"


def architecture_of(compiled: Any) -> str:
    """The name of a compiled kernel's target, as in the tables."""
    target = compiled.metadata.target
    return target.arch if target.backend == "hip" else f"sm_{target.arch}"


def resources(compiled: Any) -> Resources:
    """Reads the resources of a compiled kernel."""
    read = _amd if vendor(architecture_of(compiled)) == "amd" else _nvidia
    return read(compiled)


def instructions(compiled: Any) -> list[str]:
    """Labels and instructions of a compiled kernel, one a line, comments removed."""
    if vendor(architecture_of(compiled)) == "amd":
        return _amd_lines(compiled.asm["amdgcn"])
    return _nvidia_lines(_disassembled(compiled.asm["cubin"]))


def _amd_lines(assembly: str) -> list[str]:
    lines = []
    inside = False
    for line in assembly.splitlines():
        text = line.split(";")[0].strip()
        if text.startswith(".Lfunc_end"):
            break
        if not inside:
            inside = bool(re.match(r"^[A-Za-z_]\w*:", text))
        elif text.startswith(".LBB") or (text and not text.startswith(".")):
            lines.append(text)
    return lines


def _nvidia_lines(assembly: str) -> list[str]:
    lines = []
    for line in assembly.splitlines():
        if label := re.match(r"^(\.L_\w+):", line):
            lines.append(label.group(0))
        elif found := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(found.group(1).strip())
    return lines


@lru_cache(maxsize=256)
def _disassembled(binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [NVIDIA_TOOLS / "nvdisasm", "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd(compiled: Any) -> Resources:
    assembly, architecture = compiled.asm["amdgcn"], architecture_of(compiled)

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, name
        return int(found.group(1))

    lines = _amd_lines(assembly)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    occupancy = re.search(r"; Occupancy: (\d+)", assembly)
    assert occupancy
    fitting = float(occupancy.group(1))
    if shared:  # the compiler does not know of shared memory, which Triton asks for at the launch
        fitting = min(fitting, SHARED_LIMIT[architecture] // shared * warps / 4)
    return Resources(
        architecture=architecture,
        warps=warps,
        registers=number("vgpr_count"),
        accumulators=number("agpr_count"),
        scalar_registers=number("sgpr_count"),
        spills=number("vgpr_spill_count"),
        scalar_spills=number("sgpr_spill_count"),
        scratch=number("private_segment_fixed_size"),
        shared=shared,
        occupancy=fitting,
        matrix=_count(lines, r"^(v_s?mfma\w+)"),
        loads=_widths(lines, r"^(?:global|buffer|flat)_load_\w+"),
        stores=_widths(lines, r"^(?:global|buffer|flat)_store_\w+"),
        shared_access=_total(lines, r"^ds_(?:read|write|load|store)"),
        barriers=_total(lines, r"^s_barrier"),
        exponentials=_total(lines, r"^v_exp_"),
        instructions=sum(not line.endswith(":") for line in lines),
    )


def _nvidia(compiled: Any) -> Resources:
    architecture = architecture_of(compiled)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    registers, stack, local = _nvidia_usage(compiled.asm["cubin"])
    lines = [re.sub(r"^@!?U?P\w+\s+", "", line) for line in instructions(compiled)]
    return Resources(
        architecture=architecture,
        warps=warps,
        registers=registers,
        accumulators=0,
        scalar_registers=0,
        spills=_total(lines, r"^(?:STL|LDL)\b"),
        scalar_spills=0,
        scratch=stack + local,
        shared=shared,
        occupancy=_nvidia_occupancy(architecture, registers, shared, warps),
        matrix=_count(lines, r"^(HMMA\.\w+|IMMA\.\w+|DMMA\S*|HGMMA\.\w+|UTC\w*MMA)"),
        loads=_widths(lines, r"^(?:LDG|LDGSTS|UTMALDG)\S*"),
        stores=_widths(lines, r"^(?:STG|UTMASTG)\S*"),
        shared_access=_total(lines, r"^(?:LDS|STS|LDSM|STSM)\b"),
        barriers=_total(lines, r"^BAR\b"),
        exponentials=_total(lines, r"^MUFU\.EX2"),
        instructions=sum(not line.endswith(":") and line != "NOP" for line in lines),
    )


@lru_cache(maxsize=256)
def _nvidia_usage(binary: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack, bytes of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [NVIDIA_TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    registers, stack, local = map(int, found.groups())
    return registers, stack, local


def _nvidia_occupancy(architecture: str, registers: int, shared: int, warps: int) -> float:
    granted = -(-registers // 8) * 8 * 32  # registers of a warp
    fitting = min(64 // warps, 65536 // (granted * warps))
    fitting = min(fitting, _NVIDIA_SHARED[architecture] // (shared + 1024))
    return fitting * warps / 4


def memory_width(name: str) -> int:
    """Bytes that one lane moves by an instruction on global memory; 0 for a block copy (TMA)."""
    if name.startswith("UTMA"):
        return 0
    if words := re.search(r"_dword(?:x(\d))?", name):
        return 4 * int(words.group(1) or 1)
    if name.startswith(("global", "buffer", "flat", "scratch")):
        return 1 if "byte" in name else 2
    bits = re.search(r"\.(128|64|U?S?16|U?S?8)\b", name)
    return int(re.sub(r"\D", "", bits.group(1))) // 8 if bits else 4


def _count(lines: list[str], pattern: str) -> dict[str, int]:
    found = (re.match(pattern, line) for line in lines)
    return dict(sorted(Counter(match.group(1) for match in found if match).items()))


def _widths(lines: list[str], pattern: str) -> dict[str, int]:
    found = (re.match(pattern, line) for line in lines)
    counts = Counter(memory_width(match.group(0)) for match in found if match)
    return {str(width): counts[width] for width in sorted(counts)}


def _total(lines: list[str], pattern: str) -> int:
    return sum(bool(re.match(pattern, line)) for line in lines)
