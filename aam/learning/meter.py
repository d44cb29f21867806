"""How much memory training takes: the peak of a step, what is in use, what is free.

On CUDA and ROCm devices the peak is the allocator's. Where host and device share one pool
(MI300A) what is free is what the whole machine has left. On a CPU the peak is that of the process,
interpreter and libraries included, because that is what a limit on memory is about.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from abc import ABC, abstractmethod
from pathlib import Path

import torch

SAMPLING_SECONDS = 0.005
LARGE_BLOCK = 8 << 20  # bytes; larger ones are given back to the system when they are freed
HEAP_TOP = 16 << 20  # bytes of free small blocks that stay with the process
UNIFIED_NAMES = ("MI300A",)


class Meter(ABC):
    """Memory of one device. All numbers are bytes."""

    @staticmethod
    def for_device(device: torch.device | str) -> Meter:
        """The meter of a device."""
        device = torch.device(device)
        return CudaMeter(device) if device.type == "cuda" else ProcessMeter()

    @abstractmethod
    def reset(self) -> None:
        """Begin a new peak at what is in use now."""

    @abstractmethod
    def peak(self) -> int:
        """Most memory in use since `reset`."""

    @abstractmethod
    def now(self) -> int:
        """Memory in use."""

    @abstractmethod
    def free(self) -> int:
        """What could be taken beside what is in use."""

    @abstractmethod
    def total(self) -> int:
        """All there is."""


class CudaMeter(Meter):
    """A CUDA or ROCm device, by torch's allocator.

    The peak is of allocated memory: what the allocator has reserved beyond it depends on the steps
    before, and it gives that up before it fails.
    """

    def __init__(self, device: torch.device) -> None:
        """Meter this device."""
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        self.unified = bool(getattr(properties, "is_integrated", False)) or any(
            name in properties.name for name in UNIFIED_NAMES
        )

    def reset(self) -> None:
        """Begin a new peak of the allocator."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Most that the allocator has handed out since `reset`."""
        return torch.cuda.max_memory_allocated(self.device)

    def now(self) -> int:
        """What the allocator has handed out."""
        return torch.cuda.memory_allocated(self.device)

    def free(self) -> int:
        """Free on the device or in the shared pool, and what the allocator keeps for later."""
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - self.now()
        if self.unified:
            free = min(free, free_host_memory())
        return free + cached

    def total(self) -> int:
        """Of the device, or of the shared pool."""
        total = torch.cuda.mem_get_info(self.device)[1]
        return min(total, total_host_memory()) if self.unified else total


class ProcessMeter(Meter):
    """This process, by the kernel's own high-water mark where it can be reset (Linux).

    Elsewhere a thread looks every 5 ms: a peak that is shorter can be missed.
    """

    def __init__(self) -> None:
        """Meter this process; large blocks go back to the system when they are freed, from now."""
        return_freed_blocks()
        self._sampler = None if _can_reset_mark() else _Sampler()

    def reset(self) -> None:
        """Begin a new high-water mark."""
        if self._sampler is None:
            Path("/proc/self/clear_refs").write_text("5")
        else:
            self._sampler.reset()

    def peak(self) -> int:
        """Most resident memory since `reset`."""
        return _status("VmHWM") if self._sampler is None else self._sampler.peak()

    def now(self) -> int:
        """Resident memory."""
        return _resident()

    def free(self) -> int:
        """What the machine, or its memory group, has left."""
        return free_host_memory()

    def total(self) -> int:
        """Of the machine, or of its memory group."""
        return total_host_memory()


class _Sampler:
    """The highest resident size that a thread has seen."""

    def __init__(self) -> None:
        self._highest = 0
        self._started = False

    def reset(self) -> None:
        self._highest = _resident()
        if not self._started:
            threading.Thread(target=self._look, name="memory meter", daemon=True).start()
            self._started = True

    def peak(self) -> int:
        self._highest = max(self._highest, _resident())
        return self._highest

    def _look(self) -> None:
        pause = threading.Event()
        while not pause.wait(SAMPLING_SECONDS):
            self._highest = max(self._highest, _resident())


def return_freed_blocks() -> bool:
    """Let glibc return large blocks to the system as soon as they are freed.

    By default it keeps freed blocks of up to 32 MB, and the peak of a step depends on the steps
    before it. Pretraining on the ibd table, the error of a fit to steps of 2 to 64 samples then was
    7 to 24 % (95th percentile); it is 4 % so, and peaks are 10 % lower, for 2.6 % more time. Giving
    back small blocks too (malloc_trim before each step) took 4 to 5 % and predicted no better.

    Returns:
        Whether it could be done: on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    return bool(mallopt(mmap_threshold, LARGE_BLOCK) and mallopt(trim_threshold, HEAP_TOP))


def free_host_memory() -> int:
    """Host memory that this process could still take, within its control groups; bytes."""
    import psutil

    free = psutil.virtual_memory().available
    return max(0, min([free, *(limit - used for limit, used in _group_limits())]))


def total_host_memory() -> int:
    """Host memory that this process could have, within its control groups; bytes."""
    import psutil

    return min([psutil.virtual_memory().total, *(limit for limit, _ in _group_limits())])


def _group_limits() -> list[tuple[int, int]]:
    """(limit, used) bytes of every control group of this process that has a limit.

    Cached files count as used there, but the kernel drops them first.
    """
    found = []
    for folder, limit, used, cache in _group_folders():
        try:
            most = (folder / limit).read_text().strip()
            if most == "max" or int(most) >= 1 << 60:  # "unlimited" in version 2 and 1
                continue
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / used).read_text()) - int(stat.get(cache, 0))
        except (OSError, ValueError):
            continue
        found.append((int(most), taken))
    return found


@functools.cache
def _group_folders(
    root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> tuple[tuple[Path, str, str, str], ...]:
    """Folders of the memory control groups of this process, from its own up to the root.

    Each with the names of its limit, its use and, in memory.stat, its cached files.
    """
    version2 = ("memory.max", "memory.current", "inactive_file")
    version1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    found = []
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return ()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        top, names = (root, version2) if not controllers else (root / "memory", version1)
        own = Path(path.lstrip("/"))
        found += [(top / one, *names) for one in (own, *own.parents) if (top / one).is_dir()]
    return tuple(found)


def _resident() -> int:
    """Resident size of this process, bytes."""
    if sys.platform.startswith("linux"):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return psutil.Process().memory_info().rss


def _status(key: str) -> int:
    """A size of /proc/self/status, bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


@functools.cache
def _can_reset_mark() -> bool:
    """Whether the kernel's high-water mark of this process can be reset, by trying."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmHWM") > 0
    except (OSError, StopIteration):
        return False
