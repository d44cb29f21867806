"""Ragged attention: every implementation here against torch's padded, masked SDPA."""

import pytest
import torch
import torch.nn.functional as F

from aam_kernels import available_impls, ragged_attention

HEADS, HEAD_DIM = 4, 32
IMPLS = available_impls("cpu")["attention"]


def lengths_of(case: str, timing: bool) -> list[int]:
    """Nucleotides within ASVs (all equal), or ASVs within samples (very unequal)."""
    generator = torch.Generator().manual_seed(0)
    if case == "ASVs":
        return [101] * (256 if timing else 6)
    spread = torch.randint(10, 400 if timing else 30, (16 if timing else 5,), generator=generator)
    return spread.tolist()


def padded_attention(query, key, value, lengths):
    """torch's own: (batch, heads, length, head_dim) and a key padding mask."""
    length = int(lengths.max())
    mask = torch.arange(length) < lengths[:, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])


@pytest.mark.parametrize("case", ["ASVs", "samples"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_attention(compare, timing, case, backward):
    lengths = lengths_of(case, timing)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total, count, longest = sum(lengths), len(lengths), max(lengths)
    query, key, value, grad = torch.randn(4, total, HEADS, HEAD_DIM).unbind(0)
    inputs = [x.clone().requires_grad_(backward) for x in (query, key, value)]
    rows = torch.repeat_interleave(torch.arange(count), torch.tensor(lengths))
    columns = torch.arange(total) - offsets[:-1].long()[rows]

    def pad(x):
        padded = x.new_zeros(count, longest, HEADS, HEAD_DIM)
        padded[rows, columns] = x
        return padded.transpose(1, 2).contiguous()

    padded_inputs = [pad(x).requires_grad_(backward) for x in (query, key, value)]
    padded_grad, lengths_tensor = pad(grad), torch.tensor(lengths)

    def ours(impl):
        def call():
            out = ragged_attention(*inputs, offsets, max_length=longest, impl=impl)
            if not backward:
                return [out]
            return [out, *torch.autograd.grad(out, inputs, grad)]

        return call

    def torch_padded():
        out = padded_attention(*padded_inputs, lengths_tensor)
        if not backward:
            return [out]
        return [out, *torch.autograd.grad(out, padded_inputs, padded_grad)]

    contestants = {f"aam_kernels {impl}": ours(impl) for impl in IMPLS}
    contestants["torch SDPA, padded and masked"] = torch_padded
    if case == "ASVs":  # equal lengths need no mask: torch at its best

        def torch_unmasked():
            out = F.scaled_dot_product_attention(*padded_inputs)
            if not backward:
                return [out]
            return [out, *torch.autograd.grad(out, padded_inputs, padded_grad)]

        contestants["torch SDPA, no mask"] = torch_unmasked

    results, _ = compare(
        f"attention, {case}, {'forward+backward' if backward else 'forward'}",
        contestants,
        reference="torch SDPA, padded and masked",
        notes={"real tokens over padded slots": f"{total / (count * longest):.2f}"},
    )
    expected = [x.transpose(1, 2)[rows, columns] for x in results["torch SDPA, padded and masked"]]
    for impl in IMPLS:
        for got, want in zip(results[f"aam_kernels {impl}"], expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
