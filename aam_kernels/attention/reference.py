"""Softmax attention within ragged sequences: the specification (``impl="math"``).

For every sequence and head, with q (length, d), k and v (key_length, d)::

    S = scale q k^T        lse = logsumexp(S, keys)       P = softmax(S, keys)
    Z = P M / (1 - p)      O = Z v                        (M: the elements that dropout keeps)

    dV = Z^T dO            dP = (dO v^T) M / (1 - p)      D = rowsum(dO O)
    dS = P (dP - D)        dQ = scale dS k                dK = scale dS^T q

A sequence without keys gives output 0, gradient 0 and lse -inf; one without queries gives no row.
float16 and bfloat16 are computed in float32 and rounded once; float64 in float64. Works on any
device; on a GPU it reads the offsets back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aam_kernels._runtime.dropout import attention_dropped
from aam_kernels._runtime.grouping import Chunk, Sequences, equal_length_chunks

_BUDGET = 1 << 21  # scores at a time; bounds memory, changes no result


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output (total, heads, head_dim) and logsumexp (total, heads) in the computing dtype."""
    compute = torch.promote_types(query.dtype, torch.float32)
    heads = query.shape[1]
    output = query.new_zeros(query.shape)
    lse = query.new_full((query.shape[0], heads), float("-inf"), dtype=compute)
    for chunk in equal_length_chunks(sequences, heads, _BUDGET, pairs=True):
        q = _heads_first(chunk.query.take(query), compute)
        k, v = (_heads_first(chunk.key.take(x), compute) for x in (key, value))
        scores = q @ k.transpose(-1, -2) * scale
        kept = _dropout(scores.softmax(-1), chunk, dropout_p, seed)
        chunk.query.put(output, (kept @ v).transpose(1, 2))
        chunk.query.put(lse, scores.logsumexp(-1).transpose(1, 2))
    return output, lse


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    sequences: Sequences,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; exact without ``lse``, which others need."""
    compute = torch.promote_types(query.dtype, torch.float32)
    grads = query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    for chunk in equal_length_chunks(sequences, query.shape[1], _BUDGET, pairs=True):
        q, o, grad = (
            _heads_first(chunk.query.take(x), compute) for x in (query, output, grad_output)
        )
        k, v = (_heads_first(chunk.key.take(x), compute) for x in (key, value))
        probabilities = (q @ k.transpose(-1, -2) * scale).softmax(-1)
        kept = _dropout(probabilities, chunk, dropout_p, seed)
        grad_probabilities = _dropout(grad @ v.transpose(-1, -2), chunk, dropout_p, seed)
        delta = (grad * o).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad_probabilities - delta) * scale
        chunk.query.put(grads[0], (grad_scores @ k).transpose(1, 2))
        chunk.key.put(grads[1], (grad_scores.transpose(-1, -2) @ q).transpose(1, 2))
        chunk.key.put(grads[2], (kept.transpose(-1, -2) @ grad).transpose(1, 2))
    return grads


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).transpose(1, 2)  # (sequences, heads, length, head_dim)


def _dropout(x: Tensor, chunk: Chunk, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Drops and rescales (sequences, heads, length, key_length)."""
    if dropout_p == 0.0:
        return x
    assert seed is not None
    query_rows, key_rows = (rows.numbers().to(x.device) for rows in (chunk.query, chunk.key))
    drop = attention_dropped(seed, query_rows, key_rows, x.shape[1], dropout_p)
    return x.masked_fill(drop, 0.0) / (1.0 - dropout_p)
