"""Checks of arguments that several operations share. They look at shapes, never at values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensors(**tensors: Tensor) -> None:
    """All are tensors of one floating dtype on one device, and none carries a forward tangent.

    Raises:
        TypeError: not a tensor, or a dtype that no implementation takes, or mixed dtypes.
        ValueError: mixed devices.
        NotImplementedError: forward-mode differentiation.
    """
    (first_name, first), *_ = tensors.items()
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in FLOATING:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
        if x.dtype != first.dtype:
            raise TypeError(f"{name} is {x.dtype}, but {first_name} is {first.dtype}")
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}, but {first_name} is on {first.device}")
    refuse_forward_mode(*tensors.values())


def refuse_forward_mode(*tensors: Tensor) -> None:
    """Raises NotImplementedError inside `torch.func.jvp` and with dual tensors.

    A custom operator without this check would silently return a tangent of 0.
    """
    if torch.compiler.is_compiling():
        return
    stack = torch._C._functorch.get_interpreter_stack() or ()
    forward = any(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)
    if not forward and forward_ad._current_level >= 0:
        forward = any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    if forward:
        raise NotImplementedError(
            "forward-mode differentiation (torch.func.jvp, jacfwd, hessian) is not supported; "
            "use reverse mode (torch.func.vjp, jacrev, grad)"
        )


def check_offsets_argument(name: str, offsets: Tensor, device: torch.device) -> None:
    """(n + 1,) int32 on ``device``; values are checked inside the operator, on a CPU.

    Raises:
        TypeError: not an int32 tensor.
        ValueError: wrong shape or device.
    """
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{name} must be an int32 tensor, got {type(offsets).__name__}")
    if offsets.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {offsets.dtype}; use .to(torch.int32)")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name} must be (n + 1,), got shape {tuple(offsets.shape)}")
    if offsets.device != device:
        raise ValueError(f"{name} must be on {device} beside the values, got {offsets.device}")


def known_length(name: str, length: int | None) -> int:
    """-1 for an unknown maximum length.

    Raises:
        ValueError: negative.
    """
    if length is None:
        return -1
    if length < 0:
        raise ValueError(f"{name} must be at least 0, got {length}")
    return length
