"""Which implementation serves a call.

Operations register their implementations by module path; a module is imported when first used.
An explicit request is honoured or refused, never replaced. "auto" takes the fastest one that
serves the device, dtype and width. Away from the CPU nothing but ``math`` (the specification) is
used before it has passed a check on that device (`aam_kernels._runtime.trust`): what fails is
replaced by ``math`` with one warning under "auto", and refused when asked for by name.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

import torch

from aam_kernels._runtime import native, trust
from aam_kernels._runtime.configurations import architecture
from aam_kernels._runtime.device import device_key
from aam_kernels._runtime.trust import ANY, Case

IMPLS = ("triton", "cpu", "sdpa", "math")
"""Names of implementations, fastest first: the order in which "auto" looks."""


Refusal = Callable[[tuple[int, ...]], str]


def takes_any(width: tuple[int, ...]) -> str:
    """Refuses nothing."""
    return ""


def takes(least: int, most: int) -> Refusal:
    """Refuses a first width outside of ``least`` to ``most``."""

    def refuses(width: tuple[int, ...]) -> str:
        if least <= width[0] <= most:
            return ""
        return f"takes widths of {least} to {most}, got {width[0]}"

    return refuses


@dataclass(frozen=True)
class Implementation:
    """One implementation of one operation.

    Attributes:
        module: import path of the module that holds ``forward`` and ``backward``.
        devices: device types served; None: all.
        dtypes: dtypes served.
        auto_dtypes: dtypes for which "auto" may take it.
        available: whether it can run on this installation.
        refuses: what an implementation does not take about a width (`Case.width`), in words;
            empty: it takes it.
    """

    module: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    auto_dtypes: tuple[torch.dtype, ...]
    available: Callable[[], bool] = lambda: True
    refuses: Refusal = takes_any

    def refusal(self, case: Case) -> str:
        """Why the width of a case is not served; empty when it is, or when none is known."""
        return self.refuses(case.width) if case.width else ""

    def serves(self, device: torch.device) -> bool:
        """Whether the device is served on this installation."""
        return (self.devices is None or device.type in self.devices) and self.available()


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_REGISTRY: dict[str, dict[str, Implementation]] = {}
_WARNED: set[tuple[str, str, torch.dtype]] = set()


def register(operation: str, impl: str, implementation: Implementation) -> None:
    """Adds an implementation; the last registration of a name counts."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    _REGISTRY.setdefault(operation, {})[impl] = implementation


def register_torch(operation: str, package: str) -> None:
    """Registers the two implementations that every operation has: `reference` and `sdpa`."""
    everything = (*FLOATS, torch.float64)
    math = Implementation(f"{package}.reference", None, everything, everything)
    sdpa = Implementation(f"{package}.sdpa", ("cpu", "cuda"), everything, FLOATS)
    register(operation, "math", math)
    register(operation, "sdpa", sdpa)


def register_triton(operation: str, package: str, refuses: Refusal = takes_any) -> None:
    """Registers the Triton kernels of an operation, which run on GPUs that have a table."""
    triton = Implementation(
        f"{package}.triton", ("cuda",), FLOATS, FLOATS, _triton_available, refuses
    )
    register(operation, "triton", triton)


def register_cpu(operation: str, package: str, refuses: Refusal = takes_any) -> None:
    """Registers the compiled CPU kernels of an operation."""
    cpu = Implementation(f"{package}.cpu", ("cpu",), FLOATS, FLOATS, native.available, refuses)
    register(operation, "cpu", cpu)


def _triton_available() -> bool:
    return torch.cuda.is_available() and _triton_serves(torch.cuda.current_device())


@lru_cache(maxsize=64)
def _triton_serves(device_index: int) -> bool:
    if find_spec("triton") is None:
        return False
    try:
        architecture()
    except (RuntimeError, ImportError):
        return False
    return True


def implementation(operation: str, impl: str) -> ModuleType:
    """The module of an implementation that `choose` has named."""
    return importlib.import_module(_REGISTRY[operation][impl].module)


def choose(
    operation: str, impl: str, device: torch.device, dtype: torch.dtype, case: Case = ANY
) -> str:
    """Resolves ``impl`` for one call.

    Raises:
        ValueError: the name is unknown, or the implementation does not serve the device, dtype
            or width on this installation.
        RuntimeError: the implementation was asked for by name and has failed its check on this
            device, or no check can run now (see `trust.failure`).
    """
    check_name(impl)
    table = _REGISTRY[operation]
    if impl == "auto":
        return _choose_auto(operation, table, device, dtype, case)
    found = table.get(impl)
    if found is None or not found.serves(device):
        usable = available_impls(device).get(operation, ())
        why = native.why_not() if impl == "cpu" and device.type == "cpu" else ""
        raise ValueError(
            f"{operation}: impl={impl!r} is not available on this installation for "
            f"{device.type}{f' ({why})' if why else ''}; available: {', '.join(usable)}"
        )
    if dtype not in found.dtypes:
        raise ValueError(f"{operation}: impl={impl!r} does not take {dtype}; use impl='math'")
    refusal = found.refusal(case)
    if refusal:
        raise ValueError(f"{operation}: impl={impl!r} {refusal}")
    failure = trust.failure(operation, impl, device, dtype, case)
    if failure:
        raise RuntimeError(
            f"{failure}. Use impl='math'; AAM_KERNELS_VERIFY=0 runs it regardless, and "
            "`python -m aam_kernels.verify` measures everything again"
        )
    return impl


def check_name(impl: str) -> None:
    """Raises ValueError when ``impl`` is no name of an implementation."""
    if impl not in ("auto", *IMPLS):
        raise ValueError(f"impl must be one of {('auto', *IMPLS)}, got {impl!r}")


def available_impls(device: torch.device | str = "cpu") -> dict[str, tuple[str, ...]]:
    """The implementations of every operation that can run on a device, fastest first."""
    device = torch.device(device)
    return {
        operation: tuple(name for name in IMPLS if name in table and table[name].serves(device))
        for operation, table in _REGISTRY.items()
    }


def _choose_auto(
    operation: str,
    table: dict[str, Implementation],
    device: torch.device,
    dtype: torch.dtype,
    case: Case,
) -> str:
    if device.type == "cpu" and dtype in FLOATS:
        native.warn_if_absent()
    for name in IMPLS:
        found = table.get(name)
        if found is None or dtype not in found.auto_dtypes:
            continue
        if not found.serves(device) or found.refusal(case):
            continue
        failure = trust.failure(operation, name, device, dtype, case)
        if not failure:
            return name
        _warn_once(operation, device, dtype, failure)
        return "math"
    raise ValueError(
        f"{operation}: no implementation takes {dtype} on {device.type}; expected float32, "
        f"float16, bfloat16 or float64"
    )


def _warn_once(operation: str, device: torch.device, dtype: torch.dtype, failure: str) -> None:
    """One warning a process for each operation, device and dtype."""
    place = (operation, device_key(device), dtype)
    if place not in _WARNED:
        _WARNED.add(place)
        warnings.warn(
            f"{failure}. impl='auto' uses the slower 'math' instead; "
            "`python -m aam_kernels.verify` shows everything that is wrong on this machine",
            stacklevel=4,
        )
