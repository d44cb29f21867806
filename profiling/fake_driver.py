"""A Triton driver without a device: CPU tensors go through Triton's real launch path.

Inside `captured` a call such as ``kernel[grid](*tensors, BLOCK=64, num_warps=4)`` is bound,
specialised and compiled for the chosen target exactly as on a machine that has it, by
``JITFunction.run`` itself; only the last step, the launch, is written down instead of made::

    with captured("gfx942") as launches:
        attention_forward(query, key, value, ...)      # CPU tensors
    launches[0].kernel, launches[0].grid, launches[0].compiled.asm["amdgcn"]
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as active_driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
}
SHARED_LIMIT = {
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
}
"""Bytes of shared memory (LDS) that one program can have."""


@dataclass(frozen=True)
class Launch:
    """One launch, as the driver would have received it.

    Attributes:
        kernel: name of the kernel function.
        grid: programs on the three axes.
        function: the kernel function itself.
        compiled: what Triton compiled; None when that failed or was not asked for.
        signature: parameter -> type, "constexpr" for what is a constant of the compiled code.
        constants: parameter -> value, for those.
        attributes: parameter -> what the compiler may rely on: divisible by 16 ("tt.divisibility"),
            on AMD also within 2 GiB ("tt.pointer_range"), which gives larger tensors a kernel of
            their own.
        arguments: parameter -> value, as passed.
        options: compiler options in effect (num_warps, ...).
        error: what failed, when it did.
    """

    kernel: str
    grid: tuple[int, int, int]
    function: Any = field(default=None, repr=False)
    compiled: Any = field(default=None, repr=False)
    signature: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict, repr=False)
    options: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def specialisation(self) -> str:
        """What Triton compiles for: launches that agree in it share one compiled kernel."""
        parts = (
            sorted(self.signature.items()),
            sorted((name, repr(value)) for name, value in self.constants.items()),
            sorted(self.attributes.items()),
            sorted((name, repr(value)) for name, value in self.options.items()),
        )
        return f"{self.kernel} {parts}"

    @property
    def programs(self) -> int:
        """Programs in the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]


