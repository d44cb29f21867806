"""The processes that share a run: who they are, how they start, agree, wait and end together.

They are started by this program (``--devices N``), by torchrun or by SLURM's srun. Rank 0 alone
writes and speaks. One process is the special case in which nothing has to be agreed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from aam.errors import InputError
from aam.training.watch import Watch, complain

T = TypeVar("T")
PARENT = "AAM_PARENT"  # in the environment of a process that rank 0 started: rank 0's process id
PATIENCE = timedelta(days=30)  # of ranks that wait for rank 0: the watch ends a hopeless wait
BLAME_SECONDS = 5.0  # an error of a collective is explained by the watch within this time
CHILD_SECONDS = 1.0


@dataclass(frozen=True)
class Layout:
    """How many processes there are, and which of them this is."""

    starter: str  # aam, torchrun or slurm
    local: int  # processes of this machine
    nodes: int
    rank: int
    local_rank: int

    @property
    def size(self) -> int:
        """Processes of all machines."""
        return self.local * self.nodes


@dataclass
class State:
    """What this process knows of the others."""

    words: Sequence[str] = ()  # of the command line, for the processes that rank 0 starts
    watch: Watch | None = None
    control: Any = None  # process group on the CPU, where waiting may take long
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)


_state = State()


def find_layout(devices: int, nodes: int) -> Layout:
    """Who started this process, and with how many others.

    Args:
        devices: of this machine, as asked for; 1 under torchrun and srun: as they say.
        nodes: likewise.

    Raises:
        InputError: the options say another number than torchrun or SLURM.
    """
    said = os.environ
    if "TORCHELASTIC_RUN_ID" in said:
        size, local = int(said["WORLD_SIZE"]), int(said["LOCAL_WORLD_SIZE"])
        found = Layout("torchrun", local, size // local, int(said["RANK"]), int(said["LOCAL_RANK"]))
        if size % local:
            raise InputError(
                f"torchrun: {size} processes, {local} of them here: every machine needs as many; "
                "use the same --nproc-per-node everywhere"
            )
        many, machines = "--nproc-per-node", "--nnodes"
    elif "SLURM_STEP_ID" in said and int(said.get("SLURM_NTASKS", "1")) > 1:
        found = _slurm_layout()
        many, machines = "--ntasks-per-node", "--nodes"
    else:
        if nodes > 1:
            raise InputError(
                f"--num-nodes {nodes}: start the same command on each machine with torchrun "
                "(--nnodes, --nproc-per-node) or srun (--nodes, --ntasks-per-node)"
            )
        local_rank = int(said["LOCAL_RANK"]) if PARENT in said else 0
        return Layout("aam", devices, 1, local_rank, local_rank)
    if devices not in (1, found.local):
        raise InputError(
            f"--devices {devices}: {found.starter} started {found.local} processes here; leave "
            f"the option out or use {many}={devices}"
        )
    if nodes not in (1, found.nodes):
        raise InputError(
            f"--num-nodes {nodes}: {found.starter} started {found.nodes}; leave the option out "
            f"or use {machines}={nodes}"
        )
    return found


def _slurm_layout() -> Layout:
    """The tasks of a job step.

    Raises:
        InputError: there is no equal number of tasks a machine.
    """
    said = os.environ
    size, nodes = int(said["SLURM_NTASKS"]), int(said.get("SLURM_NNODES", "1"))
    if "SLURM_NTASKS_PER_NODE" not in said:
        raise InputError(
            f"srun: {size} tasks without --ntasks-per-node; set it to the devices of a machine"
        )
    local = int(said["SLURM_NTASKS_PER_NODE"])
    if local * nodes != size:
        raise InputError(
            f"srun: {size} tasks, but --nodes={nodes} with --ntasks-per-node={local} makes "
            f"{local * nodes}; leave --ntasks out"
        )
    return Layout("slurm", local, nodes, int(said["SLURM_PROCID"]), int(said["SLURM_LOCALID"]))


def remember_words(words: Sequence[str]) -> None:
    """Keep the command line for the processes that `start_others` starts."""
    _state.words = tuple(words)


def start_others(layout: Layout) -> None:
    """Start the other processes of this machine, where nobody else does; silence those."""
    if layout.starter == "aam" and layout.size > 1 and PARENT not in os.environ:
        if not _state.words:
            raise InputError("--devices: only the command line can start several processes")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0",
            "WORLD_SIZE": str(layout.size),
        }  # fmt: skip
        command = [sys.executable, "-m", "aam.train", *_state.words]
        for rank in range(1, layout.size):
            own = {**os.environ, **shared, "LOCAL_RANK": str(rank), PARENT: str(os.getpid())}
            _state.children.append(subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL))
        os.environ.update(shared, LOCAL_RANK="0")
        threading.Thread(target=_watch_children, daemon=True).start()
    if PARENT in os.environ:
        threading.Thread(target=_watch_parent, daemon=True).start()
    if layout.rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def _watch_children() -> None:
    """Until the watch is there: a process that rank 0 started and that ends, ends rank 0."""
    while _state.watch is None:
        for rank, child in enumerate(_state.children, 1):
            if child.poll():
                time.sleep(CHILD_SECONDS)  # rank 0 may be about to say why itself
                if _state.watch is None:
                    complain(explain_loss(rank))
                    end_children()
                    os._exit(2 if child.returncode == 2 else 1)
        time.sleep(CHILD_SECONDS / 5)


def _watch_parent() -> None:
    """Until the watch is there: a process does not outlive the rank 0 that started it."""
    while _state.watch is None:
        if os.getppid() != int(os.environ[PARENT]):
            os._exit(1)
        time.sleep(CHILD_SECONDS / 5)


def end_children() -> None:
    """Kill the processes that this one started and that have not ended."""
    for child in _state.children:
        if child.poll() is None:
            child.kill()


def join(layout: Layout) -> None:
    """Meet the other ranks, once the default process group stands, and watch each other."""
    if layout.size == 1:
        return
    _state.control = dist.new_group(backend="gloo", timeout=PATIENCE)
    watch = Watch(layout.rank, layout.size, explain_loss)
    place = watch.listen(os.environ["MASTER_ADDR"]) if first() else None
    address, port, token = tell(place or ("", 0, ""))
    if not first():
        watch.connect(address, port, token)
    watch.start()
    _state.watch = watch
    watch.wait_for_all()
    tell(None)


def explain_loss(rank: int) -> str:
    """Why a rank may be gone, as far as this process knows."""
    how = "killed, out of memory, or its machine is lost"
    if 0 < rank <= len(_state.children):
        child = _state.children[rank - 1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = child.wait(CHILD_SECONDS)
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"rank {rank} has ended ({how}); continue from the last checkpoint with --resume-from"


def first() -> bool:
    """Whether this process writes and speaks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def size() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def tell(value: T) -> T:
    """Rank 0's value, on every rank; the others wait for it as long as it takes."""
    if size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, group=_state.control)
    return box[0]


