"""Textbook flash attention on padded rows: what the kernels of the package are compared with.

The algorithm of FlashAttention-2 (Dao 2023, arXiv 2307.08691) written plainly: queries in blocks,
keys streamed past them with a running maximum and sum, a backward of two kernels that recompute
the probabilities. Rows are padded to one length and masked by ``lengths``. Two addressings: a
grid of (blocks, rows) with 32-bit offsets, as such kernels usually have, which ends at 65,535 rows
and 2**31 elements; and, with FLAT, a flattened grid with 64-bit offsets, which does not.

They are compiled and counted, never shipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def place(length, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """Block and row of this program."""
    if FLAT:
        blocks = tl.cdiv(length, BLOCK)
        program = tl.program_id(0)
        return program % blocks, (program // blocks).to(tl.int64)
    else:
        return tl.program_id(0), tl.program_id(1)


@triton.jit
def tile(pointer, rows, stride, limit, HEAD_DIM: tl.constexpr):
    """(rows, HEAD_DIM); rows from ``limit`` on are 0."""
    columns = tl.arange(0, HEAD_DIM)
    places = pointer + rows[:, None] * stride + columns[None, :]
    return tl.load(places, mask=rows[:, None] < limit, other=0.0)


@triton.jit
def put(pointer, x, rows, stride, limit, HEAD_DIM: tl.constexpr):
    """Writes (rows, HEAD_DIM) up to row ``limit``."""
    columns = tl.arange(0, HEAD_DIM)
    places = pointer + rows[:, None] * stride + columns[None, :]
    tl.store(places, x.to(pointer.dtype.element_ty), mask=rows[:, None] < limit)


@triton.jit
def flash_forward(
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    lse_ptr,
    lengths_ptr,
    length,
    scale_log2,
    stride_batch,
    stride_row,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Output and logsumexp (base 2) of one block of queries."""
    block, batch = place(length, BLOCK_M, FLAT)
    keys = tl.load(lengths_ptr + batch)
    base = batch * stride_batch
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query = tile(query_ptr + base, rows, stride_row, length, HEAD_DIM)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in range(0, keys, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        key = tile(key_ptr + base, columns, stride_row, keys, HEAD_DIM)
        value = tile(value_ptr + base, columns, stride_row, keys, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
        scores = tl.where(columns[None, :] < keys, scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        shrink = tl.exp2(running_max - new_max)
        weights = tl.exp2(scores - new_max[:, None])
        running_sum = running_sum * shrink + tl.sum(weights, 1)
        accumulator = accumulator * shrink[:, None]
        weights = weights.to(value.dtype)
        accumulator = tl.dot(weights, value, accumulator, input_precision=PRECISION)
        running_max = new_max
    some = running_sum > 0
    output = tl.where(some[:, None], accumulator / running_sum[:, None], 0.0)
    lse = tl.where(some, running_max + tl.log2(running_sum), float("inf"))
    put(output_ptr + base, output, rows, stride_row, length, HEAD_DIM)
    tl.store(lse_ptr + batch * length + rows, lse, mask=rows < length)


@triton.jit
def flash_backward_keys(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    lengths_ptr,
    grad_key_ptr,
    grad_value_ptr,
    length,
    scale_log2,
    scale,
    stride_batch,
    stride_row,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Gradients of one block of keys and values."""
    block, batch = place(length, BLOCK_N, FLAT)
    keys = tl.load(lengths_ptr + batch)
    base = batch * stride_batch
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    key = tile(key_ptr + base, columns, stride_row, keys, HEAD_DIM)
    value = tile(value_ptr + base, columns, stride_row, keys, HEAD_DIM)
    grad_key = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    grad_value = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for start in range(0, length, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        query = tile(query_ptr + base, rows, stride_row, length, HEAD_DIM)
        grad = tile(grad_ptr + base, rows, stride_row, length, HEAD_DIM)
        terms = batch * length + rows
        lse = tl.load(lse_ptr + terms, mask=rows < length, other=float("inf"))
        delta = tl.load(delta_ptr + terms, mask=rows < length, other=0.0)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale_log2
        weights = tl.where(columns[:, None] < keys, tl.exp2(scores - lse[None, :]), 0.0)
        grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=PRECISION)
    put(grad_key_ptr + base, grad_key * scale, columns, stride_row, length, HEAD_DIM)
    put(grad_value_ptr + base, grad_value, columns, stride_row, length, HEAD_DIM)


@triton.jit
def flash_backward_queries(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    lengths_ptr,
    grad_query_ptr,
    length,
    scale_log2,
    scale,
    stride_batch,
    stride_row,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Gradient of one block of queries."""
    block, batch = place(length, BLOCK_M, FLAT)
    keys = tl.load(lengths_ptr + batch)
    base = batch * stride_batch
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query = tile(query_ptr + base, rows, stride_row, length, HEAD_DIM)
    grad = tile(grad_ptr + base, rows, stride_row, length, HEAD_DIM)
    terms = batch * length + rows
    lse = tl.load(lse_ptr + terms, mask=rows < length, other=float("inf"))
    delta = tl.load(delta_ptr + terms, mask=rows < length, other=0.0)
    grad_query = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in range(0, keys, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        key = tile(key_ptr + base, columns, stride_row, keys, HEAD_DIM)
        value = tile(value_ptr + base, columns, stride_row, keys, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
        weights = tl.where(columns[None, :] < keys, tl.exp2(scores - lse[:, None]), 0.0)
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None])
        grad_query = tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision=PRECISION)
    put(grad_query_ptr + base, grad_query * scale, rows, stride_row, length, HEAD_DIM)


@dataclass(frozen=True)
class Blocks:
    """Rows that stay with a program, rows that stream past it, and its warps."""

    staying: int
    streaming: int
    num_warps: int


def forward(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, blocks: Blocks, *, flat: bool
) -> tuple[Tensor, Tensor]:
    """Output (batch, length, head_dim) and base-2 logsumexp (batch, length)."""
    batch, length, head_dim = query.shape
    output = torch.empty_like(query)
    lse = query.new_empty(batch, length, dtype=torch.float32)
    scale_log2 = head_dim**-0.5 * math.log2(math.e)
    flash_forward[_grid(length, blocks, batch, flat)](
        query,
        key,
        value,
        output,
        lse,
        lengths,
        length,
        scale_log2,
        *query.stride()[:2],
        BLOCK_M=blocks.staying,
        BLOCK_N=blocks.streaming,
        **_constants(head_dim, blocks, flat),
    )
    return output, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    lengths: Tensor,
    blocks: Blocks,
    *,
    flat: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; rowsum(dO O) is a pass of its own, by torch."""
    batch, length, head_dim = query.shape
    delta = (grad.float() * output.float()).sum(-1)
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    scale = head_dim**-0.5
    inputs = (query, key, value, grad, lse, delta, lengths)
    rest = (length, scale * math.log2(math.e), scale, *query.stride()[:2])
    grid = _grid(length, blocks, batch, flat)
    constants = _constants(head_dim, blocks, flat)
    flash_backward_keys[grid](
        *inputs,
        *grads[1:],
        *rest,
        BLOCK_M=blocks.streaming,
        BLOCK_N=blocks.staying,
        **constants,
    )
    flash_backward_queries[grid](
        *inputs,
        grads[0],
        *rest,
        BLOCK_M=blocks.staying,
        BLOCK_N=blocks.streaming,
        **constants,
    )
    return grads


def _constants(head_dim: int, blocks: Blocks, flat: bool) -> dict[str, object]:
    return {
        "HEAD_DIM": head_dim,
        "PRECISION": "ieee",
        "FLAT": flat,
        "num_warps": blocks.num_warps,
    }


def _grid(length: int, blocks: Blocks, batch: int, flat: bool) -> tuple[int, ...]:
    count = triton.cdiv(length, blocks.staying)
    return (count * batch,) if flat else (count, batch)
