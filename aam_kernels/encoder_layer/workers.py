"""Spreads chunks over threads, each of which runs its operations alone.

A chunk's operations take tens to hundreds of microseconds. Splitting each of them over the cores
would put a barrier behind every one, which costs a few per cent on a quiet machine and a multiple
of the work where a neighbour holds a core. Here a thread takes whole chunks and nobody waits
before the end. Which thread takes which chunk is fixed, and results are returned in order of the
threads: the same number of torch threads gives the same bits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Python hands out the operations of all threads; beyond this many it could not keep up, and each
# thread splits its operations over several cores instead.
MOST_WORKERS = 8

_pools: dict[tuple[int, int, int], ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def share(items: Sequence[Item], work: Callable[[Sequence[Item]], Result]) -> list[Result]:
    """``work`` on every ``workers``-th item, one call a thread, without autograd.

    Args:
        items: pieces of about equal cost.
        work: called with a share of the items, in order.

    Returns:
        The results in order of the threads; none for no items.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items), MOST_WORKERS)
    if workers <= 1:
        return [_recorded_by_nobody(work, items)] if items else []
    pool = _pool(workers, max(1, threads // workers), threads)
    shares = [items[first::workers] for first in range(workers)]
    futures = [pool.submit(_recorded_by_nobody, work, part) for part in shares]
    return [future.result() for future in futures]


def _recorded_by_nobody(work: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> Result:
    with torch.no_grad():
        return work(items)


def _pool(workers: int, threads_each: int, threads: int) -> ThreadPoolExecutor:
    key = (os.getpid(), workers, threads_each)  # a forked child has none of its parent's threads
    with _pools_lock:
        if key not in _pools:
            pool = ThreadPoolExecutor(workers, thread_name_prefix="aam_kernels")
            started = threading.Barrier(workers)

            def start() -> None:
                torch.set_num_threads(threads_each)  # of this thread, and of threads to come
                started.wait()

            for future in [pool.submit(start) for _ in range(workers)]:
                future.result()
            torch.set_num_threads(threads)  # threads to come again get what the user set
            _pools[key] = pool
        return _pools[key]
