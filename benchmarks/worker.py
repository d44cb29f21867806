"""A contestant in a process of its own: own environment, own clocks, own peak memory.

`Worker(MODULE:FUNCTION, environment={...}, **arguments)` starts a fresh interpreter and lets
FUNCTION prepare and return the work as a callable. Each call of the worker runs the work once
there and gives its result, so that processes with another allocator, other kernels or another
number of threads take turns within a round like all contestants.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
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


class Worker:
    """Work that runs in a process of its own.

    Attributes:
        memory: of all runs so far.
        faults: pages the last run asked the system for.
        wall: seconds of the last run, by the process's own clock.
        processor: CPU seconds of the last run, all threads.
    """

    def __init__(
        self, target: str, *, environment: Mapping[str, str] | None = None, **arguments: Any
    ) -> None:
        """Start the process; returns at once, and the first call waits until it is prepared.

        Args:
            target: "module:function"; called with `arguments`, it returns a callable without
                arguments.
            environment: variables beside those of this process.
            arguments: what JSON can carry.
        """
        self.name = f"{target} {json.dumps(arguments)}"
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in `close`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", target, json.dumps(arguments)],
            cwd=ROOT, env={**os.environ, **(environment or {})}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        self.prepared: float | None = None
        self.wall = self.processor = 0.0
        self.faults = 0
        self.memory = Memory(0.0, 0.0)

    def __call__(self) -> Any:
        """Run the work once.

        Raises:
            MemoryError: the process was killed, which is what Linux does when memory runs out.
            RuntimeError: the process failed; its error output is in the message.
        """
        if self.prepared is None:
            self.prepared = self._read()["prepared"]
        try:
            print("run", file=self.process.stdin, flush=True)
        except BrokenPipeError:
            self._fail()
        answer = self._read()
        self.wall, self.processor = answer["wall"], answer["processor"]
        self.faults = answer["faults"]
        self.memory = Memory(self.prepared, answer["peak"])
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                stream.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        code = self.process.wait()
        if code == -9:
            raise MemoryError(f"{self.name} did not fit into memory")
        self.errors.seek(0)
        raise RuntimeError(f"{self.name} failed:\n{self.errors.read()[-2000:]}")


def processor_seconds() -> float:
    """CPU time of this process, all its threads, and the children it has waited for."""
    spent = os.times()
    return time.process_time() + spent.children_user + spent.children_system


def high_water_mark() -> float:
    """Most resident memory so far, in megabytes.

    Linux's VmHWM where there is one: ru_maxrss survives exec there, so a child of a large process
    would begin with its parent's mark.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) * 1024 / MEGABYTE
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE


def prepare(target: str, arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """The work of "module:function", ready to run."""
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)(**arguments)


def main() -> None:
    """Child process: prepare, then run the work once for every line of input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the work prints is no answer
    work = prepare(sys.argv[1], json.loads(sys.argv[2]))
    reset = Path("/proc/self/clear_refs")
    if reset.exists() and os.access(reset, os.W_OK):
        reset.write_text("5")  # the mark begins again at what is resident now
    print(json.dumps({"prepared": high_water_mark()}), file=answers, flush=True)
    for _ in sys.stdin:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        wall, processor = time.perf_counter(), processor_seconds()
        result = work()
        told = result if isinstance(result, dict) else {}
        answer = {
            "processor": processor_seconds() - processor,
            "wall": time.perf_counter() - wall,
            # Work that begins the mark again, as training does at every step, says its own peak.
            "peak": max(high_water_mark(), told.get("peak_megabytes", 0.0)),
            "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
            "result": told or None,
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
