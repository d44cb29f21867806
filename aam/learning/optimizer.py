"""The optimizer, and its learning rate over a run."""

from __future__ import annotations

import math

import torch
from torch import nn

SCALE_LR_FACTOR = 10.0  # the distance scale is one number and must follow the embeddings


def make_optimizer(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW without decay on norms, biases and embeddings; a faster rate for distance scales.

    Its state is there before the first step, which must not run out of memory half-way: a step
    without gradients and learning rate makes it all zero, and its count begins again.
    """
    embeddings = {id(one.weight) for one in module.modules() if isinstance(one, nn.Embedding)}
    decay, plain, scales = [], [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("log_scale"):
            scales.append(parameter)
        elif parameter.ndim < 2 or name.endswith("bias") or id(parameter) in embeddings:
            plain.append(parameter)
        else:
            decay.append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay, "lr_factor": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_factor": 1.0},
        {"params": scales, "weight_decay": 0.0, "lr_factor": SCALE_LR_FACTOR},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)
    for one in (*decay, *plain, *scales):
        one.grad = torch.zeros_like(one)
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].zero_()
    optimizer.zero_grad(set_to_none=True)
    set_learning_rate(optimizer, lr)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def warmup_cosine(done: float, coming: float, total: float, warmup_fraction: float) -> float:
    """Share of the highest learning rate at a step: a linear rise, then a cosine to 0.

    Counted in samples, because steps may differ in size: `done` before the step, `coming` in it,
    `total` in all epochs together; the rate rises in a fraction of these.
    """
    warmup = warmup_fraction * total
    if done + coming <= warmup or done == 0:
        return min(1.0, (done + coming) / warmup) if warmup else 1.0
    progress = min(1.0, max(0.0, done - warmup) / max(1.0, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))
