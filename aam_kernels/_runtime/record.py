"""The file that remembers which implementations are right on which device.

``verified.json`` in the cache folder: ``{environment: {entry: failure}}`` with an empty failure
where a check passed. An entry is ``operation/impl/dtype/case``, or ``operation/impl/dtype/*`` of a
complete run of ``python -m aam_kernels.verify``, which covers every case. Nothing here can make a
call fail: what cannot be read counts as unknown, and what cannot be written is measured again by
the next process.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from aam_kernels._runtime.device import cache_folder


def record_path() -> Path:
    """Where the record is."""
    return cache_folder() / "verified.json"


def read(environment: str) -> dict[str, str]:
    """The entries of one environment; empty when there is no readable record."""
    entries = _content().get(environment, {})
    if not isinstance(entries, dict):
        return {}
    return {str(name): failure for name, failure in entries.items() if isinstance(failure, str)}


def write(environment: str, entries: Mapping[str, str], replacing: Iterable[str] = ()) -> bool:
    """Adds entries, atomically; those that begin with one of ``replacing`` go first.

    Returns:
        Whether it could be written.
    """
    content = _content()
    prefixes = tuple(replacing)
    kept = {name: x for name, x in read(environment).items() if not name.startswith(prefixes)}
    content[environment] = dict(sorted({**kept, **entries}.items()))
    path = record_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(content, file, indent=1)
        try:
            os.replace(file.name, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
    except OSError:
        return False
    return True


def _content() -> dict[str, object]:
    try:
        content = json.loads(record_path().read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
