"""The GPU cases: timed on a GPU with `--benchmark`, and all of their code, tiny, on a CPU."""

import json

import pytest
import torch

from benchmarks import gpu_cases
from benchmarks.gpu_cases import asv_rows, attention_case, layer_case, pooling_case, sample_rows
from benchmarks.on_device import Contestant, Unavailable, compare, kept_bytes

CPU = torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")


@pytest.mark.gpu
@GPU
def test_all_cases_on_a_gpu(timing, full, capsys):
    device = torch.device("cuda", torch.cuda.current_device())
    for case in gpu_cases.all_cases(device, budget=4.0 if timing else 0.0, full=full):
        found = case()
        with capsys.disabled():
            print("\n" + "\n".join(found.lines()))
        assert_ours_are_right(found)


def assert_ours_are_right(case):
    ours = [row for row in case.rows if row.name.startswith("aam_kernels")]
    assert ours
    for row in ours:
        assert row.reason == "", f"{case.title}: {row.name}: {row.reason}"
        assert row.seconds


def rows_by_name(case):
    return {row.name: row for row in case.rows}


@pytest.mark.parametrize("backward", [False, True])
def test_attention_on_a_cpu(backward):
    rows = sample_rows(CPU, torch.float32, 4, 12)
    case = attention_case(rows, 2, 8, backward=backward, budget=0.0, compiled=False)
    assert_ours_are_right(case)
    found = rows_by_name(case)
    assert found["torch SDPA flash, padded + mask"].reason == ""
    assert found["torch SDPA math, padded + mask"].speedup == 1.0
    assert "No viable backend" in found["torch SDPA cudnn, padded + mask"].reason
    assert found["torch varlen_attn"].reason  # needs a GPU
    assert found["flash-attn varlen"].reason == "flash-attn is not installed"
    flex = found["torch FlexAttention, padded"]
    assert flex.reason == "" or backward  # no backward on a CPU
    assert any("n/a: flash-attn is not installed" in line for line in case.lines())
    kept = found["aam_kernels sdpa"].kept
    if backward:  # output and logsumexp; query, key and value are inputs
        assert kept == sum(rows.lengths) * 2 * (8 + 1) * 4 + rows.offsets.nbytes
    else:
        assert kept is None


def test_pooling_and_layer_on_a_cpu():
    rows = asv_rows(CPU, torch.bfloat16, 3, 9)
    assert_ours_are_right(pooling_case(rows, 8, backward=True, budget=0.0))
    assert_ours_are_right(pooling_case(rows, 8, backward=False, budget=0.0))
    rows = asv_rows(CPU, torch.float32, 3, 9)
    case = layer_case(rows, 16, 2, dropout_p=0.0, budget=0.0)
    assert_ours_are_right(case)
    found = rows_by_name(case)
    padded = found["nn.TransformerEncoderLayer, padded"]
    assert padded.error is not None and padded.error < 1e-5
    assert found["aam_kernels sdpa, recompute"].kept < found["aam_kernels sdpa"].kept < padded.kept
    with_dropout = layer_case(rows, 16, 2, dropout_p=0.1, budget=0.0)
    assert_ours_are_right(with_dropout)
    assert all(row.error is None for row in with_dropout.rows)


def test_a_row_that_fails_or_is_wrong():
    def unavailable():
        raise Unavailable("not installed")

    def crash():
        raise RuntimeError("no kernel\nfor this")

    contestants = {
        "right": Contestant(lambda: lambda: [torch.ones(2)]),
        "wrong": Contestant(lambda: lambda: [torch.ones(2) * 2]),
        "nan": Contestant(lambda: lambda: [torch.ones(2) * float("nan")]),
        "missing": Contestant(unavailable),
        "crash": Contestant(lambda: crash),
    }
    case = compare(
        "a case", contestants, reference="right", truth=[torch.ones(2)], device=CPU, tolerance=0.1,
        budget=0.0,
    )  # fmt: skip
    found = rows_by_name(case)
    assert [row.reason for row in case.rows[:3]] == ["", "WRONG", "WRONG"]
    assert found["missing"].reason == "not installed"
    assert found["crash"].reason == "RuntimeError: no kernel for this"
    assert found["wrong"].error == 1.0 and len(found["wrong"].seconds) == 3
    lines = "\n".join(case.lines())
    assert "missing  n/a: not installed" in lines and "WRONG" in lines and "reference" in lines
    assert json.loads(json.dumps(case.to_dict()))["rows"][4]["median"] is None


def test_kept_bytes_counts_a_storage_once_and_no_inputs():
    x = torch.randn(10, requires_grad=True)
    assert kept_bytes(lambda: x.exp() * 2) == 40  # exp keeps its result
    assert kept_bytes(lambda: x * x) == 0
    assert kept_bytes(lambda: (lambda y: y[:5] * y[5:])(x.exp())) == 40


def test_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_cases.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_of_the_command(monkeypatch, tmp_path, capsys):
    rows = asv_rows(CPU, torch.float32, 3, 9)
    cases = [lambda: pooling_case(rows, 4, backward=False, budget=0.0)] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu_cases, "all_cases", lambda *_, **__: iter(cases))
    assert gpu_cases.main(["--json", str(tmp_path / "cases.json")]) == 0
    assert len(json.loads((tmp_path / "cases.json").read_text())["cases"]) == 2
    assert gpu_cases.main(["--seconds", "-1"]) == 0
    assert "2 cases left out" in capsys.readouterr().out
