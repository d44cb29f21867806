"""Ragged attention on a GPU through torch's variable-length memory-efficient kernel.

The kernel takes cumulative lengths, so no mask and no padding exist, and nothing waits for the
device when ``max_length`` is known. Gaps are closed by an index computed on the device. Rows that
belong to no sequence are zeroed on the way in and on the way out; sequences without keys, for
which several torch versions return NaN, are zeroed too. Backward runs the forward kernel again,
which keeps its own logsumexp layout out of the operator's contract. With dropout the scores of
the batch are made explicitly, padded to the longest sequence: no torch kernel takes the mask.

Like every GPU implementation it serves no call before it has passed a check on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aam_kernels._runtime.dropout import attention_dropped
from aam_kernels._runtime.grouping import Sequences

_HEAD_DIM_STEP = 8  # the kernel loads heads in steps of 16 bytes; zero columns change nothing


class _Side(NamedTuple):
    """Queries or keys: where each packed row lies, all on the device.

    Attributes:
        starts: (n,) first row of each sequence.
        lengths: (n,) rows of each sequence.
        sequence: (total,) the sequence that a row belongs to (any, where not real).
        position: (total,) the row's place in its sequence.
        real: (total,) whether the row belongs to a sequence.
        longest: bound on the lengths.
    """

    starts: Tensor
    lengths: Tensor
    sequence: Tensor
    position: Tensor
    real: Tensor
    longest: int


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of packed attention."""
    total, heads, head_dim = query.shape
    empty_lse = query.new_full((total, heads), float("-inf"), dtype=torch.float32)
    if len(sequences.offsets) == 1 or total == 0 or key.shape[0] == 0:
        return query.new_zeros(query.shape), empty_lse
    sides = _sides(query, key, sequences)
    real = (sides[0].real & (sides[1].lengths > 0)[sides[0].sequence])[:, None]
    if dropout_p:
        probabilities, lse = _probabilities(query, key, sides, scale)
        kept = _mask(probabilities, sides, dropout_p, seed)
        output = _pack(torch.matmul(kept, _pad(value, sides[1])), sides[0]).to(query.dtype)
        packed_lse = _pack(lse.unsqueeze(-1), sides[0]).squeeze(-1)
    else:
        tensors, cumulative = _compact((query, key, value), sides)
        output, lse = _kernel(tensors, cumulative, sides, scale)[:2]
        output = output[0, :, :, :head_dim][_compact_rows(sides[0], cumulative[0])]
        packed_lse = lse[sides[0].sequence, :, sides[0].position].float()
    return (
        torch.where(real.unsqueeze(-1), output, output.new_zeros(())),
        torch.where(real, packed_lse, empty_lse),
    )


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
    """Gradients of query, key and value."""
    head_dim = query.shape[2]
    if len(sequences.offsets) == 1 or query.shape[0] == 0 or key.shape[0] == 0:
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    sides = _sides(query, key, sequences)
    if dropout_p:
        grads = _explicit_backward(
            grad_output, query, key, value, output, sides, scale, dropout_p, seed
        )
    else:
        (grad, *tensors), cumulative = _compact((grad_output, query, key, value), sides)
        parts = _kernel_backward(grad, tensors, cumulative, sides, scale)
        places = (sides[0], sides[1], sides[1])
        bounds = (cumulative[0], cumulative[1], cumulative[1])
        grad_query, grad_key, grad_value = (
            part[0, :, :, :head_dim][_compact_rows(side, bound)]
            for part, side, bound in zip(parts, places, bounds, strict=True)
        )
        grads = grad_query, grad_key, grad_value
    alive = (
        sides[0].real & (sides[1].lengths > 0)[sides[0].sequence],
        sides[1].real & (sides[0].lengths > 0)[sides[1].sequence],
    )
    masks = (alive[0], alive[1], alive[1])
    grad_query, grad_key, grad_value = (
        torch.where(mask[:, None, None], part, part.new_zeros(()))
        for mask, part in zip(masks, grads, strict=True)
    )
    return grad_query, grad_key, grad_value


def _sides(query: Tensor, key: Tensor, sequences: Sequences) -> tuple[_Side, _Side]:
    side = _side(query, sequences.offsets, sequences.lengths, sequences.max_length)
    if not sequences.cross:
        return side, side
    return side, _side(key, *sequences.key_side(), sequences.max_key_length)


def _side(packed: Tensor, offsets: Tensor, lengths: Tensor | None, longest: int) -> _Side:
    offsets = offsets.long()
    starts = offsets[:-1]
    lengths = offsets.diff() if lengths is None else lengths.long()
    if longest < 0:
        longest = int(lengths.max())
    rows = torch.arange(packed.shape[0], device=packed.device)
    sequence = (torch.searchsorted(starts, rows, right=True) - 1).clamp_(min=0)
    position = rows - starts[sequence]
    real = (position >= 0) & (position < lengths[sequence])
    return _Side(starts, lengths, sequence, position.clamp_(0, max(longest - 1, 0)), real, longest)


