"""The contract on a device, for every implementation that serves it, torch's own included."""

import pytest
import torch

from aam_kernels import available_impls
from aam_kernels._problems import PROBLEMS, Problem, problems_of
from aam_kernels._runtime import dispatch, trust
from aam_kernels._runtime.configurations import table_of
from aam_kernels._verification import check_problem, main

IMPLS = ("triton", "sdpa", "math")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require(operation, impl, device):
    if impl not in available_impls(device)[operation]:
        pytest.skip(f"{operation}: {impl} does not serve this device")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", sorted(PROBLEMS))
def test_accuracy_poison_and_determinism(operation, dtype, impl, device):
    require(operation, impl, device)
    failures = []
    with trust.suspended():
        for problem in problems_of(operation):
            for check in check_problem(problem, (impl,), dtype, device):
                failures += [f"{problem.name}: {failure}" for failure in check.failures]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("operation", sorted(PROBLEMS))
def test_triton_serves_a_supported_device(operation, device):
    properties = torch.cuda.get_device_properties(device)
    name = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    if table_of(name) is None:
        pytest.skip(f"there is no table for {name}")
    assert "triton" in available_impls(device)[operation]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("impl", IMPLS)
def test_poison_of_any_kind(impl, value, device):
    for problem in (
        Problem("attention", "cross", (3, 2), key_lengths=(0, 4), tail=2, dropout_p=0.2),
        Problem("attention", "padded", (3, 0, 300), padded=True, tail=1, dropout_p=0.2),
        Problem("pooling", "tail", (3, 0, 2), tail=2),
        Problem("encoder_layer", "tail", (3, 0, 20), tail=2),
    ):
        require(problem.operation, impl, device)
        inputs = problem.inputs(torch.float32, device)
        clean = problem.run(impl, inputs)
        for name, rows in problem.ignored(device).items():
            inputs[name][rows] = value
        poisoned = problem.run(impl, inputs)
        for name in clean:
            assert torch.equal(clean[name], poisoned[name]), (problem.operation, name)


@pytest.mark.parametrize("operation", ["attention", "encoder_layer"])
def test_every_implementation_drops_the_same(operation, device):
    for problem in problems_of(operation):
        if problem.dropout_p == 0.0:
            continue
        inputs = problem.inputs(torch.float32, device)
        expected = problem.run("math", inputs)["output"]
        for impl in available_impls(device)[operation]:
            found = problem.run(impl, inputs)["output"]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_auto_takes_the_fastest_that_is_right(device, tmp_path, monkeypatch):
    monkeypatch.setenv("AAM_KERNELS_CACHE", str(tmp_path))
    trust.forget()
    for operation in PROBLEMS:
        first = available_impls(device)[operation][0]
        width = (128, 4) if operation == "encoder_layer" else (32,)
        case = trust.case_of(width, 151)
        assert dispatch.choose(operation, "auto", device, torch.bfloat16, case) == first
    assert (tmp_path / "verified.json").exists()


def test_verify_exits_with_0(capsys, tmp_path):
    code = main(["--quick", "--json", str(tmp_path / "verify.json")])
    assert code == 0, capsys.readouterr().out
