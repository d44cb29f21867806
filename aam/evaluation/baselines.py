"""What simple methods reach: the numbers printed beside every result.

A model that does not beat the Jaccard distance, a per-position consensus or a random forest has
not earned its compute. Everything here takes plain numpy and scipy inputs and needs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sparse

from aam.evaluation import metrics

Array = np.ndarray
Pairwise = Callable[[Any], Array]

MAX_TRAINING_SAMPLES = 200
"""Training samples whose pairs calibrate a distance: 19,900 pairs fit two numbers well enough."""

CONSENSUS_BLOCK = 2**16
"""Sequences whose bases are counted at once."""

NEAREST_BLOCK = 2**13
"""Known sequences that all judged ones are compared with at once."""

KMER_LENGTH = 12
BASES = "ACGT"
"""Token of a base is its index here plus one."""


@dataclass(frozen=True)
class DistanceBaseline:
    """How well a simple distance stands for the true one on validation samples.

    Attributes:
        r: Mantel's r over all pairs; ``None`` where undefined (a constant has none).
        mae: mean absolute error after a straight line fitted on pairs of training samples.
        r_between: Mantel's r over the pairs of different groups; ``None`` without groups.
    """

    r: float | None
    mae: float | None
    r_between: float | None = None


def distance_baselines(
    counts: sparse.csr_array,
    true_distances: Array | Pairwise,
    train_rows: Sequence[int] | Array,
    validation_rows: Sequence[int] | Array,
    *,
    groups: Sequence[str | None] | None = None,
    sequences: Sequence[str] | None = None,
    max_train: int = MAX_TRAINING_SAMPLES,
    seed: int = 0,
) -> dict[str, DistanceBaseline]:
    """Judge simple distances as predictors of the true one.

    Args:
        counts: ``(samples, features)`` reads.
        true_distances: ``(samples, samples)``, or a function from rows to their ``(n, n)``
            distances (so that no matrix of all samples has to exist).
        train_rows: rows whose pairs calibrate; at most ``max_train`` of them, drawn with ``seed``.
        validation_rows: rows that are judged, all of them.
        groups: ``(samples,)`` labels such as the subject, for ``r_between``.
        sequences: ``(features,)`` DNA; if given, the Jaccard distance of positional 12-mers is
            judged too. It knows which features resemble each other, as a tree does.
        max_train: see ``train_rows``.
        seed: see ``train_rows``.

    Returns:
        By name: ``constant``, ``richness difference``, ``Bray-Curtis``, ``Jaccard`` and with
        sequences ``12-mer Jaccard``.
    """
    train = _draw(np.asarray(train_rows, dtype=np.int64), max_train, seed)
    validation = np.asarray(validation_rows, dtype=np.int64)
    counts = sparse.csr_array(counts)
    true_train = metrics.condensed(_pairwise(true_distances, train))
    true_validation = _pairwise(true_distances, validation)
    between = None if groups is None else [groups[row] for row in validation]

    constant = float(true_train.mean()) if true_train.size else float("nan")
    pairs = metrics.condensed(true_validation)
    found = {
        "constant": DistanceBaseline(
            None, metrics.mean_absolute_error(np.full(pairs.shape, constant), pairs)
        )
    }
    parts = counts[train], counts[validation]
    for name, (calibrating, judged) in _simple_distances(parts, sequences).items():
        slope, intercept = _line(metrics.condensed(calibrating), true_train)
        found[name] = DistanceBaseline(
            r=metrics.mantel_r(judged, true_validation),
            mae=metrics.mean_absolute_error(slope * metrics.condensed(judged) + intercept, pairs),
            r_between=None
            if between is None
            else metrics.mantel_r(judged, true_validation, groups=between),
        )
    return found


def richness_difference(counts: sparse.csr_array) -> Array:
    """``(n, n)`` absolute differences of the number of observed features."""
    richness = np.diff(_positive(counts).indptr).astype(np.float64)
    return np.abs(richness[:, None] - richness[None, :])


def jaccard(counts: sparse.csr_array) -> Array:
    """``(n, n)`` share of the observed features of two samples that they do not share.

    Two samples without any feature are at distance 0.
    """
    presence = _positive(counts)
    presence.data = np.ones(presence.nnz, dtype=np.float32)
    shared = (presence @ presence.T).toarray().astype(np.float64)
    richness = np.diff(presence.indptr).astype(np.float64)
    union = richness[:, None] + richness[None, :] - shared
    return 1.0 - np.divide(shared, union, out=np.ones_like(shared), where=union > 0)


def bray_curtis(counts: sparse.csr_array) -> Array:
    """``(n, n)`` Bray-Curtis distance of relative abundances: 1 - sum of the minima.

    Relative, so that tables that were not rarefied are not judged by their depth. Two samples
    without any read are at distance 0.
    """
    counts = _positive(counts)
    depth = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    used = np.unique(counts.indices)
    shares = counts[:, used].toarray().astype(np.float32)
    shares /= np.maximum(depth, 1.0)[:, None].astype(np.float32)
    distance = np.empty((len(depth), len(depth)), dtype=np.float64)
    for row, share in enumerate(shares):
        # Minima differ from 0 only where this sample has reads: one column in thirty or so.
        present = np.flatnonzero(share)
        distance[row] = 1.0 - np.minimum(shares[:, present], share[present]).sum(axis=1)
    distance = np.clip((distance + distance.T) / 2, 0.0, 1.0)
    empty = depth == 0
    distance[np.ix_(empty, empty)] = 0.0
    np.fill_diagonal(distance, 0.0)
    return distance


def kmer_profile(
    counts: sparse.csr_array, sequences: Sequence[str], length: int = KMER_LENGTH
) -> sparse.csr_array:
    """Which subsequences a sample holds, told apart by their position.

    Args:
        counts: ``(samples, features)`` reads.
        sequences: ``(features,)`` DNA.
        length: bases a subsequence.

    Returns:
        ``(samples, distinct (position, subsequence) pairs)``, a positive entry where present.

    Raises:
        ValueError: as many sequences as features are needed.
    """
    if len(sequences) != counts.shape[1]:
        raise ValueError(f"expected {counts.shape[1]} sequences, got {len(sequences)}")
    presence = _positive(counts)
    used = np.unique(presence.indices)
    tokens = _padded_tokens([sequences[feature] for feature in used])
    columns, rows, first = [], [], 0
    for position in range(max(tokens.shape[1] - length + 1, 0)):
        window = tokens[:, position : position + length]
        whole = np.flatnonzero((window > 0).all(axis=1))
        code = np.zeros(len(whole), dtype=np.int64)
        for base in range(length):
            code = code * 4 + (window[whole, base].astype(np.int64) - 1)
        distinct, index = np.unique(code, return_inverse=True)
        columns.append(index + first)
        rows.append(whole)
        first += len(distinct)
    row, column = (np.concatenate(part or [np.empty(0, np.int64)]) for part in (rows, columns))
    features = sparse.csr_array(
        (np.ones(len(row), dtype=np.float32), (row, column)), shape=(len(used), max(first, 1))
    )
    presence = sparse.csr_array(presence[:, used], dtype=np.float32)
    presence.data[:] = 1.0
    return sparse.csr_array(presence @ features)


def consensus_bases(sequences: Sequence[str] | Array) -> Array:
    """The most frequent base of each position.

    Args:
        sequences: DNA of the training part's distinct features, or their tokens
            ``(n, length)`` uint8 without START (A 1, C 2, G 3, T 4, anything else is ignored).

    Returns:
        ``(length + 1,)`` uint8 tokens; the last is the most frequent base of all, for positions
        that no training sequence reaches.
    """
    counted = np.zeros((4, 0), dtype=np.int64)  # (4, length)
    for low in range(0, max(1, len(sequences)), CONSENSUS_BLOCK):
        part = sequences[low : low + CONSENSUS_BLOCK]
        tokens = part if isinstance(part, np.ndarray) else _padded_tokens(part)
        own = np.stack([(tokens == base).sum(axis=0) for base in range(1, 5)])
        longer = own.shape[1] - counted.shape[1]
        counted = np.pad(counted, ((0, 0), (0, max(longer, 0))))
        counted[:, : own.shape[1]] += own
    total = counted.sum(axis=1, keepdims=True)
    counted = np.where(counted.sum(axis=0, keepdims=True) > 0, counted, total)
    return (np.concatenate([counted, total], axis=1).argmax(axis=0) + 1).astype(np.uint8)


def consensus_of(tokens: Any) -> Array:
    """`consensus_bases` of tokens, a ``Ragged`` whose rows begin with START."""
    return consensus_bases(tokens.to("cpu").to_padded(0)[:, 1:].numpy())


def nearest_accuracy(
    known: Any, judged: Any, rows: Array, positions: Array, bases: Array
) -> float | None:
    """Share of masked bases that the nearest known sequence has at the same position.

    The nearest is the one that agrees in most bases that are not masked, position by position.

    Args:
        known: tokens of training, a ``Ragged`` whose rows begin with START.
        judged: tokens of the sequences that were masked, the same.
        rows: ``(masked,)`` which of the judged sequences.
        positions: ``(masked,)`` where, START not counted.
        bases: ``(masked,)`` the true tokens.
    """
    theirs, own = (one.to("cpu").to_padded(0)[:, 1:].numpy() for one in (known, judged))
    width = max(theirs.shape[1], own.shape[1])
    theirs, own = (np.pad(one, ((0, 0), (0, width - one.shape[1]))) for one in (theirs, own))
    seen = own.copy()
    seen[rows, positions] = 0

    def one_hot(tokens: Array) -> Array:
        return np.concatenate([tokens == base for base in range(1, 5)], 1).astype(np.float32)

    wanted, most, nearest = one_hot(seen), np.full(len(own), -1.0), np.zeros(len(own), np.int64)
    for low in range(0, len(theirs), NEAREST_BLOCK):
        agreed = wanted @ one_hot(theirs[low : low + NEAREST_BLOCK]).T
        best = agreed.argmax(axis=1)
        value = agreed[np.arange(len(own)), best]
        nearest = np.where(value > most, best + low, nearest)
        most = np.maximum(most, value)
    return metrics.accuracy(theirs[nearest[rows], positions], bases)


def consensus_accuracy(consensus: Array, positions: Array, bases: Array) -> float | None:
    """Share of masked bases that the consensus names.

    Args:
        consensus: from `consensus_bases`.
        positions: ``(masked,)`` position of each masked base in its sequence, from 0; START is
            not counted.
        bases: ``(masked,)`` the true tokens, A 1 to T 4.
    """
    positions = np.minimum(np.asarray(positions, dtype=np.int64), len(consensus) - 1)
    return metrics.accuracy(consensus[positions], bases)


def target_baselines(
    counts: sparse.csr_array,
    target: Array,
    train_rows: Sequence[int] | Array,
    validation_rows: Sequence[int] | Array,
    *,
    kind: str,
    number_of_classes: int | None = None,
    trees: int = 200,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, dict[str, float | None]]:
    """What a random forest on relative abundances and a constant reach on a target.

    Args:
        counts: ``(samples, features)`` reads.
        target: ``(samples,)`` numbers in the user's unit, or class indices from 0. Only the
            entries of the two parts are read; they must be present.
        train_rows: rows that are fitted.
        validation_rows: rows that are judged.
        kind: ``"regression"`` or ``"classification"``.
        number_of_classes: of the model; by default the largest index seen, plus one.
        trees: of the forest.
        seed: of the forest.
        threads: of the forest; by default as many as torch uses.

    Returns:
        By metric (``r2``, ``mae`` or ``accuracy``, ``balanced_accuracy``, ``auc``), then by
        baseline (``random forest``, and ``mean`` or ``majority``).

    Raises:
        ValueError: the kind is unknown, a part is empty, or a target is missing.
    """
    train = np.asarray(train_rows, dtype=np.int64)
    validation = np.asarray(validation_rows, dtype=np.int64)
    target = np.asarray(target, dtype=np.float64)
    if kind not in ("regression", "classification"):
        raise ValueError(f"expected kind 'regression' or 'classification', got {kind!r}")
    if not len(train) or not len(validation):
        raise ValueError(f"expected samples in both parts, got {len(train)}, {len(validation)}")
    missing = int((~np.isfinite(target[np.concatenate([train, validation])])).sum())
    if missing:
        raise ValueError(f"expected a target for every row, {missing} are missing")
    known, judged = _relative_abundances(counts, train, validation)
    forest: dict[str, Any] = {
        "n_estimators": trees,
        "max_features": "sqrt",
        "random_state": seed,
        "n_jobs": threads or _torch_threads(),
    }
    if kind == "regression":
        return _regression_baselines(known, judged, target[train], target[validation], forest)
    labels, true = target[train].astype(np.int64), target[validation].astype(np.int64)
    size = number_of_classes or int(max(labels.max(), true.max())) + 1
    return _classification_baselines(known, judged, labels, true, size, forest)


def _regression_baselines(
    train_inputs: Array, inputs: Array, known: Array, true: Array, forest: Mapping[str, Any]
) -> dict[str, dict[str, float | None]]:
    from sklearn.ensemble import RandomForestRegressor

    predicted = {
        "random forest": RandomForestRegressor(**forest).fit(train_inputs, known).predict(inputs),
        "mean": np.full(len(true), known.mean()),
    }
    return {
        "r2": {name: metrics.r2(value, true) for name, value in predicted.items()},
        "mae": {name: metrics.mean_absolute_error(v, true) for name, v in predicted.items()},
    }


def _classification_baselines(
    train_inputs: Array,
    inputs: Array,
    known: Array,
    true: Array,
    size: int,
    forest: Mapping[str, Any],
) -> dict[str, dict[str, float | None]]:
    from sklearn.ensemble import RandomForestClassifier

    model = RandomForestClassifier(**forest).fit(train_inputs, known)
    probabilities = np.zeros((len(true), size))
    probabilities[:, model.classes_] = model.predict_proba(inputs)
    share = np.bincount(known, minlength=size) / len(known)
    predicted = {"random forest": probabilities, "majority": np.tile(share, (len(true), 1))}
    chosen = {name: value.argmax(axis=1) for name, value in predicted.items()}
    return {
        "accuracy": {name: metrics.accuracy(v, true) for name, v in chosen.items()},
        "balanced_accuracy": {n: metrics.balanced_accuracy(v, true) for n, v in chosen.items()},
        "auc": {name: metrics.auc(value, true) for name, value in predicted.items()},
    }


def _simple_distances(
    parts: tuple[sparse.csr_array, sparse.csr_array], sequences: Sequence[str] | None
) -> dict[str, tuple[Array, Array]]:
    """By name, the distances among training samples and among validation samples."""
    found = {
        "richness difference": tuple(richness_difference(part) for part in parts),
        "Bray-Curtis": tuple(bray_curtis(part) for part in parts),
        "Jaccard": tuple(jaccard(part) for part in parts),
    }
    if sequences is not None:
        found[f"{KMER_LENGTH}-mer Jaccard"] = tuple(
            jaccard(kmer_profile(part, sequences)) for part in parts
        )
    return found  # type: ignore[return-value]


def _line(x: Array, y: Array) -> tuple[float, float]:
    """Slope and intercept of the least-squares line; flat where x does not vary."""
    if x.size == 0:
        return float("nan"), float("nan")
    centred = x - x.mean()
    spread = float((centred**2).sum())
    slope = float((centred * (y - y.mean())).sum() / spread) if spread > 0 else 0.0
    return slope, float(y.mean() - slope * x.mean())


def _draw(rows: Array, at_most: int, seed: int) -> Array:
    if len(rows) <= at_most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, size=at_most, replace=False))


def _pairwise(distances: Array | Pairwise, rows: Array) -> Array:
    if callable(distances):
        return np.asarray(distances(rows), dtype=np.float64)
    return np.asarray(distances, dtype=np.float64)[np.ix_(rows, rows)]


def _positive(counts: sparse.csr_array) -> sparse.csr_array:
    """A copy without stored zeros, so that ``indptr`` counts the features of a sample."""
    counts = sparse.csr_array(counts, copy=True)
    counts.eliminate_zeros()
    return counts


def _relative_abundances(
    counts: sparse.csr_array, train: Array, validation: Array
) -> tuple[Any, Any]:
    """Float32 shares of the features seen in training, of the training and validation samples."""
    counts = sparse.csr_array(counts)
    seen = np.unique(_positive(counts[train]).indices)
    parts = []
    for rows in (train, validation):
        part = counts[rows]
        depth = np.maximum(np.asarray(part.sum(axis=1), dtype=np.float64).ravel(), 1.0)
        part = sparse.csr_array(part[:, seen], dtype=np.float32)
        part.data /= np.repeat(depth, np.diff(part.indptr)).astype(np.float32)
        # Trees split dense columns several times faster; a large table stays sparse to fit.
        parts.append(part.toarray() if len(rows) * len(seen) <= 50_000_000 else part)
    return parts[0], parts[1]


def _padded_tokens(sequences: Sequence[str]) -> Array:
    """``(n, longest)`` uint8 tokens without START, 0 past the end and for other letters."""
    codes = np.zeros(256, dtype=np.uint8)
    for token, base in enumerate(BASES, start=1):
        codes[ord(base)] = codes[ord(base.lower())] = token
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    tokens = np.zeros((len(lengths), int(lengths.max(initial=0))), dtype=np.uint8)
    letters = np.frombuffer("".join(sequences).encode("ascii", "replace"), dtype=np.uint8)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = codes[letters]
    return tokens


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()
