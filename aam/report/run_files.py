"""Reads what a run folder holds; what is absent is left out.

The report is written at the end of hours of training, so a damaged file never stops it: the rest
is shown, and `problems` says which file could not be read and why.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aam.errors import InputError

TABLES = {  # file: its columns of text, and those of numbers
    "metrics.csv": (("metric", "part"), ("step", "value")),
    "distances.tsv": (("sample_a", "sample_b", "same_group"), ("true", "predicted")),
    "placements.tsv": (("edits",), ("support", "jaccard", "jaccard_of_nearest")),
    "predictions.tsv": (("part", "true", "predicted"), ()),
    "memory.tsv": (("section", "name", "part", "detail"), ("bytes",)),
}


@dataclass
class RunFiles:
    """Everything that the report shows; tables by the name of their file, never empty."""

    path: Path
    summary: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_run(path: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        InputError: it is not a directory.
    """
    if not path.is_dir():
        raise InputError(f"{path}: expected the directory of a run; give the --output-dir of one")
    run = RunFiles(path)
    if not (path / "summary.json").exists():
        run.problems.append("summary.json is absent: results, data and options are unknown")
    for name in ("summary.json", *TABLES):
        if not (path / name).exists():
            continue
        try:
            if name == "summary.json":
                run.summary = dict(json.loads((path / name).read_text(encoding="utf-8")))
                continue
            table, left_out = read_table(path / name)
        except (OSError, ValueError, TypeError) as error:
            run.problems.append(f"{name} could not be read and is left out: {error}")
            continue
        if len(table):
            run.tables[name] = table
        if left_out:
            said = "rows hold a number that is not finite and are left out"
            run.problems.append(f"{name}: {left_out} {said}")
    return run


def read_table(path: Path) -> tuple[pd.DataFrame, int]:
    """A table of a run, and how many rows without finite numbers are left out of it.

    Raises:
        ValueError: a column is missing.
    """
    text, numbers = TABLES[path.name]
    separator = "," if path.suffix == ".csv" else "\t"
    # An id may hold a quote, and a class may be called NA.
    table = pd.read_csv(
        path, sep=separator, dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE
    )
    missing = [name for name in (*text, *numbers) if name not in table]
    if missing:
        raise ValueError(f"column {missing[0]!r} is missing")
    if path.name == "predictions.tsv" and not table.columns.str.startswith("probability_").any():
        numbers = ("true", "predicted")
    for name in numbers:
        table[name] = pd.to_numeric(table[name], errors="coerce")
    finite = np.isfinite(table[list(numbers)]).all(axis=1)
    return table[finite], int((~finite).sum())
