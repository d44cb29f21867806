"""`aam inspect`: what is in the files, before anything is trained."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from aam.batching import EpochPlan
from aam.config import InspectConfig
from aam.data.dataset import SampleDataset
from aam.data.facts import DataFact, name_some
from aam.data.metadata import require_values
from aam.errors import InputError
from aam.training.prepare import Samples, attach_distances, make_dataset, read_samples, split, tell

BATCHES_LOOKED_AT = 200


def inspect(config: InspectConfig) -> None:
    """Run `aam inspect`; prints on standard output, writes nothing."""
    from rich.console import Console
    from rich.table import Table

    samples = read_samples(config.data, config.seed, metadata=config.metadata.metadata)
    labels = None
    table = Table("what", "value", title=None)
    if config.metadata_column is not None:
        labels = _describe_target(table, samples, config)
    if config.distances.tree is not None or config.distances.unifrac_matrix is not None:
        distances = attach_distances(samples, config.data, config.distances)
        _describe_distances(table, distances, len(samples.ids))
    dataset = make_dataset(samples, config.data)
    parts = split(samples, config.metadata, config.seed, labels=labels)
    table.add_row("training / validation samples", f"{len(parts.train)} / {len(parts.validation)}")
    _describe_cost(table, dataset, samples.rows(parts.train), config)
    tell(samples)
    Console(width=110, highlight=False).print(table)


def _describe_target(table: Any, samples: Samples, config: InspectConfig) -> list[str] | None:
    """Kind and values of the target; its classes as labels for the split."""
    metadata, column = samples.metadata, config.metadata_column
    if metadata is None or column is None:
        raise InputError("--metadata-column needs --metadata")
    values = metadata.text(column)
    numeric = metadata.is_numeric(column)
    require_values(metadata, column, numeric=numeric)
    present = [value for value in values if value is not None]
    lacking = [name for name, value in zip(samples.ids, values, strict=True) if value is None]
    if lacking:
        what = f"samples without a value of {column!r}"
        samples.facts.append(DataFact(what, len(lacking), name_some(lacking), "dropped"))
        samples.keep([n for n, v in zip(samples.ids, values, strict=True) if v is not None])
    if numeric:
        numbers = np.array([float(value) for value in present])
        table.add_row(
            f"target {column!r}",
            f"number, mean {numbers.mean():.4g}, sd {numbers.std():.4g}, "
            f"{numbers.min():.4g} to {numbers.max():.4g}",
        )
        return None
    sizes = ", ".join(f"{name} {size}" for name, size in sorted(Counter(present).items()))
    table.add_row(f"target {column!r}", f"classes: {sizes}")
    return [str(value) for value in present]


def _describe_distances(table: Any, distances: Any, count: int) -> None:
    rows = np.sort(np.random.default_rng(0).permutation(count)[:BATCHES_LOOKED_AT])
    values = distances.pairwise(rows)[np.triu_indices(len(rows), 1)]
    table.add_row("true distances", f"mean {values.mean():.3f}, sd {values.std():.3f}")


def _describe_cost(
    table: Any, dataset: SampleDataset, rows: np.ndarray, config: InspectConfig
) -> None:
    """Lengths, shared ASVs and what a step computes."""
    count = dataset.asv_count
    table.add_row("ASVs a sample", f"mean {count.mean():.0f}, most {count.max()}")
    lengths = dataset.sequence_lengths - 1
    table.add_row(
        "nucleotides an ASV", f"{lengths.min()} to {lengths.max()}, mean {lengths.mean():.0f}"
    )
    plan = EpochPlan(rows, (config.batch_size or 8), config.seed)
    batches = [dataset.batch(one) for one in plan.batches(0)[:BATCHES_LOOKED_AT]]
    slots = np.array([len(batch.slots.values) for batch in batches])
    distinct = np.array([len(batch.asv_ids) for batch in batches])
    tokens = np.array([len(batch.tokens.values) for batch in batches])
    table.add_row(f"steps an epoch (--batch-size {(config.batch_size or 8)})", str(len(plan)))
    table.add_row(
        "distinct ASVs a step",
        f"mean {distinct.mean():.0f} of {slots.mean():.0f} slots "
        f"(share {distinct.sum() / slots.sum():.2f})",
    )
    table.add_row("nucleotides a step", f"mean {tokens.mean():,.0f}, most {tokens.max():,}")
    padded = np.mean([len(batch) for batch in batches]) * config.data.token_limit
    table.add_row(
        "padding avoided",
        f"{1 - slots.mean() / padded:.0%} of {padded:,.0f} slots "
        f"(--token-limit {config.data.token_limit})",
    )
