"""Attention by explicit products with the counter mask, for sequences of one length.

Used where a dropout mask is wanted, which no fused torch kernel takes. Scores are made in blocks
of at most ``budget`` elements (whole sequences, else one head, else rows of one head), so that
probabilities and masks stay in cache; blocks follow a fixed order, so sums are
reproducible. With P the probabilities, M the kept elements, r = 1 / (1 - p)::

    O = r (P M) V            dV = r (P M)^T dO           D = rowsum(dO O)
    dS = P (r M (dO V^T) - D)      dQ = scale dS K      dK = scale dS^T Q

Shapes: query, output (B, length, heads, head_dim); key, value (B, key_length, heads, head_dim);
lse (B, length, heads); rows (B, length) int64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from aam_kernels._runtime.dropout import kept, key_factors, row_factors


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor,
    query_rows: Tensor,
    key_rows: Tensor,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """Returns output and logsumexp."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:-1])
    factors = row_factors(seed, query_rows, query.shape[2]), key_factors(seed, key_rows)
    for block, heads, rows in _blocks(query, key, budget):
        q, k, v = (_heads_first(x[block, :, heads]) for x in (query, key, value))
        scores = _scores(q[:, rows], k, scale)
        peak = scores.amax(-1, keepdim=True)
        scores.sub_(peak).exp_()
        total = scores.sum(-1, keepdim=True)
        scores.mul_(_kept(factors, block, heads, rows, dropout_p, scores))
        part = torch.bmm(scores, v).div_(total.mul(1.0 - dropout_p))
        _place(output, block, heads, rows, part)
        _place(lse.unsqueeze(-1), block, heads, rows, total.log_().add_(peak))
    return output, lse


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor,
    query_rows: Tensor,
    key_rows: Tensor,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value."""
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key = torch.zeros_like(key, memory_format=torch.contiguous_format)
    grad_value = torch.zeros_like(value, memory_format=torch.contiguous_format)
    factors = row_factors(seed, query_rows, query.shape[2]), key_factors(seed, key_rows)
    keep_scale = 1.0 / (1.0 - dropout_p)
    for block, heads, rows in _blocks(query, key, budget):
        q, k, v, grad, out = (
            _heads_first(x[block, :, heads]) for x in (query, key, value, grad_output, output)
        )
        q, grad, out = q[:, rows], grad[:, rows], out[:, rows]
        negative_lse = _heads_first(lse[block, :, heads].unsqueeze(-1))[:, rows].neg()
        delta = (grad * out).sum(-1, keepdim=True)
        probabilities = _scores(q, k, scale, negative_lse).exp_()
        keep = _kept(factors, block, heads, rows, dropout_p, probabilities)
        grad_scores = _scores(grad, v, keep_scale).mul_(keep)
        grad_scores.sub_(delta).mul_(probabilities)
        kept_weights = probabilities.mul_(keep)
        _place(grad_query, block, heads, rows, torch.bmm(grad_scores, k).mul_(scale))
        every_key = slice(None)
        part = torch.bmm(grad_scores.transpose(1, 2), q).mul_(scale)
        _add(grad_key, block, heads, every_key, part)
        part = torch.bmm(kept_weights.transpose(1, 2), grad).mul_(keep_scale)
        _add(grad_value, block, heads, every_key, part)
    return grad_query, grad_key, grad_value


def _blocks(query: Tensor, key: Tensor, budget: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices over sequences, heads and query rows whose scores number at most ``budget``."""
    batch, length, heads, _ = query.shape
    key_length = key.shape[1]
    batch_step = max(1, budget // (length * key_length * heads))
    head_step = min(heads, max(1, budget // (length * key_length)))
    row_step = min(length, max(16, budget // key_length)) if head_step == 1 else length
    for first in range(0, batch, batch_step):
        for head in range(0, heads, head_step):
            for row in range(0, length, row_step):
                yield (
                    slice(first, first + batch_step),
                    slice(head, head + head_step),
                    slice(row, row + row_step),
                )


def _heads_first(x: Tensor) -> Tensor:
    """(B, length, heads, d) -> (B * heads, length, d)."""
    return x.transpose(1, 2).flatten(0, 1)


def _scores(left: Tensor, right: Tensor, scale: float, add: Tensor | None = None) -> Tensor:
    """``add + scale * left @ right^T`` in one pass: (N, m, d), (N, n, d) -> (N, m, n)."""
    shape = (left.shape[0], left.shape[1], right.shape[1])
    if add is None:
        empty = left.new_empty(()).expand(shape)
        return torch.baddbmm(empty, left, right.transpose(1, 2), beta=0, alpha=scale)
    return torch.baddbmm(add.expand(shape), left, right.transpose(1, 2), alpha=scale)


def _kept(
    factors: tuple[Tensor, Tensor],
    block: slice,
    heads: slice,
    rows: slice,
    dropout_p: float,
    scores: Tensor,
) -> Tensor:
    """1 where kept, else 0, in the shape of ``scores`` (B * heads, rows, keys)."""
    row_part = factors[0][block, rows, heads].transpose(1, 2).unsqueeze(-1).contiguous()
    columns = factors[1][block, None, None]
    return kept(row_part, columns, dropout_p, scores.dtype).view_as(scores)


def _place(packed: Tensor, block: slice, heads: slice, rows: slice, part: Tensor) -> None:
    view = packed[block, rows, heads].transpose(1, 2)
    view.copy_(part.view(view.shape))


def _add(packed: Tensor, block: slice, heads: slice, rows: slice, part: Tensor) -> None:
    view = packed[block, rows, heads].transpose(1, 2)
    view.add_(part.view(view.shape))
