import json
import re

import pytest
import torch

from aam_kernels import _torch_backends, _verification, verify
from aam_kernels._accuracy import CEILINGS, Error, compare, error
from aam_kernels._problems import PROBLEMS, Problem, problems_of
from aam_kernels._runtime import dispatch, record, trust
from aam_kernels._runtime.device import environment
from aam_kernels._timing import median_seconds, shown
from aam_kernels._verification import main
from aam_kernels.attention import sdpa
from tests.kernels.contract import CPU

pytestmark = pytest.mark.usefixtures("without_cpu_kernels")
SMALL = [
    Problem("attention", "small", (3, 0, 5), tail=1),
    Problem("attention", "small dropout", (3, 0, 5), dropout_p=0.4),
]


@pytest.fixture
def small(monkeypatch):
    """Two small problems of attention; other operations and torch's backends are left out."""

    def problems(operation, *, quick=False):
        return SMALL if operation == "attention" else []

    monkeypatch.setattr(_verification, "problems_of", problems)
    monkeypatch.setattr(_verification, "_times", lambda *_: [])
    monkeypatch.setattr(_verification, "check_backends", lambda *_, **__: [])
    trust.forget()


def recorded():
    """What the record says of each operation and implementation in float32."""
    entries = record.read(environment(CPU))
    return {
        name.removesuffix("/float32/*"): x for name, x in entries.items() if "/float32/" in name
    }


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
    assert recorded() == {"attention/math": "", "attention/sdpa": ""}


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
    assert "failed `verify` on cpu" in recorded()["attention/sdpa"]
    assert recorded()["attention/math"] == ""


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


def test_a_crash_is_a_failure_and_the_others_go_on(small, monkeypatch, capsys):
    def crash(*_):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(sdpa, "forward", crash)
    assert main(["--device", "cpu"]) == 1
    output = capsys.readouterr().out
    assert "does not run: RuntimeError: no kernel image is available" in output
    assert re.search(r"attention +math +float32 +2 .* passed", output)


