"""Weights of which every rank holds a part (``--strategy fsdp``), with their optimizer state.

The transformer stacks are sharded by torch's ``fully_shard``: a stack is whole while it computes,
and its gradients are reduced as they arise. All else (embeddings, heads, norms) is small and stays
on every rank. Checkpoints hold whole weights, so that any number of ranks can continue.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from aam.learning import distributed
from aam_kernels.modules import TransformerEncoder

M = TypeVar("M", bound=nn.Module)


def sharded_copy(module: M, device: torch.device) -> M:
    """A module of which this rank holds a part; all else than its children is shared with it."""
    own = copy.copy(module)
    own._modules = copy.deepcopy(module._modules)
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for part in own.modules():
        if isinstance(part, TransformerEncoder):
            fully_shard(part, mesh=mesh)
    return own


def is_sharded(tensor: Any) -> bool:
    """Whether this rank holds a part of a tensor only."""
    return isinstance(tensor, DTensor)


def whole(value: Any) -> Any:
    """A state with every sharded tensor gathered, on the CPU; all ranks call it."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return type(value)((key, whole(one)) for key, one in value.items())
    return [whole(one) for one in value] if isinstance(value, list) else value


def load_module(module: nn.Module, state: dict[str, Any]) -> None:
    """Load whole weights; each rank keeps its part.

    Raises:
        RuntimeError: they do not fit.
    """
    own = module.state_dict()
    module.load_state_dict({name: part_of(one, own.get(name)) for name, one in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state; each rank keeps its part.

    Raises:
        ValueError: it does not fit.
    """
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    parts = {
        number: {name: part_of(one, parameters[number]) for name, one in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def part_of(tensor: Any, like: Any) -> Any:
    """This rank's part of a whole tensor, sharded as another one is."""
    if not isinstance(like, DTensor) or not isinstance(tensor, Tensor) or not tensor.ndim:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scale gradients, sharded or not, down to a norm; returns the norm they had."""
    own = list(parameters)
    if not any(map(is_sharded, own)):
        return float(nn.utils.clip_grad_norm_(own, most))
    squares = torch.zeros(2, dtype=torch.float64, device=own[0].device)
    for gradient, sharded in _gradients(own):
        squares[int(sharded)] += gradient.double().square().sum()
    dist.all_reduce(squares[1:])
    norm = float(squares.sum().sqrt())
    if not norm <= most:
        for gradient, _ in _gradients(own):
            gradient.mul_(most / (norm + 1e-6))
    return norm


def _gradients(parameters: list[nn.Parameter]) -> Iterator[tuple[Tensor, bool]]:
    """What this rank holds of the gradients, and whether it is a part."""
    for one in parameters:
        gradient = one.grad
        if isinstance(gradient, DTensor):
            yield gradient.to_local(), True
        elif gradient is not None:
            yield gradient, False
