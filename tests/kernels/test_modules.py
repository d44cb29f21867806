"""Modules on `Ragged`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aam_kernels import Ragged
from aam_kernels.modules import AttentionPool, SelfAttention, TransformerEncoder
from tests.kernels.contract import assert_close, exact_dtype


def ragged(lengths=(4, 0, 9, 1), dim=16, dtype=torch.float32):
    torch.manual_seed(2)
    return Ragged.from_list([torch.randn(length, dim, dtype=dtype) for length in lengths])


def torch_encoder(dim, heads, layers):
    layer = nn.TransformerEncoderLayer(
        dim, heads, 4 * dim, 0.0, activation="gelu", norm_first=True, batch_first=True
    )
    norm = nn.LayerNorm(dim, eps=1e-6)
    return nn.TransformerEncoder(layer, layers, norm=norm, enable_nested_tensor=False)


def test_the_encoder_loads_torchs_state_dict_and_equals_it(impl):
    dtype = exact_dtype(impl)
    theirs = torch_encoder(16, 2, 3).to(dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = TransformerEncoder(16, 2, 3, impl=impl).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    x = ragged(dtype=dtype)
    out = ours(x)
    for mine, row in zip(out, x, strict=True):
        if len(row):
            assert_close(mine, theirs(row[None])[0], rtol=1e-10, atol=1e-11)
    assert torch.equal(out.offsets, x.offsets)


def test_weights_start_as_torchs_do():
    torch.manual_seed(0)
    ours = TransformerEncoder(64, 4, 2)
    for layer in ours.layers:
        bound = (6 / (64 + 192)) ** 0.5  # Xavier of the joint query, key and value matrix
        assert 0.95 * bound < layer.self_attn.in_proj_weight.abs().max() <= bound
        assert not layer.self_attn.in_proj_bias.any()
        assert not layer.self_attn.out_proj.bias.any()
        assert 0.95 / 8 < layer.linear1.weight.abs().max() <= 1 / 8
        assert 0.95 / 16 < layer.linear2.weight.abs().max() <= 1 / 16
    assert ours.norm.eps == 1e-6
    assert not torch.equal(ours.layers[0].linear1.weight, ours.layers[1].linear1.weight)


def test_dropout_acts_in_training_alone_and_differs_between_layers_and_calls():
    torch.manual_seed(0)
    encoder, x = TransformerEncoder(16, 2, 2, dropout=0.5), ragged()
    first, second = encoder(x).values, encoder(x).values
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    first = encoder(x).values
    torch.manual_seed(7)
    assert torch.equal(first, encoder(x).values)
    encoder.layers[1].load_state_dict(encoder.layers[0].state_dict())
    encoder.eval()
    assert torch.equal(encoder(x).values, encoder(x).values)


def test_recompute_changes_no_gradient():
    x = ragged()
    found = []
    for recompute in (True, False):
        torch.manual_seed(3)
        encoder = TransformerEncoder(16, 2, 2, dropout=0.1, recompute=recompute)
        torch.manual_seed(4)
        encoder(x).values.square().sum().backward()
        found.append([parameter.grad for parameter in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_pooling_equals_the_formula_and_empty_sequences_give_the_norms_bias(impl):
    torch.manual_seed(5)
    dtype = exact_dtype(impl)
    pool, x = AttentionPool(16, impl=impl).to(dtype), ragged(dtype=dtype)
    nn.init.normal_(pool.norm.bias)
    out = pool(x)
    for mine, row in zip(out, x, strict=True):
        weight = torch.softmax(row @ pool.query / 4, 0)
        assert_close(mine, pool.norm(weight @ row))
    torch.testing.assert_close(out[1], pool.norm.bias)


def test_self_attention_loads_torchs_state_dict_and_equals_it(impl):
    torch.manual_seed(6)
    dtype = exact_dtype(impl)
    theirs = nn.MultiheadAttention(16, 2, batch_first=True).to(dtype)
    ours = SelfAttention(16, 2, impl=impl).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x = ragged(dtype=dtype)
    for mine, row in zip(ours(x), x, strict=True):
        if len(row):
            expected = theirs(row[None], row[None], row[None])[0][0]
            assert_close(mine, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_values_stay_half(dtype):
    x = ragged(dtype=dtype)
    encoder, pool = TransformerEncoder(16, 2, 2).to(dtype), AttentionPool(16).to(dtype)
    out = encoder(x)
    assert out.values.dtype == dtype
    assert pool(out).dtype == dtype


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="num_heads must divide dim=16, got 3"):
        TransformerEncoder(16, 3, 1)
    with pytest.raises(ValueError, match="num_heads must divide dim=16, got 3"):
        SelfAttention(16, 3)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_pooling_under_autocast_takes_values_that_stayed_in_float32(half):
    pool = AttentionPool(8)
    x = Ragged(torch.randn(5, 8), torch.tensor([0, 2, 5], dtype=torch.int32), 3)
    with torch.autocast("cpu", half):
        pooled = pool(x)
    torch.testing.assert_close(pooled.float(), pool(x), rtol=0.05, atol=0.05)
