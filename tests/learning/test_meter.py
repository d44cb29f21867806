"""Peaks of this process against allocations of known size, and limits of control groups."""

import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch

from aam.learning import meter
from aam.learning.meter import Meter, ProcessMeter, _group_folders, _group_limits, _Sampler

MB = 1_000_000
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def hold(megabytes):
    return np.ones(megabytes * MB // 8)


def test_peak_of_the_process_is_what_was_held_and_can_be_reset():
    one = Meter.for_device("cpu")
    assert isinstance(one, ProcessMeter)
    one.reset()
    before = one.now()
    block = hold(300)
    assert one.now() - before == pytest.approx(300 * MB, rel=0.05)
    del block
    assert one.peak() - before == pytest.approx(300 * MB, rel=0.05)
    assert one.now() - before < 30 * MB
    one.reset()
    assert one.peak() - before < 30 * MB
    assert len(hold(100))
    assert one.peak() - before == pytest.approx(100 * MB, rel=0.1)


def test_sampling_thread_sees_a_peak_that_lasts(monkeypatch):
    monkeypatch.setattr(meter, "_can_reset_mark", lambda: False)
    one = Meter.for_device("cpu")
    assert isinstance(one._sampler, _Sampler)
    one.reset()
    before = one.now()
    block = hold(200)
    time.sleep(0.1)
    del block
    assert one.peak() - before == pytest.approx(200 * MB, rel=0.1)
    one.reset()
    assert one.peak() - before < 30 * MB
    assert sum(thread.name == "memory meter" for thread in threading.enumerate()) >= 1


HOLDING = """
import sys
import numpy as np
from aam.learning import meter

if "return" in sys.argv and not meter.return_freed_blocks():
    raise SystemExit("no glibc")
del_first = np.ones(2_500_000)  # 20 MB: freed, it tells glibc to keep blocks of this size
del del_first
before = meter._resident()
blocks = [np.ones(2_500_000) for _ in range(10)]
pin = np.ones(100_000)  # above them in the heap
del blocks
print(meter._resident() - before)
"""


@linux
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


def test_free_and_total_memory_of_the_machine():
    one = Meter.for_device("cpu")
    assert 0 < one.now() < one.total() <= psutil.virtual_memory().total
    assert 0 < one.free() <= one.total()


def write_group(folder, names, limit, used, cache):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\nother 7\n")


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups(tmp_path, monkeypatch, version):
    names = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    root = tmp_path / "cgroup"
    top = root / "memory" if version == 1 else root
    unlimited = 9223372036854771712 if version == 1 else "max"
    write_group(top / "slurm" / "job", names, 4000 * MB, 1500 * MB, 500 * MB)
    write_group(top / "slurm", names, unlimited, 1, 0)
    write_group(top, names, 8000 * MB, 2000 * MB, 0)
    own = tmp_path / "own"
    prefix = "4:cpuset,memory" if version == 1 else "0:"
    own.write_text(f"9:name=systemd:/elsewhere\n{prefix}:/slurm/job\n")
    folders = _group_folders(root, own)
    assert [one[0] for one in folders] == [top / "slurm" / "job", top / "slurm", top]
    monkeypatch.setattr(meter, "_group_folders", lambda: folders)
    assert _group_limits() == [(4000 * MB, 1000 * MB), (8000 * MB, 2000 * MB)]
    machine = psutil.virtual_memory()
    assert meter.total_host_memory() == min(machine.total, 4000 * MB)
    assert meter.free_host_memory() <= 3000 * MB


def test_no_control_groups(tmp_path, monkeypatch):
    folders = _group_folders(tmp_path, tmp_path / "missing")
    monkeypatch.setattr(meter, "_group_folders", lambda: folders)
    assert _group_limits() == []
    assert meter.total_host_memory() == psutil.virtual_memory().total


class Properties:
    def __init__(self, name, is_integrated=0):
        self.name, self.is_integrated = name, is_integrated


@pytest.mark.parametrize(
    ("properties", "unified"),
    [
        (Properties("AMD Instinct MI300A"), True),
        (Properties("AMD Instinct MI300X"), False),
        (Properties("Radeon 8060S", 1), True),
        (Properties("NVIDIA H100"), False),
    ],
)
def test_unified_memory_is_free_only_where_the_host_has_it(monkeypatch, properties, unified):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70_000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1_000)
    monkeypatch.setattr(meter, "free_host_memory", lambda: 20_000)
    monkeypatch.setattr(meter, "total_host_memory", lambda: 60_000)
    one = Meter.for_device("cuda:0")
    assert one.free() == (22_000 if unified else 72_000)
    assert one.total() == (60_000 if unified else 80_000)
    assert one.now() == 1_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_peak_of_a_device():
    one = Meter.for_device("cuda")
    one.reset()
    before = one.now()
    block = torch.ones(100 * MB // 4, device="cuda")
    del block
    assert one.peak() - before == pytest.approx(100 * MB, rel=0.05)
    assert one.now() == before
    one.reset()
    assert one.peak() == before
    assert 0 < one.free() <= one.total()
