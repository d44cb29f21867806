"""Everything that a session on a GPU machine needs, in one go: ``make gpu-check PYTHON=...``.

Runs ``python -m aam_kernels.verify``, the tests that need a device and the GPU cases of the
benchmarks, each within its share of eight minutes, with the interpreter that started it (torch,
numpy and pytest are all that is needed). Leaves ``gpu-check/DEVICE.json`` and ``.log``. The exit
code is 0 when all is well, 1 when something failed or did not finish, 2 when there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
SECONDS = 465.0
"""For all parts together; starting and writing take the rest of eight minutes."""


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: in the JSON.
        command: (file for its result, seconds it may take) -> arguments of the interpreter.
        reserve: seconds that earlier parts must leave to it.
        read: the result's file -> what of it goes into the JSON.
    """

    name: str
    command: Callable[[Path, float], list[str]]
    reserve: float
    read: Callable[[Path], Any]


@dataclass
class Result:
    """What became of a part.

    Attributes:
        command: as it was run.
        exit_code: None when it was ended because its time was up.
        seconds: that it took.
        limit: seconds that it had.
        result: what it wrote; None when it wrote nothing readable.
    """

    command: list[str]
    exit_code: int | None
    seconds: float
    limit: float
    result: Any = field(default=None, repr=False)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _read_junit(path: Path) -> dict[str, Any]:
    """Counts, and the name and message of each failure."""
    suites = ElementTree.parse(path).getroot().iter("testsuite")
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    broken = []
    for suite in suites:
        for name in counts:
            counts[name] += int(suite.get(name, 0))
        for case in suite.iter("testcase"):
            for kind in ("failure", "error"):
                found = case.find(kind)
                if found is not None:
                    message = (found.get("message") or "")[:1000]
                    broken.append({"test": case.get("name"), "message": message})
    return {**counts, "broken": broken}


PARTS = (
    Part(
        "verify",
        lambda result, _: ["-m", "aam_kernels.verify", "--json", str(result)],
        0.0,
        _read_json,
    ),
    Part(
        "tests",
        lambda result, _: [
            "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-rs", "--tb=short",
            "-o", "addopts=--import-mode=importlib", "--confcutdir", "tests/gpu",
            "-p", "no:cacheprovider", f"--junitxml={result}",
        ],
        110.0,
        _read_junit,
    ),
    Part(
        "benchmarks",
        lambda result, limit: [
            "-m", "benchmarks.gpu_cases", "--json", str(result),
            "--seconds", str(max(1.0, 0.75 * limit - 10.0)), "--budget", "1",
        ],
        110.0,
        _read_json,
    ),
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions and the device, as far as the machine tells."""
    import torch

    from aam_kernels._runtime import device as names

    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name(index),
        "devices": torch.cuda.device_count(),
        "architecture": getattr(properties, "gcnArchName", "")
        or f"sm_{properties.major}{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "environment": names.environment(torch.device("cuda", index)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": names.triton_version(),
        "numpy": metadata.version("numpy"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": commit.stdout.strip() or "unknown",
    }


def run_part(part: Part, limit: float, log: TextIO, folder: Path) -> Result:
    """Runs one part; its output goes to the screen and into the log."""
    file = folder / f"{part.name}.result"
    command = [sys.executable, *part.command(file, limit)]
    _say(log, f"\n== {part.name}: {' '.join(command[1:])}  (at most {limit:.0f} s)\n")
    started = time.perf_counter()
    output = folder / f"{part.name}.output"
    with output.open("w") as sink:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            exit_code: int | None = process.wait(timeout=max(limit, 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            exit_code = None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    seconds = time.perf_counter() - started
    _say(log, output.read_text(errors="replace"))
    ended = "its time was up" if exit_code is None else f"exit code {exit_code}"
    _say(log, f"== {part.name}: {ended} after {seconds:.0f} s\n")
    try:
        found = part.read(file)
    except (OSError, ValueError, ElementTree.ParseError):
        found = None
    return Result(command, exit_code, seconds, limit, found)


def run_parts(
    parts: tuple[Part, ...], seconds: float, log: TextIO, folder: Path
) -> dict[str, Result]:
    """Runs all parts; each gets what is left after what later ones need."""
    end = time.perf_counter() + seconds
    results = {}
    for number, part in enumerate(parts):
        later = sum(other.reserve for other in parts[number + 1 :])
        results[part.name] = run_part(part, end - time.perf_counter() - later, log, folder)
    return results


def _say(log: TextIO, text: str) -> None:
    for stream in (sys.stdout, log):
        stream.write(text)
        stream.flush()


def _missing() -> str:
    """Why nothing can be checked with this interpreter; empty when it can."""
    if find_spec("torch") is None:
        return f"no torch in {sys.executable}; name the interpreter: make gpu-check PYTHON=..."
    import torch

    if not torch.cuda.is_available():
        return (
            f"no GPU here: torch {torch.__version__} of {sys.executable} finds no CUDA or ROCm "
            "device"
        )
    absent = [name for name in ("numpy", "pytest") if find_spec(name) is None]
    return f"{sys.executable} lacks {' and '.join(absent)}: pip install it" if absent else ""


def main(arguments: list[str] | None = None, parts: tuple[Part, ...] = PARTS) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("--folder", type=Path, default=ROOT / "gpu-check")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    options = parser.parse_args(arguments)
    missing = _missing()
    if missing:
        sys.stderr.write(f"error: {missing}\n")
        return 2
    started = time.time()
    machine = environment()
    name = re.sub(r"[^A-Za-z0-9]+", "-", str(machine["device"])).strip("-")
    options.folder.mkdir(parents=True, exist_ok=True)
    files = {kind: options.folder / f"{name}.{kind}" for kind in ("json", "log")}
    with files["log"].open("w") as log, tempfile.TemporaryDirectory() as folder:
        _say(log, "".join(f"{key}: {value}\n" for key, value in machine.items()))
        results = run_parts(parts, options.seconds, log, Path(folder))
        passed = all(result.exit_code == 0 for result in results.values())
        content = {
            "passed": passed,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": time.time() - started,
            **machine,
            "parts": {part: asdict(result) for part, result in results.items()},
        }
        files["json"].write_text(json.dumps(content, indent=1))
        _say(log, f"\n{'passed' if passed else 'FAILED'}; {files['json']}, {files['log']}\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
