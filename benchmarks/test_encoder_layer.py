"""A whole pre-norm layer: every implementation here against nn.TransformerEncoderLayer."""

import pytest
import torch
from torch import nn

from aam_kernels import EncoderLayerWeights, available_impls, encoder_layer

DIM, HEADS, LENGTH = 128, 4, 101
IMPLS = available_impls("cpu")["encoder_layer"]


def torch_layer(dropout: float) -> nn.TransformerEncoderLayer:
    """torch's own layer in the same form: pre-norm, exact GELU, eps 1e-5."""
    return nn.TransformerEncoderLayer(
        DIM, HEADS, 4 * DIM, dropout, activation="gelu", batch_first=True, norm_first=True
    )


def weights_of(layer: nn.TransformerEncoderLayer) -> EncoderLayerWeights:
    """The same parameters in the order of `encoder_layer`."""
    return EncoderLayerWeights(
        layer.norm1.weight, layer.norm1.bias,
        layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias,
        layer.self_attn.out_proj.weight, layer.self_attn.out_proj.bias,
        layer.norm2.weight, layer.norm2.bias,
        layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias,
    )  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_encoder_layer(compare, timing, backward, dropout):
    if dropout and not backward:
        pytest.skip("dropout is part of training: timed forward and backward together")
    torch.manual_seed(2)
    count = 64 if timing else 4
    layer = torch_layer(dropout).train(backward)
    weights = weights_of(layer)
    parameters = [*weights]
    offsets = torch.arange(count + 1, dtype=torch.int32) * LENGTH
    x = torch.randn(count * LENGTH, DIM)
    grad = torch.randn_like(x)
    padded_x, padded_grad = x.view(count, LENGTH, DIM), grad.view(count, LENGTH, DIM)
    mask = torch.zeros(count, LENGTH, dtype=torch.bool)  # nothing is padded, but a mask is passed

    def ours(impl, recompute):
        def call():
            with torch.set_grad_enabled(backward):
                out = encoder_layer(
                    x, offsets, weights, num_heads=HEADS, dropout_p=dropout, seed=5,
                    max_length=LENGTH, recompute=recompute, impl=impl,
                )  # fmt: skip
            return [out, *torch.autograd.grad(out, parameters, grad)] if backward else [out]

        return call

    def baseline(key_padding_mask):
        def call():
            with torch.set_grad_enabled(backward):
                out = layer(padded_x, src_key_padding_mask=key_padding_mask)
            if not backward:
                return [out.reshape_as(x)]
            gradients = torch.autograd.grad(out, parameters, padded_grad)
            return [out.reshape_as(x), *gradients]

        return call

    contestants = {}
    for impl in IMPLS:
        contestants[f"aam_kernels {impl}"] = ours(impl, recompute=False)
        if backward:
            contestants[f"aam_kernels {impl}, recompute"] = ours(impl, recompute=True)
    names = list(contestants)
    contestants["nn.TransformerEncoderLayer, masked"] = baseline(mask)
    contestants["nn.TransformerEncoderLayer, no mask"] = baseline(None)
    what = "forward+backward" if backward else "forward"
    results, _ = compare(
        f"encoder layer, dropout {dropout}, {what}",
        contestants,
        reference="nn.TransformerEncoderLayer, masked",
    )
    # With dropout torch draws another mask than the counter hash: ours agree among themselves.
    expected = results[names[0] if dropout else "nn.TransformerEncoderLayer, masked"]
    for name in names:
        for got, want in zip(results[name], expected, strict=True):
            torch.testing.assert_close(
                got, want, rtol=1e-3, atol=1e-3 * float(want.detach().abs().max())
            )
