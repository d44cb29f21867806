"""The folder of a run: opened once, written atomically, continued exactly."""

from __future__ import annotations

import contextlib
import csv
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aam.config import RunOptions, write_toml
from aam.data.splits import Split
from aam.errors import InputError
from aam.files import (
    CHECKPOINTS,
    CONFIG_FILE,
    MODEL_FILE,
    atomic_path,
    continues_in,
    is_run,
    json_text,
    resume_folder,
    write_table,
    write_text,
)
from aam.learning import distributed

METRIC_COLUMNS = ("step", "epoch", "part", "metric", "value")
RUN_FILES = (
    CONFIG_FILE, MODEL_FILE, CHECKPOINTS, "metrics.csv", "tensorboard", "train_ids.txt",
    "validation_ids.txt", "predictions.tsv", "embeddings.tsv", "distances.tsv", "placements.tsv",
    "memory.tsv", "memory.svg", "summary.json", "report.html",
)  # fmt: skip
FLUSH_SECONDS = 2.0


class Run:
    """An open run folder: metrics, TensorBoard, tables and the summary.

    Rank 0 writes it; on the others every method does nothing.
    """

    def __init__(self, options: RunOptions, config: Any, *, keep_steps: int | None = None) -> None:
        """Create or reopen the folder; `config`, all options, is saved as config.toml.

        `keep_steps`: when resuming, the step up to which earlier metrics are kept.
        """
        self.path = options.output_dir
        self.source = None if keep_steps is None else options.resume_from
        self.writes = distributed.is_rank_zero()
        self.checkpoint_seconds = 60 * options.checkpoint_minutes
        self._pending: list[tuple[Any, ...]] = []
        self._flushed = time.monotonic()
        self._metrics, self._board_folder = self.path / "metrics.csv", self.path / "tensorboard"
        self._board = None
        if not self.writes:
            return
        with _written(self.path):
            if is_run(self.path) and not continues_in(self.path, self.source):
                remove_run(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)
        with atomic_path(self.path / CONFIG_FILE) as temporary:
            write_toml(config, temporary)
        if self.source is None:
            self._write_metrics([])
        if options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            first = None if keep_steps is None else keep_steps + 1
            self._board = SummaryWriter(str(self._board_folder), purge_step=first)

    def take_over_metrics(self, last_step: int, last_validation: int) -> None:
        """Begin metrics.csv with those of the continued run, up to a step and a validation."""
        assert self.source is not None
        path = resume_folder(self.source) / "metrics.csv"
        if not self.writes or not path.is_file():
            return
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
        complete = [row for row in rows if len(row) == len(METRIC_COLUMNS) and row[0].isdigit()]
        last = {"validation": last_validation}
        self._write_metrics([row for row in complete if int(row[0]) <= last.get(row[2], last_step)])

    def _write_metrics(self, rows: list[list[str]]) -> None:
        with (
            atomic_path(self._metrics) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file, lineterminator="\n").writerows([METRIC_COLUMNS, *rows])

    def log(self, step: int, epoch: int, part: str, values: Mapping[str, float | None]) -> None:
        """Add metrics of a step; undefined ones (None, NaN) are left out."""
        if not self.writes:
            return
        for name, value in values.items():
            if value is None or math.isnan(value):
                continue
            self._pending.append((step, epoch, part, name, repr(float(value))))
            if self._board is not None:
                with _written(self._board_folder):
                    self._board.add_scalar(f"{part}/{name}", value, step)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was logged."""
        if self._pending:
            with (
                _written(self._metrics),
                open(self._metrics, "a", newline="", encoding="utf-8") as file,
            ):
                csv.writer(file, lineterminator="\n").writerows(self._pending)
            self._pending.clear()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Write everything and close the logs."""
        self.flush()
        if self._board is not None:
            with _written(self._board_folder):
                self._board.close()

    def write_split(self, parts: Split) -> None:
        """Write the ids of each part, one a line."""
        for name, ids in (("train", parts.train), ("validation", parts.validation)):
            if self.writes:
                write_text(self.path / f"{name}_ids.txt", "".join(f"{one}\n" for one in ids))

    def write_table(self, name: str, header: list[str], rows: Any) -> None:
        """Write a tab-separated table."""
        if self.writes:
            write_table(self.path / name, header, rows)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        if self.writes:
            write_text(self.path / "summary.json", json_text(summary))


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def remove_run(path: Path) -> None:
    """Delete the files of a run; whatever else is in the folder stays."""
    for one in (path / name for name in RUN_FILES):
        if one.is_dir() and not one.is_symlink():
            shutil.rmtree(one)
        else:
            one.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Delete what a process that was killed while it wrote has left in a run's folder."""
    for name in (*RUN_FILES, f"{CHECKPOINTS}/*.pt"):
        for one in (path / name).parent.glob(f".{Path(name).name}.*"):
            if one.is_file():
                one.unlink(missing_ok=True)
