"""What a device is called, and which implementations have passed `verify` on it."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from functools import lru_cache
from pathlib import Path

import torch


def device_key(device: torch.device) -> str:
    """Names a device, its driver stack and torch: results of `verify` hold for this key only."""
    if device.type == "cuda":
        stack = f"hip {torch.version.hip}" if torch.version.hip else f"cuda {torch.version.cuda}"
        return f"{torch.cuda.get_device_name(device)}, {stack}, torch {torch.__version__}"
    return f"{device.type} {platform.machine()}, torch {torch.__version__}"


def record_path() -> Path:
    """Where `verify` remembers what passed: AAM_KERNELS_CACHE or the user's cache folder."""
    root = os.environ.get("AAM_KERNELS_CACHE")
    if root is None:
        root = os.path.join(
            os.environ.get("XDG_CACHE_HOME", os.path.join(Path.home(), ".cache")), "aam_kernels"
        )
    return Path(root) / "verified.json"


@lru_cache(maxsize=1)
def _record() -> dict[str, list[str]]:
    try:
        content = json.loads(record_path().read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def passed(operation: str, impl: str, device: torch.device) -> bool:
    """Whether ``impl`` of ``operation`` has passed `verify` on this device with this torch."""
    entries = _record().get(device_key(device), [])
    return isinstance(entries, list) and f"{operation}/{impl}" in entries


def remember(device: torch.device, entries: list[str]) -> Path:
    """Replaces what is recorded for a device by ``entries`` ("operation/impl"), atomically."""
    path = record_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    _record.cache_clear()
    content = dict(_record())
    content[device_key(device)] = sorted(entries)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)
    _record.cache_clear()
    return path
