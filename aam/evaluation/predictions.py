"""What a fine-tuned model says, in the user's units, and how a table writes it."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from aam.learning.targets import TargetInfo


def in_units(outputs: Tensor, target: TargetInfo, keys: list[str] | None) -> np.ndarray:
    """Model outputs as numbers in the user's units (n,), or probabilities (n, classes)."""
    if target.classes:
        return outputs.softmax(-1).double().numpy()
    return target.transform.invert(outputs[:, 0].double().numpy(), keys)


def prediction_header(target: TargetInfo) -> list[str]:
    """Names of the columns that :func:`prediction_cells` fills."""
    return ["predicted", *(f"probability_{name}" for name in target.classes)]


def prediction_cells(predicted: np.ndarray, target: TargetInfo) -> list[list[str]]:
    """A number in the user's units, or a class name and every class's probability."""
    if not target.classes:
        return [[repr(float(value))] for value in predicted]
    return [
        [target.classes[int(row.argmax())], *(f"{value:.6f}" for value in row)] for row in predicted
    ]
