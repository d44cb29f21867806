"""`aam unifrac`: distances between all samples of a table, by a tree or by a pretrained model."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from aam.config import OptionalTableOptions, UnifracConfig
from aam.data.distances import write_distances
from aam.data.samples import read_samples
from aam.data.tree import read_tree
from aam.data.unifrac import UniFrac
from aam.errors import log, log_facts
from aam.evaluation.loaded import load
from aam.evaluation.metrics import condensed
from aam.evaluation.unifrac import unifrac_frame
from aam.files import atomic_path


def unifrac(config: UnifracConfig) -> None:
    """Run `aam unifrac`."""
    output, metric, started = config.output, config.metric, time.perf_counter()
    if config.model is None:
        frame = _by_tree(config)
    else:
        frame = load(config.model, config.device).unifrac(
            config.table, metric, sequences=config.sequences,
            rarefy_depth=config.rarefy_depth, seed=config.seed, engine=config.engine,
        )  # fmt: skip
    values = frame.to_numpy()
    if metric == "faith-pd":
        with atomic_path(output) as temporary:
            frame.to_csv(temporary, sep="\t", float_format="%.9g")
    else:
        write_distances(output, list(frame.index), values)
        values = condensed(values)
    mean, spread = (values.mean(), values.std()) if values.size else (np.nan, np.nan)
    log(
        f"{metric} of {len(frame)} samples: mean {mean:.4f}, sd {spread:.4f} "
        f"({time.perf_counter() - started:.2f} s): {output}"
    )


def _by_tree(config: UnifracConfig) -> Any:
    """A frame of the distances on a tree that has the table's features."""
    assert config.tree is not None
    sequences, depth = config.sequences, config.rarefy_depth
    options = OptionalTableOptions(table=config.table, sequences=sequences, rarefy_depth=depth)
    samples = read_samples(options, config.seed)
    tree = read_tree(config.tree, sequences=sequences)
    source = UniFrac(samples.table, tree, drop_missing=config.drop_missing_tips)
    log_facts(samples.facts + source.facts)
    return unifrac_frame(samples.table, source, config.metric, config.engine)
