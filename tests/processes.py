"""Processes that tests start, and how they end."""

import os
import subprocess
import sys
import time

# What every training command does at its end takes seconds and is tested elsewhere.
MAIN = """
import sys
import aam.report
import aam.evaluation.baselines as baselines
aam.report.write_report = lambda folder: folder / "report.html"
baselines.distance_baselines = baselines.target_baselines = lambda *_, **__: {}
from aam.train import main
sys.exit(main(sys.argv[1:]))
"""


def start_command(words: list[str]) -> subprocess.Popen:
    """Start a command of `aam` on one thread; what it says comes through a pipe."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MAIN, *words]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def ends(processes: list[subprocess.Popen], seconds: float = 60) -> list[tuple[int, str]]:
    """Exit code and what was said, of each process, all within some seconds."""
    deadline = time.monotonic() + seconds
    found = []
    for one in processes:
        said = one.communicate(timeout=max(0.1, deadline - time.monotonic()))[1]
        found.append((one.returncode, said))
    return found
