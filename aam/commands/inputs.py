"""What samples are compared by, and the parts that they are split into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aam.config import EvaluateConfig, MetadataOptions, TableOptions, TruthOptions
from aam.data.distances import read_distances
from aam.data.samples import Samples
from aam.data.splits import Split, leaking_columns, split_samples
from aam.data.table_distances import TableDistances
from aam.data.tree import read_tree
from aam.data.unifrac import Distances, UniFrac
from aam.errors import DataFact, InputError, name_some

MOST_COMPARED = 2000  # validation samples of which all pairs are compared


def attach_distances(
    samples: Samples,
    options: TruthOptions,
    distance: str | None,
    table: TableOptions | EvaluateConfig,
) -> Distances:
    """True distances between the samples: by a tree, from a matrix, or of the table itself.

    Samples that a matrix lacks are dropped from `samples` where that is allowed.
    """
    tree, matrix = options.tree, options.unifrac_matrix
    if sum(one is not None for one in (tree, matrix, distance)) != 1:
        raise InputError(
            "give one of --tree, --unifrac-matrix and --distance: what samples are compared by"
        )
    if distance is not None:
        return TableDistances(samples.table, distance)
    source: Any
    if tree is not None:
        phylogeny = read_tree(tree, sequences=table.sequences)
        source = UniFrac(samples.table, phylogeny, drop_missing=options.drop_missing_tips)
    else:
        assert matrix is not None
        source = read_distances(
            matrix, sample_ids=samples.ids, ids_file=options.unifrac_matrix_ids,
            allow_missing=table.allow_missing, table_source=samples.table.source,
        )  # fmt: skip
        samples.keep(source.sample_ids)
    samples.facts += source.facts
    return source


def split(
    samples: Samples, options: MetadataOptions, seed: int, labels: Sequence[str] | None = None
) -> Split:
    """Split the samples as the options say, stratified by labels (classes) where given.

    A warning is added to the samples where a subject crosses the split.
    """
    groups = samples.groups(options.group_column)
    if options.train_ids is None and options.validation_ids is None:
        share = options.validation_fraction
        parts = split_samples(
            samples.ids, validation_fraction=share, seed=seed, labels=labels, groups=groups
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
            f"values of {', '.join(map(repr, leaks))} are in both the training and the "
            "validation part: if these are subjects, validation numbers are too good; "
            f"use --group-column {leaks[0]}"
        )
    return parts


def given_split(samples: Samples, train_ids: Path | None, validation_ids: Path | None) -> Split:
    """The split that id files give; where one is missing, all other samples are its part."""
    known = set(samples.ids)
    paths = (train_ids, validation_ids)
    given = [None if path is None else read_ids(path, known) for path in paths]
    others = known.difference(*(ids for ids in given if ids))
    rest = tuple(name for name in samples.ids if name in others)
    train, validation = (rest if ids is None else ids for ids in given)
    both = sorted(set(train) & set(validation))
    if both:
        raise InputError(
            f"{len(both)} samples ({name_some(both)}) are in both --train-ids and --validation-ids"
        )
    return Split(train, validation)


def read_ids(path: Path, known: set[str]) -> tuple[str, ...]:
    """Sample ids of a file, one a line: at least one, each once, and known."""
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
