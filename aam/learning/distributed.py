"""The processes that share a run: who they are, how they start, agree, wait and end together.

They are started by this program (``--devices N``), by torchrun or by SLURM's srun. Rank 0 alone
writes and speaks. One process is the special case in which nothing has to be agreed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aam.errors import InputError
from aam.learning.launch import PARENT, Layout, complain
from aam.learning.watch import Watch

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # of ranks that wait for rank 0: the watch ends a hopeless wait
BLAME_SECONDS = 5.0  # an error of a collective is explained by the watch within this time
CHILD_SECONDS = 1.0
PARTING_SECONDS = 10.0  # for processes that rank 0 started to end after it has


@dataclass
class State:
    """What this process knows of the others."""

    words: Sequence[str] = ()  # of the command line, for the processes that rank 0 starts
    watch: Watch | None = None
    control: Any = None  # process group on the CPU, where waiting may take long
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)


_state = State()


def remember_words(words: Sequence[str]) -> None:
    """Keep the command line for the processes that `start_others` starts."""
    _state.words = tuple(words)


def start_others(layout: Layout) -> None:
    """Start the other processes of this machine, where nobody else does."""
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


def end_children(seconds: float = 0.0) -> None:
    """Kill the processes that this one started and that do not end by themselves in time."""
    deadline = time.monotonic() + seconds
    for child in _state.children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()


def join(layout: Layout) -> None:
    """Meet the other ranks, once the default process group stands, and watch each other."""
    if layout.size == 1:
        return
    _state.control = dist.new_group(backend="gloo", timeout=PATIENCE)
    watch = Watch(layout.rank, layout.size, explain_loss)
    place = watch.listen(os.environ["MASTER_ADDR"]) if is_rank_zero() else None
    address, port, token = broadcast(place or ("", 0, ""))
    if not is_rank_zero():
        watch.connect(address, port, token)
    watch.start()
    _state.watch = watch
    watch.wait_for_all()
    broadcast(None)


def explain_loss(rank: int) -> str:
    """Why a rank may be gone, as far as this process knows."""
    how = "killed, out of memory, or its machine is lost"
    if 0 < rank <= len(_state.children):
        child = _state.children[rank - 1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = child.wait(CHILD_SECONDS)
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"rank {rank} has ended ({how}); continue from the last checkpoint with --resume-from"


def is_rank_zero() -> bool:
    """Whether this process writes and speaks."""
    return rank() == 0


def rank() -> int:
    """This process's number among those that share the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank; the others wait for it as long as it takes."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, group=_state.control)
    return box[0]


def on_rank_zero(work: Callable[[], T]) -> T:
    """What rank 0 makes of it, on every rank; the others wait as long as it takes."""
    return broadcast(work() if is_rank_zero() else None)  # type: ignore[arg-type, return-value]


def all_reduce_max(number: int) -> int:
    """The largest of all ranks' numbers."""
    if world_size() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_state.control)
    return int(found)


def check_equal(what: str, value: Any) -> None:
    """Refuse ranks that do not see the same.

    Raises:
        InputError: names what, and the ranks with another value than rank 0's.
    """
    if world_size() == 1:
        return
    values: list[Any] = [None] * world_size()
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
        _part()
    except (InputError, OSError) as error:
        _fail(error, str(error), 2)
        raise
    except KeyboardInterrupt as stop:
        _part(agreed=hasattr(stop, "number"))  # else a second Ctrl-C
        raise
    except Exception as error:
        if _state.watch is not None:
            time.sleep(BLAME_SECONDS)  # a collective fails where a rank is gone: the watch says so
            if not is_rank_zero():
                _print_traceback()
            _fail(error, f"{type(error).__name__}: {error}", 1)
        raise
    finally:
        end_children(PARTING_SECONDS if _state.watch is not None else 0.0)


def _part(agreed: bool = True) -> None:
    """This rank has done its part."""
    if _state.watch is not None:
        _state.watch.finish()
        if agreed:
            dist.destroy_process_group()
        else:
            _end_hard(128 + signal.SIGINT)


def _end_hard(code: int) -> None:
    """Have the process end without cleaning up collectives: that would wait for ranks now gone."""

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(end)


def _fail(error: Exception, text: str, code: int) -> None:
    """The others end: rank 0 is about to say what went wrong, or is told by this one."""
    if _state.watch is not None:
        error.told = True  # type: ignore[attr-defined]
        _state.watch.fail(text, code)
        _end_hard(code)


def _print_traceback() -> None:
    lines = "".join(
        f"rank {dist.get_rank()}: {one}\n" for one in traceback.format_exc().split("\n")
    )
    if sys.__stderr__ is not None:
        sys.__stderr__.write(lines)


class RankGroup:
    """The collectives of a step, over the default process group where there is one."""

    def __init__(self) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if self.distributed else 1
        self.rank = dist.get_rank() if self.distributed else 0

    def share(self, bounds: np.ndarray) -> tuple[int, int]:
        """This rank's contiguous rows of a ragged tensor, of about equal length together.

        Args:
            bounds: (rows + 1,) offsets of the rows.
        """
        cuts = cut(bounds, self.size)
        return int(cuts[self.rank]), int(cuts[self.rank + 1])

    def gather(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """All ranks' rows one after the other, (sum of counts, ...), without graph.

        Args:
            own: (counts[rank], ...) this rank's rows.
            counts: rows of every rank.
        """
        own = own.detach()
        if self.size == 1:
            return own
        most = max(counts)
        padded = own.new_zeros((most, *own.shape[1:]))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        return bool(self.all_reduce(torch.tensor(int(flag), device=device)))

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the ranks' gradients, in one message for each dtype.

        A parameter that no rank has a gradient of keeps None, as in one process. Those of sharded
        weights have been averaged as they arose.
        """
        if self.size == 1:
            return
        own = []
        for one in parameters:
            if not isinstance(one, DTensor):
                own.append(one)
            elif one.grad is not None:
                one.grad.mul_(self.size)
        used = torch.tensor([one.grad is not None for one in own], dtype=torch.float32)
        device = own[0].device
        used = self.all_reduce(used.to(device)).cpu() > 0
        wanted = [one for one, has in zip(own, used.tolist(), strict=True) if has]
        for dtype in sorted({one.dtype for one in wanted}, key=str):
            group = [one for one in wanted if one.dtype == dtype]
            flat = torch.cat(
                [
                    torch.zeros_like(one).flatten() if one.grad is None else one.grad.flatten()
                    for one in group
                ]
            )
            self.all_reduce(flat)
            for one, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
                one.grad = part.view_as(one)

    def broadcast_weights(self, module: nn.Module) -> None:
        """Give every rank the weights and buffers of rank 0."""
        if self.size > 1:
            for value in module.state_dict().values():
                dist.broadcast(value, src=0)


def cut(bounds: np.ndarray, parts: int) -> np.ndarray:
    """Where to cut ragged rows into contiguous parts of about equal length together.

    Args:
        bounds: (rows + 1,) offsets of the rows, from 0.
        parts: how many; some are empty where there are fewer rows.

    Returns:
        (parts + 1,) row numbers, from 0 to the number of rows.
    """
    wanted = np.arange(1, parts) * (int(bounds[-1]) / parts)
    middle = (np.asarray(bounds[:-1], dtype=np.float64) + bounds[1:]) / 2
    return np.concatenate([[0], np.searchsorted(middle, wanted), [len(bounds) - 1]])
