"""From files to samples: table, rarefaction, matching ids, distances and the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aam.config import DistanceOptions, MetadataOptions, TableOptions
from aam.data.dataset import SampleDataset
from aam.data.distances import PrecomputedDistances, read_distances
from aam.data.facts import DataFact, name_some
from aam.data.index import IndexUnwritableError, TableIndex, open_index, size_in_memory
from aam.data.matching import match_ids
from aam.data.metadata import Metadata, read_metadata
from aam.data.phylogeny import UniFrac
from aam.data.samples import Samples
from aam.data.splits import Split, leaking_columns, split_samples
from aam.data.table import rarefy, read_table
from aam.data.table_distances import TableDistances
from aam.data.tree import Phylogeny, read_tree
from aam.errors import InputError, log
from aam.files import refuse_breaks

LARGE_TABLE = 500 * 10**6
"""Bytes in memory from which on a table is kept on disk (--on-disk auto)."""

JUDGED_SAMPLES = 2000
"""Most validation samples of which all pairs are compared."""


def read_samples(
    options: TableOptions,
    seed: int,
    *,
    metadata: Path | None = None,
    keep_unmatched: bool = False,
) -> Samples:
    """Read a table, rarefy it and match it with metadata.

    Args:
        options: the table's options.
        seed: of the rarefaction.
        metadata: sample metadata; samples without a row are an error or, on request, dropped.
        keep_unmatched: keep samples that may lack a row; all their cells are then missing.

    Raises:
        InputError: a file cannot be used, an id is broken, or a sample has no metadata.
    """
    depth = options.rarefy_depth
    index = open_on_disk(options, seed)
    table = read_table(options.table, sequences=options.sequences) if index is None else index.table
    ids = table.sample_ids if index is None else index.file_ids
    refuse_breaks(ids, table.source, "sample ids")
    samples = Samples(table)
    samples.facts.append(DataFact("samples in the table", len(ids), table.source))
    kept = ids
    if metadata is not None:
        known = read_metadata(metadata)
        kept, facts = match_ids(
            ids,
            known.ids,
            allow_missing=options.allow_missing,
            table_source=str(options.table),
            metadata_source=str(metadata),
        )
        if keep_unmatched:
            known, facts = _with_empty_rows(known, ids, facts)
            kept = ids
        samples.facts += facts
        samples.metadata = known
    if index is not None:
        enough, dropped = index.enough_reads(kept)
        samples.keep(enough)
    else:
        samples.keep(kept)
        dropped = ()
        if depth:
            samples.table, dropped = rarefy(samples.table, depth, seed)
            samples.keep(samples.ids)
    if dropped:
        what = f"samples with fewer than {depth} reads (--rarefy-depth)"
        samples.facts.append(DataFact(what, len(dropped), name_some(dropped), "dropped"))
    samples.facts.append(DataFact("samples used", len(samples.ids)))
    samples.facts.append(DataFact("distinct ASVs", len(samples.table.feature_ids)))
    return samples


def open_on_disk(options: TableOptions, seed: int) -> TableIndex | None:
    """The table's index on disk, or None where the table is to be read into memory.

    Raises:
        InputError: the table cannot be used, or cannot be indexed although --on-disk always.
    """
    if options.on_disk == "never":
        return None
    size = size_in_memory(options.table)
    if options.on_disk == "auto" and (size is None or size < LARGE_TABLE):
        return None
    if size is None:
        raise InputError(
            f"--on-disk always: {options.table} is no BIOM 2.1 (HDF5) table: export it as one, "
            "or read it with --on-disk auto"
        )
    how = {
        "sequences": options.sequences,
        "depth": options.rarefy_depth,
        "seed": seed,
        "by_sequence": options.asv_sampling != "first",
    }
    try:
        return open_index(options.table, how, options.index_dir, log)
    except IndexUnwritableError as error:
        if options.on_disk == "always":
            raise
        log(f"{options.table} is read into memory: {error}")
        return None


def _with_empty_rows(
    metadata: Metadata, ids: Sequence[str], facts: list[DataFact]
) -> tuple[Metadata, list[DataFact]]:
    """Metadata with a row of missing cells for every id that has none, and facts that say so."""
    known = set(metadata.ids)
    lacking = tuple(name for name in ids if name not in known)
    cells = {name: column + (None,) * len(lacking) for name, column in metadata.cells.items()}
    told = [
        replace(one, kind="info", detail=f"kept as unknown: {one.detail}")
        if one.kind == "dropped"
        else one
        for one in facts
    ]
    return replace(metadata, ids=metadata.ids + lacking, cells=cells), told


def attach_tree(samples: Samples, tree: Phylogeny, drop_missing: bool) -> UniFrac:
    """Unweighted UniFrac of the samples by a tree.

    Raises:
        InputError: the tree does not hold the table's features.
    """
    source = UniFrac(samples.table, tree, "unweighted", drop_missing=drop_missing)
    samples.facts += source.facts
    return source


def attach_distances(
    samples: Samples, table_options: TableOptions, options: DistanceOptions
) -> UniFrac | PrecomputedDistances | TableDistances:
    """True distances between the samples: by a tree, from a matrix, or of the table itself.

    Samples without distances are dropped from `samples` where that is allowed.

    Raises:
        InputError: none or several are given, or they do not fit the table.
    """
    given = [options.tree, options.unifrac_matrix, options.distance]
    if sum(one is not None for one in given) != 1:
        raise InputError(
            "give one of --tree, --unifrac-matrix and --distance: what samples are compared by"
        )
    if options.tree is not None:
        tree = read_tree(options.tree, sequences=table_options.sequences)
        return attach_tree(samples, tree, options.drop_missing_tips)
    if options.distance is not None:
        return TableDistances.of(samples.table, options.distance)
    assert options.unifrac_matrix is not None
    matrix = read_distances(
        options.unifrac_matrix,
        sample_ids=samples.ids,
        ids_file=options.unifrac_matrix_ids,
        allow_missing=table_options.allow_missing,
        table_source=str(table_options.table),
    )
    samples.facts += matrix.facts
    samples.keep(matrix.sample_ids)
    return matrix


def split(
    samples: Samples,
    options: MetadataOptions,
    seed: int,
    *,
    labels: Sequence[str] | None = None,
) -> Split:
    """Split the samples as the options say; warns where a subject crosses the split.

    Args:
        samples: the samples; a warning is added to them.
        options: group column, fraction or id files.
        seed: of the drawn split.
        labels: classes, to stratify by.
    """
    groups = samples.groups(options.group_column)
    if options.train_ids is None and options.validation_ids is None:
        parts = split_samples(
            samples.ids,
            validation_fraction=options.validation_fraction,
            seed=seed,
            labels=labels,
            groups=groups,
        )
    else:
        parts = _given_split(samples, options)
    if len(parts.train) < 2 or len(parts.validation) < 2:
        raise InputError(
            f"{len(parts.train)} training and {len(parts.validation)} validation samples: each "
            "part needs 2; use more samples or another --validation-fraction"
        )
    if samples.metadata is not None:
        leaks = leaking_columns(samples.metadata, parts)
        if leaks:
            warning = (
                f"values of {', '.join(repr(one) for one in leaks)} are in both the training and "
                "the validation part: if these are subjects, validation numbers are too good; "
                f"use --group-column {leaks[0]}"
            )
            samples.warnings.append(warning)
    return parts


def evaluation_rows(samples: Samples, parts: Split) -> np.ndarray:
    """Rows of the validation samples whose distances are compared; what is left out is a fact.

    All pairs of very many samples fit no memory, and say no more than those of some thousands.
    """
    rows = samples.rows(parts.validation)
    if len(rows) <= JUDGED_SAMPLES:
        return rows
    what = f"validation samples not looked at: {JUDGED_SAMPLES} are compared"
    samples.facts.append(DataFact(what, len(rows) - JUDGED_SAMPLES, "drawn at random", "cut"))
    order = np.random.default_rng(JUDGED_SAMPLES).permutation(rows)
    return np.sort(order[:JUDGED_SAMPLES])


def _given_split(samples: Samples, options: MetadataOptions) -> Split:
    """The split that id files give."""
    known = set(samples.ids)
    parts = {}
    for option, path in (("train", options.train_ids), ("validation", options.validation_ids)):
        parts[option] = None if path is None else read_ids(path, known)
    train, validation = parts["train"], parts["validation"]
    if train is None:
        train = tuple(name for name in samples.ids if name not in set(validation or ()))
    if validation is None:
        validation = tuple(name for name in samples.ids if name not in set(train))
    both = sorted(set(train) & set(validation))
    if both:
        raise InputError(
            f"{len(both)} samples ({name_some(both)}) are in both --train-ids and --validation-ids"
        )
    return Split(train, validation)


def read_ids(path: Path, known: set[str]) -> tuple[str, ...]:
    """Sample ids of a file, one a line.

    Raises:
        InputError: the file is missing or empty, names an id twice or one that is not known.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"{path}: cannot be read ({reason}); expected one id a line") from error
    ids = tuple(line.strip() for line in lines if line.strip())
    unknown = [name for name in ids if name not in known]
    if not ids or unknown or len(set(ids)) < len(ids):
        problem = (
            f"{len(unknown)} ids are not among the samples ({name_some(unknown)})"
            if unknown
            else "an id is given twice"
            if ids
            else "no ids"
        )
        raise InputError(f"{path}: {problem}; expected ids of the table's samples, one a line")
    return ids


def data_description(config: Any) -> dict[str, Any]:
    """What a later command must do to a table, to treat it as this run did."""
    data = config.data
    return {
        "rarefy_depth": data.rarefy_depth,
        "max_bp": data.max_bp,
        "token_limit": data.token_limit,
        "asv_sampling": data.asv_sampling,
        "seed": config.run.seed,
    }


def make_dataset(samples: Samples, options: Any, **known: Any) -> SampleDataset:
    """The samples as a dataset; what is cut is added to the facts."""
    dataset = SampleDataset(
        samples.table,
        max_bp=options.max_bp,
        token_limit=options.token_limit,
        asv_sampling=options.asv_sampling,
        **known,
    )
    samples.facts += dataset.facts
    return dataset