class FakeDriver:
    """What Triton asks of a driver, answered for one target; launches go to ``launches``."""

    def __init__(self, architecture: str, launches: list[Launch] | None = None) -> None:
        self.architecture = architecture
        self.target = TARGETS[architecture]
        self.launches = [] if launches is None else launches
        limit = SHARED_LIMIT[architecture]
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": limit},
            load_binary=lambda name, binary, shared, device: (object(), name, 0, 0, 1024),
        )
        self.launcher_cls = self._launcher

    def get_current_target(self) -> GPUTarget:
        """The target that kernels are compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """A number of its own for every target: kernels are cached by it."""
        return list(TARGETS).index(self.architecture)

    def get_active_torch_device(self) -> torch.device:
        """Where tensors lie."""
        return torch.device("cpu")

    def get_current_stream(self, device: int | None = None) -> int:
        """The default stream."""
        return 0

    def _launcher(self, source: Any, metadata: Any) -> Any:
        names = source.fn.arg_names
        described = _described(source.fn, source.signature, source.constants, source.attrs)

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            arguments = dict(zip(names, rest[-len(names) :], strict=True))
            # The launcher outlives this driver: Triton keeps it with the compiled kernel.
            target = active_driver.active
            target.launches.append(
                Launch(
                    source.fn.__name__,
                    (x, y, z),
                    arguments=arguments,
                    options=_options(metadata),
                    **described,
                )
            )

        return launch


def _options(metadata: Any) -> dict[str, Any]:
    wanted = ("num_warps", "num_stages", "waves_per_eu", "matrix_instr_nonkdim", "kpack", "maxnreg")
    return {name: getattr(metadata, name) for name in wanted if hasattr(metadata, name)}


@contextlib.contextmanager
def driving(architecture: str, launches: list[Launch] | None = None) -> Iterator[FakeDriver]:
    """Makes a fake driver for ``architecture`` the active one.

    Raises:
        ValueError: an unknown architecture.
    """
    if architecture not in TARGETS:
        raise ValueError(f"architecture must be one of {tuple(TARGETS)}, got {architecture!r}")
    before = active_driver._active
    driver = FakeDriver(architecture, launches)
    active_driver.set_active(driver)
    try:
        yield driver
    finally:
        active_driver._active = before


@contextlib.contextmanager
def captured(
    architecture: str,
    *,
    survive: bool = False,
    only: Collection[str] | None = None,
    dropout: bool | None = None,
    large: bool = False,
    compiling: bool = True,
) -> Iterator[list[Launch]]:
    """The launches that are asked for inside, in order.

    Args:
        architecture: the target to compile for.
        survive: a kernel that does not compile, or does not fit, is a `Launch` with ``error``
            set; otherwise the exception leaves the context as it would on a device.
        only: names of the kernels to compile; launches of others are passed over. None: all.
        dropout: replaces the compile-time constant DROPOUT of kernels that have one.
        large: on AMD, compile as for tensors over 2 GiB, which are addressed in another way.
        compiling: False: only bind and specialise, which takes a millisecond.
    """
    launches: list[Launch] = []
    run = JITFunction.run

    def recording(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if only is not None and self.__name__ not in only:
            return None
        if dropout is not None:
            args, kwargs = _with_dropout(self, args, kwargs, dropout)
        if not compiling:
            launches.append(_specialised(self, args, kwargs, grid))
            return None
        before = len(launches)
        try:
            compiled = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        except Exception as problem:  # compilers raise what they like: kept in the launch
            if not survive:
                raise
            last = " ".join(str(problem).split())[-400:]
            error = f"{type(problem).__name__}: {last}"
            launches.append(Launch(self.__name__, _grid(grid), options=kwargs, error=error))
            return None
        for place in range(before, len(launches)):
            launches[place] = replace(launches[place], compiled=compiled)
        return compiled

    with contextlib.ExitStack() as stack:
        stack.enter_context(driving(architecture, launches))
        stack.enter_context(mock.patch.object(JITFunction, "run", recording))
        if large:
            never = staticmethod(lambda tensor: False)
            stack.enter_context(mock.patch.object(HIPBackend, "is_within_2gb", never))
        yield launches


def _specialised(
    kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any
) -> Launch:
    """The launch as far as it is known before compiling."""
    _, _, _, backend, binder = kernel.device_caches[active_driver.active.get_current_device()]
    options = {"debug": False, "instrumentation_mode": "", **kwargs}
    arguments, specialisation, options = binder(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, arguments, specialisation, options
    )
    return Launch(
        kernel.__name__,
        _grid(grid),
        arguments=arguments,
        options=_options(parsed),
        **_described(kernel, signature, constants, attributes),
    )


def _described(
    kernel: JITFunction, signature: Any, constants: Any, attributes: Any
) -> dict[str, Any]:
    """Signature, constants and alignment by the names of parameters."""
    names = kernel.arg_names
    return {
        "function": kernel,
        "signature": dict(signature),
        "constants": {names[path[0]]: value for path, value in constants.items()},
        "attributes": {
            names[path[0]]: tuple(f"{name}={number}" for name, number in value)
            for path, value in attributes.items()
            if value
        },
    }


def _with_dropout(
    kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], dropout: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the same launch with dropout or without; the mask needs a seed."""
    if "DROPOUT" not in kernel.arg_names:
        return args, kwargs
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs, "DROPOUT": dropout}
    if "seed_ptr" in values:
        # As the launchers do: no seed, or for the short-row kernels some other tensor.
        without = values["offsets_ptr"] if kernel.__name__.startswith("short_") else None
        values["seed_ptr"] = torch.empty(3, dtype=torch.int64) if dropout else without
    return (), values


def _grid(grid: Any) -> tuple[int, int, int]:
    if callable(grid):
        return (0, 0, 0)
    sizes = (*grid, 1, 1)
    return sizes[0], sizes[1], sizes[2]
