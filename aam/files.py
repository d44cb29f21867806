"""Files that are written whole or not at all, and what they may hold."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aam.errors import InputError

BREAKS = re.compile(r"[\t\n\r]")  # what no id, class or column name may hold


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file takes the place of `path` when the block ends well.

    Raises:
        InputError: the folder cannot be written or the disk is full; `path` is as before.
    """
    handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        kept = "; the previous file is kept" if path.exists() else ""
        raise InputError(f"{path}: cannot be written ({error.strerror or error}){kept}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_file_output(path: Path, overwrite: bool) -> None:
    """Refuse, before any work, an output file that exists or cannot be written.

    Raises:
        InputError: says which, and the remedy.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; --output needs a file name")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: already exists; choose another --output or use --overwrite")
    existing = path.parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written; choose another --output")


def write_table(path: Path, header: list[str], rows: Any) -> None:
    """Write a tab-separated table atomically; cells stand as they are, without quotes.

    Raises:
        InputError: a cell has a tab or a line break.
    """
    text = io.StringIO()
    for row in itertools.chain([header], rows):
        cells = [str(cell) for cell in row]
        broken = [cell for cell in cells if BREAKS.search(cell)]
        if broken:
            raise InputError(
                f"{path}: {broken[0]!r} has a tab or a line break, which a table cannot hold; "
                "rename it in the input"
            )
        text.write("\t".join(cells) + "\n")
    write_text(path, text.getvalue())


def refuse_breaks(names: Iterable[str], source: str, what: str) -> None:
    """Refuse names that a table of predictions cannot hold.

    Raises:
        InputError: names the first ones with a tab or a line break.
    """
    broken = [name for name in names if BREAKS.search(name)]
    if broken:
        shown = ", ".join(map(repr, broken[:3]))
        raise InputError(
            f"{source}: {len(broken)} {what} ({shown}) have a tab or a line break: rename them"
        )


def json_text(values: Any) -> str:
    """JSON with NaN as null, so that every reader accepts it."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(one) for one in value]
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return str(value) if isinstance(value, Path) else value

    return json.dumps(plain(values), indent=1, ensure_ascii=False) + "\n"
