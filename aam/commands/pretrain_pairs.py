"""Pretraining that distances between samples teach: validation, and the final measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from aam.config import PretrainConfig
from aam.data.dataset import SampleDataset
from aam.data.samples import Samples
from aam.evaluation.measurements import (
    CHECK_SEED,
    distance_results,
    nucleotide_results,
    write_pairs,
)
from aam.evaluation.outputs import check_nucleotides, distance_metrics, predicted_distances
from aam.evaluation.results import print_results
from aam.learning.distributed import RankGroup
from aam.learning.losses import DistanceSource
from aam.learning.run import Run
from aam.model import PretrainedModel

VALIDATION_ASVS = 2000  # sequences whose masked nucleotides are checked at each validation


@dataclass
class PairTask:
    """Everything that validation and the final measurements look at."""

    model: PretrainedModel
    dataset: SampleDataset
    distances: DistanceSource
    train_rows: np.ndarray
    validation_rows: np.ndarray
    config: PretrainConfig

    @property
    def metric(self) -> str:
        """The validation metric that chooses the best weights."""
        return "mantel_r" if self.config.losses.unifrac_penalty else "nucleotide_accuracy"

    def validate(self) -> dict[str, float | None]:
        """Validation metrics of the current weights, in evaluation mode; all ranks call it."""
        measured: dict[str, float | None] = {}
        penalties, exchange = self.config.losses, RankGroup()
        if penalties.unifrac_penalty:
            rows = self.validation_rows
            predicted = predicted_distances(self.model, self.dataset, rows, exchange)
            measured |= distance_metrics(predicted, self.distances.pairwise(rows))
        if penalties.nucleotide_penalty:
            check = check_nucleotides(
                self.model.encoder, self.dataset, self.validation_asvs(), penalties,
                seed=CHECK_SEED, exchange=exchange,
            )  # fmt: skip
            measured |= {"nucleotide_loss": check.loss, "nucleotide_accuracy": check.accuracy}
        weights = {
            "unifrac_loss": penalties.unifrac_penalty,
            "nucleotide_loss": penalties.nucleotide_penalty,
        }
        total = sum(weight * (measured.get(name) or 0.0) for name, weight in weights.items())
        return {"loss": total, **measured}

    def validation_asvs(self, most: int = VALIDATION_ASVS) -> np.ndarray:
        """Distinct ASVs of the validation samples, the same ones every time."""
        asv_ids = self.dataset.asvs_of(self.validation_rows)
        if len(asv_ids) <= most:
            return asv_ids
        return np.sort(np.random.default_rng(CHECK_SEED).choice(asv_ids, most, replace=False))


def write_pair_results(run: Run, task: PairTask, samples: Samples, summary: dict[str, Any]) -> None:
    """Final measurements beside their baselines: tables, summary, and a printed table."""
    config, results = task.config, []
    if config.losses.unifrac_penalty:
        rows = task.validation_rows
        groups = samples.groups(config.metadata.group_column)
        predicted = predicted_distances(task.model, task.dataset, rows)
        true = task.distances.pairwise(rows)
        own = None if groups is None else [groups[row] for row in rows]
        write_pairs(run, [samples.ids[row] for row in rows], true, predicted, own)
        results += distance_results(
            samples, task.distances.pairwise, predicted, true, task.train_rows, rows, groups
        )
    if config.losses.nucleotide_penalty:
        results += nucleotide_results(
            task.model.encoder, task.dataset, task.validation_asvs(len(task.dataset.sequences)),
            task.dataset, task.dataset.asvs_of(task.train_rows), config.losses,
        )  # fmt: skip
    summary["results"] = results
    run.write_summary(summary)
    print_results(results)
