"""By Triton kernels too, a part of a batch has the dropout of the whole."""

import pytest
import torch

from tests.kernels.layers import make_weights
from tests.kernels.test_first_row import FIRSTS, attend, transform
from tests.kernels.triton import test_encoder_layer, test_long_attention, test_short_attention
from tests.kernels.triton.interpreter import interpreting

LENGTHS, KEY_LENGTHS = (17, 0, 33, 40, 3), (20, 4, 16, 35, 50)
CUT = 2  # the second part of the batch: these sequences, from these rows on
ROWS, KEYS = slice(17, None), slice(24, None)
KERNELS = {
    "short": lambda: test_short_attention.configured((32, 32), 16),
    "long": lambda: test_long_attention.configured(16, 32),
}


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_attention(kernels, first, cross):
    key_lengths, keys = (KEY_LENGTHS, KEYS) if cross else (LENGTHS, ROWS)
    first_key = 3 * first + 1 if cross else first
    query, grad = torch.randn(2, sum(LENGTHS), 2, 16)
    key, value = torch.randn(2, sum(key_lengths), 2, 16)

    def run(impl, start=0, rows=slice(0, None), keys=slice(0, None)):
        lengths = LENGTHS[start:], key_lengths[start:]
        return attend(
            (query[rows], key[keys], value[keys]), grad[rows], lengths[0],
            lengths[1] if cross else None, max_length=max(lengths[0]),
            max_key_length=max(lengths[1]), first_row=first + rows.start,
            first_key_row=first_key + keys.start, impl=impl,
        )  # fmt: skip

    expected = run("math")
    with KERNELS[kernels]():
        whole, part = run("triton"), run("triton", CUT, ROWS, keys)
    for side, *results in zip((ROWS, ROWS, keys, keys), part, whole, expected, strict=True):
        assert torch.equal(results[0], results[1][side])
        torch.testing.assert_close(results[1], results[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("first", FIRSTS)
def test_layer(first, fused):
    weights = make_weights(32, 48)
    x, grad = torch.randn(2, sum(LENGTHS), 32)

    def run(impl, start=0, rows=slice(0, None)):
        return transform(
            x[rows], grad[rows], LENGTHS[start:], weights, max_length=max(LENGTHS),
            first_row=first + rows.start, impl=impl,
        )  # fmt: skip

    expected = run("math")
    with interpreting(), test_encoder_layer.small_blocks(fused=fused):
        whole, part = run("triton"), run("triton", CUT, ROWS)
    for place in (0, 1):  # the output and the gradient of x
        torch.testing.assert_close(part[place], whole[place][ROWS], rtol=1e-5, atol=1e-5)
    for found, true in zip((*whole[:2], *whole[2]), (*expected[:2], *expected[2]), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)
