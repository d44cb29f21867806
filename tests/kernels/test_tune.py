"""Tuning with a kernel and a clock that are not there: which configuration is chosen, and why."""

import json
from types import SimpleNamespace

import pytest
import torch

from aam_kernels import tune
from aam_kernels._runtime import configurations
from aam_kernels._runtime.configurations import Configuration, Tunable
from tests.kernels.contract import CPU


def configured(block, warps=4):
    return Configuration({"BLOCK_M": block}, {"num_warps": warps})


SECONDS = {16: 4.0, 32: 2.0, 64: 1.0, 128: 0.5, 256: 0.25}
"""What a launch takes, by BLOCK_M; 128 gives wrong numbers and 256 does not compile."""


@pytest.fixture
def clock():
    """A clock that only the fake kernel moves, and the launches that it saw."""
    return SimpleNamespace(now=0.0, launches=[])


@pytest.fixture
def tunable(clock):
    def example(dtype, width, length, device):
        def launch():
            block = configurations._FORCED["fake"].meta["BLOCK_M"]
            if block == 256:
                raise RuntimeError("out of resource:\nshared memory")
            clock.now += SECONDS[block]
            clock.launches.append((block, dtype, width, length))

        return launch

    def candidates(architecture, dtype, width, length):
        return [configured(block) for block in SECONDS if block >= width]

    return Tunable("fake", (16, 32), (128,), candidates, example)


def timed(clock):
    def seconds(call, device):
        before = clock.now
        call()
        return clock.now - before

    return seconds


def wrong(kernel, dtype, width, length):
    block = configurations._FORCED[kernel].meta["BLOCK_M"]
    return ["grad key: largest error 1"] if block == 128 else []


def run(tunable, clock, present, width=16, **changes):
    options = {"screen": timed(clock), "one_run": timed(clock), "wrong": wrong, **changes}
    return tune.tune_case(tunable, "gfx942", present, torch.bfloat16, width, 128, CPU, **options)


def test_the_fastest_that_is_right_is_chosen(tunable, clock):
    outcome = run(tunable, clock, configured(16))
    assert outcome.after == configured(64) and outcome.before == configured(16)
    assert (outcome.seconds_before, outcome.seconds_after) == (4.0, 1.0)
    assert outcome.tried == 5
    text = str(outcome)
    assert "fake half width 16 length 128: 5 candidates, 2 skipped" in text
    assert "BLOCK_M=16 num_warps=4: 4 s -> BLOCK_M=64 num_warps=4: 1 s (4.00x)" in text
    assert "skipped BLOCK_M=256 num_warps=4: does not run: RuntimeError: out of resource:" in text
    assert "skipped BLOCK_M=128 num_warps=4: wrong: grad key: largest error 1" in text
    assert not configurations._FORCED


def test_a_present_configuration_stays_when_hardly_slower(tunable, clock, monkeypatch):
    monkeypatch.setitem(SECONDS, 32, 1.01)
    assert run(tunable, clock, configured(32)).after == configured(32)
    monkeypatch.setitem(SECONDS, 32, 1.03)
    assert run(tunable, clock, configured(32)).after == configured(64)


def test_a_wrong_or_missing_present_configuration(tunable, clock):
    outcome = run(tunable, clock, configured(128))
    assert outcome.after == configured(64) and outcome.seconds_before is None
    outcome = run(tunable, clock, None, width=64)
    assert outcome.after == configured(64) and "none: does not run ->" in str(outcome)


def test_no_candidate_is_right(tunable, clock):
    outcome = run(tunable, clock, None, wrong=lambda *_: ["output: all of it"])
    assert outcome.after is None and len(outcome.skipped) == 5
    assert "no candidate is right" in str(outcome)

    def crash(*_):
        raise ValueError("check")

    outcome = run(tunable, clock, None, wrong=crash)
    assert outcome.after is None and "ValueError: check" in str(outcome)


