"""A part of a packed batch, told its first row, has the dropout of the whole."""

import shutil
from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from aam_kernels import Ragged, ragged_attention
from aam_kernels.modules import SelfAttention, TransformerEncoder
from tests.kernels.contract import assert_close, numpy_dropped, offsets_of
from tests.kernels.layers import make_weights, run

LENGTHS = (5, 0, 70, 1, 16, 33, 0, 300, 12)
KEY_LENGTHS = (9, 4, 20, 0, 17, 64, 3, 260, 1)
CUTS = (0, 3, 4, 8, 9)  # parts of the batch, in sequences
P, SEED = 0.3, 1 << 40
FIRSTS = (0, (1 << 24) - 100, (1 << 32) - 100)  # where columns and rows begin again


def attend(x, grad, lengths, key_lengths=None, **options):
    """Output and gradients of q, k and v."""
    x = [part.detach().requires_grad_() for part in x]
    offsets = offsets_of(lengths)
    key_offsets = None if key_lengths is None else offsets_of(key_lengths)
    out = ragged_attention(*x, offsets, key_offsets=key_offsets, dropout_p=P, seed=SEED, **options)
    return [out.detach(), *torch.autograd.grad(out, x, grad)]


def transform(x, grad, lengths, weights, **options):
    """Output and gradient of x, then the gradients of the weights."""
    options = {"num_heads": 2, "dropout_p": P, "seed": SEED, **options}
    found = run(x.detach().requires_grad_(), offsets_of(lengths), weights, grad, **options)
    return found[0], found[1], found[2:]


def parts(lengths):
    """(first sequence, end, rows) of every part."""
    bounds = offsets_of(lengths).tolist()
    for first, end in pairwise(CUTS):
        yield first, end, slice(bounds[first], bounds[end])


def compare(impl, found, whole):
    """To the bit where a sequence's arithmetic does not depend on its neighbours."""
    if impl == "cpu":
        assert torch.equal(found, whole)
    else:
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", FIRSTS)
def test_attention(impl, first):
    x, grad = torch.randn(3, sum(LENGTHS), 2, 16), torch.randn(sum(LENGTHS), 2, 16)
    whole = attend(x, grad, LENGTHS, impl=impl, first_row=first)
    for start, end, rows in parts(LENGTHS):
        where = {"impl": impl, "first_row": first + rows.start}
        found = attend(x[:, rows], grad[rows], LENGTHS[start:end], **where)
        for part, expected in zip(found, whole, strict=True):
            compare(impl, part, expected[rows])
        if start:
            where["first_row"] += 1
            other = attend(x[:, rows], grad[rows], LENGTHS[start:end], **where)
            assert not any(torch.allclose(a, b[rows]) for a, b in zip(other, whole, strict=True))


@pytest.mark.parametrize("first", FIRSTS)
def test_cross_attention(impl, first):
    query, grad = torch.randn(2, sum(LENGTHS), 2, 16)
    key, value = torch.randn(2, sum(KEY_LENGTHS), 2, 16)
    where = {"impl": impl, "first_row": first, "first_key_row": 7 * first}
    whole = attend((query, key, value), grad, LENGTHS, KEY_LENGTHS, **where)
    both = zip(parts(LENGTHS), parts(KEY_LENGTHS), strict=True)
    for (start, end, rows), (_, _, keys) in both:
        where["first_row"], where["first_key_row"] = first + rows.start, 7 * first + keys.start
        x = query[rows], key[keys], value[keys]
        found = attend(x, grad[rows], LENGTHS[start:end], KEY_LENGTHS[start:end], **where)
        sides = (rows, rows, keys, keys)
        for part, expected, side in zip(found, whole, sides, strict=True):
            compare(impl, part, expected[side])


@pytest.mark.parametrize("first", [0, 100, (1 << 31) - 3, (1 << 33) - 3])
def test_attention_mask_is_that_of_the_rows(impl, first):
    # Equal scores and values that tell keys apart show which probabilities were dropped.
    length, heads = 9, 3
    zeros, value = torch.zeros(length, heads, 16), torch.zeros(length, heads, 16)
    value[torch.arange(length), :, torch.arange(length)] = 1.0
    for first_key in (None, 5 * first + 1):
        out = ragged_attention(
            zeros, zeros, value, offsets_of([length]), key_offsets=offsets_of([length]),
            dropout_p=P, seed=SEED, first_row=first, first_key_row=first_key, impl=impl,
        )  # fmt: skip
        start = first if first_key is None else first_key
        rows, keys = (range(at, at + length) for at in (first, start))
        drop = torch.from_numpy(numpy_dropped(SEED, rows, keys, range(heads), P))
        expected = (~drop).permute(1, 0, 2) / (length * (1 - P))
        assert_close(out[:, :, :length], expected.to(out.dtype))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("first", FIRSTS)
def test_layer(impl, first, recompute):
    weights = make_weights(32, 64)
    x, grad = torch.randn(2, sum(LENGTHS), 32)
    options = {"impl": impl, "recompute": recompute}
    out, grad_x, grads = transform(x, grad, LENGTHS, weights, first_row=first, **options)
    totals = [torch.zeros_like(weight) for weight in weights]
    for start, end, rows in parts(LENGTHS):
        options["first_row"] = first + rows.start
        found = transform(x[rows], grad[rows], LENGTHS[start:end], weights, **options)
        compare(impl, found[0], out[rows])
        compare(impl, found[1], grad_x[rows])
        for total, part in zip(totals, found[2], strict=True):
            total += part
        if start:
            options["first_row"] += 1
            other = transform(x[rows], grad[rows], LENGTHS[start:end], weights, **options)
            assert not torch.allclose(other[0], out[rows])
            assert not torch.allclose(other[1], grad_x[rows])
    for total, expected in zip(totals, grads, strict=True):
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def test_implementations_agree_on_a_part():
    weights = make_weights(32, 64)
    x, grad = torch.randn(2, sum(LENGTHS), 32)
    expected, found = (
        transform(x, grad, LENGTHS, weights, impl=impl, first_row=12345)
        for impl in ("math", "sdpa")
    )
    for a, b in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [TransformerEncoder, SelfAttention])
def test_modules(build):
    options = {"num_layers": 2} if build is TransformerEncoder else {}
    module = build(32, 2, dropout=P, **options).train()
    x = torch.randn(sum(LENGTHS), 32)
    torch.manual_seed(1)
    whole = module(Ragged(x, offsets_of(LENGTHS))).values
    for start, end, rows in parts(LENGTHS):
        torch.manual_seed(1)
        part = Ragged(x[rows], offsets_of(LENGTHS[start:end]))
        found = module(part, first_row=rows.start).values
        torch.testing.assert_close(found, whole[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_another_first_row_is_not_compiled_again(backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("Inductor needs a C++ compiler")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    x, offsets = torch.randn(10, 2, 16), offsets_of((4, 6))
    call = torch.compile(
        lambda first: ragged_attention(x, x, x, offsets, dropout_p=0.3, seed=1, first_row=first),
        backend=counter, fullgraph=True, dynamic=True,
    )  # fmt: skip
    for first in (5, 77, 1 << 31, 1 << 40):
        expected = ragged_attention(x, x, x, offsets, dropout_p=0.3, seed=1, first_row=first)
        assert torch.equal(call(first), expected)
    assert counter.frame_count == 1


def test_a_negative_row_is_refused():
    x, offsets = torch.randn(10, 2, 16), offsets_of((4, 6))
    for name in ("first_row", "first_key_row"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            ragged_attention(x, x, x, offsets, **{name: -1})
