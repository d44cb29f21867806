"""What this machine is, and the most it can do: multiply-adds in registers, and copying memory.

Both limits are contestants beside the kernels, in every round: a kernel's share of them is taken
within a round, from the same moment of a machine that others may be using too.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PEAK, COPY = "FMA peak", "copy"
COPY_BYTES = 1 << 27  # beyond the last cache
FMA_ROUNDS = 8_000_000  # of 10 vectors: some 15 ms
ROOT = Path(__file__).parent.parent


def native() -> ModuleType | None:
    """The compiled extension, which knows the processor; None where it was not built."""
    try:
        return import_module("aam_kernels._native")
    except ImportError:
        return None


def multiply_adds(threads: int | None = None) -> Callable[[], dict[str, float]]:
    """Independent multiply-adds on registers, on every thread at once; says how many operations.

    Args:
        threads: None: as many as torch uses.

    Raises:
        RuntimeError: the extension was not built.
    """
    extension = native()
    if extension is None:
        raise RuntimeError("no FMA peak without aam_kernels._native: the extension was not built")

    def call() -> dict[str, float]:
        made = extension.multiply_adds(FMA_ROUNDS, threads=threads or torch.get_num_threads())
        return {"operations": 2.0 * made, "bytes": 0.0}

    return call


def copy() -> Callable[[], dict[str, float]]:
    """Copying a tensor larger than the last cache; its bytes count as read and as written."""
    source = torch.zeros(COPY_BYTES // 4)
    target = torch.zeros_like(source)

    def call() -> dict[str, float]:
        target.copy_(source)
        return {"operations": 0.0, "bytes": 2.0 * COPY_BYTES}

    return call


def limits() -> dict[str, Callable[[], dict[str, float]]]:
    """The contestants against which shares are taken; the peak only with the extension."""
    found = {COPY: copy()}
    if native() is not None:
        found[PEAK] = multiply_adds()
    return found


def facts() -> dict[str, Any]:
    """What a number depends on besides the code."""
    extension = native()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 2),
        "compiled variant": extension.selected() if extension else "none: no extension built",
        "thread runtime": extension.threads_of() if extension else "",
        "huge pages": _bracketed(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }


def _processor() -> str:
    """The name of the processor, and which of the instructions that matter here it has."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(fields.get("flags", "").split())
    known = [flag for flag in ("avx2", "fma", "avx512f", "amx_tile") if flag in flags]
    return f"{fields.get('model name', platform.machine())} ({' '.join(known)})"


def _bracketed(path: Path) -> str:
    """The chosen one of the words in a file of /sys."""
    if not path.exists():
        return "unknown"
    return path.read_text().split("[")[-1].split("]")[0]


def _commit() -> str:
    """Short hash, with a + where files have changed since."""
    command = ["git", "-C", str(ROOT)]
    found = subprocess.run(
        [*command, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        [*command, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
    )
    return (found.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")
