"""Seconds that a call takes on a device: device events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_CACHE_BYTES = 1 << 28  # more than any GPU's last cache


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """One run. On a GPU: between two events on its stream, after which the host waits."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def median_seconds(
    call: Callable[[], object],
    device: torch.device,
    *,
    budget: float = 0.5,
    runs: tuple[int, int] = (3, 15),
    cold: bool = False,
) -> float:
    """Median of warm runs that fit a budget of seconds, at least and at most ``runs``.

    Args:
        call: what is timed; it runs once more before, to compile and to warm up.
        device: where it runs.
        budget: seconds for all runs together, about.
        runs: the fewest and the most runs.
        cold: overwrite a GPU's cache before each run, outside the clock.
    """
    call()
    flush = None
    if cold and device.type == "cuda":
        flush = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device)
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < runs[0] or (
        len(seconds) < runs[1] and time.perf_counter() - started < budget
    ):
        if flush is not None:
            flush.zero_()
        seconds.append(seconds_of(call, device))
    return statistics.median(seconds)


def shown(seconds: float) -> str:
    """1.23 s, 4.56 ms or 7.89 us."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
