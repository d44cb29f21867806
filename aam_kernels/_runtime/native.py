"""The compiled CPU kernels: whether this installation has them, and which ones run.

``aam_kernels._native`` is built from ``aam_kernels/native`` at installation, and absent where no
suitable compiler was found. Nothing is imported before a CPU call asks for it.
"""

from __future__ import annotations

import importlib
import warnings
from functools import lru_cache
from types import ModuleType

MODULE = "aam_kernels._native"
_REMEDY = (
    "install GCC 11 or Clang 14 (or newer) and then this package again: "
    "`pip install --force-reinstall --no-deps .`, or `make native` in a checkout"
)
_said = False


@lru_cache(maxsize=1)
def _load() -> ModuleType | str:
    """The module, or why there is none."""
    try:
        return importlib.import_module(MODULE)
    except ModuleNotFoundError as missing:
        if missing.name != MODULE:
            return f"{MODULE} does not load: {missing}"
        return "not compiled when this package was installed"
    except ImportError as broken:
        return f"{MODULE} does not load: {' '.join(str(broken).split())}"


def available() -> bool:
    """Whether the kernels were compiled and can be loaded."""
    return not isinstance(_load(), str)


def why_not() -> str:
    """Why there are no kernels; empty when there are."""
    found = _load()
    return found if isinstance(found, str) else ""


def kernels() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: there is none on this installation.
    """
    found = _load()
    if isinstance(found, str):
        raise RuntimeError(f"no CPU kernels: {found}; {_REMEDY}")
    return found


def warn_if_absent() -> None:
    """Says, once a process, that a CPU call is served by something slower, and what to do."""
    global _said
    reason = why_not()
    if reason and not _said:
        _said = True
        warnings.warn(
            f"no CPU kernels: {reason}. impl='auto' uses torch's slower 'sdpa' instead; {_REMEDY}",
            stacklevel=5,
        )


def description() -> str:
    """Variant, width and threads of the kernels, or why there are none: a line for people.

    Raises:
        ValueError: AAM_KERNELS_CPU names a variant that cannot run here.
    """
    found = _load()
    if isinstance(found, str):
        return f"CPU kernels: none, {found}"
    return (
        f"CPU kernels: {found.selected()} ({found.width()} floats a vector), on "
        f"{found.threads_of()}"
    )
