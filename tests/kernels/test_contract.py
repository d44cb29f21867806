"""The contract of DESIGN.md for attention and pooling, for every implementation."""

import pytest
import torch

from aam_kernels._problems import Problem, attention_problems, pooling_problems
from aam_kernels._verification import check_problem
from tests.kernels.contract import CPU, FLOAT64, IMPLS, assert_close, exact_dtype, require

PROBLEMS = [*attention_problems(), *pooling_problems()]
SLOW = ("length 4,096",)  # half inputs are the same computation there, and take seconds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.operation}: {p.name}")
def test_accuracy_poison_and_determinism(problem, dtype):
    if problem.name in SLOW and dtype != torch.float32:
        pytest.skip("long rows are checked in float32; verify checks them in every dtype")
    require("cpu")
    for check in check_problem(problem, IMPLS, dtype, CPU):
        assert check.failures == (), check.impl


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.operation}: {p.name}")
def test_float64(problem, impl):
    if impl not in FLOAT64:
        pytest.skip("computes in float32")
    if problem.name in (*SLOW, "70,000 sequences"):
        pytest.skip("covered in float32")
    inputs = problem.inputs(torch.float64)
    truth, result = problem.run("math", inputs), problem.run(impl, inputs)
    for name, expected in truth.items():
        assert torch.allclose(result[name], expected, rtol=1e-11, atol=1e-12), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_poison_of_any_kind(impl, value):
    for problem in (
        Problem("attention", "tail", (3, 0, 2), tail=2),
        Problem("attention", "cross", (3, 2), key_lengths=(0, 4), tail=2, dropout_p=0.2),
        Problem("attention", "padded", (3, 0, 2), padded=True, tail=1, dropout_p=0.2),
        Problem("pooling", "tail", (3, 0, 2), tail=2),
    ):
        inputs = problem.inputs(torch.float32)
        clean = problem.run(impl, inputs)
        for name, rows in problem.ignored().items():
            inputs[name][rows] = value
        poisoned = problem.run(impl, inputs)
        for name in clean:
            assert torch.equal(clean[name], poisoned[name]), (problem.name, name)


def test_nan_inside_a_sequence_stays_there(impl):
    problem = Problem("attention", "", (3, 4, 5))
    inputs = problem.inputs(torch.float32)
    clean = problem.run(impl, inputs)
    inputs["key"][4] = float("nan")
    output = problem.run(impl, inputs)
    for name in clean:
        assert torch.equal(clean[name][:3], output[name][:3])
        assert torch.equal(clean[name][7:], output[name][7:])
    assert output["output"][3:7].isnan().all()


def test_a_sequence_does_not_feel_its_neighbours(impl):
    # The same sequence alone, and among others of other lengths, gives the same numbers.
    problem = Problem("attention", "", (5, 30, 5, 101, 30))
    inputs = problem.inputs(exact_dtype(impl))
    together = problem.run(impl, inputs)
    alone = Problem("attention", "", (30,))
    rows = slice(5, 35)
    single = alone.run(impl, {name: x[rows] for name, x in inputs.items()})
    for name in single:
        assert_close(single[name], together[name][rows], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_bits_on_repeat(impl, threads):
    problem = Problem("attention", "", (101,) * 20 + (7, 400), heads=4)
    inputs = problem.inputs(torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = problem.run(impl, inputs), problem.run(impl, inputs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], second[name]) for name in first)
