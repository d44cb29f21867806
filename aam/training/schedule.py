"""The optimizer and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

SCALE_LR_FACTOR = 10.0  # the distance scale is one number and must follow the embeddings


def make_optimizer(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW without decay on norms, biases and embeddings; a faster rate for distance scales."""
    decay, plain, scales = [], [], []
    embeddings = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, nn.Embedding)
        for parameter in part.parameters(recurse=False)
    }
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("log_scale"):
            scales.append(parameter)
        elif parameter.ndim < 2 or id(parameter) in embeddings:
            plain.append(parameter)
        else:
            decay.append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay, "lr_factor": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_factor": 1.0},
        {"params": scales, "weight_decay": 0.0, "lr_factor": SCALE_LR_FACTOR},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)


def warmup_cosine(step: int, total: int, warmup_fraction: float) -> float:
    """Share of the highest learning rate at a step (0, 1, ...) of a run of `total` steps."""
    warmup = max(1, round(warmup_fraction * total))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
