"""`aam unifrac`: distances between all samples of a table, by a tree or by a pretrained model."""

from __future__ import annotations

import time

import numpy as np

from aam.config import UnifracConfig
from aam.data.distances import write_distances
from aam.data.samples import read_rarefied
from aam.data.tree import read_tree
from aam.data.unifrac import UniFrac
from aam.errors import InputError, log, log_facts
from aam.evaluation.applicability import of_placed
from aam.evaluation.placer import load_placer, unifrac_by_model
from aam.files import write_table
from aam.learning.device import pick_device


def unifrac(config: UnifracConfig) -> None:
    """Run `aam unifrac`."""
    check_options(config)
    placer = None if config.model is None else load_placer(config.model, pick_device(config.device))
    clock = [time.perf_counter()]
    table, facts = read_rarefied(config.table, config.sequences, config.rarefy_depth, config.seed)
    clock.append(time.perf_counter())
    if placer is not None:
        placed = placer.place(table.feature_ids)
        known, warnings = of_placed(table, placed)
        log_facts(facts + known, warnings)
        source = unifrac_by_model(table, placer.clades, placed)
    else:
        assert config.tree is not None
        tree = read_tree(config.tree, sequences=config.sequences)
        source = UniFrac(table, tree, drop_missing=config.drop_missing_tips)
        log_facts(facts + source.facts)
    clock.append(time.perf_counter())
    if config.metric == "faith-pd":
        values = distances = source.faith_pd()
    else:
        distances = source.by(config.metric).pairwise()
        values = distances[np.triu_indices(len(distances), 1)]
    clock.append(time.perf_counter())
    if config.metric == "faith-pd":
        rows = ((name, f"{one:.9g}") for name, one in zip(table.sample_ids, values, strict=True))
        write_table(config.output, ["sample-id", "faith_pd"], rows)
    else:
        write_distances(config.output, table.sample_ids, distances)
    clock.append(time.perf_counter())
    mean, sd = (values.mean(), values.std()) if values.size else (np.nan, np.nan)
    steps = zip(("table", "tree", "distances", "write"), np.diff(clock), strict=True)
    took = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in steps)
    log(
        f"{config.metric} of {len(source)} samples and {len(source.tree.tip_names)} features: mean "
        f"{mean:.4f}, sd {sd:.4f} ({took}): {config.output}"
    )


def check_options(config: UnifracConfig) -> None:
    """Refuse, before any work, options that cannot be.

    Raises:
        InputError: says which, and the remedy.
    """
    if (config.tree is None) == (config.model is None):
        raise InputError("give either --tree or --model: what places the table's features")
    kinds = (".tsv",) if config.metric == "faith-pd" else (".h5", ".tsv")
    if config.output.suffix.lower() not in kinds:
        raise InputError(
            f"{config.output}: unknown extension {config.output.suffix!r} for {config.metric}; "
            f"write to {' or '.join(kinds)}"
        )
