"""Files that are written whole or not at all, and checks of paths before any work."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from aam.errors import InputError, name_some

CONFIG_FILE = "config.toml"  # these three, of a run's folder
MODEL_FILE = "model.safetensors"
CHECKPOINTS = "checkpoints"
BREAKS = re.compile(r"[\t\n\r]")  # what no id, class or column name may hold


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file takes the place of `path` when the block ends well.

    Raises:
        InputError: the folder cannot be written or the disk is full; `path` is as before.
    """
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


def write_table(path: Path, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a tab-separated table atomically; cells stand as they are, without quotes.

    Raises:
        InputError: a cell has a tab or a line break.
    """
    lines = []
    for row in itertools.chain([header], rows):
        cells = [str(cell) for cell in row]
        broken = [cell for cell in cells if BREAKS.search(cell)]
        if broken:
            raise InputError(
                f"{path}: {broken[0]!r} has a tab or a line break, which a table cannot hold; "
                "rename it in the input"
            )
        lines.append("\t".join(cells) + "\n")
    write_text(path, "".join(lines))


def refuse_breaks(names: Iterable[str], source: str, what: str) -> None:
    """Refuse names that a table of predictions cannot hold."""
    broken = [name for name in names if BREAKS.search(name)]
    if broken:
        raise InputError(
            f"{source}: {len(broken)} {what} ({name_some(broken)}) have a tab or a line break: "
            "rename them"
        )


def json_text(values: Any) -> str:
    """JSON with NaN as null, so that every reader accepts it; numbers may be numpy's."""
    from pydantic_core import to_json

    text = to_json(values, indent=1, inf_nan_mode="null", fallback=lambda value: value.item())
    return text.decode() + "\n"


def check_input(path: Path, expected: str) -> None:
    """Refuse a path that is no file, and say what file was expected."""
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {problem}; expected {expected}")


def check_file_output(path: Path, overwrite: bool) -> None:
    """Refuse, before any work, an output file that exists or cannot be written."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; --output needs a file name")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: already exists; choose another --output or use --overwrite")
    _check_writable(path, path.parent, "--output")


def check_run_output(folder: Path, overwrite: bool, resume_from: Path | None = None) -> None:
    """Refuse, before any work, a folder that cannot be written or already holds another run."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another --output-dir")
    if is_run(folder) and not overwrite and not continues_in(folder, resume_from):
        raise InputError(
            f"{folder}: already holds a run; choose another --output-dir, replace it with "
            "--overwrite, or continue it with --resume-from"
        )
    _check_writable(folder, folder, "--output-dir")


def _check_writable(path: Path, folder: Path, option: str) -> None:
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written; choose another {option}")


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / CONFIG_FILE).exists() or (folder / CHECKPOINTS).exists()


def continues_in(folder: Path, resume_from: Path | None) -> bool:
    """Whether the run to continue is the one in a folder."""
    return resume_from is not None and resume_folder(resume_from).resolve() == folder.resolve()


def resume_folder(path: Path) -> Path:
    """The run folder that a run or one of its checkpoints names."""
    return path if path.is_dir() else path.parent.parent


def resume_checkpoint(path: Path) -> Path:
    """The checkpoint that a run folder or a checkpoint names; an error if there is none."""
    path = path / CHECKPOINTS / "last.pt" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; --resume-from needs a run that saved one")
    return path


def model_file(run: Path) -> Path:
    """The model of a run's folder, which may be named itself; an error if there is none."""
    path = run / MODEL_FILE if run.is_dir() else run
    if not path.is_file():
        raise InputError(f"{path}: no such model; give the folder of a finished run")
    return path
