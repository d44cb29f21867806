"""The contract of `encoder_layer`, for every implementation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aam_kernels import EncoderLayerWeights, encoder_layer, weights_from_torch
from aam_kernels._runtime import dropout
from aam_kernels.encoder_layer import chunk_attention, reference, sdpa
from tests.kernels.contract import assert_close, exact_dtype, offsets_of, require
from tests.kernels.layers import FLOOR, errors, problem, run


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dim,heads", [(32, 4), (60, 4), (66, 2), (128, 4), (256, 2), (135, 3)])
@pytest.mark.parametrize("fast", ["sdpa", "cpu"])
def test_float32_errs_at_most_twice_as_much_as_math(fast, dim, heads, dropout_p, recompute):
    require(fast)
    if fast == "cpu" and dim % 16:
        pytest.skip("refused: see test_widths_that_the_compiled_kernels_refuse")
    x, offsets, weights, grad = problem(dim=dim, ffn_dim=2 * dim)
    exact_x, *exact_weights = (t.detach().double().requires_grad_() for t in (x, *weights))
    of_math, of_fast = [], []
    for seed in (
        (11, 12, 13) if dropout_p else (11,)
    ):  # one draw's largest error is a matter of luck
        options = {"num_heads": heads, "dropout_p": dropout_p, "seed": seed}
        exact_weights = EncoderLayerWeights(*exact_weights)
        exact = run(exact_x, offsets, exact_weights, grad.double(), impl="math", **options)
        of_math.append(errors(run(x, offsets, weights, grad, impl="math", **options), exact))
        options |= {"impl": fast, "recompute": recompute}
        of_fast.append(errors(run(x, offsets, weights, grad, **options), exact))
    of_math, of_fast = (torch.tensor(found).amax(0).tolist() for found in (of_math, of_fast))
    for names, math, ours in zip(("out", "x", *weights._fields), of_math, of_fast, strict=True):
        assert ours[0] <= 2 * math[0] + FLOOR, (names, ours, math)
        assert ours[1] <= 2 * math[1] + FLOOR, (names, ours, math)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32_and_rounded_once(impl, dtype):
    x, offsets, weights, grad = problem(dtype=dtype)
    halves = run(x, offsets, weights, grad, num_heads=4, impl=impl)
    floats = [t.detach().float().requires_grad_() for t in (x, *weights)]
    wide = EncoderLayerWeights(*floats[1:])
    full = run(floats[0], offsets, wide, grad.float(), num_heads=4, impl=impl)
    for half, true in zip(halves, full, strict=True):
        assert half.dtype == dtype
        assert torch.equal(half, true.to(dtype))


def test_it_equals_torchs_layer_sequence_by_sequence(impl):
    torch.manual_seed(1)
    dtype = exact_dtype(impl)
    layer = nn.TransformerEncoderLayer(
        32, 4, 48, dropout=0.0, activation="gelu", norm_first=True, batch_first=True
    ).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    lengths = (4, 9, 1)
    offsets = offsets_of(lengths)
    x = torch.randn(14, 32, dtype=dtype, requires_grad=True)
    grad = torch.randn(14, 32, dtype=dtype)
    theirs = torch.cat([layer(part[None])[0] for part in x.split(lengths)])
    weights = weights_from_torch(layer)
    expected = torch.autograd.grad(theirs, [x, *weights], grad)
    ours = run(x, offsets, weights, grad, num_heads=4, impl=impl)
    assert_close(ours[0], theirs.detach())
    for mine, true in zip(ours[1:], expected, strict=True):
        assert_close(mine, true, atol=1e-11)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_specifications_gradients_are_those_of_finite_differences(dropout_p):
    x, offsets, weights, _ = problem((3, 0, 1), dim=6, ffn_dim=5, dtype=torch.float64, extra=0)

    def layer(x, *weights):
        w = EncoderLayerWeights(*weights)
        return encoder_layer(x, offsets, w, num_heads=2, dropout_p=dropout_p, seed=3, impl="math")

    assert torch.autograd.gradcheck(layer, (x, *weights))


def test_rows_of_no_sequence_reach_nothing(impl):
    x, offsets, weights, grad = problem()
    results = run(x, offsets, weights, grad, num_heads=4, impl=impl, dropout_p=0.2, seed=1)
    clean_x = x.detach().nan_to_num(7.0).requires_grad_()
    clean = run(
        clean_x, offsets, weights, grad.nan_to_num(3.0), num_heads=4, impl=impl, dropout_p=0.2,
        seed=1,
    )  # fmt: skip
    for result, expected in zip(results, clean, strict=True):
        assert torch.equal(result, expected)
    assert not results[0][int(offsets[-1]) :].any()
    assert not results[1][int(offsets[-1]) :].any()


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,)])
def test_batches_without_rows_and_of_one_row(impl, lengths):
    x, offsets, weights, grad = problem(lengths, extra=0)
    out, grad_x, *grads = run(x, offsets, weights, grad, num_heads=4, impl=impl)
    assert out.shape == grad_x.shape == x.shape
    assert all(torch.isfinite(g).all() for g in grads)
    assert sum(lengths) or not any(g.any() for g in grads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_recomputing_keeping_and_repeating_give_the_same_bits(dropout_p, threads, monkeypatch):
    monkeypatch.setattr(sdpa, "CHUNK_ROWS", 16)
    monkeypatch.setattr(chunk_attention, "LONGEST_KEPT", 20)  # 33 rows: through the fused kernel
    x, offsets, weights, grad = problem()
    options = {"num_heads": 4, "dropout_p": dropout_p, "seed": 5, "impl": "sdpa"}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [
            run(x, offsets, weights, grad, recompute=recompute, **options)
            for recompute in (True, True, False)
        ]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for first, second, kept in zip(*runs, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, kept)


@pytest.mark.parametrize("chunk_rows", [1, 8, 10_000])
@pytest.mark.parametrize("longest_kept", [0, 6, 256])
def test_neither_chunks_nor_the_route_of_attention_change_the_result(
    chunk_rows, longest_kept, monkeypatch
):
    x, offsets, weights, grad = problem()
    options = {"num_heads": 4, "dropout_p": 0.2, "seed": 5}
    expected = run(x, offsets, weights, grad, impl="math", **options)
    monkeypatch.setattr(sdpa, "CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(chunk_attention, "LONGEST_KEPT", longest_kept)
    for result, true in zip(
        run(x, offsets, weights, grad, impl="sdpa", **options), expected, strict=True
    ):
        torch.testing.assert_close(result, true, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("site", [0, 1, 2, 3])
@pytest.mark.parametrize("impl", ["math", "sdpa"])
def test_each_dropout_site_draws_the_mask_of_the_contract(impl, site, monkeypatch):
    """With every other site switched off, the layer equals one written with the mask by hand."""
    x, offsets, weights, _ = problem((6, 4), dim=8, ffn_dim=12, dtype=torch.float64, extra=0)
    p, heads, rows = 0.5, 2, torch.arange(10)
    seed = dropout.resolve_seed(9, p, x.device)
    w = weights

    def drop(values, at):
        if at != site:
            return values
        lost = dropout.feature_dropped(seed, rows, values.shape[1], at, p)
        return values.masked_fill(lost, 0.0) / (1 - p)

    norm, linear = nn.functional.layer_norm, nn.functional.linear
    qkv = linear(norm(x, (8,), w.norm1_weight, w.norm1_bias), w.qkv_weight, w.qkv_bias)
    attended = []
    for part, at in zip(qkv.split((6, 4)), rows.split((6, 4)), strict=True):
        q, k, v = part.view(len(at), 3, heads, 4).permute(1, 2, 0, 3)
        weight = (q @ k.transpose(1, 2) / 2.0).softmax(-1)
        if site == 0:
            lost = dropout.attention_dropped(seed, at, at, heads, p)
            weight = weight.masked_fill(lost, 0.0) / (1 - p)
        attended.append((weight @ v).transpose(0, 1).flatten(1))
    mid = x + drop(linear(torch.cat(attended), w.out_weight, w.out_bias), 1)
    hidden = linear(norm(mid, (8,), w.norm2_weight, w.norm2_bias), w.ffn_in_weight, w.ffn_in_bias)
    hidden = drop(nn.functional.gelu(hidden), 2)
    expected = mid + drop(linear(hidden, w.ffn_out_weight, w.ffn_out_bias), 3)

    only_this_site(site, monkeypatch)
    out = encoder_layer(x, offsets, w, num_heads=heads, dropout_p=p, seed=9, impl=impl)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def only_this_site(site, monkeypatch):
    """Switches the masks of the other sites off, in both implementations."""
    feature = reference.feature_dropped
    factors, probabilities = sdpa.feature_factors, chunk_attention.attention_factors
    monkeypatch.setattr(
        reference,
        "feature_dropped",
        lambda seed, rows, width, at, p: feature(seed, rows, width, at, p if at == site else 0.0),
    )
    original = reference._Layer.drop
    monkeypatch.setattr(
        reference._Layer, "drop", lambda self, x, at: original(self, x, at) if at == site else x
    )
    monkeypatch.setattr(
        sdpa,
        "feature_factors",
        lambda like, rows, at, p, seed: (
            factors(like, rows, at, p, seed) if at == site else torch.ones_like(like)
        ),
    )
    if site != 0:
        attention = reference.attention._dropout
        monkeypatch.setattr(
            reference.attention,
            "_dropout",
            lambda x, chunk, p, seed: attention(x, chunk, 0.0, seed),
        )
        monkeypatch.setattr(
            chunk_attention, "attention_factors", lambda like, *rest: torch.ones_like(like)
        )
    else:
        assert probabilities is chunk_attention.attention_factors


@pytest.mark.parametrize("recompute", [True, False])
def test_only_needed_gradients_are_made(impl, recompute):
    x, offsets, weights, grad = problem(extra=0)
    everything = run(x, offsets, weights, grad, num_heads=4, impl=impl)[1:]
    for wanted in ([0], [5], [1, 12], [3, 9]):
        tensors = [t.detach() for t in (x, *weights)]
        for place in wanted:
            tensors[place].requires_grad_()
        out = encoder_layer(
            tensors[0], offsets, EncoderLayerWeights(*tensors[1:]), num_heads=4, impl=impl,
            recompute=recompute,
        )  # fmt: skip
        out.backward(grad)
        for place, (tensor, expected) in enumerate(zip(tensors, everything, strict=True)):
            if place in wanted:
                assert torch.equal(tensor.grad, expected)
            else:
                assert tensor.grad is None


def test_seeds(impl):
    x, offsets, weights, _ = problem(extra=0)

    def layer(**options):
        return encoder_layer(x, offsets, weights, num_heads=4, dropout_p=0.2, impl=impl, **options)

    assert torch.equal(layer(seed=4), layer(seed=torch.tensor(4)))
    assert not torch.equal(layer(seed=4), layer(seed=5))
    torch.manual_seed(8)
    drawn = layer()
    torch.manual_seed(8)
    assert torch.equal(drawn, layer())


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"num_heads": 5}, ValueError, "num_heads must divide the width 64, got 5"),
        ({"offsets": torch.tensor([0, 70], dtype=torch.int32)}, ValueError, "70"),
        ({"offsets": torch.tensor([0, 5, 3], dtype=torch.int32)}, ValueError, "decrease"),
        ({"offsets": torch.tensor([0, 5])}, TypeError, "int32"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        ({"impl": "triton"}, ValueError, "not available"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
        ({"x": torch.zeros(61, 64, 1)}, ValueError, "x must be"),
        ({"x": torch.zeros(61, 64, dtype=torch.int64)}, TypeError, "int64"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    x, offsets, weights, _ = problem()
    arguments = {"x": x, "offsets": offsets, "num_heads": 4} | change
    with pytest.raises(error, match=message):
        encoder_layer(weights=weights, **arguments)


def test_a_weight_of_the_wrong_shape_is_named():
    x, offsets, weights, _ = problem()
    with pytest.raises(ValueError, match=r"qkv_bias must be \(192,\), got \(191,\)"):
        encoder_layer(x, offsets, weights._replace(qkv_bias=torch.zeros(191)), num_heads=4)


def test_a_torch_layer_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="norm_first=False"):
        weights_from_torch(nn.TransformerEncoderLayer(8, 2, activation="gelu"))


def test_autocast_on_a_cpu_changes_nothing():
    x, offsets, weights, grad = problem()
    expected = run(x, offsets, weights, grad, num_heads=4)
    with torch.autocast("cpu", torch.bfloat16):
        results = run(x, offsets, weights, grad, num_heads=4)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