def _compact(
    tensors: tuple[Tensor, ...], sides: tuple[_Side, _Side]
) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Closes gaps: (total, heads, d) -> (1, total, heads, padded d), and cumulative lengths."""
    cumulative = tuple(F.pad(side.lengths.cumsum(0), (1, 0)).to(torch.int32) for side in sides)
    first_key = len(tensors) - 2
    moved = []
    for number, x in enumerate(tensors):
        which = int(number >= first_key)
        side, bounds = sides[which], cumulative[which]
        rows = torch.arange(x.shape[0], device=x.device)
        sequence = (torch.searchsorted(bounds, rows, right=True) - 1).clamp_(
            0, side.starts.shape[0] - 1
        )
        source = (side.starts[sequence] + rows - bounds[sequence]).clamp_(0, x.shape[0] - 1)
        inside = (rows < bounds[-1])[:, None, None]
        x = torch.where(inside, x[source], x.new_zeros(()))
        moved.append(F.pad(x, (0, -x.shape[-1] % _HEAD_DIM_STEP)).unsqueeze(0))
    return moved, (cumulative[0], cumulative[1])


def _compact_rows(side: _Side, cumulative: Tensor) -> Tensor:
    """(total,) where `_compact` has put each row (any row, where not real)."""
    rows = cumulative[side.sequence].long() + side.position
    return rows.clamp_(0, rows.shape[0] - 1)


def _kernel(
    tensors: list[Tensor],
    cumulative: tuple[Tensor, Tensor],
    sides: tuple[_Side, _Side],
    scale: float,
) -> tuple:
    return torch.ops.aten._efficient_attention_forward(
        *tensors, None, *cumulative, sides[0].longest, sides[1].longest,
        0.0, 0, True, scale=scale,
    )  # fmt: skip


def _kernel_backward(
    grad: Tensor,
    tensors: list[Tensor],
    cumulative: tuple[Tensor, Tensor],
    sides: tuple[_Side, _Side],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    output, lse, *random, longest, longest_key = _kernel(tensors, cumulative, sides, scale)
    return torch.ops.aten._efficient_attention_backward(
        grad, *tensors, None, output, *cumulative, longest, longest_key, lse,
        0.0, *random, 0, False, scale=scale, num_splits_key=1,
    )[:3]  # fmt: skip


def _pad(x: Tensor, side: _Side) -> Tensor:
    """(total, heads, d) -> (n, heads, longest, d) float32, zero where there is no row."""
    slots = torch.arange(side.longest, device=x.device)
    rows = (side.starts[:, None] + slots).clamp_(max=x.shape[0] - 1)
    inside = (slots < side.lengths[:, None])[:, :, None, None]
    return torch.where(inside, x[rows].float(), 0.0).transpose(1, 2)


def _pack(x: Tensor, side: _Side) -> Tensor:
    """(n, heads, longest, d) -> (total, heads, d)."""
    return x[side.sequence, :, side.position]


def _probabilities(
    query: Tensor, key: Tensor, sides: tuple[_Side, _Side], scale: float
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(_pad(query, sides[0]), _pad(key, sides[1]).transpose(2, 3)) * scale
    slots = torch.arange(sides[1].longest, device=query.device)
    outside = slots >= sides[1].lengths[:, None, None, None]
    lse = scores.masked_fill_(outside, float("-inf")).logsumexp(-1)
    probabilities = (scores - lse.unsqueeze(-1)).exp().masked_fill(outside, 0.0)
    return probabilities, lse


def _mask(x: Tensor, sides: tuple[_Side, _Side], dropout_p: float, seed: Tensor | None) -> Tensor:
    assert seed is not None
    rows = [side.starts[:, None] + torch.arange(side.longest, device=x.device) for side in sides]
    drop = attention_dropped(seed, rows[0], rows[1], x.shape[1], dropout_p)
    return x.masked_fill(drop, 0.0) / (1.0 - dropout_p)


def _explicit_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sides: tuple[_Side, _Side],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    probabilities, _ = _probabilities(query, key, sides, scale)
    q, grad, out = (_pad(x, sides[0]) for x in (query, grad_output, output))
    k, v = (_pad(x, sides[1]) for x in (key, value))
    kept = _mask(probabilities, sides, dropout_p, seed)
    grad_kept = _mask(grad @ v.transpose(2, 3), sides, dropout_p, seed)
    delta = (grad * out).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad_kept - delta) * scale
    grads = (
        _pack(grad_scores @ k, sides[0]),
        _pack(grad_scores.transpose(2, 3) @ q, sides[1]),
        _pack(kept.transpose(2, 3) @ grad, sides[1]),
    )
    grad_query, grad_key, grad_value = (grad.to(query.dtype) for grad in grads)
    return grad_query, grad_key, grad_value
