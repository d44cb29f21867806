"""The numbers that judge a model: pure functions on numpy arrays.

Every function returns a plain ``float``, or ``None`` where the number is not defined: fewer
values than it needs, a constant side of a correlation, one class only, or a value that is not
finite (a model that diverged has no r2).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray


def condensed(matrix: Array) -> Array:
    """The pairs i < j of a square matrix, row by row.

    Args:
        matrix: ``(n, n)``.

    Returns:
        ``(n * (n - 1) / 2,)`` values of the upper triangle.

    Raises:
        ValueError: the matrix is not square.
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"expected a square matrix, got shape {matrix.shape}")
    return matrix[np.triu_indices(matrix.shape[0], k=1)]


def pearson_r(predicted: Array, true: Array) -> float | None:
    """Pearson correlation of two equally long vectors."""
    predicted, true = _pair(predicted, true)
    if predicted.size < 2 or not _finite(predicted, true):
        return None
    predicted = predicted - predicted.mean()
    true = true - true.mean()
    scale = float(np.sqrt((predicted**2).sum() * (true**2).sum()))
    if scale <= 1e-12 * predicted.size:
        return None
    return float(np.clip((predicted * true).sum() / scale, -1.0, 1.0))


def mantel_r(predicted: Array, true: Array, *, groups: Any = None) -> float | None:
    """Mantel's r: Pearson correlation of two distance matrices over the pairs i < j.

    Args:
        predicted: ``(n, n)`` distances.
        true: ``(n, n)`` distances.
        groups: ``(n,)`` labels such as the subject; if given, only pairs of two different
            groups count, so that repeated samples of one subject cannot carry the number.
    """
    a, b = condensed(predicted), condensed(true)
    if groups is not None:
        between = ~condensed(same_group(groups))
        a, b = a[between], b[between]
    return pearson_r(a, b)


def same_group(groups: Any) -> Array:
    """``(n, n)`` bool: whether two samples carry the same label; ``None`` equals nothing."""
    labels = np.asarray(groups, dtype=object)
    known = np.array([label is not None for label in labels], dtype=bool)
    codes = np.unique([str(label) for label in labels], return_inverse=True)[1]
    return (codes[:, None] == codes[None, :]) & known[:, None] & known[None, :]


def mean_absolute_error(predicted: Array, true: Array) -> float | None:
    """Mean of the absolute differences, in the unit of the input."""
    predicted, true = _pair(predicted, true)
    if predicted.size == 0 or not _finite(predicted, true):
        return None
    return float(np.abs(predicted - true).mean())


def r2(predicted: Array, true: Array) -> float | None:
    """Share of the variance explained: 1 is perfect, 0 the mean of ``true``, below 0 worse."""
    predicted, true = _pair(predicted, true)
    if predicted.size < 2 or not _finite(predicted, true):
        return None
    total = float(((true - true.mean()) ** 2).sum())
    if total <= 0.0:
        return None
    return 1.0 - float(((true - predicted) ** 2).sum()) / total


def accuracy(predicted: Array, true: Array) -> float | None:
    """Share of equal entries of two vectors of class indices."""
    predicted, true = _labels(predicted, true)
    return float((predicted == true).mean()) if true.size else None


def balanced_accuracy(predicted: Array, true: Array) -> float | None:
    """Mean over the classes present in ``true`` of the share found (recall)."""
    predicted, true = _labels(predicted, true)
    if true.size == 0:
        return None
    return float(np.mean([(predicted[true == label] == label).mean() for label in np.unique(true)]))


def binary_auc(score: Array, positive: Array) -> float | None:
    """Area under the ROC curve by ranks (Mann and Whitney), ties counted half.

    Args:
        score: ``(n,)``, higher for the positive class.
        positive: ``(n,)`` bool.
    """
    score = np.asarray(score, dtype=np.float64).ravel()
    positive = np.asarray(positive, dtype=bool).ravel()
    if score.shape != positive.shape:
        raise ValueError(f"expected equal lengths, got {score.size} and {positive.size}")
    found = int(positive.sum())
    if found in (0, positive.size) or not _finite(score):
        return None
    ranks = _mid_ranks(score)
    area = ranks[positive].sum() - found * (found + 1) / 2
    return float(area / (found * (positive.size - found)))


def auc(probabilities: Array, true: Array) -> float | None:
    """Area under the ROC curve; for more than two classes the mean of one against the rest.

    Args:
        probabilities: ``(n, classes)``.
        true: ``(n,)`` class indices. A class that is absent here has no curve of its own and is
            left out of the mean.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    true = np.asarray(true).ravel().astype(np.int64)
    if probabilities.ndim != 2 or probabilities.shape[0] != true.size:
        raise ValueError(
            f"expected probabilities of shape ({true.size}, classes), got {probabilities.shape}"
        )
    if probabilities.shape[1] == 2:
        return binary_auc(probabilities[:, 1], true == 1)
    areas = [binary_auc(probabilities[:, k], true == k) for k in np.unique(true)]
    defined = [area for area in areas if area is not None]
    return float(np.mean(defined)) if defined and len(defined) == len(areas) else None


def _pair(predicted: Array, true: Array) -> tuple[Array, Array]:
    predicted = np.asarray(predicted, dtype=np.float64).ravel()
    true = np.asarray(true, dtype=np.float64).ravel()
    if predicted.shape != true.shape:
        raise ValueError(f"expected equal lengths, got {predicted.size} and {true.size}")
    return predicted, true


def _labels(predicted: Array, true: Array) -> tuple[Array, Array]:
    predicted, true = np.asarray(predicted).ravel(), np.asarray(true).ravel()
    if predicted.shape != true.shape:
        raise ValueError(f"expected equal lengths, got {predicted.size} and {true.size}")
    return predicted, true


def _finite(*arrays: Array) -> bool:
    return all(bool(np.isfinite(array).all()) for array in arrays)


def _mid_ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2.0)[group]
