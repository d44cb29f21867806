"""Attention through torch's own kernels, without padding and without a mask.

On a CPU: sequences of equal length run together in cache-sized chunks through torch's fused
flash kernel, which keeps the output and the logsumexp only. No fused torch kernel takes a
counter-based dropout mask, so with dropout the products are explicit (`_explicit`), in chunks
whose scores stay in cache. float16 and bfloat16 are computed in float32 and rounded once.
On a GPU: see `aam_kernels.attention.sdpa_gpu`.

Stable signatures, which other operations may build on (shapes: B sequences of one length)::

    forward(query, key, value, sequences, scale, dropout_p, seed) -> (output, lse)
    backward(grad_output, query, key, value, output, lse, sequences, scale, dropout_p, seed)
        -> (grad_query, grad_key, grad_value)
        # packed: (total, heads, head_dim); lse (total, heads); sequences: grouping.Sequences

    forward_equal(query, key, value, scale, dropout_p, seed, query_rows, key_rows)
        -> (output, lse)
    backward_equal(grad_output, query, key, value, output, lse, scale, dropout_p, seed,
                   query_rows, key_rows) -> (grad_query, grad_key, grad_value)
        # (B, length, heads, head_dim), any strides with a dense last dimension; lse
        # (B, length, heads); rows (B, length) int64 in the packed tensor, None without dropout;
        # float32 or float64 only; every key length >= 1
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from aam_kernels._runtime.grouping import Chunk, Sequences, equal_length_chunks, has_gaps
from aam_kernels.attention import explicit, sdpa_gpu

# Elements of one operand of a chunk, 10 sequences of 101 tokens x 4 heads x 32. Between 2**15 and
# 2**19 the speed is flat; below, calls cost; far above, operands leave the cache.
CHUNK_ELEMENTS = 1 << 17
# Scores of a chunk with dropout. At 2**16 the many small calls cost twice the time of 2**18; above
# 2**19 nothing is gained, and temporaries grow.
CHUNK_SCORES = 1 << 18

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Packed attention, see the module docstring."""
    if query.device.type != "cpu":
        return sdpa_gpu.forward(query, key, value, sequences, scale, dropout_p, seed)
    total, heads, _ = query.shape
    compute = compute_dtype(query.dtype)
    gaps = has_gaps(sequences.offsets, sequences.lengths, total)
    output = query.new_zeros(query.shape) if gaps else query.new_empty(query.shape)
    lse = query.new_full((total, heads), float("-inf"), dtype=compute)
    for chunk in _chunks(query, sequences, dropout_p):
        if chunk.key.length == 0:
            chunk.query.put(output, output.new_zeros(()).expand(chunk.query.take(query).shape))
            continue
        out, chunk_lse = forward_equal(
            chunk.query.take(query).to(compute),
            chunk.key.take(key).to(compute),
            chunk.key.take(value).to(compute),
            scale,
            dropout_p,
            seed,
            chunk.query.numbers() if dropout_p else None,
            chunk.key.numbers() if dropout_p else None,
        )
        chunk.query.put(output, out)
        chunk.query.put(lse, chunk_lse)
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
    """Gradients of packed attention, see the module docstring."""
    if query.device.type != "cpu":
        return sdpa_gpu.backward(
            grad_output, query, key, value, output, lse, sequences, scale, dropout_p, seed
        )
    compute = compute_dtype(query.dtype)
    grads = query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    for chunk in _chunks(query, sequences, dropout_p):
        if chunk.key.length == 0:
            continue
        parts = backward_equal(
            chunk.query.take(grad_output).to(compute),
            chunk.query.take(query).to(compute),
            chunk.key.take(key).to(compute),
            chunk.key.take(value).to(compute),
            chunk.query.take(output).to(compute),
            chunk.query.take(lse),
            scale,
            dropout_p,
            seed,
            chunk.query.numbers() if dropout_p else None,
            chunk.key.numbers() if dropout_p else None,
        )
        rows = (chunk.query, chunk.key, chunk.key)
        for place, grad, part in zip(rows, grads, parts, strict=True):
            place.put(grad, part)
    return grads


def forward_equal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    query_rows: Tensor | None = None,
    key_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of B sequences of one length on a CPU, see the module docstring."""
    if dropout_p:
        assert seed is not None and query_rows is not None and key_rows is not None
        return explicit.forward(
            query, key, value, scale, dropout_p, seed, query_rows, key_rows, CHUNK_SCORES
        )
    output, lse = _flash(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=scale
    )
    return output.transpose(1, 2), lse.transpose(1, 2)


def backward_equal(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    query_rows: Tensor | None = None,
    key_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward_equal`, see the module docstring."""
    if dropout_p:
        assert seed is not None and query_rows is not None and key_rows is not None
        return explicit.backward(
            grad_output, query, key, value, output, lse, scale, dropout_p, seed, query_rows,
            key_rows, CHUNK_SCORES,
        )  # fmt: skip
    grads = _flash_backward(
        *(x.transpose(1, 2) for x in (grad_output, query, key, value, output, lse)),
        0.0,
        False,
        scale=scale,
    )
    grad_query, grad_key, grad_value = (grad.transpose(1, 2) for grad in grads)
    return grad_query, grad_key, grad_value


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; float32, float16 and bfloat16 are computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(query: Tensor, sequences: Sequences, dropout_p: float) -> Iterator[Chunk]:
    heads, head_dim = query.shape[1:]
    if dropout_p:
        return equal_length_chunks(sequences, heads, CHUNK_SCORES, pairs=True)
    return equal_length_chunks(sequences, heads * head_dim, CHUNK_ELEMENTS)
