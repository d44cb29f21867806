"""What a device is called, and everything that a measurement on it holds for."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch

from aam_kernels._runtime import native

PACKAGE = Path(__file__).parent.parent


def device_key(device: torch.device) -> str:
    """Names a device, its driver stack and torch, for people."""
    if device.type == "cuda":
        stack = f"hip {torch.version.hip}" if torch.version.hip else f"cuda {torch.version.cuda}"
        return f"{torch.cuda.get_device_name(device)}, {stack}, torch {torch.__version__}"
    return f"{device.type} {platform.machine()}, torch {torch.__version__}"


def environment(device: torch.device) -> str:
    """Names all that a check on a device holds for: hardware, drivers, torch, our sources."""
    parts = [device_key(device)]
    if device.type == "cuda":
        parts += [_architecture(device), f"driver {_driver()}", f"triton {triton_version()}"]
    elif device.type == "cpu":
        parts.append(native.description())
    return ", ".join([*parts, f"aam_kernels {fingerprint()}"])


def triton_version() -> str:
    """The version of the installed Triton, under whatever name it was installed; or "none"."""
    for name in ("triton", "pytorch-triton-rocm", "pytorch-triton", "triton-rocm"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def fingerprint() -> str:
    """Twelve hexadecimal digits of the package's sources and the tables in use."""
    tables = os.environ.get("AAM_KERNELS_TABLES")
    rounding = os.environ.get("AAM_KERNELS_ROUNDING", "")
    return _fingerprint(*(folder for folder in (str(PACKAGE), tables) if folder), rounding)


@lru_cache(maxsize=8)
def _fingerprint(*folders_and_rounding: str) -> str:
    *folders, rounding = folders_and_rounding
    digest = hashlib.sha256(rounding.encode())
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in (".py", ".json", ".so") and "__pycache__" not in path.parts:
                digest.update(path.relative_to(folder).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(getattr(properties, "gcnArchName", "gfx?"))
    return f"sm_{properties.major}{properties.minor}"


def _driver() -> str:
    """The kernel driver's version, as far as the machine tells."""
    for path in ("/sys/module/amdgpu/version", "/sys/module/nvidia/version"):
        try:
            return Path(path).read_text().strip()
        except OSError:
            continue
    return "unknown"


def cache_folder() -> Path:
    """Where results are remembered: AAM_KERNELS_CACHE or the user's cache folder."""
    root = os.environ.get("AAM_KERNELS_CACHE")
    if root is None:
        root = os.path.join(
            os.environ.get("XDG_CACHE_HOME", os.path.join(Path.home(), ".cache")), "aam_kernels"
        )
    return Path(root)
