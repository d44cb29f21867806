"""The kernels that have configurations: where they are, and how to compile one case of them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec

import torch

from aam_kernels._runtime.configurations import Configuration, Tunable, forced
from aam_kernels.tune import MODULES
from profiling.fake_driver import Launch, captured


@lru_cache(maxsize=1)
def tunables() -> dict[str, Tunable]:
    """Every tunable kernel by name."""
    found = {}
    for name in MODULES:
        if find_spec(name) is None:
            continue
        for tunable in getattr(importlib.import_module(name), "TUNABLES", ()):
            found[tunable.kernel] = tunable
    return found


def compiled_case(
    tunable: Tunable,
    architecture: str,
    dtype: torch.dtype,
    width: int,
    length: int,
    chosen: Configuration,
    *,
    dropout: bool | None = None,
    large: bool = False,
    compiling: bool = True,
) -> Launch:
    """Launches a kernel's example with a configuration; an error is part of the result.

    The tensors of the example have no memory ("meta"): only their shapes and strides count.
    """
    others = _first_candidates(tunable, architecture, dtype, width, length)
    with (
        others,
        forced(tunable.kernel, chosen),
        captured(
            architecture,
            survive=True,
            only={tunable.kernel},
            dropout=dropout,
            large=large,
            compiling=compiling,
        ) as launches,
    ):
        tunable.example(dtype, width, length, torch.device("meta"))()
    if not launches:
        raise RuntimeError(f"the example of {tunable.kernel} does not launch it")
    return launches[-1]


def takes_dropout(launch: Launch) -> bool:
    """Whether a kernel has a variant with dropout."""
    return "DROPOUT" in launch.constants


@contextlib.contextmanager
def _first_candidates(
    tunable: Tunable, architecture: str, dtype: torch.dtype, width: int, length: int
) -> Iterator[None]:
    """Forces some configuration of the other kernels, which an example may launch too."""
    with contextlib.ExitStack() as stack:
        for other in tunables().values():
            if other.kernel != tunable.kernel:
                nearest = min(other.widths, key=lambda w: (w < width, abs(w - width)))
                lengths = sorted(other.lengths)
                at = next((x for x in lengths if x >= length), lengths[-1])
                candidates = other.candidates(architecture, dtype, nearest, at)
                stack.enter_context(forced(other.kernel, next(iter(candidates), None)))
        yield
