"""Training and validation parts: random, stratified by class, grouped by subject."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aam.data.metadata import Metadata
from aam.errors import InputError, name_some

GROUP_ORDERS = 64  # random orders of the groups that are tried; the best cut of the best one wins


@dataclass(frozen=True)
class Split:
    """Sample ids of the two parts, each in the order in which the ids were given."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


def split_samples(
    ids: Sequence[str],
    *,
    validation_fraction: float = 0.2,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
) -> Split:
    """Split samples at random, by class (``labels``), by group (subject), or by both.

    The split depends on the ids, not on their order. With ``labels`` every class is in both parts,
    in proportion. With ``groups`` no group is in both parts; whole groups are drawn so that the
    validation part has about the asked fraction of *samples* (scikit-learn's GroupShuffleSplit
    counts groups). InputError where no such split exists.
    """
    order = np.argsort(np.array(ids, dtype=object))
    classes = np.zeros(len(ids), dtype=np.int64)
    if labels is not None:
        names, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        if lonely := names[sizes < 2].tolist():
            raise InputError(
                f"{len(lonely)} classes have one sample only ({name_some(lonely)}): merge them "
                "with another class or leave these samples out"
            )
    generator, ordered = np.random.default_rng(seed), classes[order]
    held_out = np.zeros(len(ids), dtype=bool)
    if groups is not None:
        own = np.unique(groups, return_inverse=True)[1][order]
        held_out[order] = _grouped(own, ordered, validation_fraction, generator)
    else:
        held_out[order] = _stratified(ordered, validation_fraction, generator)
    pairs = list(zip(ids, held_out.tolist(), strict=True))
    train, validation = ([one for one, out in pairs if out == part] for part in (False, True))
    return Split(tuple(train), tuple(validation))


def _stratified(classes: np.ndarray, fraction: float, generator: np.random.Generator) -> np.ndarray:
    """Whether each of n samples is for validation: the fraction of every class, at least one.

    scikit-learn's StratifiedShuffleSplit may leave a small class out of the validation part.
    """
    sizes = np.bincount(classes)
    exact = sizes * fraction
    quota = np.floor(exact).astype(np.int64)
    # Largest remainders fill up to the fraction of all samples.
    short = round(len(classes) * fraction) - int(quota.sum())
    quota[np.argsort(quota - exact, kind="stable")[:short]] += 1
    chosen = np.zeros(len(classes), dtype=bool)
    for code, number in enumerate(np.clip(quota, 1, sizes - 1)):
        chosen[generator.permutation(np.flatnonzero(classes == code))[:number]] = True
    return chosen


def _grouped(
    groups: np.ndarray, classes: np.ndarray, fraction: float, generator: np.random.Generator
) -> np.ndarray:
    """Whether each of n samples is for validation: whole groups, nearest to the fraction.

    Groups in random order are cut where the classes' counts come closest to their shares.
    """
    members = np.zeros((groups.max() + 1, classes.max() + 1), dtype=np.int64)
    np.add.at(members, (groups, classes), 1)  # (groups, classes)
    number, total = len(members), members.sum(axis=0)
    if number < 2:
        raise InputError(
            "all samples are of one group: a grouped split needs two or more; choose another "
            "--group-column or none"
        )
    least, best = np.inf, None
    for _ in range(GROUP_ORDERS):
        order = generator.permutation(number)
        inside = members[order].cumsum(axis=0)[:-1]  # (groups - 1, classes), after each group
        miss = np.abs(inside / total - fraction).sum(axis=1)
        miss[((inside == 0) | (inside == total)).any(axis=1)] = np.inf
        at = int(np.argmin(miss))
        if miss[at] < least:
            least, best = miss[at], order[: at + 1]
    if best is None:
        raise InputError(
            "no split by group has every class in both parts: some class has too few groups "
            f"(of {number}); choose another --group-column, merge classes, or split without groups"
        )
    return np.isin(groups, best)


IDENTIFIER = r"(id|ids|identifier|number|no|nr|code|name|key)"
# Column names, in snake case, that tell individuals, or what they share as closely (a cage).
SUBJECT_NAME = re.compile(
    rf"(^|_)((subject|patient|participant|volunteer|donor|animal)s?(_?{IDENTIFIER})?"
    rf"|(individual|person|host|mouse|family|household|cage|twin|mother|infant)_?{IDENTIFIER})$"
)
# Without such a name: many values, which settle at least half of many other columns. On the IBD
# study a subject settles 16 of 24 columns, no other category more than 4.
FEWEST_SUBJECTS = 8
FEWEST_SETTLED_COLUMNS = 8


def leaking_columns(metadata: Metadata, split: Split) -> list[str]:
    """Columns that look like a subject id and have values in both parts of the split.

    A column does where its values repeat and either its name says so (``host_subject_id``,
    ``patient``; these come first), or it is text of many values that settle most other columns
    (all samples of one value have the same sex, height, diagnosis, ...).
    """
    both, number = metadata.select(split.train + split.validation), len(split.train)
    found = []
    for column in both.columns:
        values = both.text(column)
        crosses = set(values[:number]) & set(values[number:]) - {None}
        if crosses and _looks_like_subjects(both, column):
            found.append(column)
    return sorted(found, key=lambda column: not _names_subjects(column))


def _looks_like_subjects(metadata: Metadata, column: str) -> bool:
    values = metadata.frame[column]
    distinct = values.nunique()
    if distinct < 3 or values.count() < 1.5 * distinct:
        return False
    if _names_subjects(column):
        return True
    if distinct < FEWEST_SUBJECTS or metadata.is_numeric(column):
        return False
    others = metadata.frame[values.notna()].drop(columns=column)
    others = others.loc[:, (others.nunique() > 1) & (2 * others.count() >= len(values))]
    if len(others.columns) < FEWEST_SETTLED_COLUMNS:
        return False
    settled = (others.groupby(values).nunique() <= 1).all()
    return bool(2 * settled.sum() >= len(settled))


def _names_subjects(column: str) -> bool:
    snake = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", column)
    return bool(SUBJECT_NAME.search(re.sub(r"[^a-z0-9]+", "_", snake.lower()).strip("_")))
