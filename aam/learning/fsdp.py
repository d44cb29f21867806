"""Weights of which every rank holds a part (``--strategy fsdp``), with their optimizer state.

The transformer stacks are sharded by torch's ``fully_shard``: a stack is whole while it computes,
and its gradients are reduced as they arise. All else (embeddings, heads, norms) is small and stays
on every rank. Checkpoints hold whole weights, so that any number of ranks can continue.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

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


def copy_whole(sharded: nn.Module, whole: nn.Module) -> None:
    """Give a module the weights of its sharded copy; all ranks call it."""
    own = whole.state_dict()
    for name, value in sharded.state_dict().items():
        own[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)


def get_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer state by name, whole; all ranks call it, rank 0 alone has all."""
    sharded = any(isinstance(one, DTensor) for one in module.parameters())
    options = StateDictOptions(full_state_dict=sharded, cpu_offload=sharded)
    weights, state = get_state_dict(module, optimizer, options=options)
    return {"objective": weights, "optimizer": state}


def set_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `get_state` gave; a rank keeps its part of sharded weights."""
    sharded = any(isinstance(one, DTensor) for one in module.parameters())
    weights = {"model_state_dict": state["objective"], "optim_state_dict": state["optimizer"]}
    set_state_dict(module, optimizer, **weights, options=StateDictOptions(full_state_dict=sharded))


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scale gradients, sharded or not, down to a norm; returns the norm they had."""
    own = [one for one in parameters if one.grad is not None]
    sharded = [one for one in own if isinstance(one.grad, DTensor)]
    if not sharded:
        return float(clip_grad_norm_(own, most))
    plain = [one for one in own if not isinstance(one.grad, DTensor)]
    norms: list[Tensor] = []
    for group in (sharded, plain):  # torch does not take both at once
        norm = get_total_norm([one.grad for one in group if one.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for group in (sharded, plain):
        clip_grads_with_norm_(group, most, norm)
    return float(norm)
