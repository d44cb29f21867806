"""The GPU path's index arithmetic, with the device's kernel replaced by plain torch on a CPU.

The kernel itself is checked by ``verify`` on a device.
"""

import pytest
import torch

from aam_kernels._problems import attention_problems, pooling_problems
from aam_kernels._runtime.grouping import Sequences
from aam_kernels.attention import reference, sdpa, sdpa_gpu
from aam_kernels.pooling import sdpa as pooling_sdpa


def fake_kernel(tensors, cumulative, sides, scale):
    """What the variable-length kernel promises, NaN wherever it promises nothing."""
    query, key, value = tensors
    cu_query, cu_key = cumulative
    longest = -(-max(sides[0].longest, 1) // 32) * 32
    output = torch.full_like(query, float("nan"))
    lse = torch.full((len(cu_query) - 1, query.shape[2], longest), float("nan"))
    for i in range(len(cu_query) - 1):
        rows, keys = slice(cu_query[i], cu_query[i + 1]), slice(cu_key[i], cu_key[i + 1])
        if cu_key[i] == cu_key[i + 1]:
            continue
        assert rows.stop - rows.start <= sides[0].longest
        scores = torch.einsum("qhd,khd->hqk", query[0, rows], key[0, keys]) * scale
        output[0, rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[0, keys])
        lse[i, :, : rows.stop - rows.start] = scores.logsumexp(-1)
    return output, lse


def fake_backward(grad, tensors, cumulative, sides, scale):
    query, key, value = tensors
    cu_query, cu_key = cumulative
    grads = [torch.full_like(x, float("nan")) for x in (query, key, value)]
    for i in range(len(cu_query) - 1):
        rows, keys = slice(cu_query[i], cu_query[i + 1]), slice(cu_key[i], cu_key[i + 1])
        if cu_key[i] == cu_key[i + 1]:
            continue
        q, g = query[0, rows], grad[0, rows]
        k, v = key[0, keys], value[0, keys]
        weights = (torch.einsum("qhd,khd->hqk", q, k) * scale).softmax(-1)
        grad_weights = torch.einsum("qhd,khd->hqk", g, v)
        delta = (weights * grad_weights).sum(-1, keepdim=True)
        grad_scores = weights * (grad_weights - delta) * scale
        grads[0][0, rows] = torch.einsum("hqk,khd->qhd", grad_scores, k)
        grads[1][0, keys] = torch.einsum("hqk,qhd->khd", grad_scores, q)
        grads[2][0, keys] = torch.einsum("hqk,qhd->khd", weights, g)
    return tuple(grads)


@pytest.fixture(autouse=True)
def _on_gpu_path(monkeypatch):
    monkeypatch.setattr(sdpa_gpu, "_kernel", fake_kernel)
    monkeypatch.setattr(sdpa_gpu, "_kernel_backward", fake_backward)
    monkeypatch.setattr(sdpa, "forward", sdpa_gpu.forward)
    monkeypatch.setattr(sdpa, "backward", sdpa_gpu.backward)
    monkeypatch.setattr(pooling_sdpa, "forward", pooling_sdpa._forward_gpu)
    monkeypatch.setattr(pooling_sdpa, "backward", pooling_sdpa._backward_gpu)


LARGE = ("length 4,096", "70,000 sequences", "dropout, length 1,024")
PROBLEMS = [p for p in (*attention_problems(), *pooling_problems()) if p.name not in LARGE]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.operation}: {p.name}")
def test_equals_math(problem):
    inputs = problem.inputs(torch.float32)
    truth = problem.run("math", inputs)
    for name, rows in problem.ignored().items():
        inputs[name][rows] = float("nan")
    result = problem.run("sdpa", inputs)
    for name, expected in truth.items():
        assert torch.allclose(result[name], expected, rtol=1e-4, atol=1e-5), name


def test_lse_and_unknown_lengths():
    query, key, value = torch.randn(3, 12, 2, 8).unbind(0)
    offsets, lengths = torch.tensor([0, 4, 4, 12]).int(), torch.tensor([3, 0, 6]).int()
    sequences = Sequences(offsets, None, lengths)
    found = sdpa_gpu.forward(query, key, value, sequences, 0.3, 0.0, None)
    expected = reference.forward(query, key, value, sequences, 0.3, 0.0, None)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
