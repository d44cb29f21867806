"""A measured number beside its baselines: one form for the screen and for the summary."""

from __future__ import annotations

from typing import Any


def result(
    name: str,
    value: float | None,
    simple: dict[str, float | None],
    *,
    higher_is_better: bool = True,
    part: str = "validation",
) -> dict[str, Any]:
    """One measured number beside its baselines, as the summary holds it."""
    return {
        "name": name,
        "part": part,
        "value": value,
        "unit": "",
        "higher_is_better": higher_is_better,
        "baselines": simple,
    }


def print_results(results: list[dict[str, Any]]) -> None:
    """Print the measured numbers, each beside its baselines, on standard output."""
    from rich.console import Console
    from rich.table import Table

    def show(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.4f}"  # errors are small

    table = Table("validation", "model", "baselines", title=None)
    for one in results:
        simple = ", ".join(f"{name} {show(value)}" for name, value in one["baselines"].items())
        table.add_row(one["name"], show(one["value"]), simple)
    Console(width=110, highlight=False).print(table)
