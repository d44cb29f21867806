import json
import re

import pytest
import torch

from aam_kernels import _problems, verify
from aam_kernels._problems import Problem
from aam_kernels._runtime import device, dispatch
from aam_kernels._verification import main
from aam_kernels.attention import sdpa

SMALL = [
    Problem("attention", "small", (3, 0, 5), tail=1),
    Problem("attention", "small dropout", (3, 0, 5), dropout_p=0.4),
]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(_problems.PROBLEMS, "attention", lambda: SMALL)
    for name in ("pooling", "encoder_layer"):
        monkeypatch.setitem(_problems.PROBLEMS, name, list)
    device._record.cache_clear()


def broken(monkeypatch, change):
    """Lets sdpa's forward return something changed."""
    original = sdpa.forward

    def forward(*arguments):
        output, lse = original(*arguments)
        return change(output), lse

    monkeypatch.setattr(sdpa, "forward", forward)


def test_command_line_prints_and_remembers(small, capsys, tmp_path):
    file = tmp_path / "report.json"
    assert main(["--device", "cpu", "--json", str(file)]) == 0
    table = capsys.readouterr().out
    assert table.count("passed") == 6 and "FAILED" not in table
    content = json.loads(file.read_text())
    assert content["passed"] and len(content["checks"]) == 2 * 2 * 3
    assert {check["impl"] for check in content["checks"]} == {"math", "sdpa"}
    cpu = torch.device("cpu")
    assert device.passed("attention", "sdpa", cpu)
    assert not device.passed("attention", "triton", cpu)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 1.001, "output: largest error"),
        (lambda x: x + torch.rand(()) * 1e-8, "repeated: .*not bitwise equal"),
        (lambda x: torch.where(x == 0, 1e-9, x), "rows without a sequence are not 0"),
        (lambda x: x * float("nan"), "largest error inf"),
    ],
)
def test_a_broken_implementation_fails(small, monkeypatch, capsys, change, message):
    broken(monkeypatch, change)
    assert main(["--device", "cpu"]) == 1
    assert re.search(f"FAILED attention/sdpa.*{message}", capsys.readouterr().out)
    assert not device.passed("attention", "sdpa", torch.device("cpu"))
    assert device.passed("attention", "math", torch.device("cpu"))


def test_a_different_dropout_mask_fails(small, monkeypatch):
    original = sdpa.forward

    def forward(query, key, value, sequences, scale, dropout_p, seed):
        seed = None if seed is None else seed + 1
        return original(query, key, value, sequences, scale, dropout_p, seed)

    monkeypatch.setattr(sdpa, "forward", forward)
    report = verify("cpu", operations=("attention",), dtypes=(torch.float32,))
    assert {(c.impl, c.problem) for c in report.failures} == {("sdpa", "small dropout")}


def test_ignoring_a_gap_is_caught(small, monkeypatch):
    original = sdpa.forward

    def forward(query, *rest):
        output, lse = original(query, *rest)
        return output + 0 * query[-1:], lse

    monkeypatch.setattr(sdpa, "forward", forward)
    report = verify("cpu", operations=("attention",), dtypes=(torch.float32,))
    assert any("NaN in ignored rows" in c.failures[0] for c in report.failures)


def test_wrong_requests(small, capsys):
    assert main(["--device", "cpu", "--operation", "convolution"]) == 2
    assert "got 'convolution'" in capsys.readouterr().err
    assert main(["--device", "cpu", "--impl", "triton"]) == 2
    assert "impl='triton' is not available here" in capsys.readouterr().err
    with pytest.raises(ValueError, match="only a complete run"):
        verify("cpu", impls=("sdpa",), save=True)


def test_auto_on_a_cpu():
    cpu = torch.device("cpu")
    assert dispatch.choose("attention", "auto", cpu, torch.float32) == "sdpa"
    assert dispatch.choose("attention", "auto", cpu, torch.bfloat16) == "sdpa"
    assert dispatch.choose("attention", "auto", cpu, torch.float64) == "math"
    assert dispatch.choose("attention", "sdpa", cpu, torch.float64) == "sdpa"


def test_auto_elsewhere_takes_only_what_has_passed(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(dispatch, "device_key", lambda _: "some GPU")
    monkeypatch.setattr(dispatch, "passed", lambda *_: False)
    dispatch._WARNED.clear()
    with pytest.warns(UserWarning, match="'sdpa' has not passed on some GPU"):
        assert dispatch.choose("attention", "auto", gpu, torch.float32) == "math"
    assert dispatch.choose("attention", "auto", gpu, torch.float32) == "math"  # told once
    assert dispatch.choose("attention", "sdpa", gpu, torch.float32) == "sdpa"
    monkeypatch.setattr(dispatch, "passed", lambda *_: True)
    assert dispatch.choose("attention", "auto", gpu, torch.float32) == "sdpa"


def test_the_record_survives_damage(monkeypatch):
    cpu = torch.device("cpu")
    device._record.cache_clear()
    device.remember(cpu, ["attention/sdpa"])
    assert device.passed("attention", "sdpa", cpu)
    device.record_path().write_text("{broken")
    device._record.cache_clear()
    assert not device.passed("attention", "sdpa", cpu)
    device.remember(cpu, ["attention/math"])
    assert device.passed("attention", "math", cpu)
    device._record.cache_clear()


def test_the_function_survives_importing_the_module_of_its_name(small):
    import aam_kernels

    assert aam_kernels.verify("cpu", operations=("attention",), impls=("math",)).passed
    import aam_kernels.verify as module

    assert aam_kernels.verify("cpu", operations=("attention",), impls=("math",)).passed
    assert module.verify is verify or module.verify.__name__ == "verify"
