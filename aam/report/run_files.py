"""Reads what a run directory holds; whatever is absent is simply not there.

The report is written at the end of hours of training, so a file that is absent or damaged never
stops it: the rest is shown and ``problems`` says which file could not be read and why.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aam.errors import InputError

Series = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Distances:
    """Pairs of validation samples.

    Attributes:
        sample_a: ``(pairs,)`` row of the first sample in ``samples``.
        sample_b: ``(pairs,)`` row of the second.
        true: ``(pairs,)``.
        predicted: ``(pairs,)``.
        same_group: ``(pairs,)`` 1 within a group, 0 between groups, -1 unknown.
        samples: ids in the order in which they are met.
    """

    sample_a: np.ndarray
    sample_b: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    same_group: np.ndarray
    samples: tuple[str, ...]

    def matrix(self, values: np.ndarray) -> np.ndarray | None:
        """``(samples, samples)`` symmetric matrix, or ``None`` where a pair is missing."""
        matrix = np.full((len(self.samples),) * 2, np.nan)
        matrix[self.sample_a, self.sample_b] = values
        matrix[self.sample_b, self.sample_a] = values
        np.fill_diagonal(matrix, 0.0)
        return matrix if np.isfinite(matrix).all() else None


@dataclass(frozen=True)
class Placements:
    """Where left-out ASVs were placed.

    Attributes:
        edits: ``(n,)`` to the nearest known ASV, infinite where there is none.
        support: ``(n,)`` mean probability that the model gives the clades it chose.
        jaccard: ``(n,)`` of predicted and true clades.
        nearest: ``(n,)`` the same of the clades of the nearest known ASV.
    """

    edits: np.ndarray
    support: np.ndarray
    jaccard: np.ndarray
    nearest: np.ndarray


@dataclass(frozen=True)
class Predictions:
    """Predictions of a target, as text; ``probabilities`` are ``(samples, classes)`` or None."""

    ids: tuple[str, ...]
    part: np.ndarray
    true: tuple[str, ...]
    predicted: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: np.ndarray | None


@dataclass
class RunFiles:
    """Everything the report shows."""

    path: Path
    summary: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, dict[str, Series]] = field(default_factory=dict)
    distances: Distances | None = None
    placements: Placements | None = None
    predictions: Predictions | None = None
    memory: list[dict[str, str]] = field(default_factory=list)
    config_text: str | None = None
    problems: list[str] = field(default_factory=list)


def read_run(run_dir: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        InputError: it is not a directory.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise InputError(f"{path}: expected the directory of a run; give the --output-dir of one")
    run = RunFiles(path)
    for name, read in _READERS.items():
        if not (path / name).is_file():
            continue
        try:
            read(path / name, run)
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            reason = f"column {error} is missing" if isinstance(error, KeyError) else str(error)
            run.problems.append(f"{name} could not be read and is left out: {reason}")
    if not (path / "summary.json").is_file():
        run.problems.append("summary.json is absent: results, data and configuration are unknown")
    return run


def to_float(value: Any) -> float:
    """A number, or NaN for anything that is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _summary(path: Path, run: RunFiles) -> None:
    summary = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(summary, dict):
        raise ValueError(f"expected a JSON object, got {type(summary).__name__}")
    run.summary = summary


def _curves(path: Path, run: RunFiles) -> None:
    found: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for row in table_rows(path, delimiter=","):
        steps, values = found.setdefault((row["metric"], row["part"]), ([], []))
        steps.append(to_float(row["step"]))
        values.append(to_float(row["value"]))
    not_finite = 0
    for (metric, part), (steps, values) in found.items():
        step, value = np.array(steps), np.array(values)
        finite = np.isfinite(step) & np.isfinite(value)
        not_finite += int((~finite).sum())
        if finite.any():
            run.curves.setdefault(metric, {})[part] = (step[finite], value[finite])
    if not_finite:
        run.problems.append(
            f"{not_finite} values in metrics.csv are not finite numbers and are not drawn"
        )


def _distances(path: Path, run: RunFiles) -> None:
    rows: dict[str, int] = {}
    first, second, true, predicted, group = [], [], [], [], []
    for row in table_rows(path):
        first.append(rows.setdefault(row["sample_a"], len(rows)))
        second.append(rows.setdefault(row["sample_b"], len(rows)))
        true.append(to_float(row["true"]))
        predicted.append(to_float(row["predicted"]))
        group.append({"1": 1, "0": 0}.get(row.get("same_group") or "", -1))
    if first:
        run.distances = Distances(
            sample_a=np.array(first),
            sample_b=np.array(second),
            true=np.array(true),
            predicted=np.array(predicted),
            same_group=np.array(group),
            samples=tuple(rows),
        )


def _placements(path: Path, run: RunFiles) -> None:
    names = ("edits", "support", "jaccard", "jaccard_of_nearest")
    rows = [[to_float(row[name]) for name in names] for row in table_rows(path)]
    if rows:
        run.placements = Placements(*np.array(rows).T)


def _predictions(path: Path, run: RunFiles) -> None:
    rows = list(table_rows(path))
    if not rows:
        return
    prefix = "probability_"
    columns = [name for name in rows[0] if name.startswith(prefix)]
    run.predictions = Predictions(
        ids=tuple(row["sample-id"] for row in rows),
        part=np.array([row.get("part") or "" for row in rows], dtype=object),
        true=tuple(row.get("true") or "" for row in rows),
        predicted=tuple(row["predicted"] for row in rows),
        classes=tuple(name[len(prefix) :] for name in columns),
        probabilities=np.array([[to_float(row[name]) for name in columns] for row in rows])
        if columns
        else None,
    )


def _memory(path: Path, run: RunFiles) -> None:
    rows = list(table_rows(path))
    for row in rows:
        row["section"], row["name"], row["part"], row["detail"], float(row["bytes"])
    run.memory = rows


def _config(path: Path, run: RunFiles) -> None:
    run.config_text = path.read_text(encoding="utf-8")


_READERS = {
    "summary.json": _summary,
    "metrics.csv": _curves,
    "distances.tsv": _distances,
    "placements.tsv": _placements,
    "predictions.tsv": _predictions,
    "memory.tsv": _memory,
    "config.toml": _config,
}


def table_rows(path: Path, delimiter: str = "\t") -> Iterator[dict[str, str]]:
    """Rows by column name. Quotes are ordinary characters: an id may hold one."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        header = next(reader, None)
        for number, row in enumerate(reader, start=2):
            if header is None or len(row) != len(header):
                expected = 0 if header is None else len(header)
                raise ValueError(f"line {number} has {len(row)} fields, expected {expected}")
            yield dict(zip(header, row, strict=True))
