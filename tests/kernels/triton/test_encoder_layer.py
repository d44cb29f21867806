"""The encoder layer by Triton kernels, interpreted: the contract, what it keeps, its operator."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from torch import nn

from aam_kernels import EncoderLayerWeights, encoder_layer
from aam_kernels._accuracy import error
from aam_kernels._problems import Problem
from aam_kernels._runtime.configurations import Configuration, forced
from aam_kernels._verification import check_problem
from aam_kernels.encoder_layer import ops
from aam_kernels.encoder_layer.triton.launches import Launcher, Norm
from tests.kernels.contract import CPU, offsets_of
from tests.kernels.triton.interpreter import GuardZones, interpreting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 5, 33, 0, 17, 0)
PRODUCT = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16}
SMALL = {  # several blocks in every direction, and several shares of every sum
    "layer_product": PRODUCT,
    "layer_feed_forward": {"BLOCK_M": 32, "BLOCK_F": 32},
    "layer_feed_backward": {"BLOCK_M": 16, "BLOCK_F": 64},
    "layer_hidden_backward": PRODUCT,
    "layer_weight_gradient": {"BLOCK_ROWS": 16, "BLOCK_N": 64, "BLOCK_K": 32},
    "layer_norm_backward": {"BLOCK_ROWS": 16},
    "layer_add_partials": {"BLOCK": 2048},
}
WHOLE = Problem("encoder_layer", "", LENGTHS, heads=1, head_dim=24, dropout_p=0.3, tail=10)


@pytest.fixture(autouse=True)
def _interpreted():
    with interpreting():
        yield


@contextlib.contextmanager
def small_blocks(*, fused=True):
    with contextlib.ExitStack() as stack:
        for kernel, meta in SMALL.items():
            stack.enter_context(forced(kernel, Configuration(meta, {})))
        if not fused:
            stack.enter_context(forced("layer_feed_forward", None))
            stack.enter_context(forced("layer_feed_backward", None))
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(dtype):
    with small_blocks():
        (check,) = check_problem(WHOLE, ("triton",), dtype, CPU)
    assert check.failures == ()


def test_contract_with_separate_products():
    with small_blocks(fused=False):
        (check,) = check_problem(WHOLE, ("triton",), torch.bfloat16, CPU)
    assert check.failures == ()


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_batches_without_rows(lengths):
    problem = Problem("encoder_layer", "", lengths, heads=1, head_dim=8, tail=40)
    inputs = problem.inputs(torch.float32)
    for name, rows in problem.ignored().items():
        inputs[name][rows] = torch.nan
    for result in problem.run("triton", inputs).values():
        assert not result.any()


def test_the_blocks_of_the_tables():
    problem = Problem("encoder_layer", "", (140, 3), head_dim=40, recompute=False)
    inputs = problem.inputs(torch.float32)
    expected = problem.run("math", inputs)
    for name, result in problem.run("triton", inputs).items():
        assert error(result, expected[name].double()).largest < 2e-6, name


def some(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype) * shape[-1] ** -0.5


def make(dim=32, hidden=48, rows=60, dtype=torch.float32):
    shapes = (
        (dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,),
        (dim,), (dim,), (hidden, dim), (hidden,), (dim, hidden), (dim,),
    )  # fmt: skip
    weights = EncoderLayerWeights(*(some(*shape, dtype=dtype).requires_grad_() for shape in shapes))
    return (some(rows, dim) * 5).to(dtype).requires_grad_(), weights


def run(x, weights, grad, lengths=LENGTHS, **options):
    options = {"num_heads": 2, "max_length": max(lengths), "impl": "triton", **options}
    out = encoder_layer(x, offsets_of(lengths), weights, **options)
    return [out.detach(), *torch.autograd.grad(out, [x, *weights], grad)]


@pytest.mark.parametrize("fused", [True, False])
def test_recomputing_and_keeping_give_the_same_bits(fused):
    x, weights = make(dtype=torch.bfloat16)
    grad = torch.randn_like(x)
    options = {"dropout_p": 0.2, "seed": 3}
    with small_blocks(fused=fused):
        kept = run(x, weights, grad, recompute=False, **options)
        again = run(x, weights, grad, recompute=True, **options)
    for one, other in zip(kept, again, strict=True):
        assert torch.equal(one, other)


def test_shares_of_the_tokens_are_added_in_order(monkeypatch):
    # The same sums by one share and by many: equal but for rounding.
    x, weights = make()
    grad = torch.randn_like(x)
    launches = sys.modules[Launcher.__module__]
    with small_blocks():
        many = run(x, weights, grad)
        monkeypatch.setattr(launches, "NORM_PROGRAMS", 1)
        monkeypatch.setattr(launches, "WEIGHT_PROGRAMS", 1)
        one = run(x, weights, grad)
        monkeypatch.undo()
        monkeypatch.setattr(launches, "SHARE_GROUP", 2)  # sums of sums
        grouped = run(x, weights, grad)
    assert any(not torch.equal(a, b) for a, b in zip(many, one, strict=True))
    for a, b, c in zip(many, one, grouped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", [[0], [4, 12], [1, 9]])
def test_only_needed_gradients_are_made(wanted):
    x, weights = make(rows=55)
    grad = torch.randn_like(x)
    with small_blocks():
        everything = run(x, weights, grad)[1:]
        tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, *weights))]
        out = encoder_layer(
            tensors[0], offsets_of(LENGTHS), EncoderLayerWeights(*tensors[1:]), num_heads=2,
            max_length=33, impl="triton",
        )  # fmt: skip
        out.backward(grad)
    for i, (tensor, expected) in enumerate(zip(tensors, everything, strict=True)):
        assert (tensor.grad is not None) == (i in wanted)
        assert tensor.grad is None or torch.equal(tensor.grad, expected)


def test_nothing_around_the_tensors_is_read_or_written():
    zones = GuardZones()
    x, weights = make()
    x, *placed = (zones.place(t.detach()).requires_grad_() for t in (x, *weights))
    grad = zones.place(torch.randn(60, 32))
    plain = [t.detach().clone().requires_grad_() for t in (x, *placed)]
    options = {"dropout_p": 0.2, "seed": 3, "recompute": False}
    with small_blocks():
        found = run(x, EncoderLayerWeights(*placed), grad, **options)
    zones.check()
    expected = run(plain[0], EncoderLayerWeights(*plain[1:]), grad, impl="math", **options)
    for one, true in zip(found, expected, strict=True):
        torch.testing.assert_close(one, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [16, 24, 40])
def test_products_of_any_width_with_everything_around_them(dim):
    x, weight, bias = some(20, dim), some(36, dim), some(36)
    norm = Norm(some(dim) + 1.0, some(dim) * 0.5)
    offsets, residual = offsets_of((9, 8)), some(20, 36)
    x[17:], residual[17:] = torch.nan, torch.nan
    with small_blocks():
        launcher = Launcher(offsets, 0.0, None)
        found = launcher.product(x, weight, bias, norm=norm, residual=residual, gelu=True)
        turned = launcher.product(x, weight.t().contiguous(), transposed=True)
    normed = nn.functional.layer_norm(x[:17], (dim,), norm.weight, norm.bias)
    expected = nn.functional.gelu(nn.functional.linear(normed, weight, bias)) + residual[:17]
    torch.testing.assert_close(found[:17], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned[:17], x[:17] @ weight.t(), rtol=1e-5, atol=1e-5)
    assert not found[17:].any()
    assert not turned[17:].any()


def test_gelu_of_half_types_errs_by_little_more_than_their_rounding():
    x = torch.linspace(-7.0, 7.0, 64 * 16).reshape(64, 16).half()
    exact = nn.functional.gelu(x.double())
    with small_blocks():
        launcher = Launcher(offsets_of((64,)), 0.0, None)
        found = launcher.product(x, torch.eye(16, dtype=torch.float16), gelu=True)
    assert bool(((found - exact).abs() <= exact.abs() * 2.0**-11 * 1.06 + 2.2e-6).all())


def kept_bytes(call, own):
    """Bytes of distinct storages that autograd holds for one call, without those of ``own``."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    return sum(size for place, size in storages.items() if place not in known)


