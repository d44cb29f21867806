"""Where the real tokens of a padded batch stand, from a 2-D mask, without waiting for a device.

Rows are sequences of the flattened batch that begin at their first real token, so padding on the
right and on the left is skipped where it lies. Rows with holes need their real tokens moved to the
front (`PaddingMask.order`) and the result moved back (`PaddingMask.inverse`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PaddingMask:
    """Where the real tokens of a padded batch stand.

    Not a tensor, so that a model that computes with its mask fails instead of going wrong.

    Attributes:
        batch: rows of the batch.
        length: slots of a row.
        offsets: (batch + 2,) int32 first real slot of each row in the flattened batch, after an
            empty sequence at slot 0, before the number of slots.
        lengths: (batch + 1,) int32 real tokens, 0 of the empty sequence.
        longest: bound on the lengths.
        order: (batch * length,) int64 slots with each row's real tokens moved to its front; None
            when the real tokens of every row stand side by side.
        inverse: (batch * length,) int64 the inverse of ``order``.
    """

    batch: int
    length: int
    offsets: Tensor
    lengths: Tensor
    longest: int
    order: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Whatever torch is asked to do with a mask of this kind."""
        raise NotImplementedError(
            "this model computes with its attention mask, outside transformers' attention "
            f"interface ({getattr(func, '__name__', func)} of a PaddingMask); use "
            'attn_implementation="eager" for it'
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PaddingMask:
        """The same on another device: layers of a model may live on several."""
        device = torch.device(device)  # refuses a dtype
        moved: dict[str, Any] = {
            name: x.to(device, non_blocking=non_blocking)
            for name, x in vars(self).items()
            if isinstance(x, Tensor)
        }
        return replace(self, **moved)


def padding_mask(mask: Tensor, holes: bool = True) -> PaddingMask | None:
    """Finds the real tokens of a 2-D mask.

    Args:
        mask: (batch, length) bool, True at real tokens.
        holes: padding may stand between real tokens. The mask is then looked at once, which waits
            for a GPU; inside `torch.compile` it is not, and tokens are reordered in any case.
            False promises that there are none, and waits for nothing.

    Returns:
        None when all slots are known to be real.

    Raises:
        ValueError: 2**31 slots or more; with ``holes=False``, a mask with holes on a CPU (on a
            GPU and when compiled an assertion of the device).
    """
    if mask.numel() == 0:
        return None
    batch, length = mask.shape
    bounds = row_offsets(batch, length, mask.device)
    real = mask.to(torch.int32)  # compilers of some ROCm releases fail at reductions of bool
    lengths = real.sum(1, dtype=torch.int32)
    runs = real.select(1, 0) + (real.diff(dim=1) > 0).sum(1, dtype=torch.int32)
    longest = length
    if torch.compiler.is_compiling() or (not holes and mask.device.type != "cpu"):
        if not holes:
            torch._assert_async(
                runs.max() <= 1, "an attention mask has holes: register(holes=True)"
            )
        reorder = holes
    else:
        most_runs, shortest, longest = torch.stack([runs.max(), *lengths.aminmax()]).tolist()
        if shortest == length:
            return None
        reorder = most_runs > 1
        if reorder and not holes:
            row = int(runs.argmax())
            raise ValueError(
                f"row {row} of the attention mask has {int(runs[row])} runs of real tokens, but "
                "register(holes=False) promised one; use register()"
            )
    first, last = bounds.narrow(0, 0, 1), bounds.narrow(0, batch, 1)
    starts = bounds.narrow(0, 0, batch)
    order = inverse = None
    if reorder:
        order = real.argsort(dim=1, descending=True, stable=True)
        order = (order + starts.long().unsqueeze(1)).flatten()
        inverse = order.argsort()
    else:
        starts = starts + real.argmax(1).to(torch.int32)
    offsets = torch.cat([first, starts, last])
    lengths = torch.cat([first, lengths])
    return PaddingMask(batch, length, offsets, lengths, longest, order, inverse)


def row_offsets(batch: int, length: int, device: torch.device) -> Tensor:
    """(batch + 1,) int32 offsets of full rows.

    Raises:
        ValueError: 2**31 slots or more.
    """
    if batch * length >= 1 << 31:
        raise ValueError(f"at most 2**31 - 1 slots fit into int32 offsets, got {batch * length}")
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length
