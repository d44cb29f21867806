"""`make gpu-check` with parts that need no GPU: what it leaves and says, when it ends a part."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import PARTS, Part, _read_json, _read_junit

ROOT = Path(__file__).parent.parent
WRITES = "import json, sys; json.dump({'x': 1}, open(sys.argv[1], 'w')); print('seen')"
SLEEPS = WRITES + "; sys.stdout.flush(); import time; time.sleep(60)"


def part(name, code, reserve=0.0):
    return Part(name, lambda result, _: ["-c", code, str(result)], reserve, _read_json)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(gpu_check, "_missing", lambda: "")
    monkeypatch.setattr(gpu_check, "environment", lambda: {"device": "AMD Instinct (X) 300A"})


def read(folder):
    content = json.loads((folder / "AMD-Instinct-X-300A.json").read_text())
    return content, (folder / "AMD-Instinct-X-300A.log").read_text()


def test_all_is_well(machine, tmp_path, capfd):
    assert gpu_check.main(["--folder", str(tmp_path)], (part("a", WRITES), part("b", WRITES))) == 0
    content, log = read(tmp_path)
    assert content["passed"] and content["device"] == "AMD Instinct (X) 300A"
    assert content["parts"]["b"]["result"] == {"x": 1}
    assert content["parts"]["a"]["exit_code"] == 0 and 0 < content["seconds"] < 60
    assert log.count("seen\n") == 2 and capfd.readouterr().out == log


def test_a_failure_and_a_part_that_takes_too_long(machine, tmp_path):
    parts = (
        part("slow", SLEEPS),
        part("broken", "raise SystemExit('it broke')", 2.0),
        part("last", WRITES, 2.0),
    )
    started = time.perf_counter()
    assert gpu_check.main(["--folder", str(tmp_path), "--seconds", "5"], parts) == 1
    assert time.perf_counter() - started < 15
    content, log = read(tmp_path)
    slow, broken, last = content["parts"].values()
    assert slow["exit_code"] is None and slow["limit"] < 1.01
    assert broken["exit_code"] == 1 and broken["result"] is None and "it broke" in log
    assert last["exit_code"] == 0 and not content["passed"]
    assert "slow: its time was up" in log and "FAILED" in log


def test_what_a_part_wrote_before_its_time_was_up_is_kept(machine, tmp_path):
    assert gpu_check.main(["--folder", str(tmp_path), "--seconds", "2"], (part("a", SLEEPS),)) == 1
    content, log = read(tmp_path)
    assert content["parts"]["a"]["result"] == {"x": 1} and "seen" in log


def test_the_real_parts(tmp_path):
    assert [p.name for p in PARTS] == ["verify", "tests", "benchmarks"]
    assert sum(p.reserve for p in PARTS) < gpu_check.SECONDS - 200 < 480 - 200
    tests = PARTS[1].command(tmp_path / "junit.xml", 60.0)
    result = subprocess.run(
        [sys.executable, *tests], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if not torch.cuda.is_available():
        assert result.returncode == 0, result.stdout + result.stderr
        counts = _read_junit(tmp_path / "junit.xml")
        assert counts["tests"] == counts["skipped"] > 20 and not counts["broken"]
    for number in (0, 2):
        flag, module, *options = PARTS[number].command(tmp_path / "x", 60.0)
        assert flag == "-m" and find_spec(module) is not None and str(tmp_path / "x") in options


def test_failures_are_read_from_junit(tmp_path):
    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase name="good"/><testcase name="bad"><failure message="1 != 2">x</failure>'
        '</testcase><testcase name="left"><skipped/></testcase></testsuite></testsuites>'
    )
    found = _read_junit(tmp_path / "junit.xml")
    assert found["broken"] == [{"test": "bad", "message": "1 != 2"}]
    assert (found["tests"], found["failures"], found["skipped"]) == (3, 1, 1)


def test_without_a_gpu_or_torch():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    outer = ("MAKEFLAGS", "ARGS")  # of a make that runs these tests
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    for python, expected in ((sys.executable, "no GPU here"), (None, "no torch in")):
        if python is None:  # an interpreter without packages
            command = [sys.executable, "-S", "-m", "benchmarks.gpu_check"]
        else:
            command = ["make", "gpu-check", f"PYTHON={python}"]
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
        )
        assert result.returncode == 2
        lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
        assert len(lines) == 1 and lines[0].startswith(f"error: {expected}"), result.stderr
    assert not (ROOT / "gpu-check").exists()
