"""Calls of the three operations, ours and torch's, on the same rows; and what they compute.

How work is counted. A product of (m, k) and (k, n) is 2 m k n operations; nothing else counts
(softmax, GELU, norms and dropout are overhead). A layer's forward pass over a row of L tokens is
2 L D (4 D + 2 F) of linear maps and 4 L^2 D of attention. Its backward pass is twice the linear
maps and 2.5 times the attention (scores are made again from query and key, then four products);
with recomputation the forward pass is executed a second time, but for its last product. Shares of
the FMA peak count what is *executed*; the column "3 x forward" counts three forward passes,
whatever is recomputed. torch's calls are counted as ours that keep activations, on real tokens.
Bytes are those of the arguments and results, once each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aam_kernels import attention_pool, encoder_layer, ragged_attention, weights_from_torch
from benchmarks.comparison import Work
from benchmarks.rows import Rows

DIM, HEADS, HIDDEN = 128, 4, 512
CHUNK = 8  # rows that torch's layer takes at a time where it should stay in cache
Call = Callable[[], list[Tensor]]
"""Runs once: output, then gradients, packed or padded."""


def attention_work(lengths: Sequence[int], dim: int, *, backward: bool) -> Work:
    """Attention of all heads together, of width `dim`."""
    forward = sum(4.0 * length**2 * dim for length in lengths)
    tensors = 11 if backward else 4  # q, k, v, out; then those, their gradients, out again
    transferred = tensors * 4.0 * sum(lengths) * dim
    if not backward:
        return Work(forward, transferred, forward)
    return Work(3.5 * forward, transferred, 3 * forward)


def layer_work(lengths: Sequence[int], *, backward: bool, recompute: bool = False) -> Work:
    """The whole layer."""
    tokens = float(sum(lengths))
    linear = 2 * tokens * DIM * (4 * DIM + 2 * HIDDEN)
    attention = sum(4.0 * length**2 * DIM for length in lengths)
    forward = linear + attention
    if not backward:
        return Work(forward, 2 * 4 * tokens * DIM, forward)
    executed = forward + 2 * linear + 2.5 * attention
    if recompute:
        executed += forward - 2 * tokens * DIM * HIDDEN
    kept = 0 if recompute else 2 * (5 * DIM + HIDDEN)
    return Work(executed, 4 * tokens * (5 * DIM + kept), 3 * forward)


def pooling_work(lengths: Sequence[int], dim: int, *, backward: bool) -> Work:
    """Pooling is bound by memory: values are read, and in backward read again and written."""
    forward = sum(2.0 * length * dim for length in lengths)
    return Work(
        3 * forward if backward else forward, 4.0 * sum(lengths) * dim * (3 if backward else 1)
    )


def gradients(out: Tensor, inputs: Sequence[Tensor], grad: Tensor, backward: bool) -> list[Tensor]:
    """Output, and with `backward` the gradients of the inputs."""
    return [out, *torch.autograd.grad(out, inputs, grad)] if backward else [out]


def attention_calls(rows: Rows, impls: Sequence[str], *, backward: bool) -> dict[str, Call]:
    """Ours on packed rows, named "aam ..."; torch's on padded ones, with heads before rows."""
    query, key, value, grad = rows.draw(4, HEADS, DIM // HEADS).unbind(1)
    inputs = [x.contiguous().requires_grad_(backward) for x in (query, key, value)]
    grad, offsets = grad.contiguous(), rows.offsets
    padded = [heads_first(rows.pad(x.detach())).requires_grad_(backward) for x in inputs]
    padded_grad, mask = heads_first(rows.pad(grad)), rows.real[:, None, None, :]

    def ours(impl: str) -> Call:
        def call() -> list[Tensor]:
            out = ragged_attention(*inputs, offsets, max_length=rows.longest, impl=impl)
            return gradients(out, inputs, grad, backward)

        return call

    def torchs(mask: Tensor | None) -> Call:
        def call() -> list[Tensor]:
            out = F.scaled_dot_product_attention(*padded, attn_mask=mask)
            return gradients(out, padded, padded_grad, backward)

        return call

    def row_by_row() -> list[Tensor]:
        out = torch.zeros_like(padded[0])
        found = [torch.zeros_like(x) for x in padded] if backward else []
        for i, length in enumerate(rows.lengths):
            parts = [x[i : i + 1, :, :length].detach().requires_grad_(backward) for x in padded]
            one = F.scaled_dot_product_attention(*parts)
            made = gradients(one, parts, padded_grad[i : i + 1, :, :length], backward)
            for whole, part in zip((out, *found), made, strict=True):
                whole[i, :, :length] = part[0].detach()
        return [out, *found]

    calls = {f"aam {impl}": ours(impl) for impl in impls}
    calls["torch SDPA, padded and masked"] = torchs(mask)
    if rows.equal:
        calls["torch SDPA, no mask"] = torchs(None)
    else:
        calls["torch SDPA, row by row"] = row_by_row
    return calls


def heads_first(x: Tensor) -> Tensor:
    """(rows, length, heads, head_dim) -> (rows, heads, length, head_dim), in memory too."""
    return x.transpose(1, 2).contiguous()


def pooling_calls(rows: Rows, impls: Sequence[str], *, backward: bool) -> dict[str, Call]:
    """Ours on packed rows; a masked softmax on padded ones."""
    values, scores = (rows.draw(*shape).requires_grad_(backward) for shape in ((DIM,), ()))
    grad = torch.randn(len(rows.lengths), DIM, generator=torch.Generator().manual_seed(5))
    padded = [rows.pad(x.detach()).requires_grad_(backward) for x in (values, scores)]
    offsets, real = rows.offsets, rows.real

    def ours(impl: str) -> Call:
        def call() -> list[Tensor]:
            out = attention_pool(values, scores, offsets, max_length=rows.longest, impl=impl)
            return gradients(out, [values, scores], grad, backward)

        return call

    def torchs(mask: Tensor | None) -> Call:
        def call() -> list[Tensor]:
            values, scores = padded
            filled = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
            out = (filled.softmax(-1)[:, None] @ values)[:, 0]
            return gradients(out, padded, grad, backward)

        return call

    calls = {f"aam {impl}": ours(impl) for impl in impls}
    calls["torch, padded and masked"] = torchs(real)
    return calls


def torch_layer(dropout: float) -> nn.TransformerEncoderLayer:
    """The layer of torch in the same form: pre-norm, exact GELU, eps 1e-5."""
    torch.manual_seed(2)
    return nn.TransformerEncoderLayer(
        DIM, HEADS, HIDDEN, dropout, activation="gelu", batch_first=True, norm_first=True
    )


def layer_call(
    lengths: Sequence[int],
    *,
    dropout: float = 0.0,
    backward: bool = True,
    recompute: bool = True,
    impl: str = "auto",
) -> Call:
    """Our layer: output, gradients of the input and of the twelve weights."""
    rows = Rows(tuple(lengths))
    x, grad = (t.contiguous() for t in rows.draw(2, DIM).unbind(1))
    weights = weights_from_torch(torch_layer(dropout))
    inputs, offsets = [x.requires_grad_(backward), *weights], rows.offsets

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            out = encoder_layer(
                x, offsets, weights, num_heads=HEADS, dropout_p=dropout, seed=5,
                max_length=rows.longest, recompute=recompute, impl=impl,
            )  # fmt: skip
        return gradients(out, inputs, grad, backward)

    return call


def torch_layer_calls(rows: Rows, *, dropout: float, backward: bool) -> dict[str, Call]:
    """The layer of torch: masked, and for equal rows unmasked, whole or some rows at a time."""
    layer = torch_layer(dropout).train(backward or dropout > 0)
    x, grad = (rows.pad(t).contiguous() for t in rows.draw(2, DIM).unbind(1))
    x.requires_grad_(backward)
    padding, inputs = ~rows.real, [x, *weights_from_torch(layer)]

    def whole(padding: Tensor | None) -> Call:
        def call() -> list[Tensor]:
            with torch.set_grad_enabled(backward):
                out = layer(x, src_key_padding_mask=padding)
            return gradients(out, inputs, grad, backward)

        return call

    def in_chunks() -> list[Tensor]:
        outs, grads, totals = [], [], []
        for start in range(0, len(x), CHUNK):
            part = x[start : start + CHUNK].detach().requires_grad_(backward)
            with torch.set_grad_enabled(backward):
                out = layer(part)
            made = gradients(out, [part, *inputs[1:]], grad[start : start + CHUNK], backward)
            outs.append(made[0].detach())
            grads += made[1:2]
            for total, more in zip(totals, made[2:], strict=False):
                total += more
            totals = totals or made[2:]
        return [torch.cat(outs), *([torch.cat(grads)] if backward else []), *totals]

    calls = {"nn.TransformerEncoderLayer, masked": whole(padding)}
    if rows.equal:
        calls["nn.TransformerEncoderLayer, no mask"] = whole(None)
        calls[f"nn.TransformerEncoderLayer, {CHUNK} rows at a time"] = in_chunks
    return calls
