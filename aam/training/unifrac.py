"""`aam unifrac`: distances between all samples of a table."""

from __future__ import annotations

from aam.config import UnifracConfig
from aam.data.distances import compute_unifrac
from aam.training.runs import say


def unifrac(config: UnifracConfig) -> None:
    """Run `aam unifrac`."""
    summary = compute_unifrac(
        config.table,
        config.tree,
        config.metric,
        config.output,
        sequences=config.sequences,
        rarefy_depth=config.rarefy_depth,
        seed=config.seed,
        drop_missing_tips=config.drop_missing_tips,
        overwrite=config.overwrite,
    )
    for fact in summary.facts:
        say(f"{fact.kind}: {fact.count} {fact.what} ({fact.detail})")
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in summary.seconds.items())
    say(
        f"{config.metric} of {summary.samples} samples and {summary.features} features: mean "
        f"{summary.mean:.4f}, sd {summary.standard_deviation:.4f} ({parts}): {config.output}"
    )
