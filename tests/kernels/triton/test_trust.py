"""The small check meets the real Triton kernels, interpreted: a CPU here counts as a device."""

from dataclasses import replace

import pytest
import torch

from aam_kernels import ragged_attention
from aam_kernels._runtime import dispatch, trust
from tests.kernels.contract import CPU, offsets_of

pytest.importorskip("triton")

from tests.kernels.triton.interpreter import interpreting

OFFSETS = offsets_of((5, 0, 16, 1))


@pytest.fixture(autouse=True)
def _nothing_is_trusted(monkeypatch):
    monkeypatch.setattr(trust, "TRUSTED_DEVICES", ())
    monkeypatch.delenv("AAM_KERNELS_VERIFY", raising=False)
    trust.forget()
    dispatch._WARNED.clear()
    with interpreting():
        for table in dispatch._REGISTRY.values():
            table["triton"] = replace(table["triton"], auto_dtypes=dispatch.FLOATS)
        yield
    trust.forget()
    dispatch._WARNED.clear()


@pytest.mark.parametrize(
    ("operation", "width", "form"),
    [
        ("pooling", (40,), "self"),
        ("attention", (24,), "gaps"),
        ("attention", (32,), "cross"),
        ("encoder_layer", (32, 2), "self"),
    ],
)
def test_auto_takes_triton_when_it_is_right(operation, width, form):
    dtype = torch.bfloat16 if form == "self" else torch.float32
    case = trust.case_of(width, 16, 0.0 if operation == "pooling" else 0.1, form)
    assert trust.failure(operation, "triton", CPU, dtype, case) == ""
    assert dispatch.choose(operation, "auto", CPU, dtype, case) == "triton"


def test_auto_takes_math_when_triton_is_wrong(monkeypatch):
    from aam_kernels.attention import triton

    original = triton.forward

    def forward(*arguments):
        output, lse = original(*arguments)
        return output.roll(1, 1), lse  # heads mixed up

    monkeypatch.setattr(triton, "forward", forward)
    query, key, value = torch.randn(3, 22, 2, 16).unbind(0)
    with pytest.warns(UserWarning, match=r"impl='triton' fails .* output: largest error"):
        found = ragged_attention(query, key, value, OFFSETS, max_length=16)
    assert torch.equal(
        found, ragged_attention(query, key, value, OFFSETS, max_length=16, impl="math")
    )
    with pytest.raises(RuntimeError, match="impl='triton' fails"):
        ragged_attention(query, key, value, OFFSETS, max_length=16, impl="triton")
