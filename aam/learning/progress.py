"""What a person sees while a run goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from aam.errors import log

LINE_SECONDS = 10.0  # without a terminal: one line this often
SHOWN = {
    "loss": "loss", "unifrac_loss": "unifrac", "clade_loss": "clades",
    "nucleotide_loss": "nucleotide", "target_loss": "target", "count_loss": "count",
    "samples_per_second": "samples/s",
}  # fmt: skip


class ProgressDisplay:
    """A progress bar on a terminal; now and then a line elsewhere."""

    def __init__(self, total: int, done: int = 0) -> None:
        """Show a run of `total` steps of which `done` are done."""
        self.total, self.first = total, done
        self._bar: Any = None
        self._started = self._logged = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        """Start the bar: steps and time left first, so that a narrow terminal cuts the losses."""
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console
            from rich.table import Column

            losses = Column(ratio=1, no_wrap=True, overflow="ellipsis")
            self._bar = progress.Progress(
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(compact=True),
                progress.BarColumn(bar_width=12),
                progress.TextColumn("epoch {task.fields[epoch]}"),
                progress.TextColumn("{task.fields[losses]}", table_column=losses),
                console=Console(stderr=True),
                expand=True,
            )
            self._bar.start()
            shown = {"total": self.total, "completed": self.first, "epoch": 1, "losses": ""}
            self._task = self._bar.add_task("", **shown)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, epoch: int, measured: Mapping[str, float]) -> None:
        """Show a finished step."""
        shown = [name for name in SHOWN if name in measured]
        losses = "  ".join(f"{SHOWN[name]} {measured[name]:.4g}" for name in shown)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, epoch=epoch + 1, losses=losses)
            return
        now = time.monotonic()
        if step == self.first + 1 or now - self._logged > LINE_SECONDS:
            self._logged = now
            rest = int((now - self._started) / max(1, step - self.first) * (self.total - step))
            left = f"{rest // 60}:{rest % 60:02d} left"
            log(f"step {step}/{self.total}  {left}  epoch {epoch + 1}  {losses}")

    def validated(self, step: int, measured: Mapping[str, float | None]) -> None:
        """Show the numbers of a validation."""
        numbers = (f"{name} {value:.4g}" for name, value in measured.items() if value is not None)
        text = f"validation at step {step}: {'  '.join(numbers)}"
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            log(text)
