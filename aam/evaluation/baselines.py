"""What simple methods reach: the numbers printed beside every result.

A model that does not beat the Jaccard distance, a per-position consensus or a random forest has
not earned its compute. Nothing here needs a model. `counts` are (samples, features) reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from aam.data.neighbours import bases_of
from aam.data.samples import Samples
from aam.data.sequences import A, C, G, T
from aam.data.table_distances import bray_curtis, jaccard
from aam.data.texts import Texts
from aam.data.unifrac import Distances
from aam.evaluation.metrics import (
    Measured,
    condensed,
    distance_metrics,
    mean_absolute_error,
    target_metrics,
)
from aam_kernels import Ragged

Array = np.ndarray

CHECK_SEED = 20_231  # of what is drawn for a measurement
CALIBRATING = 200  # training samples whose pairs calibrate a distance: 19,900 pairs are enough
KMER = 12
KNOWN_AT_ONCE = 2**13  # known sequences that all masked ones are compared with at once
MOST_DENSE = 50_000_000  # numbers up to which a forest's table is dense, and split much faster


@dataclass(frozen=True)
class EvaluationSubset:
    """The samples whose distances are compared with the true ones."""

    samples: Samples
    truth: Distances
    rows: Array  # (n,) the samples that are compared
    train_rows: Array  # samples that simple methods may learn from
    group_column: str | None

    @property
    def ids(self) -> list[str]:
        """Ids of the n samples."""
        return [self.samples.ids[row] for row in self.rows]

    @property
    def groups(self) -> list[str] | None:
        """Groups of the n samples, where there is a column of them."""
        groups = self.samples.groups(self.group_column)
        return None if groups is None else [groups[row] for row in self.rows]


def distance_baselines(subset: EvaluationSubset, true: Array) -> dict[str, Measured]:
    """Simple distances as predictors of the true ones (n, n) of a subset, by name.

    The mean absolute error is that after a straight line fitted on pairs of training samples, or
    of some of very many; without any there are no baselines.
    """
    table, groups, train_rows = subset.samples.table, subset.groups, subset.train_rows
    if not len(train_rows):
        return {}
    if len(train_rows) > CALIBRATING:
        generator = np.random.default_rng(CHECK_SEED)
        train_rows = np.sort(generator.choice(train_rows, CALIBRATING, replace=False))
    calibrating = condensed(subset.truth.pairwise(train_rows))
    mean = calibrating.mean() if calibrating.size else np.nan
    found = {"constant": distance_metrics(np.full_like(true, mean), true, groups)}
    distances: dict[str, Callable[[csr_array], Array]] = {
        "richness difference": richness_difference,
        "Bray-Curtis": bray_curtis,
        "Jaccard": jaccard,
        f"{KMER}-mer Jaccard": lambda part: jaccard(kmer_profile(part, table.feature_ids)),
    }
    for name, distance in distances.items():
        slope, intercept = _line(condensed(distance(table.counts[train_rows])), calibrating)
        own = distance(table.counts[subset.rows])
        error = mean_absolute_error(slope * condensed(own) + intercept, condensed(true))
        found[name] = distance_metrics(own, true, groups) | {"distance_mae": error}
    return found


def richness_difference(counts: csr_array) -> Array:
    """(n, n) absolute differences of the number of observed features."""
    richness = np.diff(counts.indptr).astype(np.float64)
    return np.abs(richness[:, None] - richness)


def kmer_profile(counts: csr_array, sequences: Sequence[str], length: int = KMER) -> csr_array:
    """(samples, k-mers) positive where a sample has a k-mer at its position in the sequence."""
    used = np.unique(counts.indices)
    bases = bases_of(Texts.of(sequences).take(used))
    powers, none = 4 ** np.arange(length), np.empty(0, dtype=np.int64)
    features, columns, count = [none], [none], 0
    for place in range(bases.shape[1] - length + 1):
        window = bases[:, place : place + length]
        whole = np.flatnonzero(window.all(axis=1))
        distinct, code = np.unique((window[whole] - 1) @ powers, return_inverse=True)
        features.append(whole)
        columns.append(count + code)
        count += len(distinct)
    feature, column = np.concatenate(features), np.concatenate(columns)
    ones = np.ones(len(feature), dtype=np.float32)
    holds = csr_array((ones, (feature, column)), (len(used), max(count, 1)))
    return csr_array(counts[:, used].sign().astype(np.float32) @ holds)


def _line(x: Array, y: Array) -> tuple[float, float]:
    """Slope and intercept of the least-squares line; flat where x does not vary."""
    if not x.size:
        return np.nan, np.nan
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread else 0.0
    return slope, float(y.mean() - slope * x.mean())


def nucleotide_baselines(
    known: Ragged, masked: Ragged, rows: Array, positions: Array, bases: Array
) -> Measured:
    """Share of masked bases that the consensus and the nearest known sequence name.

    The consensus has the most frequent base of each position (past the end of all known ones, of
    all positions). The nearest agrees in most bases that are not masked, position by position.
    The `bases` (n,) stood at `positions` (n,), 0 the first base, of the `rows` (n,) of `masked`;
    tokens begin with START.
    """
    if not len(known):
        return {}
    width = max(known.max_length, masked.max_length)

    def padded(tokens: Ragged) -> Array:
        filled = tokens.to("cpu").to_padded(0).numpy()
        return np.pad(filled[:, 1:], ((0, 0), (0, width - filled.shape[1])))

    def one_hot(tokens: Array) -> Array:
        return np.concatenate([tokens == base for base in (A, C, G, T)], 1).astype(np.float32)

    theirs, own = padded(known), padded(masked)
    counted = np.stack([(theirs == base).sum(axis=0) for base in (A, C, G, T)])
    counted = np.where(counted.any(axis=0), counted, counted.sum(axis=1, keepdims=True))
    own[rows, positions] = 0
    wanted, most, nearest = one_hot(own), np.full(len(own), -1.0), np.zeros(len(own), np.int64)
    for low in range(0, len(theirs), KNOWN_AT_ONCE):
        agreed = wanted @ one_hot(theirs[low : low + KNOWN_AT_ONCE]).T
        best, value = agreed.argmax(axis=1), agreed.max(axis=1)
        nearest = np.where(value > most, best + low, nearest)
        most = np.maximum(most, value)
    consensus, neighbour = A + counted.argmax(axis=0)[positions], theirs[nearest[rows], positions]
    named = {"consensus": consensus, "nearest known ASV": neighbour}
    return {name: float((one == bases).mean()) for name, one in named.items()}


def target_baselines(
    counts: csr_array,
    truth: Array,
    train_rows: Array,
    rows: Array,
    *,
    classes: int,
    trees: int = 200,
    seed: int = 0,
) -> dict[str, Measured]:
    """What a random forest on relative abundances, and a constant, reach on a target, by name.

    `truth` (samples,) are numbers in the user's unit or, of a number of `classes`, class codes; of
    the rows that are fitted and of those that are measured it must be known.
    """
    import torch
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    from sklearn.preprocessing import normalize

    fitted, measured = (
        normalize(counts[part].astype(np.float32), "l1") for part in (train_rows, rows)
    )  # relative abundances
    seen = np.unique(fitted.indices)
    inputs = fitted[:, seen], measured[:, seen]
    known, own = (x.toarray() if np.prod(x.shape) <= MOST_DENSE else x for x in inputs)
    kind = RandomForestClassifier if classes else RandomForestRegressor
    forest = kind(trees, max_features="sqrt", random_state=seed, n_jobs=torch.get_num_threads())
    forest.fit(known, truth[train_rows])
    forest.n_jobs = 1  # threads would add up the trees in any order
    if classes:
        labels = truth[train_rows].astype(np.int64)
        probabilities = np.zeros((len(rows), classes))
        probabilities[:, forest.classes_.astype(np.int64)] = forest.predict_proba(own)
        share = np.bincount(labels, minlength=classes) / len(labels)
        predicted = {"random forest": probabilities, "majority": np.tile(share, (len(rows), 1))}
    else:
        mean = np.full(len(rows), truth[train_rows].mean())
        predicted = {"random forest": forest.predict(own), "mean": mean}
    return {name: target_metrics(one, truth[rows], classes) for name, one in predicted.items()}
