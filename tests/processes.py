"""Processes that tests start, and how they end."""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

MAIN = """
import sys
from pytest import MonkeyPatch
from aam.cli import main
from tests.processes import leave_out_reports
leave_out_reports(MonkeyPatch())
sys.exit(main(sys.argv[1:]))
"""


def leave_out_reports(patch: pytest.MonkeyPatch) -> None:
    """Have training commands end without what takes seconds and is tested elsewhere."""
    patch.setattr("aam.report.write_report", lambda folder: folder / "report.html")
    patch.setattr("aam.evaluation.baselines.target_baselines", lambda *_, **__: {})
    patch.setattr("aam.evaluation.baselines.distance_baselines", lambda *_, **__: {})


def start_command(argv: list[str]) -> subprocess.Popen:
    """Start a command of `aam` on one thread; what it says comes through a pipe."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MAIN, *argv]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


class Fork:
    """A copy of this process on one thread, which does some work; what it says goes to a file."""

    def __init__(self, work: Callable[[], object], **environment: object) -> None:
        self.said = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
        self.process = multiprocessing.get_context("fork").Process(
            target=self._do, args=(work, environment)
        )
        self.process.start()

    def _do(self, work: Callable[[], object], environment: dict[str, object]) -> None:
        os.environ.update({name: str(value) for name, value in environment.items()})
        os.dup2(self.said.fileno(), 2)
        sys.stdout = sys.__stdout__ = sys.stderr = sys.__stderr__ = os.fdopen(2, "w")
        torch.set_num_threads(1)
        sys.exit(work())

    def wait_for(self, text: str) -> None:
        """Wait until something has been said."""
        while self.process.is_alive() and text not in Path(self.said.name).read_text():
            time.sleep(0.05)

    def end(self, seconds: float = 60) -> tuple[int | None, str]:
        """Exit code and what was said, if it ends in time."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
        self.said.seek(0)
        return self.process.exitcode, self.said.read()


def fork_ranks(count: int, work: Callable[[], object], slurm: bool = False) -> list[Fork]:
    """Processes as torchrun or srun start them, each of which does some work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if slurm:
        shared = {"SLURM_STEP_ID": 0, "SLURM_NTASKS": count, "SLURM_JOB_NODELIST": "127.0.0.1"}
        own = ("SLURM_PROCID", "SLURM_LOCALID")
    else:
        shared = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        own = ("RANK", "LOCAL_RANK")
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [Fork(work, **shared, **dict.fromkeys(own, rank)) for rank in range(count)]
