"""Puts the page together: sections, tables, escaping."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aam.errors import InputError
from aam.report import figures
from aam.report.memory_figure import memory_figure
from aam.report.placement_figure import placement_figure
from aam.report.results import (
    NOTHING,
    Result,
    distance_warnings,
    duration,
    number,
    read_results,
    sentence,
)
from aam.report.run_files import RunFiles, read_run
from aam.report.target_figures import target_figures
from aam.report.theme import STYLE

LONGEST_TEXT = 1_500
"""Letters of one text from the run that are shown; the file itself holds the rest."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The browser is told to load nothing and to run nothing."""

MARKS = {"better": "▲", "worse": "▼", "equal": "=", "undefined": "?", "no baseline": ""}

PLACEMENT = ("placement", "nearest known ASV")
"""Baselines that are nearest-neighbour placement."""


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run directory from the files that are in it.

    The page needs no network and holds no script. Figures and sections whose files are absent
    are left out; a file that cannot be read is named among the warnings. The page is written
    beside its place and moved there, so that no half page is ever seen.

    Args:
        run_dir: directory of a run: summary.json, metrics.csv, distances.tsv, placements.tsv,
            predictions.tsv, memory.tsv, config.toml, each optional.

    Returns:
        Path of the page.

    Raises:
        InputError: ``run_dir`` is not a directory, or the page cannot be written there.
    """
    run = read_run(Path(run_dir))
    page = render(run)
    path = run.path / "report.html"
    try:
        handle, name = tempfile.mkstemp(dir=run.path, prefix=".report-", suffix=".html")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(page)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free it or its disk"
        ) from error
    return path


def render(run: RunFiles) -> str:
    """The page of a run as one string of HTML."""
    results = read_results(run.summary)
    drawn = [
        [figures.distances_figure(run.distances)],
        [placement_figure(run.placements)],
        target_figures(run.predictions, run.summary.get("target")),
        [figures.ordination_figure(run)],
        [figures.curves_figure(run.curves, results)],
        [figures.mechanics_figure(run.curves)],
        [memory_figure(run.memory)],
    ]
    groups = [found for group in drawn if (found := [figure for figure in group if figure])]
    given = run.summary.get("warnings")
    warnings = [str(entry) for entry in given] if isinstance(given, list) else []
    warnings += distance_warnings(run.distances) + run.problems
    sections = [
        ("results", "Results", _results(results, run.summary)),
        *((f"section-{group[0].id}", group[0].title, _figures(group)) for group in groups),
        ("data", "Data", _data(run.summary.get("data"))),
    ]
    present = [entry for entry in sections if entry[2]]
    body = "".join(
        f'<section id="{name}"><h2>{text(title)}</h2>{inner}</section>\n'
        for name, title, inner in present
    )
    configuration = _configuration(run)
    if configuration:
        present.append(("configuration", "Configuration", ""))
    title = text(run.summary.get("title") or run.path.resolve().name or "Run")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><div>{_header(title, run.summary)}{_navigation(present)}</div></header>\n<main>\n"
        f"{_warnings(warnings)}{body}{configuration}</main>\n{_footer(run.summary)}"
        "</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """Anything as HTML text: escaped, without control characters, cut where endless."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(value))
    if len(shown) > LONGEST_TEXT:
        shown = f"{shown[:LONGEST_TEXT]} … ({len(shown) - LONGEST_TEXT:,} letters more)"
    return html.escape(shown, quote=True)


def _header(title: str, summary: Mapping[str, Any]) -> str:
    facts = []
    for name, value in (
        ("training samples", summary.get("samples_train")),
        ("validation samples", summary.get("samples_validation")),
        ("training sequences", summary.get("sequences_train")),
        ("left-out sequences", summary.get("sequences_validation")),
        ("steps", summary.get("steps")),
        ("epochs", summary.get("epochs")),
        ("parameters", summary.get("parameters")),
    ):
        if value is not None:
            facts.append((name, number(value) if float_like(value) else text(value)))
    if summary.get("seconds") is not None:
        facts.append(("time", duration(summary["seconds"])))
    if summary.get("device"):
        threads = f", {text(summary['threads'])} threads" if summary.get("threads") else ""
        facts.append(("device", text(summary["device"]) + threads))
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    started = f'<p class="ran">{text(summary["started"])}</p>' if summary.get("started") else ""
    command = summary.get("command")
    if isinstance(command, list):
        command = " ".join(str(word) for word in command)
    shown = f'<pre class="command"><code>{text(command)}</code></pre>' if command else ""
    facts_list = f'<dl class="facts">{listed}</dl>' if listed else ""
    return f"<h1>{title}</h1>{started}{facts_list}{shown}"


def _navigation(sections: Sequence[tuple[str, str, str]]) -> str:
    links = "".join(f'<a href="#{name}">{text(title)}</a>' for name, title, _ in sections)
    return f'<nav aria-label="Sections">{links}</nav>' if links else ""


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    listed = "".join(f"<li>{text(entry)}</li>" for entry in warnings[:50])
    if len(warnings) > 50:
        listed += f"<li>{len(warnings) - 50} more in summary.json</li>"
    title = "Warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
    return (
        f'<div class="warnings" id="warnings" role="note"><h2>{title}</h2><ul>{listed}</ul></div>\n'
    )


