"""What attention issues and moves, ours beside the textbook's: a model of kernels, not a time.

Every case is launched through the functions that users reach, on rows of one length, compiled for
the target, and counted by `static_model`: issue clocks of a SIMD (AMD) or warp instructions
(NVIDIA) per 1,000 pairs of a *real* query and a real key, so that padding inside tiles counts as
waste. Bytes are what all lanes ask for; the minimum is every input read and every output written
once. The roofline is a bound from below: no kernel of this instruction mix could be faster.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from aam_kernels._runtime.grouping import Sequences
from profiling import baselines
from profiling.ahead_of_time import Resources, resources, vendor
from profiling.fake_driver import Launch, captured
from profiling.static_model import Cost
from profiling.work import cost

ROWS, HEADS = 512, 4  # of a case; figures are per pair and do not depend on them


@dataclass(frozen=True)
class Device:
    """What bounds a kernel: units that issue, and memory, at their peak clocks and rates.

    Attributes:
        name: the product.
        units: SIMDs or sub-partitions.
        clock: Hz.
        bandwidth: bytes a second.
    """

    name: str
    units: int
    clock: float
    bandwidth: float


DEVICES = {
    "gfx942": Device("MI300A", 228 * 4, 2.1e9, 5.3e12),
    "sm_90": Device("H100", 132 * 4, 1.83e9, 3.35e12),
}
ROOFLINE_ROWS = 8192
KERNELS = ("aam_kernels", "textbook", "textbook, 64-bit", "textbook, tuned")
"""Ours; the baseline with the blocks it usually has, with 64-bit addresses, with better blocks."""


@dataclass(frozen=True)
class Case:
    """Self-attention of rows of one length.

    Attributes:
        architecture: target.
        dtype: of the tensors.
        length: rows of a sequence.
        head_dim: elements of a head.
        dropout: whether probability 0.1 is dropped.
        backward: the backward pass, else the forward pass.
        kernels: one of `KERNELS`.
    """

    architecture: str
    dtype: torch.dtype
    length: int
    head_dim: int
    dropout: bool
    backward: bool
    kernels: str

    @property
    def pairs(self) -> int:
        """Real query-key pairs of all heads."""
        return ROWS * HEADS * self.length**2

    @property
    def least_bytes(self) -> int:
        """Of every tensor once: 4 or 8 of the size of the query, and the logsumexp."""
        elements = ROWS * HEADS * self.length
        tensors = 8 if self.backward else 4
        return elements * (tensors * self.head_dim * self.dtype.itemsize + 4)


@dataclass(frozen=True)
class Figures:
    """What a case takes; costs are of all its launches, per 1,000 real pairs.

    Attributes:
        case: what was compiled.
        launches: kernels launched.
        worst: resources of the launch with the fewest warps that fit.
        cost: by the static model.
        error: why there are no figures.
    """

    case: Case
    launches: int = 0
    worst: Resources | None = None
    cost: Cost | None = None
    error: str = ""

    @property
    def bytes_ratio(self) -> float:
        """Bytes asked for, as a multiple of the minimum."""
        if self.cost is None:
            return nan
        return self.cost.bytes * self.case.pairs / 1000 / self.case.least_bytes

    def roofline(self) -> tuple[float, float, float] | None:
        """Microseconds that 8,192 rows of 4 heads cannot go below: issue, matrix unit, memory."""
        device = DEVICES.get(self.case.architecture)
        if device is None or self.cost is None:
            return None
        share = ROOFLINE_ROWS / ROWS
        clocks = self.case.pairs / 1000 * share / (device.units * device.clock) * 1e6
        memory = self.case.least_bytes * share / device.bandwidth * 1e6
        return self.cost.issue * clocks, self.cost.matrix * clocks, memory


def figures(case: Case, *, cycles: bool = False) -> Figures:
    """Compiles and counts a case."""
    launches = launched(case)
    failed = [launch.error for launch in launches if launch.error is not None]
    if failed or not launches:
        return Figures(case, error=failed[0] if failed else "nothing was launched")
    total = Cost()
    for launch in launches:
        total += cost(launch, case.length, cycles=cycles) * (1000 / case.pairs)
    measured = [resources(launch.compiled) for launch in launches]
    worst = min(measured, key=lambda used: used.occupancy)
    return Figures(case, len(launches), worst, total)


def launched(case: Case) -> list[Launch]:
    """The launches of one pass, compiled."""
    with captured(case.architecture, survive=True) as launches:
        try:
            (_ours if case.kernels == "aam_kernels" else _textbook)(case)
        except (AssertionError, RuntimeError) as problem:  # no configuration, so no launch
            launches.append(Launch("none", (0, 0, 0), error=repr(problem)))
    return launches


def _ours(case: Case) -> None:
    """As the encoder layer calls it: query, key and value are slices of one packed tensor."""
    operation = importlib.import_module("aam_kernels.attention.triton")
    total = ROWS * case.length
    packed = _meta(total, 3, HEADS, case.head_dim, dtype=case.dtype)
    query, key, value = packed.unbind(1)
    sequences = Sequences(_meta(ROWS + 1, dtype=torch.int32), max_length=case.length)
    seed = _meta(dtype=torch.int64) if case.dropout else None
    rest = (sequences, case.head_dim**-0.5, 0.1 if case.dropout else 0.0, seed)
    if not case.backward:
        operation.forward(query, key, value, *rest)
        return
    output = _meta(total, HEADS, case.head_dim, dtype=case.dtype)
    lse = _meta(total, HEADS, dtype=torch.float32)
    operation.backward(output, query, key, value, output, lse, *rest)


def _textbook(case: Case) -> None:
    x = _meta(ROWS * HEADS, case.length, case.head_dim, dtype=case.dtype)
    lengths = _meta(ROWS * HEADS, dtype=torch.int32)
    blocks = textbook_blocks(case.architecture, tuned="tuned" in case.kernels)
    flat = "64-bit" in case.kernels
    if not case.backward:
        baselines.forward(x, x, x, lengths, blocks, flat=flat)
        return
    lse = _meta(ROWS * HEADS, case.length, dtype=torch.float32)
    baselines.backward(x, x, x, x, x, lse, lengths, blocks, flat=flat)


def textbook_blocks(architecture: str, *, tuned: bool) -> baselines.Blocks:
    """The blocks that such kernels usually have, or the best of a few by this very model."""
    if vendor(architecture) == "amd":
        return baselines.Blocks(32, 32, 1) if tuned else baselines.Blocks(128, 64, 4)
    return baselines.Blocks(64, 64, 2) if tuned else baselines.Blocks(64, 64, 4)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
