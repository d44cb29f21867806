"""Attention pooling: every implementation here against the padded, masked softmax."""

import pytest
import torch

from aam_kernels import attention_pool, available_impls

DIM = 128
IMPLS = available_impls("cpu")["pooling"]


def padded_pool(values, scores, mask):
    """(batch, length, dim), (batch, length) -> (batch, dim)."""
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bl,bld->bd", weights, values)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_pooling(compare, timing, backward):
    count = 512 if timing else 7
    lengths = torch.randint(60, 152, (count,), generator=torch.Generator().manual_seed(1))
    offsets = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
    total, longest = int(lengths.sum()), int(lengths.max())
    values = torch.randn(total, DIM).requires_grad_(backward)
    scores = torch.randn(total).requires_grad_(backward)
    grad = torch.randn(count, DIM)
    mask = torch.arange(longest) < lengths[:, None]
    padded_values = torch.zeros(count, longest, DIM)
    padded_values[mask] = values.detach()
    padded_scores = torch.zeros(count, longest)
    padded_scores[mask] = scores.detach()
    padded_values.requires_grad_(backward)
    padded_scores.requires_grad_(backward)

    def ours(impl):
        def call():
            out = attention_pool(values, scores, offsets, max_length=longest, impl=impl)
            return [out, *torch.autograd.grad(out, [values, scores], grad)] if backward else [out]

        return call

    def padded():
        out = padded_pool(padded_values, padded_scores, mask)
        if not backward:
            return [out]
        return [out, *torch.autograd.grad(out, [padded_values, padded_scores], grad)]

    contestants = {f"aam_kernels {impl}": ours(impl) for impl in IMPLS}
    contestants["torch, padded and masked"] = padded
    results, _ = compare(
        f"attention pooling, {'forward+backward' if backward else 'forward'}",
        contestants,
        reference="torch, padded and masked",
    )
    out, *gradients = results["torch, padded and masked"]
    expected = [out, *[gradient[mask] for gradient in gradients]]
    for impl in IMPLS:
        for got, want in zip(results[f"aam_kernels {impl}"], expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