def _results(results: Sequence[Result], summary: Mapping[str, Any]) -> str:
    if not results:
        return ""
    target = summary.get("target")
    column = (
        str(target.get("column") or "the target") if isinstance(target, Mapping) else "the target"
    )
    judged = [result for result in results if result.verdict in ("better", "worse", "equal")]
    words = []
    if judged:
        ahead = sum(result.verdict == "better" for result in judged)
        words.append(f"Better than every baseline in {ahead} of {len(judged)} comparisons.")
    words += [
        sentence(r, column) for r in results if r.verdict != "undefined" and r.part != "train"
    ]
    said = "".join(f"<li>{text(line)}</li>" for line in words)
    rows = "".join(_result_row(result) for result in results)
    return (
        f'<ul class="words">{said}</ul>\n'
        '<div class="scroll"><table class="stack" id="result-table">'
        "<thead><tr><th>Metric</th><th>Model</th><th>Verdict</th><th>Baselines</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{_placement_note(results)}"
    )


def _placement_note(results: Sequence[Result]) -> str:
    copied = [name for name in PLACEMENT if any(name in result.baselines for result in results)]
    if not copied:
        return ""
    named = f"The baseline {copied[0]!r}" if len(copied) == 1 else "The baselines {!r} and {!r}"
    verb = "is" if len(copied) == 1 else "are"
    return (
        f'<p class="quiet">{text(named.format(*copied))} {verb} nearest-neighbour placement: a new '
        "ASV joins the tree beside the most similar known ASV.</p>"
    )


def _result_row(result: Result) -> str:
    best = result.best
    listed = "".join(
        f'<li class="{"best" if best and name == best[0] else "quiet"}">{text(name)} '
        f'<span class="number">{number(value)}</span></li>'
        for name, value in result.baselines.items()
    )
    verdict = result.verdict
    words = {
        "undefined": "not defined",
        "no baseline": "no baseline",
        "equal": f"equal to {best[0] if best else ''}",
        "better": f"better than {best[0] if best else ''}",
        "worse": f"worse than {best[0] if best else ''}",
    }[verdict]
    if best is not None and verdict in ("better", "worse"):
        words += f" by {number(abs(result.value - best[1]))}"
    direction = "higher is better" if result.higher_is_better else "lower is better"
    unit = f' <span class="quiet">{text(result.unit)}</span>' if result.unit else ""
    return (
        f'<tr><th scope="row">{text(result.name)}<br><span class="quiet">{text(result.part)}, '
        f'{direction}</span></th><td class="number"><span class="main">{number(result.value)}'
        f'</span>{unit}</td><td><span class="chip {verdict.replace(" ", "-")}">{MARKS[verdict]} '
        f'{text(words)}</span></td><td><ul class="baselines">{listed or f"<li>{NOTHING}</li>"}'
        "</ul></td></tr>"
    )


def _figures(group: Sequence[figures.Figure]) -> str:
    """One figure, or several side by side where the page is wide."""
    drawn = "".join(_figure(figure) for figure in group)
    return drawn if len(group) == 1 else f'<div class="pair">{drawn}</div>'


def _figure(figure: figures.Figure) -> str:
    wide = " wide" if figure.wide else ""
    return (
        f'<figure id="{figure.id}"><div class="panels{wide}">{"".join(figure.panels)}</div>'
        f"<figcaption>{text(figure.caption)}</figcaption></figure>"
    )


def _data(facts: Any) -> str:
    entries = [fact for fact in facts or [] if isinstance(fact, Mapping)]
    if not entries:
        return ""
    order = {"dropped": 0, "cut": 1}
    entries.sort(key=lambda fact: order.get(str(fact.get("kind")), 2))
    lost = sum(str(fact.get("kind")) in order for fact in entries)
    said = (
        f"{lost} of {len(entries)} entries are about something dropped or cut; they come first."
        if lost
        else "Nothing was dropped and nothing was cut."
    )
    rows = "".join(
        f'<tr><th scope="row">{text(fact.get("what", ""))}</th>'
        f'<td class="number">{number(fact.get("count"))}</td>'
        f'<td><span class="chip {_kind(fact)}">{text(fact.get("kind") or "info")}</span></td>'
        f"<td>{text(fact.get('detail') or '')}</td></tr>"
        for fact in entries[:200]
    )
    more = f"<p>{len(entries) - 200} more in summary.json.</p>" if len(entries) > 200 else ""
    return (
        f'<p>{said}</p><div class="scroll"><table class="stack" id="data-table"><thead><tr>'
        "<th>What</th><th>Count</th><th>Kind</th><th>Detail</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{more}"
    )


def _kind(fact: Mapping[str, Any]) -> str:
    return kind if (kind := str(fact.get("kind"))) in ("dropped", "cut") else "info"


def _configuration(run: RunFiles) -> str:
    config = run.summary.get("config")
    if isinstance(config, Mapping) and config:
        rows = "".join(
            f'<tr><th scope="row"><code>{text(name)}</code></th><td>{text(value)}</td></tr>'
            for name, value in _flat(config)
        )
        inner = (
            "<table><thead><tr><th>Option</th><th>Value</th></tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )
    elif run.config_text:
        inner = f"<pre><code>{text(run.config_text)}</code></pre>"
    else:
        return ""
    return (
        '<section id="configuration"><details><summary><h2>Configuration</h2></summary>'
        f'<div class="scroll">{inner}</div></details></section>\n'
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", NOTHING if value is None else value


def _footer(summary: Mapping[str, Any]) -> str:
    named = (("aam", "aam_version"), ("torch", "torch_version"))
    versions = [f"{name} {text(summary[key])}" for name, key in named if summary.get(key)]
    return (
        f"<footer><p>Written by {', '.join(versions) or 'aam'}. "
        "This page loads nothing from elsewhere.</p></footer>\n"
    )


def float_like(value: Any) -> bool:
    """Whether a value of the summary is a number rather than words."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
