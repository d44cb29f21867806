"""`aam pretrain`: learn the clades of a tree, or distances between samples, and nucleotides.

`pretrain_tree` has what a tree teaches; here is what distances teach where there is none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from aam.commands.inputs import attach_distances, evaluation_rows, split
from aam.commands.pretrain_tree import TreePretraining
from aam.commands.training import make_encoder, pretraining_metrics, train, usual_options
from aam.config import PretrainConfig
from aam.data.dataset import SampleDataset
from aam.data.samples import read_samples
from aam.data.unifrac import UniFrac
from aam.evaluation import results
from aam.evaluation.baselines import CHECK_SEED, EvaluationSubset
from aam.evaluation.metrics import Measured, condensed, distance_metrics
from aam.evaluation.outputs import predicted_distances
from aam.learning.checkpoint import fingerprint
from aam.learning.distributed import RankGroup
from aam.learning.losses import DistanceLoss
from aam.learning.objective import PairObjective
from aam.learning.run import Run
from aam.learning.task import Task
from aam.model import PretrainedModel

FREE_CLADES = 512
EPOCHS, LEARNING_RATE = 40, 1e-3  # where none are given
UNIT_SAMPLES = 64  # whose distances say what a distance of 1 is
USUAL_DISTANCE = 0.7  # of two samples, in units of the largest
VALIDATION_ASVS = 2000  # sequences whose masked nucleotides are checked at each validation


def pretrain(config: PretrainConfig) -> Path:
    """Run `aam pretrain`; returns the run folder."""
    return train(config, PairPretraining if config.distances.tree is None else TreePretraining)


class PairPretraining(Task):
    """Learn distances between samples and masked nucleotides."""

    config: PretrainConfig
    model: PretrainedModel
    dataset: SampleDataset

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        """Read the table and its distances."""
        self.config, self.device, data = config, device, config.data
        samples = read_samples(data, config.run.seed, metadata=config.metadata.metadata)
        truth = config.distances
        distances = attach_distances(samples, truth, truth.distance, data)
        assert not isinstance(distances, UniFrac)  # with a tree its clades are learned
        self.distances = distances
        self.parts = split(samples, config.metadata, config.run.seed)
        self.dataset = samples.dataset(data)
        self.rows = samples.rows(self.parts.train)
        evaluated, column = evaluation_rows(samples, self.parts), config.metadata.group_column
        self.subset = EvaluationSubset(samples, self.distances, evaluated, self.rows, column)
        self.facts, self.warnings = samples.facts, samples.warnings
        self.optimizer = usual_options(config.optimizer, EPOCHS, LEARNING_RATE)
        self.best_metric = "mantel_r" if config.losses.unifrac_penalty else "nucleotide_accuracy"
        self.known = {"distance": truth.distance or "matrix"}
        near = self.distances.pairwise(self.rows[:16])
        self.fingerprint = fingerprint(samples.table.digest(), self.parts, near)

    def build(self, state: dict[str, Any] | None) -> PairObjective:
        """The model's unit of distance is that of some training samples."""
        abundance = self.config.distances.distance != "jaccard"
        encoder = make_encoder(self.config)
        self.model = PretrainedModel(encoder, free_clades=FREE_CLADES, abundance=abundance)
        assert self.model.pairs is not None
        order = np.random.default_rng(self.config.run.seed).permutation(self.rows)
        mean = condensed(self.distances.pairwise(order[:UNIT_SAMPLES])).mean()
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

    def results(self, run: Run) -> dict[str, Any]:
        """Distances and masked nucleotides beside their baselines."""
        losses, dataset, rows = self.config.losses, self.dataset, self.subset.rows
        found: results.Results = []
        if losses.unifrac_penalty:
            predicted = predicted_distances(self.model, dataset, rows)
            found += results.distance_results(self.subset, predicted, run)
        if losses.nucleotide_penalty:
            encoder, asvs = self.model.encoder, dataset.asvs_of(rows)
            known = dataset.asvs_of(self.rows)
            found += results.nucleotide_results(encoder, dataset, asvs, dataset, known, losses)
        return {"results": found}
