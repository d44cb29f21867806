"""What a user is told: one line on standard error, or an error that ends the command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


class InputError(ValueError):
    """Input that cannot be used: one line naming the file, column or ids, and the remedy.

    The command line prints the message as ``error: ...`` on standard error and exits with 2.
    """


def log(text: str = "") -> None:
    """One line for the person who waits, on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@dataclass(frozen=True)
class DataFact:
    """One thing that happened to the data, with its count; printed, logged and put in the report.

    Attributes:
        what: what was counted, in words ("sequences cut at 150 bases").
        count: how many.
        detail: the first ids, sizes or the reason.
        kind: ``info`` (nothing lost), ``dropped`` (left out), ``cut`` (shortened).
    """

    what: str
    count: int
    detail: str = ""
    kind: Literal["info", "dropped", "cut"] = "info"


def name_some(ids: Sequence[str], most: int = 3) -> str:
    """Return the first ids, quoted and shortened, for a one-line message ("'a', 'b', 'c', ...")."""
    shown = ", ".join(repr(one if len(one) <= 40 else one[:37] + "...") for one in ids[:most])
    return shown + (", ..." if len(ids) > most else "")


def dropped(what: str, ids: Sequence[str]) -> list[DataFact]:
    """The fact that samples or sequences of these ids are left out, if there are any."""
    return [DataFact(what, len(ids), name_some(ids), "dropped")] if ids else []


def one_line(error: Exception, most: int = 200) -> str:
    """Return another library's message for use within ours: no line breaks, shortened."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:most]


def log_facts(facts: Sequence[DataFact], warnings: Sequence[str] = ()) -> None:
    """Log what was read, dropped and cut, and every warning."""
    for fact in facts:
        detail = f" ({fact.detail})" if fact.detail else ""
        log(f"{'' if fact.kind == 'info' else fact.kind + ': '}{fact.count} {fact.what}{detail}")
    for warning in warnings:
        log(f"warning: {warning}")
