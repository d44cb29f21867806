"""The processes of ``--devices N``, started and watched by torch's elastic launcher.

They see what torchrun would tell them. The process that launched them computes nothing: it hands
its signals on and says how a rank has ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    ProcessFailure,
    SubprocessContext,
)

from aam.learning.stopping import SIGNALS

PROGRAM = ("-m", "aam.train")
POLL_SECONDS = 0.1
KEPT = (signal.SIGHUP, signal.SIGQUIT)  # nohup has them ignored; torch would end at them


class Workers(SubprocessContext):
    """A process for each rank. Where one fails, the others end at once.

    They wait for it in a collective, where they would not notice torch's usual SIGTERM.
    """

    def close(self, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        """End those that are left."""
        super().close(death_sig or signal.SIGKILL, timeout)


def launch(argv: Sequence[str], count: int) -> int:
    """Run the command of an argv in several processes of this machine; the exit code."""
    logging.disable()  # of torch's launcher: the worker or this function says what it would
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    shared = {
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_RUN_ID": "aam", "OMP_NUM_THREADS": threads,
        "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    received: set[int] = set()

    def forward(number: int, _frame: Any) -> None:
        received.add(number)
        for process in workers.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    with tempfile.TemporaryDirectory(prefix="aam-") as folder:
        workers = Workers(
            "aam",
            sys.executable,
            args=dict.fromkeys(range(count), (*PROGRAM, *argv)),
            envs={n: {**shared, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)},
            logs_specs=DefaultLogsSpecs(folder),
        )
        handlers: dict[int, Any] = {number: signal.getsignal(number) for number in KEPT}
        handlers |= dict.fromkeys(SIGNALS, forward)
        try:
            workers.start()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            result = workers.wait(period=POLL_SECONDS)
        finally:
            workers.close()
    assert result is not None
    return _explain(result.failures, received)


def _explain(failures: dict[int, ProcessFailure], received: set[int]) -> int:
    """The exit code; says what the rank that failed first cannot have said itself."""
    if not failures:
        return 0
    rank, first = next(iter(failures.items()))
    code = first.exitcode
    if code == 2 or code - 128 in SIGNALS:
        return code
    if -code in received:  # before training a signal ends a process
        return 128 - code
    how = f"killed by {first.signal_name()}" if code < 0 else f"exit code {code}"
    if isinstance(first.message, dict):
        how = " ".join(first.message["message"].split())
    sys.stderr.write(
        f"error: rank {rank} has ended ({how}); continue from the last checkpoint with "
        "--resume-from\n"
    )
    return 1
