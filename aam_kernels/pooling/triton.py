"""Attention pooling in Triton: each value is read once, forward and backward.

For every sequence, with scores s (length,) and values v (length, dim)::

    lse = logsumexp(s)     p = softmax(s)       o = p v
    dv = p dO              ds = p (v dO - o dO)

Forward: one program a sequence and block of features. Every row of the block keeps a running
maximum and sum of its own, so nothing crosses a lane before the last block of rows.
Backward: one program a sequence and share of its rows. The softmax is made again from the
scores, which are few, because ``exp(s - lse)`` would round where the lse is large. The last
programs of the launch write zeros to the rows past the last sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from aam_kernels._runtime.configurations import Configuration, Tunable, configuration, launch
from aam_kernels._runtime.grouping import Sequences

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: beside it a score of -inf weighs 0, not NaN

SHARE_ROWS = 512
"""Rows of a sequence that one backward program takes."""
MOST_TAIL_PROGRAMS = 256


@triton.jit
def sequence_rows(sequence, offsets_ptr, lengths_ptr):
    """First packed row (int64) and number of rows of a sequence."""
    start = tl.load(offsets_ptr + sequence)
    if lengths_ptr is None:
        length = tl.load(offsets_ptr + sequence + 1) - start
    else:
        length = tl.load(lengths_ptr + sequence)
    return start.to(tl.int64), length


@triton.jit
def add_scores(scores, running_max, running_sum):
    """New maxima, sums and weights of a block of scores, and what to scale older sums by."""
    new_max = tl.maximum(running_max, scores)
    rescale = tl.exp2((running_max - new_max) * LOG2E)
    weights = tl.exp2((scores - new_max) * LOG2E)
    return new_max, running_sum * rescale + weights, weights, rescale


@triton.jit
def pool_forward(
    values_ptr,
    scores_ptr,
    pooled_ptr,
    lse_ptr,
    offsets_ptr,
    lengths_ptr,
    stride_values,
    stride_scores,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Pooled values and logsumexp of one sequence and BLOCK_DIM features."""
    DIM_BLOCKS: tl.constexpr = (DIM + BLOCK_DIM - 1) // BLOCK_DIM
    sequence = (tl.program_id(0) // DIM_BLOCKS).to(tl.int64)
    features = tl.program_id(0) % DIM_BLOCKS * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    start, length = sequence_rows(sequence, offsets_ptr, lengths_ptr)
    block = tl.arange(0, BLOCK_ROWS)
    running_max = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    running_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    accumulated = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for first in range(0, length, BLOCK_ROWS):
        inside = first + block < length
        row = start + first
        scores = tl.load(
            scores_ptr + row * stride_scores + block * stride_scores,
            mask=inside,
            other=float("-inf"),
        ).to(tl.float32)
        values = tl.load(
            values_ptr + row * stride_values + block[:, None] * stride_values + features[None, :],
            mask=inside[:, None] & (features < DIM)[None, :],
            other=0.0,
        )  # (BLOCK_ROWS, BLOCK_DIM)
        running_max, running_sum, weights, rescale = add_scores(scores, running_max, running_sum)
        accumulated = accumulated * rescale[:, None] + weights[:, None] * values.to(tl.float32)
    highest = tl.max(running_max, 0)
    rescale = tl.exp2((running_max - highest) * LOG2E)
    total = tl.sum(running_sum * rescale, 0)
    pooled = tl.sum(accumulated * rescale[:, None], 0) / total
    pooled = tl.where(length > 0, pooled, 0.0)
    pooled_ptr += sequence * DIM
    tl.store(pooled_ptr + features, pooled.to(pooled_ptr.dtype.element_ty), mask=features < DIM)
    if tl.program_id(0) % DIM_BLOCKS == 0:
        tl.store(lse_ptr + sequence, highest + tl.log2(total) * LN2)


@triton.jit
def score_statistics(scores_ptr, length, stride_scores, BLOCK_ROWS: tl.constexpr):
    """Maximum and sum of exponentials of a sequence's scores."""
    block = tl.arange(0, BLOCK_ROWS)
    running_max = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    running_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, length, BLOCK_ROWS):
        scores = tl.load(
            scores_ptr + (first + block).to(tl.int64) * stride_scores,
            mask=first + block < length,
            other=float("-inf"),
        ).to(tl.float32)
        running_max, running_sum, _, _ = add_scores(scores, running_max, running_sum)
    highest = tl.max(running_max, 0)
    return highest, tl.sum(running_sum * tl.exp2((running_max - highest) * LOG2E), 0)