def test_at_most_a_third_of_the_padded_layers_bytes_are_kept():
    dim, length, count = 128, 151, 1
    layer = nn.TransformerEncoderLayer(
        dim, 4, 4 * dim, dropout=0.1, activation="gelu", norm_first=True, batch_first=True,
        dtype=torch.bfloat16,
    )  # fmt: skip
    padded = torch.randn(count, length, dim, dtype=torch.bfloat16, requires_grad=True)
    theirs = kept_bytes(lambda: layer(padded), list(layer.parameters()))
    rows = count * length
    x, weights = make(dim, 4 * dim, rows, torch.bfloat16)
    offsets = offsets_of((length,) * count)
    ours = {}
    for recompute in (True, False):
        ours[recompute] = kept_bytes(
            lambda recompute=recompute: encoder_layer(
                x, offsets, weights, num_heads=4, dropout_p=0.1, seed=1, max_length=length,
                recompute=recompute, impl="triton",
            ),
            [*weights, offsets],
        )  # fmt: skip
    assert ours[True] / rows == pytest.approx(2 * dim, abs=1)
    assert ours[False] / rows == pytest.approx(2 * dim + 6 * dim + 4 * dim + 4 * 4, abs=1)
    assert ours[False] <= theirs / 3


def test_opcheck():
    x, weights = make(16, 16, 9)
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    how = (1, 0.2, torch.tensor([3, 7, 7]), 5, "triton")
    with small_blocks():
        torch.library.opcheck(ops.encoder_layer, (x, offsets, *weights, *how, False))
        plain = [weight.detach() for weight in weights]
        output, *saved = ops.encoder_layer(x.detach(), offsets, *plain, *how, False)
        needs = [True, False] * 6 + [True]
        arguments = (torch.ones_like(output), x.detach(), offsets, *plain, *saved, needs, *how)
        utils = ("test_schema", "test_faketensor")
        torch.library.opcheck(ops.encoder_layer_backward, arguments, test_utils=utils)
