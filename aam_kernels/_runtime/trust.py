"""Whether an implementation may serve a call: checked once against float64, then remembered.

Away from the CPU every implementation but ``math`` must pass a small check before it is used, for
each device, dtype and kind of call (`Case`). The check itself is installed by the floor above
(`install`), runs in a thread of its own, so that nothing of the caller's state (autocast, autograd,
function transforms, streams) reaches it, and uses no autograd: it may be asked for inside a
backward pass. Its result is kept in memory and in the record on disk.

``AAM_KERNELS_VERIFY=0`` trusts everything.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from aam_kernels._runtime import record
from aam_kernels._runtime.device import device_key, environment

TRUSTED_DEVICES = ("cpu",)
"""Device types on which everything is used without a check."""

EDGES = (16, 32, 64, 112, 128, 160, 192, 256, 1024)
"""Bounds of the length classes, all that tables have among them; the last stands for any longer."""


class Case(NamedTuple):
    """What of a call decides which code runs.

    Attributes:
        width: (head_dim,) of attention, (dim,) of pooling, (dim, heads) of a layer.
        longest: one of `EDGES`, or -1 when the caller does not know.
        dropout: whether anything is dropped.
        form: "self", "cross" (keys of their own) or "gaps" (lengths beside offsets).
    """

    width: tuple[int, ...] = ()
    longest: int = -1
    dropout: bool = False
    form: str = "self"

    def __str__(self) -> str:
        """Part of an entry of the record, and of messages."""
        width = "x".join(map(str, self.width)) or "any"
        rows = f"rows to {self.longest}" if self.longest >= 0 else "rows of unknown length"
        return f"width {width}, {rows}, {self.form}{', dropout' if self.dropout else ''}"


ANY = Case()


def case_of(
    width: tuple[int, ...], longest: int, dropout_p: float = 0.0, form: str = "self"
) -> Case:
    """The case of a call whose rows are at most ``longest``, or -1."""
    edge = -1 if longest < 0 else next((x for x in EDGES if longest <= x), EDGES[-1])
    return Case(width, edge, dropout_p > 0.0, form)


class Unsettled(Exception):
    """The check could not be carried out: a failure for this process, and not for the record.

    Memory may have run out, or a compiler be missing: another process may find it otherwise.
    """


Checker = Callable[[str, str, torch.device, torch.dtype, Case], list[str]]
_checker: Checker | None = None
_settled: dict[tuple, str] = {}
_lock = threading.Lock()
_thread = threading.local()
_suspended = 0


def install(checker: Checker) -> None:
    """Sets the check: (operation, impl, device, dtype, case) -> what diverged."""
    global _checker
    _checker = checker


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Trusts everything meanwhile, in all threads: `verify` has to run what is broken too."""
    global _suspended
    _suspended += 1
    try:
        yield
    finally:
        _suspended -= 1


def forget() -> None:
    """Forgets what this process knows; the record on disk stays."""
    with _lock:
        _settled.clear()


def failure(operation: str, impl: str, device: torch.device, dtype: torch.dtype, case: Case) -> str:
    """Why an implementation must not serve a call; empty when it may.

    Raises:
        RuntimeError: a check is due while a CUDA graph is being captured.
    """
    if impl == "math" or device.type in TRUSTED_DEVICES:
        return ""
    precision = torch.get_float32_matmul_precision() if dtype == torch.float32 else ""
    place = (operation, impl, device, dtype, precision, case)
    known = _settled.get(place)
    if known == "" or _suspended or getattr(_thread, "checking", False):
        return ""
    if os.environ.get("AAM_KERNELS_VERIFY") == "0":
        return ""
    if known is None:
        with _lock:
            known = _settled.get(place)
            if known is None:
                known = _settled[place] = _settle(operation, impl, device, dtype, case)
    return known


def entry(operation: str, impl: str, dtype: torch.dtype, case: Case | None = None) -> str:
    """The name of an entry of the record; None: every case."""
    return f"{operation}/{impl}/{dtype_name(dtype)}/{'*' if case is None else case}"


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype, with torch's float32 matmul precision where that changes kernels."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return f"{name} at {torch.get_float32_matmul_precision()} precision"
    return name


def _settle(operation: str, impl: str, device: torch.device, dtype: torch.dtype, case: Case) -> str:
    where = environment(device)
    name, whole = entry(operation, impl, dtype, case), entry(operation, impl, dtype)
    entries = record.read(where)
    for known in (whole, name):
        if known in entries:
            return entries[known]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{operation}: impl={impl!r} has not been checked on this device for {case}, and no "
            "check can run while a CUDA graph is captured; call the operation once before capture"
        )
    try:
        found = "; ".join(_check(operation, impl, device, dtype, case))
    except Unsettled as problem:
        return _message(operation, impl, device, dtype, case, str(problem))
    if found:
        found = _message(operation, impl, device, dtype, case, found)
    record.write(where, {name: found})
    return found


def _message(
    operation: str, impl: str, device: torch.device, dtype: torch.dtype, case: Case, found: str
) -> str:
    return (
        f"{operation}: impl={impl!r} fails its check against float64 on {device_key(device)} "
        f"({dtype_name(dtype)}, {case}): {found}"
    )


def _check(
    operation: str, impl: str, device: torch.device, dtype: torch.dtype, case: Case
) -> list[str]:
    """Runs the installed check in a thread of its own; a crash in it is a failure."""
    if _checker is None:
        return ["no check is installed: import aam_kernels"]
    checker = _checker
    found: list[str] = []
    problems: list[Exception] = []

    def work() -> None:
        _thread.checking = True
        try:
            with _quiet(device):
                found[:] = checker(operation, impl, device, dtype, case)
        except Exception as problem:  # carried out of the thread
            problems.append(problem)

    thread = threading.Thread(target=work, name="aam_kernels check", daemon=True)
    thread.start()
    thread.join()
    if problems:
        told = f"{type(problems[0]).__name__}: {' '.join(str(problems[0]).split())[:500]}"
        if isinstance(problems[0], (torch.OutOfMemoryError, MemoryError)):
            raise Unsettled(f"the check ran out of memory ({told})")
        if usable(device):
            raise Unsettled(f"it does not run: {told}")
        return [f"it does not run, and the device is lost until the process ends: {told}"]
    return found


def usable(device: torch.device) -> bool:
    """Whether the device still works: an illegal access makes everything after it fail."""
    try:
        with _quiet(device):
            torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """On the device, with host waits allowed: the check reads its results back."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)
    try:
        with torch.cuda.device(device):
            yield
            torch.cuda.current_stream(device).synchronize()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
