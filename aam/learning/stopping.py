"""Signals that ask a run to stop: it ends after the step, saved, and may be queued again.

Ctrl-C, SIGTERM (SLURM before it ends a job) and SIGUSR1 (what ``sbatch --signal=USR1@120`` sends
two minutes before) have the same effect. The exit code is 128 + the signal's number.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from typing import Any

from aam.errors import log

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REQUEUE_SECONDS = 30.0


class Stopped(KeyboardInterrupt):
    """A signal asked to stop; the run is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopSignals:
    """Within the block the first signal is noted, and a second Ctrl-C ends the run at once."""

    def __init__(self) -> None:
        self.number = 0  # 0: none
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Take over the signals, if this is the main thread; else they are the caller's."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {one: signal.signal(one, self._note) for one in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.number:
            again = "; Ctrl-C once more to stop at once, without saving"
            log(f"stopping after this step{again if number == signal.SIGINT else ''}")
        self.number = number


def requeue(number: int) -> None:
    """Have SLURM queue the job again, if it was SIGUSR1 that ended it."""
    job, tool = os.environ.get("SLURM_JOB_ID"), shutil.which("scontrol")
    if job is None or number != signal.SIGUSR1:
        return
    if tool is None:
        log("warning: no scontrol on this machine: the job is not queued again")
        return
    command = [tool, "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=REQUEUE_SECONDS)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    log(f"warning: scontrol requeue {job}: {problem}" if problem else f"job {job} is queued again")
