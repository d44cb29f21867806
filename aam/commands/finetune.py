"""`aam finetune`: train a predictor of a metadata column."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aam.commands.inputs import split
from aam.commands.training import make_encoder, train, usual_options
from aam.config import FinetuneConfig, flag
from aam.data.dataset import SampleDataset
from aam.data.samples import read_samples
from aam.errors import InputError, log
from aam.evaluation import outputs
from aam.evaluation.metrics import Measured, target_metrics
from aam.evaluation.results import target_results
from aam.learning.checkpoint import fingerprint
from aam.learning.distributed import RankGroup
from aam.learning.losses import TargetLoss
from aam.learning.model_file import load_encoder, read_model
from aam.learning.objective import FinetuneObjective
from aam.learning.run import Run
from aam.learning.targets import TargetInfo, TargetTransform, class_weights
from aam.learning.task import Task
from aam.model import Predictor
from aam.model.predictor import PredictorShape

EPOCHS, LEARNING_RATE = 20, 6e-4  # where none are given


def finetune(config: FinetuneConfig) -> Path:
    """Run `aam finetune`; returns the run folder."""
    return train(config, Finetuning)


def adopt_shape(config: FinetuneConfig, run: Path) -> None:
    """Take the encoder's shape from a pretrained run, so that its weights fit."""
    for name, value in read_model(run).description["encoder"].items():
        if name == "dropout":
            continue
        options: Any = config.data if name == "max_bp" else config.model
        asked, default = getattr(options, name), getattr(type(options), name)
        if asked not in (default, value):
            raise InputError(
                f"{flag(name)} {asked}: the encoder of {run} has {value}; leave the option out, "
                "it is taken over"
            )
        setattr(options, name, value)


