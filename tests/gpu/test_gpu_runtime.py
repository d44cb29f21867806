"""What only a device shows: waits, graphs, compilation, 2**31 elements, how long a check takes."""

import time

import pytest
import torch

from aam_kernels import (
    attention_pool,
    available_impls,
    encoder_layer,
    ragged_attention,
    weights_from_torch,
)
from aam_kernels._problems import PROBLEMS, Problem
from aam_kernels._runtime import trust

IMPLS = ("triton", "sdpa")
LENGTHS = (151, 0, 1, 101, 33, 150)


@pytest.fixture(params=IMPLS)
def impl(request, device):
    if request.param not in available_impls(device)["attention"]:
        pytest.skip(f"{request.param} does not serve this device")
    return request.param


def calls(impl, device, lengths=LENGTHS, dtype=torch.bfloat16, dropout_p=0.1):
    """name -> (call, tensors): every operation on tensors that require gradients."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    total, longest = sum(lengths), max(lengths)
    query, key, value = (torch.randn(total, 4, 32, device=device, dtype=dtype) for _ in range(3))
    x, scores = (torch.randn(total, *s, device=device, dtype=dtype) for s in ((128,), ()))
    layer = torch.nn.TransformerEncoderLayer(
        128, 4, 512, 0.0, activation="gelu", norm_first=True, batch_first=True
    ).to(device, dtype)
    weights = weights_from_torch(layer)
    seed = torch.tensor(3, device=device)
    found = {
        "attention": (
            lambda q, k, v: ragged_attention(
                q, k, v, offsets, max_length=longest, dropout_p=dropout_p, seed=seed, impl=impl
            ),
            [query, key, value],
        ),
        "pooling": (
            lambda v, s: attention_pool(v, s, offsets, max_length=longest, impl=impl),
            [x, scores],
        ),
        "encoder_layer": (
            lambda x, *w: encoder_layer(
                x, offsets, type(weights)(*w), num_heads=4, dropout_p=dropout_p, seed=seed,
                max_length=longest, impl=impl,
            ),
            [x, *(w.detach() for w in weights)],
        ),
    }  # fmt: skip
    return {
        name: (call, [t.clone().requires_grad_() for t in tensors])
        for name, (call, tensors) in found.items()
        if impl in available_impls(device)[name]
    }


def step(call, tensors):
    output = call(*tensors)
    return [output, *torch.autograd.grad(output, tensors, torch.ones_like(output))]


@pytest.mark.parametrize("operation", sorted(PROBLEMS))
def test_no_wait_for_the_device(impl, operation, device):
    if operation not in (made := calls(impl, device)):
        pytest.skip(f"{operation}: no {impl}")
    call, tensors = made[operation]
    step(call, tensors)  # checked and compiled
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(call, tensors)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_a_check_may_wait_where_the_caller_may_not(impl, device, tmp_path, monkeypatch):
    monkeypatch.setenv("AAM_KERNELS_CACHE", str(tmp_path))
    call, tensors = calls(impl, device)["attention"]
    trust.forget()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(call, tensors)
        assert torch.cuda.get_sync_debug_mode() == 2
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("operation", sorted(PROBLEMS))
def test_a_cuda_graph(operation, device):
    if operation not in (made := calls("triton", device)):
        pytest.skip(f"{operation}: no triton")
    call, tensors = made[operation]
    expected = step(call, tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(call, tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(call, tensors)
    graph.replay()
    torch.cuda.synchronize()
    for found, wanted in zip(captured, expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_check_during_capture_is_refused(device, tmp_path, monkeypatch):
    if "triton" not in available_impls(device)["pooling"]:
        pytest.skip("no triton")
    call, tensors = calls("triton", device)["pooling"]
    step(call, tensors)
    monkeypatch.setenv("AAM_KERNELS_CACHE", str(tmp_path))
    trust.forget()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="once before capture"), torch.cuda.graph(graph):
        call(*tensors)
    step(call, tensors)


@pytest.mark.parametrize("operation", sorted(PROBLEMS))
def test_compiled_as_one_graph(impl, operation, device):
    if operation not in (made := calls(impl, device, dropout_p=0.0)):
        pytest.skip(f"{operation}: no {impl}")
    call, tensors = made[operation]
    expected = step(call, tensors)
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for found, wanted in zip(step(compiled, tensors), expected, strict=True):
        assert torch.equal(found, wanted)


def test_batch_sizes_and_lengths_do_not_recompile(device):
    made = calls("triton", device)
    if "attention" not in made:
        pytest.skip("no triton")
    for lengths in ((151,) * 5, (150, 3), (151,) * 33):  # compiles what there is to compile
        step(*calls("triton", device, lengths)["attention"])
    torch.cuda.synchronize()
    started = time.perf_counter()
    for count in (7, 17, 64, 100):
        step(*calls("triton", device, (151, 149) * count)["attention"])
    torch.cuda.synchronize()
    assert time.perf_counter() - started < 1.0, "a launch seems to compile"


@pytest.mark.parametrize("heads", [64])
def test_more_than_2_to_the_31_elements(impl, heads, device):
    free, _ = torch.cuda.mem_get_info(device)
    rows = 2**31 // (heads * 128) + 3000
    needed = 8 * rows * heads * 128 * 2
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of device memory, {free / 1e9:.0f} are free")
    query = torch.zeros(rows, heads, 128, device=device, dtype=torch.bfloat16)
    offsets = torch.arange(0, rows, 128, device=device, dtype=torch.int32)
    last = offsets[-2:].tolist()
    query[last[0] : last[1]] = torch.randn(128, heads, 128, device=device, dtype=torch.bfloat16)
    query.requires_grad_()
    output = ragged_attention(query, query, query, offsets, max_length=128, impl=impl)
    (grad,) = torch.autograd.grad(output, query, torch.ones_like(output))
    part = query.detach()[last[0] : last[1]].clone().requires_grad_()
    small = torch.tensor([0, 128], device=device, dtype=torch.int32)
    expected = ragged_attention(part, part, part, small, max_length=128, impl="math")
    (expected_grad,) = torch.autograd.grad(expected, part, torch.ones_like(expected))
    torch.testing.assert_close(output[last[0] : last[1]], expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(grad[last[0] : last[1]], expected_grad, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("operation", sorted(PROBLEMS))
def test_a_check_is_quick(operation, device, tmp_path, monkeypatch):
    first = available_impls(device)[operation][0]
    width = (128, 4) if operation == "encoder_layer" else (32,)
    case = trust.case_of(width, 151, 0.1 if operation != "pooling" else 0.0)
    monkeypatch.setenv("AAM_KERNELS_CACHE", str(tmp_path))
    trust.forget()
    trust.failure(operation, first, device, torch.bfloat16, case)  # compiles
    (tmp_path / "verified.json").unlink(missing_ok=True)
    trust.forget()
    started = time.perf_counter()
    assert trust.failure(operation, first, device, torch.bfloat16, case) == ""
    assert time.perf_counter() - started < 1.0


def test_a_side_stream(impl, device):
    problem = Problem("attention", "", LENGTHS)
    inputs = problem.inputs(torch.float32, device)
    expected = problem.run(impl, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = problem.run(impl, inputs)
    stream.synchronize()
    for name, wanted in expected.items():
        assert torch.equal(found[name], wanted), name


def test_a_second_device(impl):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    problem = Problem("attention", "", LENGTHS)
    results = [problem.run(impl, problem.inputs(torch.float32, f"cuda:{i}")) for i in range(2)]
    for name, found in results[1].items():
        torch.testing.assert_close(found.cpu(), results[0][name].cpu(), rtol=1e-5, atol=1e-5)
