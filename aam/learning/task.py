"""What is trained: data, a model, and how it is measured; `Trainer` trains any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from aam.config import OptimizerOptions
from aam.data.clades import known_arrays
from aam.data.dataset import AsvDataset, SampleDataset
from aam.data.splits import Split
from aam.errors import DataFact
from aam.learning.objective import Objective
from aam.learning.run import Run
from aam.model import Predictor, PretrainedModel

DATA_OPTIONS = ("rarefy_depth", "max_bp", "token_limit", "asv_sampling")
MASK_OPTIONS = ("mask_probability", "mask_strategy")


class Task(ABC):
    """Something to learn: its data, read when it is made, its model, and how that is measured."""

    config: Any  # all options
    device: torch.device
    model: PretrainedModel | Predictor  # what is saved; there after `build`
    dataset: SampleDataset | AsvDataset
    rows: np.ndarray  # (n,) which of the dataset train
    parts: Split  # names of those that train and those that validate
    unit = "samples"  # what `parts` names
    optimizer: OptimizerOptions  # with every value given
    best_metric: str  # chooses the best weights, if no option does
    fingerprint: str  # of the data: a run is continued with the same alone
    known: dict[str, Any]  # what later commands must know beside the options
    facts: list[DataFact]  # what was read, dropped and cut
    warnings: list[str]  # what a reader should know before trusting a number

    def describe(self) -> dict[str, Any]:
        """What is kept beside the weights: how to treat data as this run did, and what is known."""
        data = {name: getattr(self.config.data, name) for name in DATA_OPTIONS}
        data |= {name: getattr(self.config.losses, name) for name in MASK_OPTIONS}
        return {
            "command": self.config.command,
            "data": {**data, "seed": self.config.run.seed},
            "fingerprint": self.fingerprint,
            **self.known,
        }

    @abstractmethod
    def build(self, state: dict[str, Any] | None) -> Objective:
        """Make the model, and what it is to learn; `state` is the checkpoint to continue from."""

    @abstractmethod
    def validate(self) -> dict[str, float | None]:
        """Validation metrics of the current weights, in evaluation mode; all ranks call it."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What the trained model knows beside its weights: the sequences of training."""
        assert isinstance(self.dataset, SampleDataset)
        return known_arrays(self.dataset.sequences.take(self.dataset.asvs_of(self.rows)))

    @abstractmethod
    def results(self, run: Run) -> dict[str, Any]:
        """Final measurements: writes tables, returns ``results`` and more of summary.json."""