def test_nothing_is_checked_on_a_lost_device(small, monkeypatch, capsys):
    def crash(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(sdpa, "forward", crash)
    monkeypatch.setattr(trust, "usable", lambda _: False)
    assert main(["--device", "cpu"]) == 1
    output = capsys.readouterr().out
    assert "attention/sdpa float32, small, left the device unusable" in output
    assert output.count("FAILED attention") == 1
    assert list(recorded()) == ["attention/sdpa"]


def test_a_complete_run_replaces_small_checks(small, monkeypatch):
    where, case = environment(CPU), trust.case_of((16,), 20)
    small_check = trust.entry("attention", "sdpa", torch.float32, case)
    other = trust.entry("attention", "triton", torch.float32, case)
    record.write(where, {small_check: "was wrong", other: "is wrong"})
    assert main(["--device", "cpu"]) == 0
    entries = record.read(where)
    assert small_check not in entries and entries[other] == "is wrong"
    monkeypatch.setattr(trust, "TRUSTED_DEVICES", ())
    monkeypatch.setattr(trust, "_checker", None)
    trust.forget()
    assert dispatch.choose("attention", "sdpa", CPU, torch.float32, case) == "sdpa"
    trust.forget()


def test_what_is_broken_can_still_be_measured(small, monkeypatch, capsys):
    # Where nothing is trusted, `verify` runs what calls would refuse.
    broken(monkeypatch, lambda x: x * 1.1)
    monkeypatch.setattr(trust, "TRUSTED_DEVICES", ())
    assert main(["--device", "cpu"]) == 1
    output = capsys.readouterr().out
    assert "largest error" in output and "does not run" not in output
    with pytest.raises(RuntimeError, match="failed `verify`"):
        dispatch.choose("attention", "sdpa", CPU, torch.float32, trust.case_of((16,), 20))
    trust.forget()


def test_a_quick_run_is_not_remembered(small):
    assert main(["--device", "cpu", "--quick", "--no-times"]) == 0
    assert not record.record_path().exists()
    with pytest.raises(ValueError, match="only a complete run"):
        verify("cpu", quick=True, save=True)


def test_the_problems_cover_what_the_kernels_distinguish():
    problems = problems_of("attention")
    assert {8, 16, 24, 32, 40, 64, 80, 96, 128} <= {p.head_dim for p in problems}
    lengths = {length for p in problems for length in p.lengths}
    assert lengths >= {0, 1, 15, 16, 17, 127, 128, 129, 151, 160, 255, 256, 257, 511, 1024, 4096}
    assert any(len(p.lengths) * p.heads > 65_535 * 4 for p in problems)
    assert any(p.magnitude > 1 for p in problems) and any(not p.bounded for p in problems)
    for operation in PROBLEMS:
        names = [problem.name for problem in problems_of(operation)]
        assert len(set(names)) == len(names)
        quick = problems_of(operation, quick=True)
        assert 0 < len(quick) <= 3 and set(quick) <= set(problems_of(operation))


def test_large_logits_and_unknown_lengths():
    added = ("large logits", "large scores", "longest row not given", "cross, 4,096 keys")
    for operation in ("attention", "pooling"):
        for problem in problems_of(operation):
            if problem.name in added:
                for check in _verification.check_problem(
                    problem, ("math", "sdpa"), torch.float32, CPU
                ):
                    assert check.failures == (), (check.impl, check.problem)


def test_times_are_taken_of_every_implementation(monkeypatch):
    monkeypatch.setattr(_verification, "problems_of", lambda *_, **__: SMALL[:1])
    monkeypatch.setattr(_verification, "TIMED_WIDTH", 8)
    report = verify("cpu", operations=("attention",), dtypes=(torch.float32,), times=True)
    assert [timing.impl for timing in report.timings] == ["sdpa", "math"]
    assert all(timing.forward > 0 and timing.backward > 0 for timing in report.timings)
    assert re.search(r"attention +sdpa .* [mu]s +.* [mu]s +passed", report.table())
    assert json.loads(report.to_json())["timings"][0]["rows"] == report.timings[0].rows


def test_what_has_no_time_says_why(monkeypatch):
    def full(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(_verification, "problems_of", lambda *_, **__: SMALL[:1])
    monkeypatch.setattr(_verification, "median_seconds", full)
    report = verify("cpu", operations=("attention",), dtypes=(torch.float32,), times=True)
    assert report.passed and [timing.forward for timing in report.timings] == [None, None]
    assert "no time of attention/sdpa float32: MemoryError: no room" in report.table()


def test_a_clock():
    calls = []
    assert 0 < median_seconds(lambda: calls.append(1), CPU, budget=0.0) < 1
    assert len(calls) == 4  # a warm-up and the fewest runs
    assert [shown(x) for x in (2.0, 0.5, 3e-6)] == ["2 s", "500 ms", "3 us"]


def test_a_broken_math_lends_its_error_to_nobody():
    truth, wrong = {"x": torch.ones(4).double()}, {"x": torch.zeros(4)}
    found = compare(wrong, truth, {"x": Error(1.0, 1.0)}, torch.bfloat16)
    assert found.failures and f"{CEILINGS[torch.bfloat16]:.2e}" in found.failures[0]
    assert error(torch.tensor([float("nan")]), torch.ones(1).double()).largest == float("inf")


def test_torch_backends_are_measured(capsys):
    checks = _torch_backends.check_backends(CPU, (torch.float32, torch.bfloat16), times=False)
    found = {(check.backend, check.mask, check.dtype): check for check in checks}
    assert len(found) == len(checks) == 4 * 3 * 2
    assert found["math", "padding mask", "float32"].verdict == "right"
    assert found["flash", "padding mask", "bfloat16"].verdict == "right"
    refused = found["cudnn", "no mask", "float32"]
    assert refused.verdict == "n/a" and "No viable backend" in refused.reason
    lines = _torch_backends.table(checks)
    assert len(lines) == 1 + 1 + 8 + 1  # reasons are told once
    assert lines[-1].startswith("[1] RuntimeError")


def test_a_wrong_torch_backend_is_told_and_does_not_decide(small, monkeypatch, capsys):
    original = _torch_backends._attention

    def ignores_masks(tensors, mask):
        return original(tensors, None)

    monkeypatch.setattr(_torch_backends, "_attention", ignores_masks)
    monkeypatch.setattr(
        _verification,
        "check_backends",
        lambda device, _, **how: _torch_backends.check_backends(device, (torch.float32,), **how),
    )
    assert main(["--device", "cpu", "--no-times"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"math +float32 +right \S+ +WRONG \S+ \[\d\] +WRONG", output)
    assert re.search(r"\[\d\] flash, padding mask, float32: error of output \d", output)
    assert "the exit code does not depend on it" in output


def test_the_function_survives_importing_the_module_of_its_name(small):
    import aam_kernels

    assert aam_kernels.verify("cpu", operations=("attention",), impls=("math",)).passed
    import aam_kernels.verify as module

    assert aam_kernels.verify("cpu", operations=("attention",), impls=("math",)).passed
    assert module.verify is verify or module.verify.__name__ == "verify"
