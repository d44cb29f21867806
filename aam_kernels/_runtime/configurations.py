"""How Triton kernels are launched: static tables, one JSON file an architecture.

A configuration is chosen by kernel, dtype, width and length and never measured at import or at
first call; ``python -m aam_kernels.tune`` measures on a device and writes a table. A table entry::

    {"short_forward": [{"dtype": "half", "width": 32, "length": 160,
                        "meta": {"BLOCK_M": 16}, "options": {"num_warps": 1}}, ...]}

serves float16 and bfloat16 ("half") or float32 ("float32"), widths (head_dim, or D) up to
``width`` and rows up to ``length``; ``meta`` are compile-time constants of the kernel, ``options``
those of the compiler. The entry with the smallest sufficient width, then length, counts.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TABLES = Path(__file__).parent / "tables"
AMD = ("gfx90a", "gfx942", "gfx950")
NVIDIA = ("sm_80", "sm_90", "sm_100")
ARCHITECTURES = (*AMD, *NVIDIA)
"""The architectures that have a table."""

OPTIONS = ("num_warps", "num_stages", "waves_per_eu", "matrix_instr_nonkdim", "kpack", "maxnreg")
"""Compiler options that a table may hold: Triton ignores unknown ones without a word."""


class Configuration(NamedTuple):
    """Compile-time constants of a kernel and options of the compiler."""

    meta: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Tunable:
    """What is needed to choose the configurations of a kernel.

    Attributes:
        kernel: name of the kernel, the key in the tables.
        widths: widths to have entries for.
        lengths: lengths to have entries for.
        candidates: (architecture, dtype, width, length) -> configurations worth trying, the
            likeliest first; empty where the kernel is not offered.
        example: (dtype, width, length, device) -> a function that launches the kernel once, on
            many rows of that length, through the launcher that users reach.
        constants: names of the meta parameters.
    """

    kernel: str
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    candidates: Callable[[str, torch.dtype, int, int], list[Configuration]]
    example: Callable[[torch.dtype, int, int, torch.device], Callable[[], object]]
    constants: tuple[str, ...] = field(default=())


def architecture() -> str:
    """The table that serves the current GPU.

    Raises:
        RuntimeError: no kernel was compiled for this architecture or anything it runs.
    """
    from triton.runtime import driver

    target = driver.active.get_current_target()
    name = target.arch if target.backend == "hip" else f"sm_{target.arch}"
    found = table_of(str(name))
    if found is None:
        raise RuntimeError(f"no Triton configuration for {name}; there are {ARCHITECTURES}")
    return found


def table_of(name: str) -> str | None:
    """The table for an architecture: its own, or for NVIDIA the newest one that it can run."""
    if name in ARCHITECTURES:
        return name
    if not name.startswith("sm_"):
        return None
    capability = int(name.removeprefix("sm_").rstrip("af"))
    if capability // 10 in (9, 10):
        return f"sm_{capability // 10}0"
    return "sm_80" if capability >= 80 else None


def configuration(kernel: str, dtype: torch.dtype, width: int, length: int) -> Configuration | None:
    """The configuration of a kernel on the current GPU; None where the table offers none."""
    if kernel in _FORCED:
        return _FORCED[kernel]
    return _lookup(architecture(), kernel, dtype_class(dtype), width, length)


@lru_cache(maxsize=4096)
def _lookup(table: str, kernel: str, dtype: str, width: int, length: int) -> Configuration | None:
    fitting = (
        entry
        for entry in load_table(table).get(kernel, ())
        if entry["dtype"] == dtype and entry["width"] >= width and entry["length"] >= length
    )
    best = min(fitting, key=lambda entry: (entry["width"], entry["length"]), default=None)
    return None if best is None else Configuration(best["meta"], best["options"])


def dtype_class(dtype: torch.dtype) -> str:
    """The name of a dtype in the tables."""
    return "float32" if dtype == torch.float32 else "half"


@lru_cache(maxsize=16)
def load_table(name: str) -> dict[str, list[dict[str, Any]]]:
    """The table of an architecture; a user's own from AAM_KERNELS_TABLES, else the shipped one.

    Raises:
        ValueError: an option that Triton does not know.
    """
    folder = Path(os.environ.get("AAM_KERNELS_TABLES", TABLES))
    path = folder / f"{name}.json"
    if not path.exists():
        path = TABLES / f"{name}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    for kernel, entries in table.items():
        for entry in entries:
            unknown = set(entry["options"]) - set(OPTIONS)
            if unknown:
                raise ValueError(f"{path}: {kernel}: unknown options {sorted(unknown)}")
    return table


_FORCED: dict[str, Configuration | None] = {}


@contextlib.contextmanager
def forced(kernel: str, chosen: Configuration | None) -> Iterator[None]:
    """Uses one configuration of a kernel for every case, for tuning and tests."""
    before = dict(_FORCED)
    _FORCED[kernel] = chosen
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(before)


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a product: IEEE float32 unless torch's own setting allows TF32."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32" if architecture() in ("gfx942", *NVIDIA) else "ieee"


def round_half_up(dtype: torch.dtype) -> bool:
    """Whether bfloat16 intermediates are rounded half up: where the processor has no convert.

    That is gfx90a and gfx942; AAM_KERNELS_ROUNDING=even asks for round-half-to-even there too.
    """
    if dtype != torch.bfloat16 or os.environ.get("AAM_KERNELS_ROUNDING", "") == "even":
        return False
    return architecture() in ("gfx90a", "gfx942")


def launch(
    kernel: Any, programs: int, *arguments: Any, configuration: Configuration, **constants: Any
) -> None:
    """Launches ``programs`` programs of a kernel, on the device of its first tensor."""
    if programs == 0:
        return
    first = next(x for x in arguments if isinstance(x, Tensor))
    guard = torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
    with guard:
        kernel[(programs,)](*arguments, **constants, **configuration.meta, **configuration.options)
