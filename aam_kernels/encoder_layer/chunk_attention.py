"""Self-attention inside a chunk of the layer, from the packed query, key and value rows.

Short sequences keep their probabilities while the chunk is in cache, so the backward pass that
follows a recomputation makes neither scores nor softmax again. Long sequences keep the
logsumexp and go through `aam_kernels.attention`.

Shapes: N = sequences x heads of one group; qkv (chunk rows, 3 D); output (chunk rows, D).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from aam_kernels.attention import sdpa
from aam_kernels.encoder_layer.chunks import Chunk
from aam_kernels.encoder_layer.masks import attention_factors

# Longest sequence whose probabilities are kept: beyond it they leave the cache.
LONGEST_KEPT = 256


class Kept(NamedTuple):
    """What the backward pass of one group needs."""

    packed: Tensor  # (3, N, length, head_dim), or empty for long sequences
    probabilities: Tensor  # (N, length, length), or the logsumexp (count, length, heads)
    multiplier: Tensor | None  # (N, length, length): 0 where dropped, 1 / (1 - p) elsewhere


def forward(
    qkv: Tensor,
    chunk: Chunk,
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
    rows: Tensor | None,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, list[Kept]]:
    """Attention of every sequence of a chunk.

    Args:
        qkv: (chunk rows, 3 D).
        chunk: the sequences.
        num_heads: heads.
        dropout_p: probability of dropping an attention probability.
        seed: (3,) int64, None without dropout.
        rows: (chunk rows,) int64 rows in the packed tensor, None without dropout.
        known: the output and (on a GPU) the logsumexp, where they were kept and only the second
            result is wanted.

    Returns:
        Output (chunk rows, D), and what `backward` needs, one entry a group.
    """
    if chunk.packed is not None:
        if known is not None:
            return known[0].to(qkv.dtype), [Kept(qkv.new_empty(0), known[1], None)]
        heads = qkv.unflatten(1, (3, num_heads, -1))
        out, lse = sdpa.forward(*heads.unbind(1), chunk.packed, _scale(heads), dropout_p, seed)
        return out.flatten(1), [Kept(qkv.new_empty(0), lse, None)]
    output = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3) if known is None else known[0]
    kept = []
    for group in chunk.groups:
        place = group.take(output).unflatten(2, (num_heads, -1))
        group_rows = group.take(rows) if rows is not None else None
        part = group.take(qkv).unflatten(2, (3, num_heads, -1))
        if group.length > LONGEST_KEPT:
            out, lse = sdpa.forward_equal(
                *part.unbind(2), _scale(place), dropout_p, seed, group_rows, group_rows
            )
            if known is None:
                place.copy_(out)
            kept.append(Kept(qkv.new_empty(0), lse, None))
            continue
        packed = part.permute(2, 0, 3, 1, 4).flatten(1, 2)  # (3, N, length, head_dim), copied
        probabilities = torch.softmax(_scores(packed, _scale(place)), dim=-1)
        multiplier = _multiplier(probabilities, group_rows, num_heads, dropout_p, seed)
        if known is None:
            applied = probabilities if multiplier is None else probabilities * multiplier
            out = torch.bmm(applied, packed[2]).unflatten(0, (group.count, num_heads))
            place.copy_(out.transpose(1, 2))
        kept.append(Kept(packed, probabilities, multiplier))
    return output, kept


def backward(
    grad_output: Tensor,
    qkv: Tensor,
    output: Tensor,
    kept: list[Kept],
    chunk: Chunk,
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    """Gradient of ``qkv``, (chunk rows, 3 D)."""
    if chunk.packed is not None:
        query, key, value = qkv.unflatten(1, (3, num_heads, -1)).unbind(1)
        grads = sdpa.backward(
            grad_output.view(query.shape), query, key, value, output.view(query.shape),
            kept[0].probabilities, chunk.packed, _scale(query), dropout_p, seed,
        )  # fmt: skip
        return torch.stack(grads, dim=1).flatten(1)
    grad_qkv = torch.empty_like(qkv)
    for group, saved in zip(chunk.groups, kept, strict=True):
        place = group.take(grad_qkv).unflatten(2, (3, num_heads, -1))
        grad = group.take(grad_output).unflatten(2, (num_heads, -1))
        if group.length > LONGEST_KEPT:
            group_rows = group.take(rows) if rows is not None else None
            query, key, value = group.take(qkv).unflatten(2, (3, num_heads, -1)).unbind(2)
            parts = sdpa.backward_equal(
                grad, query, key, value,
                group.take(output).unflatten(2, (num_heads, -1)), saved.probabilities,
                _scale(grad), dropout_p, seed, group_rows, group_rows,
            )  # fmt: skip
            for part, target in zip(parts, place.unbind(2), strict=True):
                target.copy_(part)
        else:
            parts = _short_backward(grad.transpose(1, 2).flatten(0, 1), saved, _scale(grad))
            place.copy_(parts.unflatten(1, (group.count, num_heads)).permute(1, 3, 0, 2, 4))
    return grad_qkv


def _short_backward(grad: Tensor, saved: Kept, scale: float) -> Tensor:
    """(N, length, head_dim) -> (3, N, length, head_dim)."""
    (query, key, value), probabilities = saved.packed.unbind(0), saved.probabilities
    grads = torch.empty_like(saved.packed)
    grad_probabilities = torch.bmm(grad, value.transpose(1, 2))
    applied = probabilities
    if saved.multiplier is not None:
        grad_probabilities.mul_(saved.multiplier)
        applied = probabilities * saved.multiplier
    torch.bmm(applied.transpose(1, 2), grad, out=grads[2])
    grad_scores = torch.ops.aten._softmax_backward_data(
        grad_probabilities, probabilities, -1, probabilities.dtype
    )
    grads[0].baddbmm_(grad_scores, key, beta=0, alpha=scale)
    grads[1].baddbmm_(grad_scores.transpose(1, 2), query, beta=0, alpha=scale)
    return grads


def _scale(heads_last: Tensor) -> float:
    return 1.0 / math.sqrt(heads_last.shape[-1])


def _scores(packed: Tensor, scale: float) -> Tensor:
    query, key = packed[0], packed[1]
    scores = query.new_empty(query.shape[0], query.shape[1], key.shape[1])
    return scores.baddbmm_(query, key.transpose(1, 2), beta=0, alpha=scale)


def _multiplier(
    probabilities: Tensor,
    rows: Tensor | None,
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    assert seed is not None and rows is not None
    return attention_factors(probabilities, rows, num_heads, dropout_p, seed)
