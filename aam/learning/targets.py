"""The predicted column: which kind it is, how it is scaled, and the way back to its units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from aam.config import TargetOptions
from aam.data.metadata import Metadata
from aam.data.samples import Samples
from aam.errors import InputError

MINIMUM_CATEGORY = 2  # samples that a category needs for a mean and deviation of its own


@dataclass(frozen=True)
class TargetTransform:
    """y -> (f(y) - centre) / scale with f = log(1 + y) where asked; invertible, saved.

    With ``zscore-category`` centre and scale are those of the sample's categories, where the
    training part had at least two samples of them.
    """

    name: str = "none"
    centre: float = 0.0
    scale: float = 1.0
    by_category: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def fit(
        cls, name: str, values: np.ndarray, categories: Sequence[str] | None = None
    ) -> TargetTransform:
        """Fit on the training part.

        Args:
            name: none, minmax, zscore, zscore-category, log-minmax or log-zscore.
            values: (n,) training targets in the user's units.
            categories: (n,) key of each sample's categories, for ``zscore-category``.

        Raises:
            InputError: a logarithm of numbers <= -1, or categories are missing.
        """
        values = np.asarray(values, dtype=np.float64)
        if name == "none":
            return cls()
        if name.startswith("log-"):
            if values.min() <= -1:
                raise InputError(
                    f"--target-transform {name} needs numbers above -1, the smallest is "
                    f"{values.min():g}; use zscore"
                )
            values = np.log1p(values)
        if name.endswith("minmax"):
            return cls(name, float(values.min()), _positive(np.ptp(values)))
        by_category = {}
        if name == "zscore-category":
            if categories is None:
                raise InputError("--target-transform zscore-category needs --categorical-columns")
            for key in sorted(set(categories)):
                own = values[[one == key for one in categories]]
                if len(own) >= MINIMUM_CATEGORY:
                    by_category[key] = (float(own.mean()), _positive(own.std()))
        return cls(name, float(values.mean()), _positive(values.std()), by_category)

    def apply(self, values: np.ndarray, categories: Sequence[str] | None = None) -> np.ndarray:
        """From the user's units to what the model learns."""
        values = np.asarray(values, dtype=np.float64)
        if self.name.startswith("log-"):
            values = np.log1p(values)
        centre, scale = self._centre_scale(len(values), categories)
        return (values - centre) / scale

    def invert(self, values: np.ndarray, categories: Sequence[str] | None = None) -> np.ndarray:
        """From what the model says to the user's units."""
        values = np.asarray(values, dtype=np.float64)
        centre, scale = self._centre_scale(len(values), categories)
        values = values * scale + centre
        return np.expm1(values) if self.name.startswith("log-") else values

    def _centre_scale(
        self, count: int, categories: Sequence[str] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        default = (self.centre, self.scale)
        if not self.by_category:
            pairs = [default] * count
        else:
            pairs = [self.by_category.get(key, default) for key in categories or [""] * count]
        centre, scale = np.array(pairs, dtype=np.float64).reshape(count, 2).T
        return centre, scale


@dataclass(frozen=True)
class TargetInfo:
    """What `predict` must know of the column a model was trained on."""

    column: str
    classes: tuple[str, ...] = ()
    transform: TargetTransform = field(default_factory=TargetTransform)

    @property
    def kind(self) -> str:
        """``classification`` or ``regression``."""
        return "classification" if self.classes else "regression"

    @property
    def outputs(self) -> int:
        """Width of the model's last layer."""
        return len(self.classes) or 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TargetInfo:
        """Inverse of :meth:`to_dict`."""
        transform = dict(values["transform"])
        transform["by_category"] = {k: tuple(v) for k, v in transform["by_category"].items()}
        return cls(values["column"], tuple(values["classes"]), TargetTransform(**transform))


def is_classification(metadata: Metadata, options: TargetOptions) -> bool:
    """Say whether the column is predicted as classes."""
    if options.task == "auto":
        return not metadata.is_numeric(options.metadata_column)
    return options.task == "classification"


def category_keys(metadata: Metadata, columns: Sequence[str], ids: Sequence[str]) -> list[str]:
    """One string a sample that names its values in all categorical columns."""
    chosen = metadata.select(ids)
    values = [chosen.text(column) for column in columns]
    return ["\x1f".join(value or "" for value in row) for row in zip(*values, strict=True)]


def encode_categories(samples: Samples, classes: dict[str, list[str]]) -> np.ndarray:
    """Codes (samples, columns) int64; 0 for unknown or missing."""
    if samples.metadata is None:
        return np.zeros((len(samples.ids), len(classes)), dtype=np.int64)
    codes = []
    for column, names in classes.items():
        code: dict[str | None, int] = {name: i for i, name in enumerate(names, start=1)}
        codes.append([code.get(value, 0) for value in samples.metadata.text(column)])
    return np.array(codes, dtype=np.int64).T


def class_weights(codes: np.ndarray, classes: int) -> np.ndarray:
    """Inverse class frequencies with mean 1 over the samples, (classes,) float32."""
    sizes = np.bincount(codes, minlength=classes)
    return (len(codes) / (classes * np.maximum(sizes, 1))).astype(np.float32)


def _positive(scale: float) -> float:
    """A constant target has no scale of its own."""
    return float(scale) if scale > 0 else 1.0
