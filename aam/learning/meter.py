"""How much memory training takes: the peak of a step, what is in use, what is free; all in bytes.

On a CPU the peak is that of the process, interpreter and libraries included, because that is what
a limit on memory is about. On CUDA and ROCm devices it is the allocator's: what that has reserved
beyond it depends on earlier steps, and it gives it up before it fails.
"""

from __future__ import annotations

import ctypes
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from aam.errors import InputError

GB = 1e9
DEFAULT_FRACTION = 0.85  # of what is free
SAMPLING_SECONDS = 0.005
LARGE_BLOCK = 8 << 20  # bytes; larger ones are given back to the system when they are freed
HEAP_TOP = 16 << 20  # bytes of free small blocks that stay with the process
UNIFIED_NAMES = ("MI300A",)  # host and device share one pool
# Files of a memory control group: its limit, its use and, in memory.stat, what is cached.
GROUP_FILES = ("memory.max", "memory.current", "inactive_file")
GROUP_FILES_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


class Meter:
    """Memory of a GPU, or of this process on a CPU.

    There the peak is the kernel's high-water mark, where that can be reset (Linux); elsewhere a
    thread looks every 5 ms, and a peak that is shorter can be missed.
    """

    def __init__(self, device: torch.device) -> None:
        self.gpu = device if device.type == "cuda" else None
        self.unified = False
        if self.gpu is not None:
            found = torch.cuda.get_device_properties(device)
            named = any(name in found.name for name in UNIFIED_NAMES)
            self.unified = named or bool(getattr(found, "is_integrated", False))
            return
        return_freed_blocks()
        self._highest, self._marks = 0, high_water_mark(reset=True) is not None
        if not self._marks:
            threading.Thread(target=self._sample, name="memory meter", daemon=True).start()

    def reset(self) -> None:
        """Begin a new peak at what is in use now."""
        if self.gpu is not None:
            torch.cuda.reset_peak_memory_stats(self.gpu)
            return
        if self._marks:
            high_water_mark(reset=True)
        self._highest = self.now()

    def peak(self) -> int:
        """Most memory in use since `reset`."""
        if self.gpu is not None:
            return torch.cuda.max_memory_allocated(self.gpu)
        return max(self._highest, (self._marks and high_water_mark()) or self.now())

    def now(self) -> int:
        """Memory in use."""
        if self.gpu is not None:
            return torch.cuda.memory_allocated(self.gpu)
        return psutil.Process().memory_info().rss

    def available(self) -> tuple[int, int]:
        """What could be taken beside what is in use, and all there is."""
        free, total = host_memory()
        if self.gpu is None:
            return free, total
        device = torch.cuda.mem_get_info(self.gpu)
        if not self.unified:
            free, total = device
        kept_for_later = torch.cuda.memory_reserved(self.gpu) - self.now()
        return min(free, device[0]) + kept_for_later, min(total, device[1])

    def budget(self, max_gb: float | None, max_fraction: float | None) -> float:
        """The peak that training may reach; data and weights should be there already.

        In units of 10^9 bytes, or as a share of what is free; 0.85 of that if neither is given.
        """
        used, (free, total) = self.now(), self.available()
        if max_gb is None:
            return used + (max_fraction or DEFAULT_FRACTION) * free
        reason = ""
        if max_fraction is not None:
            reason = f"--max-memory-fraction {max_fraction:g} is given too; give one of them"
        elif max_gb * GB > total:
            reason = f"there are {total / GB:.3g} GB; give less"
        elif max_gb * GB <= used:
            reason = f"program, data and weights already take {used / GB:.3g} GB; give more"
        if reason:
            raise InputError(f"--max-memory-gb {max_gb:g}: {reason}")
        return max_gb * GB

    def _sample(self) -> None:
        while True:
            self._highest = max(self._highest, self.now())
            time.sleep(SAMPLING_SECONDS)


def high_water_mark(reset: bool = False) -> int | None:
    """Most resident memory of this process since the last reset; None where there is no such."""
    with suppress(OSError, StopIteration):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return None


def return_freed_blocks() -> bool:
    """Let glibc return large blocks to the system as soon as they are freed; whether it could.

    By default it keeps freed blocks of up to 32 MB, and the peak of a step depends on the steps
    before it: on the ibd table predictions were off by 7 to 24 % (95th percentile); they are by
    4 % so, and peaks are 10 % lower, for 2.6 % more time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another libc; Windows
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    return bool(mallopt(mmap_threshold, LARGE_BLOCK) and mallopt(trim_threshold, HEAP_TOP))


def host_memory(
    root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> tuple[int, int]:
    """(free, total) that this process can have, within its memory control groups."""
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (root / "memory", GROUP_FILES_1) if controllers else (root, GROUP_FILES)
        own = Path(path.lstrip("/"))
        for folder in (top / one for one in (own, *own.parents)):
            with suppress(OSError, ValueError):  # no such folder, or the limit is "max"
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                stat = (folder / "memory.stat").read_text().split()
                cached = int(stat[stat.index(names[2]) + 1])  # in use, but dropped first
                free, total = min(free, limit - used + cached), min(total, limit)
    return max(0, free), total
