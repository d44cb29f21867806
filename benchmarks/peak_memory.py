"""Peak memory of a piece of work, each measured in a process of its own.

`growth(MODULE:FUNCTION, **arguments)` starts a fresh interpreter, lets FUNCTION prepare and return
the work as a callable, notes what the process holds, runs the work and reads the peak.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MEGABYTE = 1e6


@dataclass(frozen=True)
class Memory:
    """Megabytes (1e6 bytes)."""

    prepared: float  # the process before the work: interpreter, torch, data, weights
    peak: float  # the highest during the work

    @property
    def growth(self) -> float:
        """What the work itself needed."""
        return self.peak - self.prepared

    def __str__(self) -> str:
        """Both figures and their difference."""
        return f"{self.growth:,.0f} MB ({self.peak:,.0f} peak - {self.prepared:,.0f} before)"


def growth(target: str, *, repeats: int = 2, timeout: float = 600.0, **arguments: Any) -> Memory:
    """Memory of the work that `target` prepares.

    Args:
        target: "module:function"; called with `arguments`, it returns a callable without arguments.
        repeats: how often the work runs; optimizer state exists from the second step on.
        timeout: seconds.
        arguments: what JSON can carry.

    Raises:
        MemoryError: the process was killed, which is what Linux does when memory runs out.
        RuntimeError: the process failed; its error output is in the message.
    """
    command = [sys.executable, "-m", "benchmarks.peak_memory", target, str(repeats)]
    command.append(json.dumps(arguments))
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    if result.returncode == -9:
        raise MemoryError(f"{target} {arguments} did not fit into memory")
    if result.returncode:
        raise RuntimeError(f"{target} {arguments} failed:\n{result.stderr}")
    return Memory(**json.loads(result.stdout.splitlines()[-1]))


def high_water_mark() -> float:
    """Highest resident memory of this process in megabytes.

    Linux's VmHWM where there is one: ru_maxrss survives exec there, so a child of a large process
    would begin with its parent's mark.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) * 1024 / MEGABYTE
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE


def main() -> None:
    """Child process: prepare, measure, print one line of JSON."""
    target, repeats, arguments = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    module, function = target.split(":")
    work = getattr(importlib.import_module(module), function)(**arguments)
    reset = Path("/proc/self/clear_refs")
    if reset.exists() and os.access(reset, os.W_OK):
        reset.write_text("5")  # the mark begins again at what is resident now
    prepared = high_water_mark()
    for _ in range(repeats):
        work()
    print(json.dumps({"prepared": prepared, "peak": high_water_mark()}))


if __name__ == "__main__":
    main()