def test_only_the_fastest_are_checked_and_timed_again(tunable, clock):
    checked = []

    def counted(*what):
        checked.append(configurations._FORCED["fake"].meta["BLOCK_M"])
        return []

    run(tunable, clock, configured(16), wrong=counted)
    assert checked == [128, 64, 32, 16]  # three finalists and the present one
    assert len(clock.launches) == 4 + 4 * tune.ROUNDS


def test_tables_keep_what_was_not_tuned(tunable, clock):
    table = {
        "other": [{"dtype": "half", "width": 32, "length": 64, "meta": {}, "options": {}}],
        "fake": [
            {"dtype": "float32", "width": 16, "length": 128, "meta": {"A": 1}, "options": {}},
            {"dtype": "half", "width": 16, "length": 128, "meta": {"BLOCK_M": 16}, "options": {}},
        ],
    }
    found = tune.replaced(table, [run(tunable, clock, configured(16))])
    assert found["other"] == table["other"] and len(table["fake"]) == 2
    assert [row["dtype"] for row in found["fake"]] == ["half", "float32"]
    assert found["fake"][0]["meta"] == {"BLOCK_M": 64}
    assert json.loads(tune.formatted(found)) == found
    assert tune.formatted(found).count("\n") == 3 + 2 * len(found) + 2
    none = tune.replaced(table, [run(tunable, clock, None, wrong=lambda *_: ["x"])])
    assert [row["dtype"] for row in none["fake"]] == ["float32"]


@pytest.fixture
def device(monkeypatch, tunable, clock):
    """A machine with a GPU of which only the fake kernel is used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(configurations, "architecture", lambda: "gfx942")
    monkeypatch.setattr(tune, "tunables", lambda: {"fake": (tunable, "attention")})
    monkeypatch.setattr(tune, "_checker", lambda _: wrong)
    monkeypatch.setattr(tune, "_screen", timed(clock))
    monkeypatch.setattr(tune, "seconds_of", timed(clock))
    yield
    configurations.load_table.cache_clear()
    configurations._lookup.cache_clear()


def test_command_line(device, clock, monkeypatch, tmp_path, capsys):
    shipped = {path: path.read_bytes() for path in configurations.TABLES.iterdir()}
    assert tune.main([]) == 2
    assert "nowhere to write" in capsys.readouterr().err
    monkeypatch.setenv("AAM_KERNELS_TABLES", str(configurations.TABLES))
    assert tune.main([]) == 2
    assert tune.main(["--kernel", "no such", "--output", str(tmp_path / "x")]) == 2
    assert "there are the kernels fake" in capsys.readouterr().err
    assert not clock.launches

    configurations.load_table.cache_clear()
    configurations._lookup.cache_clear()
    monkeypatch.setenv("AAM_KERNELS_TABLES", str(tmp_path / "tables"))
    assert tune.main(["--dtype", "half", "--width", "32"]) == 0
    output = capsys.readouterr().out
    assert "fake half width 32 length 128" in output and output.endswith("gfx942.json\n")
    table = json.loads((tmp_path / "tables" / "gfx942.json").read_text())
    assert [(row["dtype"], row["width"]) for row in table["fake"]] == [("half", 32)]
    assert table["fake"][0]["options"] == {"num_warps": 4}
    assert {width for _, _, width, _ in clock.launches} == {32}

    configurations.load_table.cache_clear()
    found = configurations._lookup("gfx942", "fake", "half", 24, 100)
    assert found == configured(64)
    configurations.load_table.cache_clear()
    configurations._lookup.cache_clear()

    assert tune.main(["--length", "128", "--output", str(tmp_path / "mine.json")]) == 0
    assert len(json.loads((tmp_path / "mine.json").read_text())["fake"]) == 4
    assert shipped == {path: path.read_bytes() for path in configurations.TABLES.iterdir()}


def test_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tune.main(["--output", "never"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "no GPU here" in captured.err
    assert not captured.out


def test_every_kernel_of_the_package_can_be_tuned():
    pytest.importorskip("triton")
    for kernel, (tunable, operation) in tune.tunables().items():
        assert tunable.kernel == kernel and operation in ("attention", "pooling", "encoder_layer")
        assert tunable.candidates("gfx942", torch.bfloat16, tunable.widths[-1], tunable.lengths[0])
