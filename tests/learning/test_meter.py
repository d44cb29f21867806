"""Peaks of this process against allocations of known size, and limits of control groups."""

import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from aam.errors import InputError
from aam.learning import meter
from aam.learning.meter import Meter, host_memory

MB = 1_000_000
CPU = torch.device("cpu")


def hold(megabytes):
    return np.ones(megabytes * MB // 8)


@pytest.mark.parametrize("marks", [True, False])
def test_peak_of_the_process_is_what_was_held_and_can_be_reset(marks, monkeypatch):
    """By the kernel's mark, or where that cannot be reset by a thread that looks."""
    if not marks:
        monkeypatch.setattr(meter, "high_water_mark", lambda reset=False: None)
    one = Meter(CPU)
    one.reset()
    before = one.now()
    block = hold(300)
    time.sleep(0.0 if marks else 0.1)
    assert one.now() - before == pytest.approx(300 * MB, rel=0.05)
    del block
    assert one.peak() - before == pytest.approx(300 * MB, rel=0.05)
    assert one.now() - before < 30 * MB
    one.reset()
    assert one.peak() - before < 30 * MB


HOLDING = """
import sys
import numpy as np, psutil
from aam.learning import meter

if "return" in sys.argv and not meter.return_freed_blocks():
    raise SystemExit("no glibc")
held = psutil.Process().memory_info
del_first = np.ones(2_500_000)  # 20 MB: freed, it tells glibc to keep blocks of this size
del del_first
before = held().rss
blocks = [np.ones(2_500_000) for _ in range(10)]
pin = np.ones(100_000)  # above them in the heap
del blocks
print(held().rss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_freed_blocks_leave_the_process():
    def kept(*words):
        done = subprocess.run(
            [sys.executable, "-c", HOLDING, *words], capture_output=True, text=True, check=False
        )
        if "no glibc" in done.stderr:
            pytest.skip("needs glibc")
        return int(done.stdout)

    assert kept("return") < 30 * MB
    assert kept() > 150 * MB


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups(tmp_path, version):
    names, cached = (meter.GROUP_FILES, meter.GROUP_FILES_1)[version == 1], (0, 500 * MB)
    root, own = tmp_path / "cgroup", tmp_path / "own"
    top = root / "memory" if version == 1 else root
    unlimited = 9223372036854771712 if version == 1 else "max"
    for folder, limit, used, cached in (
        ("slurm/job", 4000 * MB, 1500 * MB, 500 * MB), ("slurm", unlimited, 1, 0),
        ("", 8000 * MB, 2000 * MB, 0),
    ):  # fmt: skip
        (top / folder).mkdir(parents=True, exist_ok=True)
        (top / folder / names[0]).write_text(f"{limit}\n")
        (top / folder / names[1]).write_text(f"{used}\n")
        (top / folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\nother 7\n")
    prefix = "4:cpuset,memory" if version == 1 else "0:"
    own.write_text(f"9:name=systemd:/elsewhere\n{prefix}:/slurm/job\n")
    machine = psutil.virtual_memory()
    free, total = host_memory(root, own)
    assert total == min(machine.total, 4000 * MB) and free <= 3000 * MB
    (top / "slurm" / "job" / names[1]).write_text(f"{4600 * MB}\n")
    assert host_memory(root, own)[0] == 0
    assert host_memory(root, tmp_path / "missing")[1] == machine.total


class Properties:
    def __init__(self, name, is_integrated=0):
        self.name, self.is_integrated = name, is_integrated


@pytest.mark.parametrize(
    ("properties", "unified"),
    [
        (Properties("AMD Instinct MI300A"), True), (Properties("AMD Instinct MI300X"), False),
        (Properties("Radeon 8060S", 1), True), (Properties("NVIDIA H100"), False),
    ],
)  # fmt: skip
def test_unified_memory_is_free_only_where_the_host_has_it(monkeypatch, properties, unified):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70_000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1_000)
    monkeypatch.setattr(meter, "host_memory", lambda: (20_000, 60_000))
    one = Meter(torch.device("cuda:0"))
    assert one.available() == ((22_000, 60_000) if unified else (72_000, 80_000))
    assert one.now() == 1_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_peak_of_a_device():
    one = Meter(torch.device("cuda"))
    one.reset()
    before = one.now()
    block = torch.ones(100 * MB // 4, device="cuda")
    del block
    assert one.peak() - before == pytest.approx(100 * MB, rel=0.05)
    one.reset()
    assert one.peak() == one.now() == before
    free, total = one.available()
    assert 0 < free <= total


def test_budget(monkeypatch):
    one = Meter(CPU)
    monkeypatch.setattr(one, "now", lambda: 10**9)
    monkeypatch.setattr(one, "available", lambda: (20 * 10**9, 24 * 10**9))
    assert one.budget(None, None) == 18e9
    assert one.budget(None, 0.5) == 11e9
    assert one.budget(4, None) == 4e9
    for given, said in (
        ((32, None), "--max-memory-gb 32: there are 24 GB; give less"),
        (
            (0.5, None),
            r"--max-memory-gb 0\.5: .* already take 1 GB; give more",
        ),
        ((4, 0.5), "give one of them"),
    ):
        with pytest.raises(InputError, match=said):
            one.budget(*given)