class Finetuning(Task):
    """Learn to predict a metadata column, from a pretrained encoder or from scratch."""

    config: FinetuneConfig
    model: Predictor
    dataset: SampleDataset

    def __init__(self, config: FinetuneConfig, device: torch.device) -> None:
        """Read the table, the target and the covariates."""
        self.config, self.device, seed = config, device, config.run.seed
        # The base that a new run begins with; a continued one has its own in the checkpoint.
        self.base = None if config.run.resume_from else config.pretrained_encoder
        if self.base is not None:
            adopt_shape(config, self.base)
        samples = self.samples = read_samples(config.data, seed, metadata=config.metadata.metadata)
        column, columns = config.target.metadata_column, config.categorical.categorical_columns
        allow_missing = config.data.allow_missing
        labels = samples.keep_with(column, config.target.task, allow_missing=allow_missing)
        classes = tuple(sorted(set(labels or ())))
        assert samples.metadata is not None
        self.parts = split(samples, config.metadata, seed, labels)
        self.rows = samples.rows(self.parts.train)
        self.validation_rows = samples.rows(self.parts.validation)
        truth = TargetInfo(column, classes).truth(samples.metadata)
        transform = "none" if classes else config.target.target_transform
        self.keys = samples.category_keys(columns)
        fitted = TargetTransform.fit(transform, truth[self.rows], self.keys[self.rows])
        self.target = TargetInfo(column, classes, fitted)
        scaled = fitted.apply(truth, self.keys)
        self.learned = scaled.astype(np.int64 if classes else np.float32)
        self.truth = self.learned if classes else truth
        self.categories = {one: self.category_classes(one) for one in columns}
        codes = samples.category_codes(self.categories) if columns else None
        self.dataset = samples.dataset(config.data, targets=self.learned, categories=codes)
        self.facts, self.warnings = samples.facts, samples.warnings
        self.optimizer = usual_options(config.optimizer, EPOCHS, LEARNING_RATE)
        self.best_metric = "balanced_accuracy" if classes else "r2"
        self.known = {"target": asdict(self.target), "categories": self.categories}
        self.fingerprint = fingerprint(samples.table.digest(), self.parts, self.truth, codes)

    def category_classes(self, column: str) -> list[str]:
        """Classes of a categorical column: those of the training part."""
        metadata = self.samples.metadata
        assert metadata is not None
        values = metadata.text(column)
        classes = sorted({one for row in self.rows if (one := values[row]) is not None})
        if not classes:
            raise InputError(
                f"{metadata.source}: column {column!r} has no values in the training part; "
                "leave it out of --categorical-columns"
            )
        return classes

    def build(self, state: dict[str, Any] | None) -> FinetuneObjective:
        """With a frozen base each distinct ASV of the table is encoded once."""
        config, classes = self.config, len(self.target.classes)
        self.model = self.make_predictor(state).to(self.device)
        encoder = self.model.encoder
        self.frozen: Tensor | None = None
        if config.freeze_base:
            encoder.requires_grad_(False)
            everything = np.arange(len(self.dataset.sequences))
            log(f"encoding {len(everything)} distinct ASVs once (--freeze-base)")
            self.frozen = outputs.encode_asvs(encoder, self.dataset, everything, RankGroup())
        if self.base is not None:
            self.standardise()
        weights = None
        if classes and config.target.class_weights:
            weights = torch.as_tensor(class_weights(self.learned[self.rows], classes))
        self.loss = TargetLoss(config.target, weights, bool(classes))
        return FinetuneObjective(self.model, config.losses, self.loss, frozen_asvs=self.frozen)

    def make_predictor(self, state: dict[str, Any] | None) -> Predictor:
        """The predictor with the weights of the pretrained run, or of a checkpoint."""
        config, encoder = self.config, make_encoder(self.config)
        if self.base is not None:
            log(f"encoder from {self.base}:")
            for part, what, size in load_encoder(encoder, self.base):
                log(f"  {part:20}{what:10}{size:>12,} parameters")
        shape = PredictorShape(
            outputs=len(self.target.classes) or 1,
            count_embedding=config.count_embedding,
            category_sizes=tuple(len(one) for one in self.categories.values()),
            categorical_embed_dim=config.categorical.categorical_embed_dim,
            categorical_fusion=config.categorical.categorical_fusion,
            target_head=config.target.target_head,
            predict_counts=bool(config.losses.count_penalty),
        )
        impl, recompute = config.run.attn_implementation, config.run.gradient_checkpointing
        predictor = Predictor(encoder, shape, impl=impl, recompute=recompute)
        if state is not None:  # now, because a frozen base encodes before the training resumes
            weights = state["objective"].items()
            predictor.load_state_dict({k.removeprefix("predictor."): v for k, v in weights})
        return predictor

    def standardise(self) -> None:
        """Standardise what the base hands over, by the slots of the training samples."""
        starts, asvs = self.dataset.entries()
        slots = np.concatenate([asvs[starts[row] : starts[row + 1]] for row in self.rows])
        times = np.bincount(slots, minlength=len(self.dataset.sequences))
        used = np.flatnonzero(times)
        if self.frozen is None:
            vectors = outputs.encode_asvs(self.model.encoder, self.dataset, used, RankGroup())
        else:
            vectors = self.frozen[torch.from_numpy(used).to(self.frozen.device)]
        weights = torch.from_numpy(times[used]).to(vectors)
        self.model.sample_encoder.standardise_by(vectors, weights)

    def predict(
        self, rows: np.ndarray, ranks: RankGroup | None = None
    ) -> tuple[np.ndarray, Tensor]:
        """Predictions (numbers in the user's units, or probabilities) and raw outputs."""
        raw = outputs.predict_outputs(
            self.model, self.dataset, rows, frozen_asvs=self.frozen, ranks=ranks
        )
        return outputs.in_units(raw, self.target, self.keys[rows]), raw

    def validate(self) -> Measured:
        """The loss of the validation samples, and their metrics in the user's units."""
        rows = self.validation_rows
        predicted, raw = self.predict(rows, RankGroup())
        loss = float(self.loss(raw, torch.as_tensor(self.learned[rows])))
        measured = target_metrics(predicted, self.truth[rows], len(self.target.classes))
        return {"loss": loss, "target_loss": loss, **measured}

    def results(self, run: Run) -> dict[str, Any]:
        """Predictions of both parts, and the metrics beside their baselines."""
        target, rows, classes = self.target, [], self.target.classes
        for part, chosen in (("train", self.rows), ("validation", self.validation_rows)):
            predicted, _ = self.predict(chosen)
            ids = [self.samples.ids[row] for row in chosen]
            frame = outputs.prediction_frame(predicted, target, ids)
            for true, (name, *cells) in zip(
                self.truth[chosen], outputs.prediction_cells(frame), strict=True
            ):
                rows.append([name, part, classes[int(true)] if classes else float(true), *cells])
        run.write_table("predictions.tsv", ["sample-id", "part", "true", *frame.columns], rows)
        results = target_results(
            target, predicted, self.truth, self.samples, self.rows, self.validation_rows
        )
        return {"results": results, "target": {"column": target.column, "classes": classes}}
