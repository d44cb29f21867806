"""From files to samples: table, rarefaction, matching ids, distances and the split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aam.config import DistanceOptions, MetadataOptions, TableOptions
from aam.data.distances import PrecomputedDistances, read_distances
from aam.data.phylogeny import UniFrac
from aam.data.samples import Samples
from aam.data.splits import Split, leaking_columns, split_samples
from aam.data.table_distances import TableDistances
from aam.data.tree import Phylogeny, read_tree
from aam.errors import DataFact, InputError, name_some

JUDGED_SAMPLES = 2000
"""Most validation samples of which all pairs are compared."""


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
