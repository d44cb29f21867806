"""The predicted column: which kind it is, how it is scaled, and the way back to its units."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aam.data.metadata import Metadata
from aam.errors import InputError

MINIMUM_CATEGORY = 2  # samples that a category needs for a mean and deviation of its own


@dataclass(frozen=True)
class TargetTransform:
    """y -> (f(y) - centre) / scale, where f is log(1 + y) in the transforms named log-.

    With ``zscore-category`` centre and scale are those of the sample's categories, where the
    training part had at least two samples of them.
    """

    name: str = "none"
    centre: float = 0.0
    scale: float = 1.0
    by_category: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def fit(cls, name: str, values: np.ndarray, keys: np.ndarray | None = None) -> TargetTransform:
        """Fit on training targets (n,) in the user's units, and names of their categories (n,)."""
        if name == "none":
            return cls()
        values = _logarithm(name, values)
        if name.endswith("minmax"):
            return cls(name, float(values.min()), float(np.ptp(values)) or 1.0)
        by_category = {}
        for key in np.unique(keys) if name == "zscore-category" and keys is not None else ():
            own = values[keys == key]
            if len(own) >= MINIMUM_CATEGORY:
                by_category[key] = (float(own.mean()), float(own.std()) or 1.0)
        return cls(name, float(values.mean()), float(values.std()) or 1.0, by_category)

    def apply(self, values: np.ndarray, keys: np.ndarray | None = None) -> np.ndarray:
        """From the user's units to what the model learns; keys as in `fit`."""
        centre, scale = self._centre_and_scale(keys)
        return (_logarithm(self.name, values) - centre) / scale

    def invert(self, values: np.ndarray, keys: np.ndarray | None = None) -> np.ndarray:
        """From the model's outputs to the user's units."""
        centre, scale = self._centre_and_scale(keys)
        values = np.asarray(values, dtype=np.float64) * scale + centre
        return np.expm1(values) if self.name.startswith("log-") else values

    def _centre_and_scale(self, keys: np.ndarray | None) -> Any:
        """Two numbers, or (2, n)."""
        both = (self.centre, self.scale)
        if keys is None:
            return both
        return np.array([self.by_category.get(key, both) for key in keys]).reshape(-1, 2).T


def _logarithm(name: str, values: np.ndarray) -> np.ndarray:
    """log(1 + values) float64, where a transform of this name takes it."""
    values = np.asarray(values, dtype=np.float64)
    if not name.startswith("log-"):
        return values
    if values.min() <= -1:
        raise InputError(
            f"--target-transform {name} needs numbers above -1, the smallest is "
            f"{values.min():g}; use zscore"
        )
    return np.log1p(values)


@dataclass(frozen=True)
class TargetInfo:
    """What `predict` must know of the column a model was trained on."""

    column: str
    classes: tuple[str, ...] = ()  # none: a number
    transform: TargetTransform = field(default_factory=TargetTransform)

    def truth(self, metadata: Metadata) -> np.ndarray:
        """True numbers, or class codes, (samples,) float64; NaN where missing or no known class."""
        if not self.classes:
            return metadata.numeric(self.column)
        codes: dict[Any, float] = {name: n for n, name in enumerate(self.classes)}
        return np.array([codes.get(one, np.nan) for one in metadata.text(self.column)])


def class_weights(codes: np.ndarray, classes: int) -> np.ndarray:
    """Inverse class frequencies with mean 1 over the samples, (classes,) float32."""
    sizes = np.bincount(codes, minlength=classes)
    return (len(codes) / (classes * np.maximum(sizes, 1))).astype(np.float32)
