"""The processes that share a run: who started them, how they meet, and how they end together.

torchrun or SLURM's srun start them, or this program does (``--devices N``, see `workers`). Rank 0
alone writes and speaks. This module is imported before torch is.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aam.config import RunOptions
from aam.errors import InputError
from aam.learning.stopping import Stopped, requeue

if TYPE_CHECKING:
    import torch

LAUNCHER = "AAM_LAUNCHER"  # in the environment of a worker: process id of what launched it
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
GRACE_SECONDS = 1.5  # an error that all ranks meet is said by rank 0 within this time
BLAME_SECONDS = 5.0  # a collective fails where a rank is gone: its launcher says so before


@dataclass(frozen=True)
class Layout:
    """How many processes there are, and which of them this is."""

    starter: str = "aam"  # or torchrun (workers of `aam` too), or slurm
    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1  # processes of this machine


def find_layout() -> Layout:
    """What torchrun or srun say of this process; without them it is alone."""
    said = os.environ
    if "TORCHELASTIC_RUN_ID" in said:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        return Layout("torchrun", *(int(said[name]) for name in names))
    size = int(said.get("SLURM_NTASKS", "1"))
    if "SLURM_STEP_ID" in said and size > 1:
        local = int(said.get("SLURM_NTASKS_PER_NODE", size // int(said.get("SLURM_NNODES", "1"))))
        return Layout("slurm", int(said["SLURM_PROCID"]), int(said["SLURM_LOCALID"]), size, local)
    return Layout()


def begin() -> None:
    """Leave the screen to rank 0, and have Linux end a worker when its launcher is killed."""
    if find_layout().rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    if LAUNCHER in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != int(os.environ[LAUNCHER]):
            os._exit(1)


def refuse_several(command: str) -> None:
    """Refuse to run a command in several processes that would all do the same."""
    starter, size = find_layout().starter, find_layout().size
    if size > 1:
        raise InputError(f"{command} runs in one process; {starter} started {size} of them")


def run(command: Callable[[Any], Any], argv: Sequence[str], options: Any) -> int:
    """Run a command that trains, here or in workers launched with its argv; the exit code."""
    layout = find_layout()
    if layout.starter == "aam" and (options.run.devices > 1 or options.run.data_parallel):
        from aam.learning.device import count_devices
        from aam.learning.workers import launch

        count = count_devices(options.run)
        if count > 1:
            os.environ[LAUNCHER] = str(os.getpid())
            return launch(argv, count)
    try:
        command(options)
    except BaseException as error:
        if isinstance(error, Stopped) and not layout.rank:
            requeue(error.number)
        if layout.size > 1:
            _leave_early(error)
        raise
    if layout.size > 1:
        from aam.learning import distributed

        distributed.leave()
    return 0


def start(options: RunOptions) -> torch.device:
    """The checked device of this process, which meets the other ranks of the run, if any."""
    import torch

    from aam.learning import device as devices
    from aam.learning import distributed

    layout, count = find_layout(), devices.count_devices(options)
    if layout.starter == "aam" and count > 1:
        raise InputError("--devices: only the command line can start several processes")
    if count not in (1, layout.local_size):
        option = {"torchrun": "--nproc-per-node", "slurm": "--ntasks-per-node"}[layout.starter]
        raise InputError(
            f"--devices {count}: {layout.starter} started {layout.local_size} processes here; "
            f"leave the option out or use {option}={count}"
        )
    device = devices.find_device(options.device)
    if layout.size > 1 and device.type == "cuda":
        if layout.local_size > torch.cuda.device_count():
            raise InputError(
                f"{layout.starter} started {layout.local_size} processes on this machine, each "
                f"sees {torch.cuda.device_count()} GPUs: every process must see all GPUs of its "
                "machine (srun: --gpus-per-node, not --gpus-per-task)"
            )
        device = torch.device("cuda", layout.local_rank)
    devices.check_attention(options.attn_implementation, device)
    devices.check_precision(options, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if layout.size > 1:
        if layout.starter == "slurm":
            _name_first_host()
        distributed.join(device, layout.rank, layout.size)
    return device


def exit_code(error: BaseException) -> int:
    """2 for input that cannot be used, 128 and its number after a signal, 1 for anything else."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "number", signal.SIGINT)
    return 2 if isinstance(error, (InputError, OSError)) else 1


def complain(error: BaseException) -> None:
    """One line for an error that ends a command: by rank 0, or by another that meets it alone."""
    if isinstance(error, KeyboardInterrupt):
        return
    text = str(error)
    if isinstance(error, OSError):  # a disk that fills up while a log or a report is written
        place = f"{error.filename}: " if error.filename else ""
        text = f"{place}{error.strerror or error}"
    layout, stream = find_layout(), sys.stderr
    if layout.rank:
        time.sleep(GRACE_SECONDS * (1 + layout.local_rank))
        text, stream = f"rank {layout.rank}: {text}", sys.__stderr__ or stream
    stream.write(f"error: {' '.join(text.split())}\n")
    stream.flush()


def _leave_early(error: BaseException) -> None:
    """Prepare the end of one of several ranks.

    All stop together at a signal, or a launcher would end rank 0 when the first of them has left.
    Else the process ends without cleaning up collectives: that would wait for ranks that are gone.
    """
    if isinstance(error, Stopped):
        from aam.learning import distributed

        distributed.all_reduce_max(0)
    elif exit_code(error) == 1:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        time.sleep(BLAME_SECONDS)
        get_error_handler().record_exception(error)  # for the launcher
        sys.stderr = sys.__stderr__
    atexit.register(os._exit, exit_code(error))


def _name_first_host() -> None:
    """Say to torch where the tasks of a SLURM job meet, if nobody has."""
    said = os.environ
    hosts = said.get("SLURM_STEP_NODELIST") or said.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    first = re.match(r"([^,\[]+)(?:\[([^],-]+))?", hosts)  # node[07-09,12] begins with node07
    said.setdefault("MASTER_ADDR", "".join(first.groups("")) if first else hosts)
    said.setdefault("MASTER_PORT", str(20000 + int(said.get("SLURM_JOB_ID", "0")) % 10000))
