"""Attention pooling with torch's own kernels.

On a CPU: sequences of equal length in cache-sized chunks, a softmax and one batched
vector-matrix product each. On a GPU: the scores padded to (n, max_length) for the softmax, then
`torch.segment_reduce` over the packed values: no mask, no padding of values, no atomics, and no
wait for the device when ``max_length`` is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aam_kernels._runtime.grouping import Sequences, equal_length_chunks

# Elements of the values of a chunk. Memory binds, so few calls count for more than the cache:
# 2**17 takes 1.7 times as long.
CHUNK_ELEMENTS = 1 << 21


def forward(values: Tensor, scores: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Pooled values (n, dim) and logsumexp (n,)."""
    if values.device.type != "cpu":
        return _forward_gpu(values, scores, sequences)
    compute = torch.promote_types(values.dtype, torch.float32)
    count = sequences.offsets.shape[0] - 1
    pooled = values.new_zeros(count, values.shape[1])
    lse = values.new_full((count,), float("-inf"), dtype=compute)
    for chunk in equal_length_chunks(sequences, values.shape[1], CHUNK_ELEMENTS):
        s, v = (chunk.query.take(x).to(compute) for x in (scores, values))
        peak = s.amax(1, keepdim=True)
        weights = s.sub(peak).exp_()
        total = weights.sum(1, keepdim=True)
        part = torch.bmm(weights.unsqueeze(1), v).squeeze(1).div_(total)
        chunk.put_sequences(pooled, part)
        chunk.put_sequences(lse, total.log_().add_(peak).squeeze(1))
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
    if values.device.type != "cpu":
        return _backward_gpu(grad_pooled, values, scores, pooled, lse, sequences)
    compute = torch.promote_types(values.dtype, torch.float32)
    grad_values, grad_scores = values.new_zeros(values.shape), scores.new_zeros(scores.shape)
    for chunk in equal_length_chunks(sequences, values.shape[1], CHUNK_ELEMENTS):
        s, v = (chunk.query.take(x).to(compute) for x in (scores, values))
        grad, out = (chunk.take_sequences(x).to(compute) for x in (grad_pooled, pooled))
        weights = s.softmax(1)  # exact where exp(s - lse) would round a large lse
        delta = (grad * out).sum(1, keepdim=True)
        products = torch.bmm(v, grad.unsqueeze(2)).squeeze(2)
        chunk.query.put(grad_scores, products.sub_(delta).mul_(weights))
        chunk.query.put(grad_values, weights.unsqueeze(2) * grad.unsqueeze(1))
    return grad_values, grad_scores


def _forward_gpu(values: Tensor, scores: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    count = sequences.offsets.shape[0] - 1
    empty = values.new_full((count,), float("-inf"), dtype=torch.float32)
    if values.shape[0] == 0 or count == 0:
        return values.new_zeros(count, values.shape[1]), empty
    starts, lengths, sequence, real, longest = _rows(values, sequences)
    slots = torch.arange(longest, device=values.device)
    rows = (starts[:, None] + slots).clamp_(max=values.shape[0] - 1)
    inside = slots < lengths[:, None]
    lse = torch.where(inside, scores[rows].float(), float("-inf")).logsumexp(1)
    weights = (scores.float() - lse[sequence]).exp().unsqueeze(1)
    weighted = torch.where(real.unsqueeze(1), weights * values, 0.0)
    pooled = torch.segment_reduce(
        weighted, "sum", offsets=sequences.offsets.long(), unsafe=True, initial=0
    )
    alive = lengths > 0
    pooled = torch.where(alive.unsqueeze(1), pooled, 0.0).to(values.dtype)
    return pooled, torch.where(alive, lse, empty)


def _backward_gpu(
    grad_pooled: Tensor,
    values: Tensor,
    scores: Tensor,
    pooled: Tensor,
    lse: Tensor,
    sequences: Sequences,
) -> tuple[Tensor, Tensor]:
    if values.shape[0] == 0 or pooled.shape[0] == 0:
        return values.new_zeros(values.shape), scores.new_zeros(scores.shape)
    _, _, sequence, real, _ = _rows(values, sequences)
    grad = grad_pooled.float()
    delta = (grad * pooled).sum(1)
    weights = (scores.float() - lse[sequence]).exp()
    products = (values * grad[sequence]).sum(1)
    grad_scores = torch.where(real, weights * (products - delta[sequence]), 0.0)
    grad_values = torch.where(real.unsqueeze(1), weights.unsqueeze(1) * grad[sequence], 0.0)
    return grad_values.to(values.dtype), grad_scores.to(scores.dtype)


def _rows(values: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Starts and lengths (n,), each row's sequence and whether it has one (total,), longest."""
    offsets = sequences.offsets.long()
    starts = offsets[:-1]
    lengths = offsets.diff() if sequences.lengths is None else sequences.lengths.long()
    longest = sequences.max_length if sequences.max_length >= 0 else int(lengths.max())
    rows = torch.arange(values.shape[0], device=values.device)
    sequence = (torch.searchsorted(starts, rows, right=True) - 1).clamp_(min=0)
    position = rows - starts[sequence]
    return starts, lengths, sequence, position < lengths[sequence], longest
