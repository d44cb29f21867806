"""What the tests of the encoder layer share."""

from __future__ import annotations

import torch
from torch import nn

from aam_kernels import EncoderLayerWeights, encoder_layer, weights_from_torch
from tests.kernels.contract import offsets_of

LENGTHS = (5, 0, 1, 7, 7, 33, 5, 0)
FLOOR = 2e-7
"""Relative; where math happens to round luckily."""


def make_weights(dim, ffn_dim, dtype=torch.float32, grad=True):
    layer = nn.TransformerEncoderLayer(dim, 1, ffn_dim, activation="gelu", norm_first=True)
    weights = weights_from_torch(layer)
    noisy = (weight.detach() + 0.1 * torch.randn(weight.shape) for weight in weights)
    return EncoderLayerWeights(*(w.to(dtype).requires_grad_(grad) for w in noisy))


def run(x, offsets, weights, grad, **options):
    """Output, then the gradients of x and of every weight."""
    out = encoder_layer(x, offsets, weights, **options)
    return [out.detach(), *torch.autograd.grad(out, [x, *weights], grad)]


def problem(lengths=LENGTHS, dim=64, ffn_dim=96, dtype=torch.float32, extra=3):
    torch.manual_seed(0)
    offsets = offsets_of(lengths)
    total = int(offsets[-1]) + extra
    x = torch.randn(total, dim).to(dtype)
    grad = torch.randn(total, dim).to(dtype)
    x[total - extra :] = grad[total - extra :] = torch.nan
    return x.requires_grad_(), offsets, make_weights(dim, ffn_dim, dtype), grad


def errors(results, exact):
    """Largest and mean error of each result, in units of the exact result's largest value."""
    found = []
    for result, true in zip(results, exact, strict=True):
        scale = true.abs().max().clamp_min(1e-30)
        error = (result.double() - true).abs() / scale
        found.append((error.max().item(), error.mean().item()))
    return found
