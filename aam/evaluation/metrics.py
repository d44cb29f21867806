"""The numbers that a model is measured by: functions of numpy arrays.

Each is a plain ``float``, or None where it is not defined: fewer values than it needs, a constant
side of a correlation, one class only, or a value that is not finite (a model that diverged has no
R2). Classes are indices from 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray
Measured = dict[str, float | None]


def condensed(matrix: Array) -> Array:
    """The pairs i < j of a square matrix (n, n), row by row: (n * (n - 1) / 2,)."""
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"expected a square matrix, got shape {matrix.shape}")
    return matrix[np.triu_indices(len(matrix), k=1)]


def mantel_r(
    predicted: Array, true: Array, *, groups: Sequence[str | None] | None = None
) -> float | None:
    """Mantel's r: Pearson correlation of two distance matrices (n, n) over the pairs i < j.

    With groups (n,), such as subjects, of pairs of different groups, so that repeated samples of
    one subject cannot carry the number; None equals nothing.
    """
    a, b = (condensed(one).astype(np.float64) for one in (predicted, true))
    if groups is not None:
        known = {label: code for code, label in enumerate(dict.fromkeys(groups))} | {None: -1}
        codes = np.array([known[label] for label in groups])
        between = condensed((codes[:, None] != codes) | (codes < 0))
        a, b = a[between], b[between]
    if not _defined(a, b, least=2) or a.std() * b.std() <= 1e-12:  # a constant side
        return None
    return float(np.clip(np.corrcoef(a, b)[0, 1], -1.0, 1.0))


def mean_absolute_error(predicted: Array, true: Array) -> float | None:
    """Mean of the absolute differences, in the unit of the input."""
    return float(np.abs(predicted - true).mean()) if _defined(predicted, true) else None


def r2(predicted: Array, true: Array) -> float | None:
    """Share of the variance explained: 1 is perfect, 0 the mean of ``true``, below 0 worse."""
    from sklearn.metrics import r2_score

    if not _defined(predicted, true, least=2) or not np.ptp(true):
        return None
    return float(r2_score(true, predicted))


def distance_metrics(
    predicted: Array, true: Array, groups: Sequence[str | None] | None = None
) -> Measured:
    """Loss, Mantel's r (with groups also between them) and mean error of distances (n, n)."""
    a, b = condensed(predicted), condensed(true)
    found = {
        "unifrac_loss": float(((a - b) ** 2).mean()),
        "mantel_r": mantel_r(predicted, true),
    }
    if groups is not None:
        found["mantel_r_between"] = mantel_r(predicted, true, groups=groups)
    return {**found, "distance_mae": mean_absolute_error(a, b)}


def target_metrics(outputs: Array, true: Array, classes: int) -> Measured:
    """Metrics of numbers (n,) in the user's units, or of probabilities (n, classes).

    The area under the ROC curve is, for more than two classes, the mean of each against the rest;
    a class that is absent from ``true`` (n,) has none.
    """
    from sklearn.metrics import recall_score, roc_auc_score

    if not classes:
        return {"r2": r2(outputs, true), "mae": mean_absolute_error(outputs, true)}
    if not len(true):
        return {"accuracy": None, "balanced_accuracy": None, "auc": None}
    chosen, present, area = outputs.argmax(axis=1), np.unique(true).astype(np.int64), None
    if len(present) > 1 and np.isfinite(outputs).all():
        curves = [1] if classes == 2 else present
        area = float(np.mean([roc_auc_score(true == one, outputs[:, one]) for one in curves]))
    return {
        "accuracy": float((chosen == true).mean()),
        "balanced_accuracy": float(recall_score(true, chosen, labels=present, average="macro")),
        "auc": area,
    }


def _defined(predicted: Array, true: Array, *, least: int = 1) -> bool:
    """Whether two vectors are long enough and finite."""
    if predicted.shape != true.shape:
        raise ValueError(f"expected equal lengths, got {predicted.size} and {true.size}")
    return predicted.size >= least and bool(np.isfinite(predicted).all() & np.isfinite(true).all())
