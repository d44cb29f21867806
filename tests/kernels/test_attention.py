import pytest
import torch

import aam_kernels
from aam_kernels import attention, ragged_attention
from aam_kernels.attention import explicit, sdpa
from tests.kernels.contract import (
    assert_close,
    exact_dtype,
    numpy_dropped,
    offsets_of,
    oracle_attention,
)

LENGTHS = (5, 0, 7, 1, 33, 5)
KEY_LENGTHS = (2, 3, 0, 40, 6, 1)


def tensors(total, total_key, heads=2, head_dim=12, dtype=torch.float64):
    shapes = ((total, heads, head_dim), (total_key, heads, head_dim), (total_key, heads, head_dim))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("cross", [False, True])
def test_equals_plain_torch(impl, cross, dropout_p):
    key_lengths = KEY_LENGTHS if cross else LENGTHS
    query, key, value = tensors(sum(LENGTHS), sum(key_lengths), dtype=exact_dtype(impl))
    seed = -77
    output = ragged_attention(
        query, key, value, offsets_of(LENGTHS),
        key_offsets=offsets_of(key_lengths) if cross else None,
        scale=0.4, dropout_p=dropout_p, seed=seed, impl=impl,
    )  # fmt: skip

    def drop(queries, keys, heads):
        return numpy_dropped(seed, queries, keys, range(heads), dropout_p)

    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    truth = oracle_attention(
        *exact, LENGTHS, key_lengths, 0.4, drop if dropout_p else None, dropout_p
    )
    assert_close(output, truth, rtol=1e-12, atol=1e-13)
    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, (query, key, value), grad)
    true_grads = torch.autograd.grad(truth, exact, grad.double())
    for found, expected in zip(grads, true_grads, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_of_math(dropout_p):
    query, key, value = tensors(6, 7, head_dim=3)
    offsets, key_offsets = offsets_of((2, 0, 3, 1)), offsets_of((3, 1, 3, 0))

    def call(q, k, v):
        return ragged_attention(
            q, k, v, offsets, key_offsets=key_offsets, dropout_p=dropout_p, seed=1, impl="math"
        )

    assert torch.autograd.gradcheck(call, (query, key, value))


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_the_mask_is_the_documented_one_forward_and_backward(impl, p):
    # With equal scores and one-hot values the output shows the mask itself.
    lengths, heads, seed = (9, 4), 3, 1234567890123
    zeros = torch.zeros(13, heads, 13, requires_grad=True)
    value = torch.eye(13).unsqueeze(1).repeat(1, heads, 1).requires_grad_()
    output = ragged_attention(
        zeros, zeros, value, offsets_of(lengths), dropout_p=p, seed=seed, impl=impl
    )
    grad = torch.autograd.grad(output, value, torch.eye(13).unsqueeze(1).repeat(1, heads, 1))[0]
    for first, length in ((0, 9), (9, 4)):
        rows = range(first, first + length)
        kept = ~torch.from_numpy(numpy_dropped(seed, rows, rows, range(heads), p))
        expected = kept / (length * (1 - p))  # (heads, queries, keys)
        part = slice(first, first + length)
        assert torch.allclose(output[part, :, part].transpose(0, 1), expected)
        assert torch.allclose(grad[part, :, part].permute(1, 2, 0), expected)


def test_dropout_of_long_rows_is_blocked_without_a_trace(monkeypatch):
    query, key, value = tensors(70, 70, heads=3, dtype=torch.float32)
    offsets = offsets_of((60, 10))

    def run():
        output = ragged_attention(query, key, value, offsets, dropout_p=0.2, seed=5, impl="sdpa")
        return output, *torch.autograd.grad(output.sum(), (query, key, value))

    whole = run()
    monkeypatch.setattr(sdpa, "CHUNK_SCORES", 400)  # a few rows of one head at a time
    blocks = list(explicit._blocks(query[None, :60], key[None, :60], 400))
    assert len(blocks) == 3 * 4
    for a, b in zip(whole, run(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_lse(impl):
    dtype = exact_dtype(impl)
    query, key, value = tensors(sum(LENGTHS) + 2, sum(KEY_LENGTHS), dtype=dtype)
    output, lse = ragged_attention(
        query, key, value, offsets_of(LENGTHS), key_offsets=offsets_of(KEY_LENGTHS),
        scale=0.4, return_lse=True, impl=impl,
    )  # fmt: skip
    assert lse.dtype == dtype and not lse.requires_grad and output.requires_grad
    first, first_key = 0, 0
    for length, key_length in zip(LENGTHS, KEY_LENGTHS, strict=True):
        rows, keys = slice(first, first + length), slice(first_key, first_key + key_length)
        scores = torch.einsum("qhd,khd->qhk", query[rows], key[keys]) * 0.4
        assert_close(lse[rows], scores.logsumexp(-1), rtol=1e-12)
        first, first_key = rows.stop, keys.stop
    assert (lse[first:] == float("-inf")).all()
    assert lse[5:12].isneginf().all()  # the sequence without keys


def test_lse_is_float32_for_half(impl):
    query, key, value = tensors(4, 4, dtype=torch.bfloat16)
    _, lse = ragged_attention(query, key, value, offsets_of((4,)), return_lse=True, impl=impl)
    assert lse.dtype == torch.float32


def test_padded_equals_ragged(impl):
    lengths = torch.tensor([4, 0, 6, 1], dtype=torch.int32)
    x = [torch.randn(4, 6, 2, 8, requires_grad=True) for _ in range(3)]
    output = attention(*x, lengths=lengths, impl=impl)
    packed = [aam_kernels.Ragged.from_padded(t.detach(), lengths) for t in x]
    truth = ragged_attention(*(t.values for t in packed), packed[0].offsets, impl=impl)
    assert torch.equal(packed[0].with_values(truth).to_padded(), output)
    full = attention(*x, impl=impl)
    plain = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in x))
    assert torch.allclose(full, plain.transpose(1, 2), atol=1e-6)


def test_strided_and_expanded_inputs(impl):
    qkv = torch.randn(12, 3, 2, 8, requires_grad=True)
    query, key, value = qkv.unbind(1)
    offsets = offsets_of((5, 7))
    output = ragged_attention(query, key, value, offsets, impl=impl)
    dense = ragged_attention(*(x.contiguous() for x in (query, key, value)), offsets, impl=impl)
    assert torch.equal(output, dense)
    one = torch.autograd.grad(output.sum(), qkv, retain_graph=True)[0]  # an expanded gradient
    other = torch.autograd.grad(output, qkv, torch.ones_like(output))[0]
    assert torch.equal(one, other)
    last_dim_strided = torch.randn(12, 8, 2).transpose(1, 2)
    a = ragged_attention(last_dim_strided, key, value, offsets, impl=impl)
    b = ragged_attention(last_dim_strided.contiguous(), key, value, offsets, impl=impl)
    assert torch.equal(a, b)


def test_a_missing_seed_follows_manual_seed(impl):
    query, key, value = (x.detach() for x in tensors(9, 9, dtype=exact_dtype(impl)))

    def call():
        return ragged_attention(query, key, value, offsets_of((9,)), dropout_p=0.5, impl=impl)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(first, call()) and not torch.equal(first, second)


Q = torch.zeros(6, 2, 4)
OFFSETS = torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(6, 8)}, ValueError, r"head_dim\), got \(6, 8\)"),
        ({"query": torch.zeros(6, 2, 4, dtype=torch.int32)}, TypeError, "got torch.int32"),
        ({"key": Q.double()}, TypeError, "key is torch.float64, but query is torch.float32"),
        ({"key": Q.to("meta")}, ValueError, "key is on meta, but query is on cpu"),
        ({"query": "q"}, TypeError, "query must be a tensor, got str"),
        ({"value": torch.zeros(6, 2, 5)}, ValueError, r"\(6, 2, 5\)"),
        ({"key": torch.zeros(5, 2, 4), "value": torch.zeros(5, 2, 4)}, ValueError, "key_offsets"),
        ({"offsets": OFFSETS.long()}, TypeError, "int32, got torch.int64"),
        ({"offsets": [0, 6]}, TypeError, "list"),
        ({"offsets": OFFSETS[None]}, ValueError, r"\(1, 3\)"),
        ({"offsets": OFFSETS.to("meta")}, ValueError, "got meta"),
        ({"offsets": torch.tensor([0, 4, 2]).int()}, ValueError, "4 then 2 at position 1"),
        ({"offsets": torch.tensor([1, 4, 6]).int()}, ValueError, "start at 0, got 1"),
        ({"offsets": torch.tensor([0, 4, 7]).int()}, ValueError, "end at 7, but there are 6"),
        ({"key_offsets": OFFSETS[:2]}, ValueError, r"\(3\), got 2"),
        ({"key_offsets": torch.tensor([0, 9, 9]).int()}, ValueError, "key_offsets end at 9"),
        ({"max_length": 3}, ValueError, r"\(4\), got 3"),
        ({"max_length": -2}, ValueError, "got -2"),
        ({"dropout_p": 1.0}, ValueError, "got 1.0"),
        ({"impl": "flash"}, ValueError, "got 'flash'"),
        ({"impl": "triton"}, ValueError, "not available on this installation.*sdpa, math"),
    ],
)
def test_wrong_arguments_name_the_value(change, error, message):
    arguments = {"query": Q, "key": Q, "value": Q, "offsets": OFFSETS, **change}
    with pytest.raises(error, match=message):
        ragged_attention(**arguments)


def test_wrong_padded_arguments():
    x = torch.zeros(2, 3, 2, 4)
    with pytest.raises(ValueError, match=r"share one shape.*\(2, 2, 2, 4\)"):
        attention(x, x[:, :2], x)
    with pytest.raises(ValueError, match=r"\(2,\), got \(1,\)"):
        attention(x, x, x, lengths=torch.tensor([1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"lengths\[1\] must lie in 0\.\.3, got 4"):
        attention(x, x, x, lengths=torch.tensor([1, 4], dtype=torch.int32))
    with pytest.raises(TypeError, match="lengths must be int32"):
        attention(x, x, x, lengths=torch.tensor([1, 4]))
