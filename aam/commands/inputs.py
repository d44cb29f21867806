"""From files to samples: table, rarefaction, matching ids, distances and the split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aam.config import DistanceOptions, MetadataOptions, TableOptions
from aam.data.distances import read_distances
from aam.data.samples import Samples
from aam.data.splits import Split, leaking_columns, split_samples
from aam.data.table_distances import TableDistances
from aam.data.tree import Phylogeny, read_tree
from aam.data.unifrac import Distances, UniFrac
from aam.errors import DataFact, InputError, name_some

MOST_COMPARED = 2000  # validation samples of which all pairs are compared


def attach_tree(samples: Samples, tree: Phylogeny, drop_missing: bool) -> UniFrac:
    """Unweighted UniFrac of the samples by a tree, which must hold the table's features."""
    unifrac = UniFrac(samples.table, tree, drop_missing=drop_missing)
    samples.facts += unifrac.facts
    return unifrac


def attach_distances(
    samples: Samples, table_options: TableOptions, options: DistanceOptions
) -> Distances:
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
    if options.distance is not None:
        return TableDistances(samples.table, options.distance)
    if options.tree is not None:
        tree = read_tree(options.tree, sequences=table_options.sequences)
        return attach_tree(samples, tree, options.drop_missing_tips)
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
    samples: Samples, options: MetadataOptions, seed: int, *, labels: Sequence[str] | None = None
) -> Split:
    """Split the samples as the options say, stratified by labels (classes) where given.

    A warning is added to the samples where a subject crosses the split.
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
        parts = given_split(samples, options.train_ids, options.validation_ids)
    if len(parts.train) < 2 or len(parts.validation) < 2:
        raise InputError(
            f"{len(parts.train)} training and {len(parts.validation)} validation samples: each "
            "part needs 2; use more samples or another --validation-fraction"
        )
    leaks = [] if samples.metadata is None else leaking_columns(samples.metadata, parts)
    if leaks:
        samples.warnings.append(
            f"values of {', '.join(repr(one) for one in leaks)} are in both the training and "
            "the validation part: if these are subjects, validation numbers are too good; "
            f"use --group-column {leaks[0]}"
        )
    return parts


def given_split(samples: Samples, train_ids: Path | None, validation_ids: Path | None) -> Split:
    """The split that id files give; where one is missing, all other samples are its part."""
    known = set(samples.ids)
    train = None if train_ids is None else read_ids(train_ids, known)
    validation = None if validation_ids is None else read_ids(validation_ids, known)
    given = set(train or ()) | set(validation or ())
    others = tuple(name for name in samples.ids if name not in given)
    train, validation = (others if part is None else part for part in (train, validation))
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
    problem = "" if ids else "no ids"
    if len(set(ids)) < len(ids):
        problem = "an id is given twice"
    if unknown:
        problem = f"{len(unknown)} ids are not among the samples ({name_some(unknown)})"
    if problem:
        raise InputError(f"{path}: {problem}; expected ids of the table's samples, one a line")
    return ids


def evaluation_rows(samples: Samples, parts: Split) -> np.ndarray:
    """Rows of the validation samples whose distances are compared; what is left out is a fact.

    All pairs of very many samples fit no memory, and say no more than those of some thousands.
    """
    rows = samples.rows(parts.validation)
    if len(rows) <= MOST_COMPARED:
        return rows
    what = f"validation samples not looked at: {MOST_COMPARED} are compared"
    samples.facts.append(DataFact(what, len(rows) - MOST_COMPARED, "drawn at random", "cut"))
    drawn = np.random.default_rng(MOST_COMPARED).permutation(rows)[:MOST_COMPARED]
    return np.sort(drawn)
