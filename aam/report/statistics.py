"""Small computations behind the figures, on numpy arrays."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def principal_coordinates(distances: Array, axes: int = 2) -> tuple[Array, Array]:
    """Principal coordinates analysis (Gower 1966).

    Args:
        distances: ``(n, n)`` symmetric.
        axes: coordinates wanted.

    Returns:
        Coordinates ``(n, axes)`` and the share of the positive variance on each axis ``(axes,)``.
    """
    squared = -0.5 * np.asarray(distances, dtype=np.float64) ** 2
    centred = squared - squared.mean(axis=0) - squared.mean(axis=1, keepdims=True) + squared.mean()
    values, vectors = np.linalg.eigh(centred)
    values, vectors = values[::-1], vectors[:, ::-1]
    positive = np.maximum(values, 0.0)
    coordinates = np.zeros((len(values), axes))
    share = np.zeros(axes)
    found = min(axes, len(values))
    coordinates[:, :found] = vectors[:, :found] * np.sqrt(positive[:found])
    if positive.sum() > 0:
        share[:found] = positive[:found] / positive.sum()
    return coordinates, share


def procrustes(target: Array, source: Array) -> tuple[Array, float]:
    """Turn, mirror and scale ``source`` onto ``target``, both ``(n, 2)``.

    Returns:
        The aligned source and the Procrustes correlation (1: the same shape, 0: no likeness).
    """
    centre = target.mean(axis=0)
    a, b = target - centre, source - source.mean(axis=0)
    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    if norm_a == 0 or norm_b == 0:
        return source, 0.0
    left, singular, right = np.linalg.svd((b / norm_b).T @ (a / norm_a))
    correlation = float(singular.sum())
    return b / norm_b @ (left @ right) * norm_a * correlation + centre, correlation


def roc_curve(score: Array, positive: Array) -> tuple[Array, Array, float] | None:
    """False and true positive rates from (0, 0) to (1, 1), and the area below.

    ``None`` where one of the classes is absent or a score is not finite.
    """
    if not positive.any() or positive.all() or not np.isfinite(score).all():
        return None
    order = np.argsort(-score, kind="stable")
    # Equal scores are one threshold: only the last of a run of ties is a point of the curve.
    last = np.append(np.diff(score[order]) != 0, True)
    true_rate = np.concatenate([[0.0], np.cumsum(positive[order])[last] / positive.sum()])
    false_rate = np.concatenate([[0.0], np.cumsum(~positive[order])[last] / (~positive).sum()])
    area = float((np.diff(false_rate) * (true_rate[1:] + true_rate[:-1]) / 2).sum())
    return false_rate, true_rate, area


def thin(step: Array, value: Array, at_most: int) -> tuple[Array, Array]:
    """At most so many points: means of consecutive runs of equal length, in order of step."""
    order = np.argsort(step, kind="stable")
    step, value = step[order], value[order]
    if len(step) <= at_most:
        return step, value
    edges = np.linspace(0, len(step), at_most + 1).astype(int)
    sizes = np.diff(edges)
    return np.add.reduceat(step, edges[:-1]) / sizes, np.add.reduceat(value, edges[:-1]) / sizes


def draw_rows(count: int, at_most: int) -> Array:
    """All rows, or so many of them drawn at random (always the same ones), in order."""
    if count <= at_most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, size=at_most, replace=False))
