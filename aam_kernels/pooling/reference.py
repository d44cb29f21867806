"""Attention pooling of ragged sequences: the specification (``impl="math"``).

For every sequence, with scores s (length,) and values v (length, dim)::

    lse = logsumexp(s)     p = softmax(s)       o = p v
    dv = p dO              ds = p (v dO - o dO)

A sequence without rows gives 0, gradient 0 and lse -inf. float16 and bfloat16 are computed in
float32 and rounded once; float64 in float64. On a GPU it reads the offsets back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aam_kernels._runtime.grouping import Sequences, equal_length_chunks

_BUDGET = 1 << 22  # elements at a time; bounds memory, changes no result


def forward(values: Tensor, scores: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Pooled values (n, dim) and logsumexp (n,) in the computing dtype."""
    compute = torch.promote_types(values.dtype, torch.float32)
    count = sequences.offsets.shape[0] - 1
    pooled = values.new_zeros(count, values.shape[1])
    lse = values.new_full((count,), float("-inf"), dtype=compute)
    for chunk in equal_length_chunks(sequences, values.shape[1], _BUDGET):
        s, v = (chunk.query.take(x).to(compute) for x in (scores, values))
        chunk.put_sequences(lse, s.logsumexp(1))
        chunk.put_sequences(pooled, (s.softmax(1).unsqueeze(1) @ v).squeeze(1))
    return pooled, lse


def backward(
    grad_pooled: Tensor,
    values: Tensor,
    scores: Tensor,
    pooled: Tensor,
    lse: Tensor,
    sequences: Sequences,
) -> tuple[Tensor, Tensor]:
    """Gradients of values and scores."""
    compute = torch.promote_types(values.dtype, torch.float32)
    grad_values, grad_scores = values.new_zeros(values.shape), scores.new_zeros(scores.shape)
    for chunk in equal_length_chunks(sequences, values.shape[1], _BUDGET):
        s, v = (chunk.query.take(x).to(compute) for x in (scores, values))
        grad, out = (chunk.take_sequences(x).to(compute) for x in (grad_pooled, pooled))
        weights = s.softmax(1)
        delta = (grad * out).sum(1, keepdim=True)
        chunk.query.put(grad_values, weights.unsqueeze(2) * grad.unsqueeze(1))
        products = (v @ grad.unsqueeze(2)).squeeze(2)
        chunk.query.put(grad_scores, weights * (products - delta))
    return grad_values, grad_scores
