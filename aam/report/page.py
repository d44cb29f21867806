"""Puts the page together: what page.html.j2 lays out."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from aam.files import write_text
from aam.report import figures
from aam.report.drawing import PALETTE, Figure, style
from aam.report.memory_figure import memory_figure
from aam.report.results import NOTHING, Result, duration, number, read_results
from aam.report.run_files import RunFiles, read_run
from aam.report.target_figures import target_figure

LONGEST_TEXT = 1_500  # letters of one text that are shown; the file itself holds the rest
COLLAPSE = 0.5  # of the true distances' spread; below it the predicted ones hardly differ


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory from the files that are in it.

    The page needs no network and holds no script. Figures and sections whose files are absent
    are left out; a file that cannot be read is named among the warnings.

    Raises:
        InputError: `run_dir` is not a directory, or the page cannot be written there.
    """
    path = Path(run_dir) / "report.html"
    write_text(path, render(read_run(path.parent)))
    return path


def render(run: RunFiles) -> str:
    """The page of a run as one string of HTML."""
    summary, results = run.summary, read_results(run.summary)
    pairs = run.tables.get("distances.tsv")
    warnings = [*(summary.get("warnings") or []), *_distance_warnings(pairs), *run.problems]
    data = sorted(summary.get("data") or [], key=lambda fact: _is_loss(fact), reverse=True)
    config = pd.json_normalize(summary.get("config") or {}).to_dict("records")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=shown,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"number": number, "duration": duration}
    source = resources.files("aam.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        palette=PALETTE,
        title=summary.get("title") or run.path.resolve().name or "Run",
        summary=summary,
        warnings=warnings,
        results=results,
        sentences=_sentences(results, summary),
        baselines={name for one in results for name in one.baselines},
        figures=_figures(run, results),
        data=data,
        lost=sum(map(_is_loss, data)),
        config=config[0] if config else {},
    )


def shown(value: Any) -> Any:
    """Anything as text: without control characters, and cut where it is endless."""
    if isinstance(value, Markup):
        return value
    text = NOTHING if value is None else str(value)
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT:,} letters more)"
    return text


def _sentences(results: list[Result], summary: Mapping[str, Any]) -> list[str]:
    """The results in words, how many baselines were beaten first."""
    column = (summary.get("target") or {}).get("column") or "the target"
    compared = [one.verdict for one in results if one.verdict in ("better", "worse", "equal")]
    said = []
    if compared:
        ahead = compared.count("better")
        said = [f"Better than every baseline in {ahead} of {len(compared)} comparisons."]
    return said + [one.sentence(column) for one in results if one.verdict != "undefined"]


def _distance_warnings(pairs: pd.DataFrame | None) -> list[str]:
    """Where predicted distances have collapsed to nearly one number."""
    if pairs is None:
        return []
    true, predicted = pairs["true"].std(ddof=0), pairs["predicted"].std(ddof=0)
    if predicted >= COLLAPSE * true:
        return []
    return [
        f"Predicted distances hardly differ: their spread is {number(predicted)}, that of the true "
        f"ones {number(true)}."
    ]


def _figures(run: RunFiles, results: list[Result]) -> list[Figure]:
    tables, summary = run.tables, run.summary
    found: list[Figure | None] = []
    with style():
        if "distances.tsv" in tables:
            found.append(figures.distances_figure(tables["distances.tsv"]))
        if "placements.tsv" in tables:
            found.append(figures.placements_figure(tables["placements.tsv"]))
        if "predictions.tsv" in tables:
            found.append(target_figure(tables["predictions.tsv"], summary.get("target") or {}))
        if "distances.tsv" in tables:
            colours = summary.get("colours") or {}
            found.append(figures.ordination_figure(tables["distances.tsv"], colours))
        if "metrics.csv" in tables:
            found.extend(figures.curves_figures(tables["metrics.csv"], results))
        if "memory.tsv" in tables:
            found.append(memory_figure(tables["memory.tsv"]))
    return [figure for figure in found if figure is not None]


def _is_loss(fact: Mapping[str, Any]) -> bool:
    return fact.get("kind") in ("dropped", "cut")
