"""Steps within a memory budget, in pieces that fit; in smaller ones where they did not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from aam.batching import EpochPlan, StepSize
from aam.config import OptimizerOptions
from aam.data.dataset import SampleDataset
from aam.errors import InputError
from aam.training.objectives import Objective
from aam.training.runs import say
from aam.training.step import StepTooLarge

DEFAULT_BATCH = 8


def make_plan(rows: np.ndarray, options: OptimizerOptions, seed: int) -> EpochPlan:
    """Which samples share a step."""
    size = options.effective_batch_size or options.batch_size or DEFAULT_BATCH
    return EpochPlan(rows, size, seed)


class MemoryGuard:
    """Chooses the pieces of every step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.failures = 0
        self.largest: float | None = None  # tokens of a piece that did not fit

    def pieces(self, size: StepSize) -> int:
        """Into how many pieces a step is cut."""
        pieces = 1
        while self.largest is not None and size.split(pieces).tokens >= self.largest:
            pieces *= 2
        return pieces

    def run(
        self, size: StepSize, compute: Callable[[int], dict[str, float]]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Compute a step, again in twice as many pieces each time the memory is too small.

        Args:
            size: what the step holds in one piece.
            compute: the step in a number of pieces; leaves no gradients when it fails.

        Returns:
            What the step returned, and what it took.

        Raises:
            InputError: even the smallest pieces do not fit.
        """
        pieces = self.pieces(size)
        while True:
            try:
                terms = compute(pieces)
            except StepTooLarge:
                self.failures += 1
                self.largest = size.split(pieces).tokens
                if pieces >= max(size.asvs, size.samples):
                    raise InputError(
                        "out of memory: a step does not fit even one sequence at a time; use a "
                        "smaller model or --token-limit"
                    ) from None
                pieces *= 2
                say(f"out of memory: the same step again in {pieces} pieces")
                continue
            return terms, {"pieces": float(pieces)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"failures": self.failures, "largest": self.largest}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self.failures, self.largest = state["failures"], state["largest"]


def step_size(
    dataset: SampleDataset, rows: np.ndarray, objective: Objective, ranks: int = 1
) -> StepSize:
    """What each of some ranks holds of a step in one piece."""
    asvs = dataset.asvs_of(rows)
    tokens = float(dataset.sequence_lengths[asvs].sum()) / ranks
    mixtures = 1 + objective.mixtures
    return StepSize(
        tokens=0.0 if objective.frozen_asvs is not None else tokens,
        masked=objective.masked_share * tokens,
        asvs=float(len(asvs)),
        slots=float(dataset.asv_count[rows].sum()) * mixtures / ranks,
        samples=len(rows) * mixtures,
    )
