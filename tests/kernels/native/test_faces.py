"""What stands between torch and the compiled kernels: the choice, dtypes, strides, gaps."""

import json
import re
import warnings

import pytest
import torch

from aam_kernels import (
    EncoderLayerWeights,
    available_impls,
    encoder_layer,
    ragged_attention,
    verify,
)
from aam_kernels._runtime import dispatch, native
from aam_kernels._runtime.grouping import Sequences
from aam_kernels._runtime.trust import case_of
from aam_kernels._verification import main
from aam_kernels.pooling import cpu as pooling
from aam_kernels.pooling import reference
from tests.kernels.contract import CPU, offsets_of
from tests.kernels.layers import problem, run

WIDTHS = {"attention": (32,), "pooling": (3,), "encoder_layer": (64, 4)}
REASON = "they were lost"


@pytest.fixture
def absent(monkeypatch):
    """An installation without the compiled kernels."""
    monkeypatch.setattr(native, "_load", lambda: REASON)
    monkeypatch.setattr(native, "_said", False)


@pytest.mark.parametrize("operation", WIDTHS)
def test_auto_takes_the_compiled_kernels(compiled, operation):
    assert available_impls("cpu")[operation] == ("cpu", "sdpa", "math")
    case = case_of(WIDTHS[operation], 20)
    for dtype in dispatch.FLOATS:
        assert dispatch.choose(operation, "auto", CPU, dtype, case) == "cpu"
    assert dispatch.choose(operation, "auto", CPU, torch.float64, case) == "math"
    with pytest.raises(ValueError, match=r"impl='cpu' does not take torch.float64"):
        dispatch.choose(operation, "cpu", CPU, torch.float64, case)
    with pytest.raises(ValueError, match=r"'cpu' is not available .* for cuda; available:"):
        dispatch.choose(operation, "cpu", torch.device("cuda", 0), torch.float32, case)


@pytest.mark.parametrize("head_dim", [4, 136])
def test_a_head_that_is_refused(compiled, head_dim):
    case = case_of((head_dim,), 20)
    assert dispatch.choose("attention", "auto", CPU, torch.float32, case) == "sdpa"
    with pytest.raises(ValueError, match=f"takes widths of 8 to 128, got {head_dim}"):
        dispatch.choose("attention", "cpu", CPU, torch.float32, case)


def test_an_installation_without_them(absent):
    for operation, width in WIDTHS.items():
        assert available_impls("cpu")[operation] == ("sdpa", "math")
        with pytest.raises(ValueError, match=f"impl='cpu' is not available.*{REASON}"):
            dispatch.choose(operation, "cpu", CPU, torch.float32, case_of(width, 20))
    query = torch.randn(5, 2, 16)
    with pytest.warns(UserWarning, match=f"{REASON}.*slower 'sdpa'") as told:
        found = ragged_attention(query, query, query, offsets_of((2, 3)))
        ragged_attention(query, query, query, offsets_of((2, 3)))
    assert len(told) == 1
    expected = ragged_attention(query, query, query, offsets_of((2, 3)), impl="sdpa")
    assert torch.equal(found, expected)


def test_nothing_is_said_where_nothing_slower_serves(absent):
    query = torch.randn(5, 2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ragged_attention(query, query, query, offsets_of((2, 3)), impl="sdpa")
        ragged_attention(*[query.double()] * 3, offsets_of((2, 3)))


@pytest.mark.parametrize("dim", [1, 7, 16, 33])
def test_pooling_of_any_strides(compiled, dim):
    offsets, lengths = offsets_of((3, 2, 70, 4)), torch.tensor([3, 0, 65, 2], dtype=torch.int32)
    where = Sequences(offsets, lengths=lengths)
    values, scores = torch.randn(79, 2 * dim)[:, :dim], torch.randn(79, 3)[:, 1]
    pooled, lse = pooling.forward(values, scores, where)
    true = reference.forward(values.double(), scores.double(), where)
    torch.testing.assert_close(pooled, true[0].float())
    torch.testing.assert_close(lse, true[1].float())
    grad = torch.randn(dim, 4).t()
    found = pooling.backward(grad, values, scores, pooled, lse, where)
    expected = reference.backward(grad.double(), values.double(), scores.double(), *true, where)
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, exact.float(), rtol=1e-5, atol=1e-5)
    turned = torch.randn(dim, 79).t()
    again = pooling.forward(turned, scores, where)[0]
    assert torch.equal(again, pooling.forward(turned.contiguous(), scores, where)[0])


def test_a_layer_of_any_strides(compiled):
    x, offsets, weights, grad = problem(dim=32, ffn_dim=33)
    expected = run(x, offsets, weights, grad, num_heads=2, impl="cpu")

    def strided(tensor):
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
        wide[..., ::2] = tensor.detach()
        return wide[..., ::2].requires_grad_()

    turned = EncoderLayerWeights(*(strided(weight) for weight in weights))
    for part in (strided(x), torch.cat([x, x], 1).detach()[:, :32].requires_grad_()):
        found = run(part, offsets, turned, strided(grad).detach(), num_heads=2, impl="cpu")
        for mine, true in zip(found, expected, strict=True):
            assert torch.equal(mine, true)


def test_torchs_defaults_do_not_matter(compiled):
    x, offsets, weights, grad = problem()
    options = {"num_heads": 4, "impl": "cpu", "dropout_p": 0.1, "seed": 1, "recompute": False}
    expected = run(x, offsets, weights, grad, **options)
    query = x.detach().unflatten(1, (4, 16))
    attended = ragged_attention(query, query, query, offsets, impl="cpu")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found = run(x, offsets, weights, grad, **options)
        again = ragged_attention(query, query, query, offsets, impl="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(attended, again)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_inputs_are_left_alone(compiled):
    x, offsets, weights, grad = problem()
    tensors = (x, offsets, *weights, grad)
    before = [tensor.detach().clone() for tensor in tensors]
    for recompute in (True, False):
        run(x, offsets, weights, grad, num_heads=4, impl="cpu", recompute=recompute)
    for tensor, true in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), true.nan_to_num(7.0))


def test_a_variant_that_cannot_run_is_one_clear_error(compiled, monkeypatch):
    x, offsets, weights, _ = problem()
    monkeypatch.setenv("AAM_KERNELS_CPU", "x86-64-v9")
    with pytest.raises(ValueError, match="x86-64-v9"):
        compiled.select(None)
        encoder_layer(x, offsets, weights, num_heads=4, impl="cpu")
    monkeypatch.delenv("AAM_KERNELS_CPU")


def test_verify_says_which_kernels_run(compiled):
    report = verify("cpu", operations=("pooling",), dtypes=(torch.float32,), quick=True)
    assert report.passed and {check.impl for check in report.checks} == {"cpu", "sdpa", "math"}
    line = report.table().splitlines()[1]
    assert line == report.kernels == json.loads(report.to_json())["kernels"]
    assert f"{compiled.selected()} ({compiled.width()} floats a vector)" in line
    assert compiled.threads_of() in line and line in report.environment


def test_verify_says_why_none_run(absent, capsys):
    assert main(["--device", "cpu", "--operation", "pooling", "--quick", "--no-times"]) == 0
    table = capsys.readouterr().out
    assert REASON in table.splitlines()[1]
    assert "sdpa" in table and not re.search(r"pooling +cpu", table)
