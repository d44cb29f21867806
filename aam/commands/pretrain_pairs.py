"""Pretraining that distances between samples teach, where there is no tree."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from aam.commands.inputs import attach_distances, evaluation_rows, split
from aam.commands.training import (
    Task,
    make_encoder,
    pretraining_metrics,
    usual_options,
)
from aam.config import PretrainConfig
from aam.data.clades import known_arrays
from aam.data.dataset import SampleDataset
from aam.data.samples import make_dataset, read_samples
from aam.data.unifrac import UniFrac
from aam.evaluation import metrics
from aam.evaluation.metrics import Measured, distance_metrics
from aam.evaluation.outputs import predicted_distances
from aam.evaluation.results import (
    CHECK_SEED,
    EvaluationSubset,
    Results,
    distance_results,
    nucleotide_results,
)
from aam.learning.checkpoint import fingerprint
from aam.learning.distributed import RankGroup
from aam.learning.losses import DistanceLoss
from aam.learning.objective import PairObjective
from aam.learning.run import Run
from aam.model import PretrainedModel

FREE_CLADES = 512
EPOCHS, LEARNING_RATE = 40, 1e-3  # where none are given
UNIT_SAMPLES = 64  # whose distances say what a distance of 1 is
USUAL_DISTANCE = 0.7  # of two samples, in units of the largest
VALIDATION_ASVS = 2000  # sequences whose masked nucleotides are checked at each validation


class PairPretraining(Task):
    """Learn distances between samples and masked nucleotides."""

    config: PretrainConfig
    model: PretrainedModel
    dataset: SampleDataset

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        """Read the table and its distances."""
        self.config, self.device, seed = config, device, config.run.seed
        samples = read_samples(config.data, seed, metadata=config.metadata.metadata)
        distances = attach_distances(samples, config.data, config.distances)
        assert not isinstance(distances, UniFrac)  # with a tree its clades are learned
        self.distances = distances
        self.parts = split(samples, config.metadata, seed)
        self.dataset = make_dataset(samples, config.data)
        self.rows = samples.rows(self.parts.train)
        evaluated, column = evaluation_rows(samples, self.parts), config.metadata.group_column
        self.subset = EvaluationSubset(samples, self.distances, evaluated, self.rows, column)
        self.facts, self.warnings = samples.facts, samples.warnings
        self.optimizer = usual_options(config.optimizer, EPOCHS, LEARNING_RATE)
        self.best_metric = "mantel_r" if config.losses.unifrac_penalty else "nucleotide_accuracy"
        self.description = {"distance": config.distances.distance or "matrix"}
        self.fingerprint = fingerprint(
            samples.table.digest(), self.parts, self.distances.pairwise(self.rows[:16])
        )

    def build(self, state: dict[str, Any] | None) -> PairObjective:
        """The model's unit of distance is that of some training samples."""
        abundance = self.config.distances.distance != "jaccard"
        encoder = make_encoder(self.config)
        self.model = PretrainedModel(encoder, free_clades=FREE_CLADES, abundance=abundance)
        assert self.model.pairs is not None
        order = np.random.default_rng(self.config.run.seed).permutation(self.rows)
        mean = metrics.condensed(self.distances.pairwise(order[:UNIT_SAMPLES])).mean()
        self.model.pairs.unit.fill_(max(float(mean), 1e-6) / USUAL_DISTANCE)
        self.model.to(self.device)
        loss = DistanceLoss(self.distances)
        return PairObjective(encoder, self.model.pairs, self.config.losses, loss)

    def validate(self) -> Measured:
        """Distances of the validation samples, and masked nucleotides."""
        measured, rows = {}, self.subset.rows
        if self.config.losses.unifrac_penalty:
            predicted = predicted_distances(self.model, self.dataset, rows, RankGroup())
            measured = distance_metrics(predicted, self.distances.pairwise(rows))
        asvs = self.dataset.asvs_of(rows)
        if len(asvs) > VALIDATION_ASVS:
            drawn = np.random.default_rng(CHECK_SEED).choice(asvs, VALIDATION_ASVS, replace=False)
            asvs = np.sort(drawn)
        return pretraining_metrics(self, measured, self.dataset, asvs)

    def arrays(self) -> dict[str, np.ndarray]:
        """The sequences of training."""
        return known_arrays(self.dataset.sequences.take(self.dataset.asvs_of(self.rows)))

    def results(self, run: Run) -> dict[str, Any]:
        """Distances and masked nucleotides beside their baselines."""
        losses, dataset, rows = self.config.losses, self.dataset, self.subset.rows
        results: Results = []
        if losses.unifrac_penalty:
            predicted = predicted_distances(self.model, dataset, rows)
            results += distance_results(self.subset, predicted, run)
        if losses.nucleotide_penalty:
            asvs, known = dataset.asvs_of(rows), dataset.asvs_of(self.rows)
            encoder = self.model.encoder
            results += nucleotide_results(encoder, dataset, asvs, dataset, known, losses)
        return {"results": results}