@triton.jit
def clear_rows(
    values_ptr,
    scores_ptr,
    first,
    end,
    step,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Writes zeros to blocks of rows from ``first`` to ``end``, ``step`` apart."""
    block = tl.arange(0, BLOCK_ROWS)
    zeros = tl.zeros([BLOCK_ROWS, BLOCK_DIM], values_ptr.dtype.element_ty)
    zero_scores = tl.zeros([BLOCK_ROWS], scores_ptr.dtype.element_ty)
    for row in range(first, end, step):
        rows = row + block
        tl.store(scores_ptr + rows, zero_scores, mask=rows < end)
        for feature in range(0, DIM, BLOCK_DIM):
            features = feature + tl.arange(0, BLOCK_DIM)
            tl.store(
                values_ptr + rows[:, None] * DIM + features[None, :],
                zeros,
                mask=(rows < end)[:, None] & (features < DIM)[None, :],
            )


@triton.jit(do_not_specialize=["count", "total", "shares", "tail_programs"])
def pool_backward(
    grad_pooled_ptr,
    values_ptr,
    scores_ptr,
    pooled_ptr,
    grad_values_ptr,
    grad_scores_ptr,
    offsets_ptr,
    lengths_ptr,
    count,
    total,
    shares,
    tail_programs,
    stride_grad,
    stride_values,
    stride_scores,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Gradients of every ``shares``-th block of rows of one sequence, or zeros past the last."""
    sequence = (tl.program_id(0) // shares).to(tl.int64)
    block = tl.arange(0, BLOCK_ROWS)
    if sequence >= count:
        tail = tl.program_id(0) - count * shares
        first = tl.load(offsets_ptr + count).to(tl.int64) + tail * BLOCK_ROWS
        clear_rows(
            grad_values_ptr, grad_scores_ptr, first, total.to(tl.int64),
            tail_programs * BLOCK_ROWS, DIM, BLOCK_ROWS, BLOCK_DIM,
        )  # fmt: skip
        return
    start, length = sequence_rows(sequence, offsets_ptr, lengths_ptr)
    share = tl.program_id(0) % shares
    grad_pooled_ptr += sequence * stride_grad
    pooled_ptr += sequence * DIM
    scores_ptr += start * stride_scores
    values_ptr += start * stride_values
    grad_scores_ptr += start
    grad_values_ptr += start * DIM
    highest, sum_exponentials = score_statistics(scores_ptr, length, stride_scores, BLOCK_ROWS)
    delta = tl.zeros([BLOCK_DIM], tl.float32)
    for feature in range(0, DIM, BLOCK_DIM):
        features = feature + tl.arange(0, BLOCK_DIM)
        grad = tl.load(grad_pooled_ptr + features, mask=features < DIM, other=0.0)
        pooled = tl.load(pooled_ptr + features, mask=features < DIM, other=0.0)
        delta += grad.to(tl.float32) * pooled.to(tl.float32)
    grad_output_output = tl.sum(delta, 0)
    for first in range(share * BLOCK_ROWS, length, shares * BLOCK_ROWS):
        rows = (first + block).to(tl.int64)
        inside = rows < length
        scores = tl.load(scores_ptr + rows * stride_scores, mask=inside, other=0.0).to(tl.float32)
        weights = tl.exp2((scores - highest) * LOG2E) / sum_exponentials
        products = tl.zeros([BLOCK_ROWS], tl.float32)
        for feature in range(0, DIM, BLOCK_DIM):
            features = feature + tl.arange(0, BLOCK_DIM)
            mask = inside[:, None] & (features < DIM)[None, :]
            grad = tl.load(grad_pooled_ptr + features, mask=features < DIM, other=0.0)
            grad = grad.to(tl.float32)
            values = tl.load(
                values_ptr + rows[:, None] * stride_values + features[None, :],
                mask=mask,
                other=0.0,
            )  # (BLOCK_ROWS, BLOCK_DIM)
            products += tl.sum(values.to(tl.float32) * grad[None, :], 1)
            grad_values = weights[:, None] * grad[None, :]
            tl.store(
                grad_values_ptr + rows[:, None] * DIM + features[None, :],
                grad_values.to(grad_values_ptr.dtype.element_ty),
                mask=mask,
            )
        grad_scores = weights * (products - grad_output_output)
        grad_scores = grad_scores.to(grad_scores_ptr.dtype.element_ty)
        tl.store(grad_scores_ptr + rows, grad_scores, mask=inside)


def forward(values: Tensor, scores: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Pooled values (n, dim) and logsumexp (n,) float32."""
    values = _dense_rows(values)
    count, dim = sequences.offsets.shape[0] - 1, values.shape[1]
    pooled = values.new_empty(count, dim)
    lse = values.new_empty(count, dtype=torch.float32)
    chosen = _configuration("pool_forward", values, sequences)
    launch(
        pool_forward, count * triton.cdiv(dim, chosen.meta["BLOCK_DIM"]),
        values, scores, pooled, lse, sequences.offsets, sequences.lengths,
        values.stride(0), scores.stride(0),
        DIM=dim, configuration=chosen,
    )  # fmt: skip
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
    grad_pooled, values = _dense_rows(grad_pooled), _dense_rows(values)
    count, (total, dim) = sequences.offsets.shape[0] - 1, values.shape
    make = torch.empty if sequences.lengths is None else torch.zeros  # zeros in the gaps
    grad_values = make((total, dim), dtype=values.dtype, device=values.device)
    grad_scores = make((total,), dtype=scores.dtype, device=scores.device)
    chosen = _configuration("pool_backward", values, sequences)
    rows = chosen.meta["BLOCK_ROWS"]
    shares = max(1, triton.cdiv(sequences.max_length, max(SHARE_ROWS, rows)))
    tails = min(triton.cdiv(total, rows), MOST_TAIL_PROGRAMS)
    launch(
        pool_backward, count * shares + tails,
        grad_pooled, values, scores, pooled.contiguous(), grad_values, grad_scores,
        sequences.offsets, sequences.lengths, count, total, shares, tails,
        grad_pooled.stride(0), values.stride(0), scores.stride(0),
        DIM=dim, configuration=chosen,
    )  # fmt: skip
    return grad_values, grad_scores


def _dense_rows(x: Tensor) -> Tensor:
    """Kernels read a row as consecutive elements; an expanded gradient is not that."""
    return x if x.stride(1) == 1 else x.contiguous()


def _configuration(kernel: str, values: Tensor, sequences: Sequences) -> Configuration:
    dim = min(values.shape[1], WIDTHS[-1])
    longest = LENGTHS[0] if kernel == "pool_backward" else LENGTHS[-1]
    length = min(max(sequences.max_length, 0), longest)
    found = configuration(kernel, values.dtype, dim, length)
    assert found is not None, f"the tables hold no {kernel}"
    return found


WIDTHS, LENGTHS = (32, 128), (256, 4096)
"""Of the tables; wider values and longer rows are taken in blocks."""


def _candidates(
    architecture: str, dtype: torch.dtype, width: int, length: int
) -> list[Configuration]:
    """Long rows: few sequences, so narrow blocks for more programs and tall ones to read ahead."""
    short = length <= LENGTHS[0]
    return [
        Configuration({"BLOCK_ROWS": rows, "BLOCK_DIM": block}, {"num_warps": warps})
        for block in ((width,) if short else (32, 64))
        for rows in ((32, 64, 128) if short else (256, 128, 64))
        for warps in ((4, 2, 8) if short else (8, 4))
        if block <= width and 512 <= rows * block // warps <= 4096
    ]


def _backward_candidates(
    architecture: str, dtype: torch.dtype, width: int, length: int
) -> list[Configuration]:
    return _candidates(architecture, dtype, width, 0)


def _example(
    dtype: torch.dtype, width: int, length: int, device: torch.device, *, grad: bool
) -> Callable[[], object]:
    count = max(1, (1 << 20) // length)
    values, scores = (
        torch.randn(count * length, *shape, device=device).to(dtype) for shape in ((width,), ())
    )
    offsets = torch.arange(count + 1, dtype=torch.int32, device=device) * length
    sequences = Sequences(offsets, max_length=length)
    if not grad:
        return lambda: forward(values, scores, sequences)
    pooled, lse = forward(values, scores, sequences)
    return lambda: backward(pooled, values, scores, pooled, lse, sequences)


TUNABLES = (
    Tunable(
        "pool_forward", WIDTHS, LENGTHS, _candidates, partial(_example, grad=False),
        ("BLOCK_ROWS", "BLOCK_DIM"),
    ),
    Tunable(
        "pool_backward", WIDTHS, LENGTHS[:1], _backward_candidates, partial(_example, grad=True),
        ("BLOCK_ROWS", "BLOCK_DIM"),
    ),
)  # fmt: skip
