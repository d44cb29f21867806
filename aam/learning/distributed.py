"""What the ranks of a run say to one another, by torch.distributed.

Every rank sees the same batch, computes a contiguous share of its ASVs and samples, and has the
others' results from here. One process is the special case in which nothing has to be sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aam.errors import InputError

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # of ranks that wait for rank 0

_control: dist.ProcessGroup | None = None  # on the CPU, where waiting may take long


def join(device: torch.device, rank: int, size: int) -> None:
    """Meet the other ranks, where the environment says (MASTER_ADDR, MASTER_PORT)."""
    global _control
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size)
    _control = dist.new_group(backend="gloo", timeout=PATIENCE)


def leave() -> None:
    """Part from the other ranks, at the end of a run that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number among those that share the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Whether this process writes and speaks."""
    return rank() == 0


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank; the others wait for it as long as it takes."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, group=_control)
    return box[0]


def all_reduce_max(number: int) -> int:
    """The largest of all ranks' numbers."""
    if world_size() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_control)
    return int(found)


def check_equal(what: str, value: Any) -> None:
    """Refuse ranks that do not see the same as rank 0."""
    if world_size() == 1:
        return
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_control)
    other = [rank for rank, one in enumerate(values) if one != values[0]]
    if other:
        raise InputError(
            f"{what} of rank {other[0]} differs from that of rank 0: all machines need the same "
            "files, options and version, and a run folder that they share"
        )


class RankGroup:
    """The collectives of a step, over the default process group where there is one."""

    def __init__(self) -> None:
        self.size, self.rank = world_size(), rank()

    def gather(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """All ranks' rows (sum of counts, ...), without graph; each has (counts[rank], ...)."""
        own = own.detach()
        if self.size == 1:
            return own
        padded = own.new_zeros((max(counts), *own.shape[1:]))
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
        """Add up the ranks' gradients, in one message.

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
        used = torch.tensor([one.grad is not None for one in own], device=own[0].device)
        has_gradient = self.all_reduce(used.float()).tolist()
        own = [one for one, has in zip(own, has_gradient, strict=True) if has]
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in own]
        if own:
            flat = self.all_reduce(torch.cat([one.flatten() for one in gradients]))
            for one, part in zip(own, flat.split([one.numel() for one in own]), strict=True):
                one.grad = part.view_as(one)

    def broadcast_weights(self, module: nn.Module) -> None:
        """Give every rank the weights and buffers of rank 0."""
        if self.size > 1:
            for value in module.state_dict().values():
                dist.broadcast(value, src=0)


def cut(bounds: np.ndarray, parts: int) -> np.ndarray:
    """Row numbers (parts + 1,) that cut ragged rows into parts of about equal length together.

    `bounds` (rows + 1,) are the rows' offsets from 0; parts are empty where rows are fewer.
    """
    wanted = np.arange(1, parts) * (int(bounds[-1]) / parts)
    middle = (np.asarray(bounds[:-1], dtype=np.float64) + bounds[1:]) / 2
    return np.concatenate([[0], np.searchsorted(middle, wanted), [len(bounds) - 1]])
