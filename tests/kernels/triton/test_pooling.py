"""Attention pooling by Triton kernels, interpreted: the contract and its edges."""

from __future__ import annotations

import pytest
import torch

from aam_kernels import attention_pool
from aam_kernels._problems import Problem
from aam_kernels._runtime.configurations import Configuration, forced
from aam_kernels._runtime.grouping import Sequences
from aam_kernels._verification import check_problem
from aam_kernels.pooling import reference
from aam_kernels.pooling import triton as kernels
from tests.kernels.contract import CPU, offsets_of
from tests.kernels.triton.interpreter import GuardZones, interpreting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROBLEMS = [
    Problem("pooling", "unequal lengths", (1, 2, 5, 0, 17, 33, 101), tail=3, head_dim=24),
    Problem("pooling", "empty first and last", (0, 3, 0, 0, 7, 0)),
    Problem("pooling", "no sequences", ()),
    Problem("pooling", "all empty", (0, 0, 0), tail=2),
    Problem("pooling", "longest row not given", (40, 3), bounded=False),
    Problem("pooling", "large scores", (40, 3), magnitude=50.0),
    Problem("pooling", "dim 1", (17, 0, 3), heads=1, head_dim=1),
    Problem("pooling", "dim 300", (3, 0, 40), heads=10, head_dim=30),
]


@pytest.fixture(autouse=True)
def _interpreted():
    with interpreting():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_contract(problem, dtype):
    (check,) = check_problem(problem, ("triton",), dtype, CPU)
    assert check.failures == ()


def test_rows_longer_than_any_block():
    problem = Problem("pooling", "", (600, 5), tail=1)
    (check,) = check_problem(problem, ("triton",), torch.bfloat16, CPU)
    assert check.failures == ()


@pytest.mark.parametrize("blocks", [(16, 16), (64, 8), (1, 32)], ids=str)
def test_blocks_do_not_matter(blocks):
    chosen = Configuration(dict(zip(("BLOCK_ROWS", "BLOCK_DIM"), blocks, strict=True)), {})
    problem = Problem("pooling", "", (1, 5, 0, 17, 33), head_dim=10, tail=2)
    with forced("pool_forward", chosen), forced("pool_backward", chosen):
        (check,) = check_problem(problem, ("triton",), torch.float32, CPU)
    assert check.failures == ()


def some(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_shares_of_a_sequence_make_one_gradient(monkeypatch):
    values, scores = some(130, 8).requires_grad_(), some(130).requires_grad_()
    offsets, grad = offsets_of((100, 30)), some(2, 8)

    def grads():
        pooled = attention_pool(values, scores, offsets, max_length=100, impl="triton")
        return torch.autograd.grad(pooled, (values, scores), grad)

    together = grads()
    monkeypatch.setattr(kernels, "SHARE_ROWS", 32)
    for one, other in zip(together, grads(), strict=True):
        assert torch.equal(one, other)


def test_gaps_and_tails_are_neither_read_nor_left():
    values, scores, grad = some(12, 5), some(12), some(3, 5)
    offsets, lengths = offsets_of((4, 0, 6)), torch.tensor([3, 0, 6], dtype=torch.int32)
    outside = torch.tensor([3, 10, 11])
    values[outside], scores[outside] = torch.nan, torch.nan
    sequences = Sequences(offsets, None, lengths, max_length=6)
    pooled, lse = kernels.forward(values, scores, sequences)
    expected, expected_lse = reference.forward(values, scores, sequences)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(lse, expected_lse)
    found = kernels.backward(grad, values, scores, pooled, lse, sequences)
    for one, true in zip(
        found, reference.backward(grad, values, scores, expected, lse, sequences), strict=True
    ):
        torch.testing.assert_close(one, true)
        assert not one[outside].any()


def test_nothing_around_the_tensors_is_read_or_written():
    zones = GuardZones()
    lengths = (3, 0, 33)
    inputs = [zones.place(x) for x in (some(38, 24), some(38), some(3, 24))]
    sequences = Sequences(zones.place(offsets_of(lengths)), max_length=33)
    values, scores, grad = inputs
    pooled, lse = kernels.forward(values, scores, sequences)
    grads = kernels.backward(grad, values, scores, zones.place(pooled), lse, sequences)
    zones.check()
    expected = reference.forward(values, scores, sequences)[0]
    torch.testing.assert_close(pooled, expected)
    for one, true in zip(
        grads, reference.backward(grad, values, scores, expected, lse, sequences), strict=True
    ):
        torch.testing.assert_close(one, true)


@pytest.mark.parametrize("lowest", [float("-inf"), torch.finfo(torch.float32).min])
def test_scores_that_mask_weigh_nothing_beside_others(lowest):
    values = some(4, 8)
    scores = torch.tensor([0.0, lowest, lowest, 1e4])
    pooled = attention_pool(values, scores, offsets_of((2, 2)), impl="triton")
    assert torch.equal(pooled, values[[0, 3]])


def test_equally_low_scores_share_the_weight():
    values, lowest = some(2, 8), torch.finfo(torch.float32).min
    scores = torch.full((2,), lowest)
    pooled = attention_pool(values, scores, offsets_of((2,)), impl="triton")
    torch.testing.assert_close(pooled, values.mean(0, keepdim=True))


def test_strided_values_and_an_expanded_gradient():
    values, scores = some(5, 8).T.requires_grad_(), some(8, 2)[:, 0].requires_grad_()
    results = []
    for impl in ("triton", "math"):
        pooled = attention_pool(values, scores, offsets_of((3, 5)), impl=impl)
        results.append((pooled, *torch.autograd.grad(pooled.sum(), (values, scores))))
    for one, true in zip(*results, strict=True):
        torch.testing.assert_close(one, true, atol=1e-6, rtol=1e-5)
