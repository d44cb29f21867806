"""Attention pooling with torch's own kernels.

On a CPU: a softmax by `torch.segment_reduce` and one `torch.nn.functional.embedding_bag`, which
sums weighted rows by sequence without a copy of the values. On a GPU: the scores padded to
(n, max_length) for the softmax, then `torch.segment_reduce` over the packed values: no mask, no
padding of values, no atomics, and no wait for the device when ``max_length`` is known.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from aam_kernels._runtime.grouping import Sequences


def forward(values: Tensor, scores: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Pooled values (n, dim) and logsumexp (n,)."""
    if values.device.type != "cpu":
        return _forward_gpu(values, scores, sequences)
    compute = torch.promote_types(values.dtype, torch.float32)
    rows, sequence, lengths = _real_rows(sequences)
    weights, lse = _softmax(scores[rows].to(compute), sequence, lengths)
    bags = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=bags[1:])
    pooled = embedding_bag(
        rows, values.to(compute), bags, mode="sum", per_sample_weights=weights,
        include_last_offset=True,
    )  # fmt: skip
    return pooled.to(values.dtype), lse


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
    rows, sequence, lengths = _real_rows(sequences)
    # The softmax again: exp(s - lse) would round where the lse is large.
    weights, _ = _softmax(scores[rows].to(compute), sequence, lengths)
    grad_pooled = grad_pooled.to(compute)
    delta = (grad_pooled * pooled.to(compute)).sum(1)
    grad = grad_pooled.index_select(0, sequence)
    products = (grad * values.index_select(0, rows).to(compute)).sum(1)
    grad_scores[rows] = (weights * (products - delta[sequence])).to(scores.dtype)
    grad_values[rows] = grad.mul_(weights.unsqueeze(1)).to(values.dtype)
    return grad_values, grad_scores


def _real_rows(sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that belong to a sequence and its number (rows,), and the lengths (n,); all int64."""
    offsets = sequences.offsets.long()
    lengths = offsets.diff() if sequences.lengths is None else sequences.lengths.long()
    sequence = torch.repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    rows = torch.arange(len(sequence)) + (offsets[:-1] - first)[sequence]
    return rows, sequence, lengths


def _softmax(scores: Tensor, sequence: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (rows,) and logsumexp (n,), which is -inf for a sequence without rows."""
    if not len(scores):
        return scores, scores.new_full((len(lengths),), float("-inf"))
    peak = torch.segment_reduce(scores, "max", lengths=lengths, unsafe=True)
    weights = (scores - peak[sequence]).exp_()
    total = torch.segment_reduce(weights, "sum", lengths=lengths, unsafe=True, initial=0)
    lse = torch.where(lengths > 0, total.log() + peak, float("-inf"))
    return weights.div_(total[sequence]), lse


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
