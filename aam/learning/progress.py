"""What a person sees while a run goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

LINE_SECONDS = 10.0  # without a terminal: one line this often
SHOWN = {
    "loss": "loss",
    "unifrac_loss": "unifrac",
    "nucleotide_loss": "nucleotide",
    "target_loss": "target",
    "count_loss": "count",
    "samples_per_second": "samples/s",
}


class ProgressDisplay:
    """A progress bar on a terminal; now and then a line elsewhere."""

    def __init__(self, total: int, done: int = 0) -> None:
        """Show a run of `total` steps of which `done` are done."""
        self.total, self.first = total, done
        self._bar: Any = None
        self._started = self._said = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        """Start the bar."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[losses]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "", total=self.total, completed=self.first, epoch=1, losses=""
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, epoch: int, measured: Mapping[str, float]) -> None:
        """Show a finished step."""
        losses = "  ".join(
            f"{label} {measured[name]:.4g}" for name, label in SHOWN.items() if name in measured
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, epoch=epoch + 1, losses=losses)
            return
        now = time.monotonic()
        if step == self.first + 1 or now - self._said > LINE_SECONDS:
            self._said = now
            rest = (now - self._started) / max(1, step - self.first) * (self.total - step)
            self._line(
                f"step {step}/{self.total}  epoch {epoch + 1}  {losses}  "
                f"{int(rest) // 60}:{int(rest) % 60:02d} left"
            )

    def validated(self, step: int, measured: Mapping[str, float | None]) -> None:
        """Show the numbers of a validation."""
        numbers = "  ".join(
            f"{name} {value:.4g}" for name, value in measured.items() if value is not None
        )
        self._line(f"validation at step {step}: {numbers}")

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