def on_first(work: Callable[[], T]) -> T:
    """What rank 0 makes of it, on every rank; the others wait as long as it takes."""
    return tell(work() if first() else None)  # type: ignore[arg-type, return-value]


def highest(number: int) -> int:
    """The largest of all ranks' numbers."""
    if size() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_state.control)
    return int(found)


def agree(what: str, value: Any) -> None:
    """Refuse ranks that do not see the same.

    Raises:
        InputError: names what, and the ranks with another value than rank 0's.
    """
    if size() == 1:
        return
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value, group=_state.control)
    other = [rank for rank, one in enumerate(values) if one != values[0]]
    if other:
        raise InputError(
            f"{what} of rank {other[0]} differs from that of rank 0: all machines need the same "
            "files, options and version, and a run folder that they share"
        )


@contextlib.contextmanager
def together(words: Sequence[str]) -> Iterator[None]:
    """Run a command; if it ends badly on one rank, it ends on all with one message.

    Args:
        words: of the command line.
    """
    remember_words(words)
    try:
        yield
        if _state.watch is not None:
            _state.watch.finish()
            dist.destroy_process_group()
    except (InputError, OSError) as error:
        _fail(str(error), 2)
        raise
    except KeyboardInterrupt:
        if _state.watch is not None:
            _state.watch.finish()
        raise
    except Exception as error:
        if _state.watch is not None:
            time.sleep(BLAME_SECONDS)  # a collective fails where a rank is gone: the watch says so
            if not first():
                _print_traceback()
            _fail(f"{type(error).__name__}: {error}", 1)
        raise
    finally:
        _leave()


def _fail(text: str, code: int) -> None:
    """The others end: rank 0 is about to say what went wrong, or is told by this one."""
    if _state.watch is not None:
        _state.watch.fail(text, code)


def _print_traceback() -> None:
    lines = "".join(
        f"rank {dist.get_rank()}: {one}\n" for one in traceback.format_exc().split("\n")
    )
    if sys.__stderr__ is not None:
        sys.__stderr__.write(lines)


def _leave() -> None:
    """Forget the others; rank 0 waits for those that it started."""
    deadline = time.monotonic() + CHILD_SECONDS
    for child in _state.children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
    end_children()
