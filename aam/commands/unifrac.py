"""`aam unifrac`: distances between all samples of a table, by a tree or by a pretrained model."""

from __future__ import annotations

import time

from aam.config import UnifracConfig
from aam.data.distances import (
    UnifracSummary,
    check_output,
    compute_unifrac,
    read_rarefied,
    write_unifrac,
)
from aam.errors import InputError, log, log_facts
from aam.evaluation.applicability import of_placed
from aam.evaluation.placer import load_placer, unifrac_by_model
from aam.learning.device import pick_device


def unifrac(config: UnifracConfig) -> None:
    """Run `aam unifrac`."""
    if (config.tree is None) == (config.model is None):
        raise InputError("give either --tree or --model: what places the table's features")
    if config.tree is None:
        summary = unifrac_by_placing(config)
    else:
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
        log(f"{fact.kind}: {fact.count} {fact.what} ({fact.detail})")
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in summary.seconds.items())
    log(
        f"{config.metric} of {summary.samples} samples and {summary.features} features: mean "
        f"{summary.mean:.4f}, sd {summary.standard_deviation:.4f} ({parts}): {config.output}"
    )


def unifrac_by_placing(config: UnifracConfig) -> UnifracSummary:
    """Distances by what a pretrained model knows; features that it does not know are placed."""
    assert config.model is not None
    check_output(config.output, config.metric, config.overwrite)
    placer = load_placer(config.model, pick_device(config.device))
    clock = [time.perf_counter()]
    table, facts = read_rarefied(config.table, config.sequences, config.rarefy_depth, config.seed)
    clock.append(time.perf_counter())
    placed = placer.place(table.feature_ids)
    known, warnings = of_placed(table, placed)
    log_facts(facts + known, warnings)
    unifrac = unifrac_by_model(table, placer.clades, placed)
    if config.metric != "faith-pd":
        unifrac = unifrac.by(config.metric)
    clock.append(time.perf_counter())
    return write_unifrac(unifrac, config.metric, config.output, [], clock)
