"""What the ranks of a run tell one another within a step: rows, sums, and whether all went well.

Every rank sees the same batch, computes a contiguous share of its ASVs and samples, and learns
the others' results here. One process is the special case in which nothing has to be sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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
