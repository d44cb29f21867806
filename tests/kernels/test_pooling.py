import pytest
import torch

from aam_kernels import attention_pool
from tests.kernels.contract import assert_close, exact_dtype, offsets_of

LENGTHS = (3, 0, 5, 3, 1, 40)


def test_equals_plain_torch(impl):
    total = sum(LENGTHS)
    dtype = exact_dtype(impl)
    values = torch.randn(total, 6, dtype=dtype, requires_grad=True)
    scores = (5 * torch.randn(total, dtype=dtype)).requires_grad_()
    pooled = attention_pool(values, scores, offsets_of(LENGTHS), impl=impl)
    parts = zip(values.split(LENGTHS), scores.split(LENGTHS), strict=True)
    truth = torch.stack([(v * s.softmax(0)[:, None]).sum(0) for v, s in parts])
    assert_close(pooled, truth, rtol=1e-13, atol=1e-14)
    assert torch.equal(pooled[1], torch.zeros(6, dtype=dtype))
    grad = torch.randn_like(truth)
    found = torch.autograd.grad(pooled, (values, scores), grad)
    expected = torch.autograd.grad(truth, (values, scores), grad)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_large_scores_do_not_overflow(impl):
    scores = torch.tensor([1e4, 1e4, -1e4, -1e4])
    values = torch.tensor([[1.0], [3.0], [5.0], [9.0]])
    pooled = attention_pool(values, scores, offsets_of((2, 2)), impl=impl)
    assert pooled.tolist() == [[2.0], [7.0]]


def test_gradcheck_of_math():
    values = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(6, dtype=torch.float64, requires_grad=True)
    offsets = offsets_of((2, 0, 3, 1))
    assert torch.autograd.gradcheck(
        lambda v, s: attention_pool(v, s, offsets, impl="math"), (values, scores)
    )


def test_strided_values_and_expanded_gradient(impl):
    values = torch.randn(5, 8).T.requires_grad_()
    scores = torch.randn(8, 2)[:, 0].requires_grad_()
    pooled = attention_pool(values, scores, offsets_of((3, 5)), impl=impl)
    dense = attention_pool(values.contiguous(), scores.contiguous(), offsets_of((3, 5)), impl=impl)
    assert torch.allclose(pooled, dense, atol=1e-6)
    found = torch.autograd.grad(pooled.sum(), (values, scores))
    expected = torch.autograd.grad(dense, (values, scores), torch.ones(2, 5))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


V = torch.zeros(4, 3)
S = torch.zeros(4)
OFFSETS = torch.tensor([0, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(4)}, ValueError, r"got \(4,\) and \(4,\)"),
        ({"scores": torch.zeros(5)}, ValueError, r"\(5,\)"),
        ({"scores": torch.zeros(4, 1)}, ValueError, r"\(4, 1\)"),
        ({"scores": S.double()}, TypeError, "scores is torch.float64"),
        ({"values": V.long(), "scores": S.long()}, TypeError, "torch.int64"),
        ({"offsets": OFFSETS.long()}, TypeError, "torch.int64"),
        ({"offsets": torch.tensor([0, 5]).int()}, ValueError, "end at 5"),
        ({"max_length": 2}, ValueError, "got 2"),
        ({"impl": "triton"}, ValueError, "not available"),
    ],
)
def test_wrong_arguments_name_the_value(change, error, message):
    with pytest.raises(error, match=message):
        attention_pool(**{"values": V, "scores": S, "offsets": OFFSETS, **change})
