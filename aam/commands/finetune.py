"""`aam finetune`: train a predictor of a metadata column."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aam.commands.inputs import data_description, split
from aam.commands.train_and_report import Job, train_and_report, usual_options
from aam.config import FinetuneConfig
from aam.data.clades import known_arrays
from aam.data.dataset import SampleDataset
from aam.data.metadata import require_values
from aam.data.samples import Samples, make_dataset, read_samples
from aam.errors import DataFact, InputError, log, log_facts, name_some
from aam.evaluation import baselines
from aam.evaluation.outputs import encode_asvs, predict_outputs, target_metrics
from aam.evaluation.predictions import in_units, prediction_cells, prediction_header
from aam.evaluation.results import print_results, result
from aam.files import refuse_breaks
from aam.learning.checkpoint import load_encoder, read_model
from aam.learning.distributed import RankGroup
from aam.learning.launch import start
from aam.learning.losses import TargetLoss
from aam.learning.objective import FinetuneObjective
from aam.learning.resume import compatible_state, fingerprint
from aam.learning.run import Run, check_output
from aam.learning.targets import (
    TargetInfo,
    TargetTransform,
    category_keys,
    class_weights,
    encode_categories,
    is_classification,
)
from aam.model import AsvEncoder, EncoderShape, Predictor
from aam.model.predictor import PredictorShape
from aam.option_files import flag

BASELINE_SEED = 0
EPOCHS, LEARNING_RATE = 20, 6e-4  # where none are given


@dataclass
class Task:
    """What validation and the final measurements look at."""

    predictor: Predictor
    dataset: SampleDataset
    target: TargetInfo
    truth: np.ndarray  # (samples,) in the user's units, or class codes
    keys: list[str] | None  # categories of each sample, for zscore-category
    train_rows: np.ndarray
    validation_rows: np.ndarray
    target_loss: TargetLoss
    scaled: np.ndarray  # (samples,) what the model learns
    frozen_asvs: Tensor | None

    def predict(
        self, rows: np.ndarray, exchange: RankGroup | None = None
    ) -> tuple[np.ndarray, Tensor]:
        """Predictions (numbers in the user's units, or probabilities) and raw outputs."""
        outputs = predict_outputs(
            self.predictor, self.dataset, rows, frozen_asvs=self.frozen_asvs, exchange=exchange
        )
        keys = None if self.keys is None else [self.keys[row] for row in rows]
        return in_units(outputs, self.target, keys), outputs

    def validate(self) -> dict[str, float | None]:
        """Validation metrics of the current weights, in evaluation mode; all ranks call it."""
        rows = self.validation_rows
        predicted, outputs = self.predict(rows, RankGroup())
        true = torch.as_tensor(self.scaled[rows])
        true = true.long() if self.target.classes else true.float()
        loss = float(self.target_loss(outputs, true))
        return {
            "loss": loss,
            "target_loss": loss,
            **target_metrics(predicted, self.truth[rows], len(self.target.classes)),
        }


def finetune(config: FinetuneConfig) -> Path:
    """Run `aam finetune`.

    Returns:
        The run folder.
    """
    started = time.time()
    check_output(config.run)
    check_options(config)
    state = compatible_state(config)
    if state is None:
        adopt_pretrained(config)
    device = start(config.run)
    samples = read_samples(config.data, config.run.seed, metadata=config.metadata.metadata)
    keep_samples_with_target(samples, config)
    classes = target_classes(samples, config)
    assert samples.metadata is not None
    column = config.target.metadata_column
    labels = [str(one) for one in samples.metadata.text(column)] if classes else None
    parts = split(samples, config.metadata, config.run.seed, labels=labels)
    train_rows = samples.rows(parts.train)
    target, truth, scaled, keys = prepare_target(samples, config, classes, train_rows)
    categories, category_classes = prepare_categories(samples, config, train_rows)
    dataset = make_dataset(
        samples,
        config.data,
        targets=scaled.astype(np.int64 if classes else np.float32),
        categories=categories,
    ).to(device)
    log_facts(samples.facts, samples.warnings)
    description = {
        "command": "finetune",
        "data": data_description(config),
        "target": target.to_dict(),
        "categories": category_classes,
        "fingerprint": fingerprint(samples.table.digest(), parts, truth, categories),
    }

    torch.manual_seed(config.run.seed)
    predictor = make_predictor(config, target, category_classes, state).to(device)
    frozen = frozen_vectors(predictor, dataset) if config.freeze_base else None
    if config.pretrained_encoder is not None and state is None:
        standardise(predictor, dataset, train_rows, frozen)
    weights = None
    if classes and config.target.class_weights:
        weights = torch.as_tensor(class_weights(truth[train_rows].astype(np.int64), len(classes)))
    target_loss = TargetLoss(config.target, weights, bool(classes))
    objective = FinetuneObjective(predictor, config.losses, target_loss, frozen_asvs=frozen)
    task = Task(
        predictor,
        dataset,
        target,
        truth,
        keys,
        train_rows,
        samples.rows(parts.validation),
        target_loss,
        scaled,
        frozen,
    )
    job = Job(
        objective=objective,
        model=predictor,
        dataset=dataset,
        rows=train_rows,
        parts=parts,
        options=usual_options(config.optimizer, EPOCHS, LEARNING_RATE),
        validate=task.validate,
        best_metric="balanced_accuracy" if classes else "r2",
        description=description,
        arrays=lambda: known_arrays(dataset.sequences_of(dataset.asvs_of(train_rows))),
        write_results=lambda run, summary: write_results(run, task, samples, summary),
        facts=samples.facts,
        warnings=samples.warnings,
    )
    return train_and_report(config, device, state, job, started)


def frozen_vectors(predictor: Predictor, dataset: SampleDataset) -> Tensor:
    """Freeze the base, and encode each distinct ASV of the table once."""
    predictor.encoder.requires_grad_(False)
    log(f"encoding {len(dataset.sequences)} distinct ASVs once (--freeze-base)")
    everything = np.arange(len(dataset.sequences))
    return encode_asvs(predictor.encoder, dataset, everything, RankGroup())


def standardise(
    predictor: Predictor, dataset: SampleDataset, train_rows: np.ndarray, frozen: Tensor | None
) -> None:
    """Standardise what the base hands over, by the slots of the training samples."""
    starts, asvs = dataset.entries()
    slots = np.concatenate([asvs[starts[row] : starts[row + 1]] for row in train_rows])
    times = np.bincount(slots, minlength=len(dataset.sequences))
    used = np.flatnonzero(times)
    if frozen is None:
        vectors = encode_asvs(predictor.encoder, dataset, used, RankGroup())
    else:
        vectors = frozen[torch.from_numpy(used).to(frozen.device)]
    weights = torch.from_numpy(times[used]).to(vectors)
    predictor.sample_encoder.standardise_by(vectors, weights)


def check_options(config: FinetuneConfig) -> None:
    """Refuse combinations that cannot mean anything.

    Raises:
        InputError: names the options.
    """
    if config.metadata.metadata is None:
        raise InputError("finetune needs --metadata, which holds the --metadata-column")
    if config.freeze_base and config.pretrained_encoder is None and config.run.resume_from is None:
        raise InputError("--freeze-base needs --pretrained-encoder: a fresh encoder must train")
    if config.freeze_base and config.losses.nucleotide_penalty:
        raise InputError("--freeze-base leaves nothing for --nucleotide-penalty to train")
    if not config.losses.target_penalty:
        raise InputError("--target-penalty 0: nothing would learn to predict the column")


def adopt_pretrained(config: FinetuneConfig) -> None:
    """Take the encoder's shape from the pretrained run, so that its weights fit.

    Raises:
        InputError: an option asks for another shape.
    """
    if config.pretrained_encoder is None:
        return
    described = read_model(config.pretrained_encoder).description
    for name, value in described["encoder"].items():
        if name == "dropout":
            continue
        options: Any = config.data if name == "max_bp" else config.model
        asked, default = getattr(options, name), getattr(type(options), name)
        if asked not in (default, value):
            raise InputError(
                f"{flag(name)} {asked}: the encoder of {config.pretrained_encoder} has {value}; "
                "leave the option out, it is taken over"
            )
        setattr(options, name, value)


def keep_samples_with_target(samples: Samples, config: FinetuneConfig) -> None:
    """Drop and count samples without a value of the target, where that is allowed.

    Raises:
        InputError: the column is missing, has no values, one class, or is not numeric; or some
            samples have no value and --allow-missing is not given.
    """
    metadata = samples.metadata
    assert metadata is not None
    column = config.target.metadata_column
    values = metadata.text(column)
    require_values(metadata, column, numeric=not is_classification(metadata, config.target))
    lacking = [name for name, value in zip(samples.ids, values, strict=True) if value is None]
    if lacking:
        if not config.data.allow_missing:
            raise InputError(
                f"{metadata.source}: column {column!r} has no value for {len(lacking)} of "
                f"{len(values)} samples ({name_some(lacking)}): fill them in or leave these "
                "samples out with --allow-missing"
            )
        what = f"samples without a value of {column!r}"
        samples.facts.append(DataFact(what, len(lacking), name_some(lacking), "dropped"))
        samples.keep([n for n, v in zip(samples.ids, values, strict=True) if v is not None])


def target_classes(samples: Samples, config: FinetuneConfig) -> tuple[str, ...]:
    """The target's classes among the samples, sorted; none for a number.

    Raises:
        InputError: a class has a tab or a line break, which no table of predictions can hold.
    """
    metadata, column = samples.metadata, config.target.metadata_column
    assert metadata is not None
    if not is_classification(metadata, config.target):
        return ()
    classes = tuple(sorted({str(one) for one in metadata.text(column)}))
    refuse_breaks(classes, metadata.source, f"values of column {column!r}")
    return classes


def prepare_target(
    samples: Samples, config: FinetuneConfig, classes: tuple[str, ...], train_rows: np.ndarray
) -> tuple[TargetInfo, np.ndarray, np.ndarray, list[str] | None]:
    """The target, its true values, what the model learns, and the samples' category keys."""
    metadata, column = samples.metadata, config.target.metadata_column
    assert metadata is not None
    if classes:
        code = {name: i for i, name in enumerate(classes)}
        codes = np.array([code[str(one)] for one in metadata.text(column)])
        return TargetInfo(column, classes), codes, codes, None
    values = metadata.numeric(column)
    keys = None
    if config.target.target_transform == "zscore-category":
        columns = config.categorical.categorical_columns
        keys = category_keys(metadata, columns, samples.ids) if columns else None
    own = None if keys is None else [keys[row] for row in train_rows]
    transform = TargetTransform.fit(config.target.target_transform, values[train_rows], own)
    scaled = transform.apply(values, keys)
    if not np.isfinite(scaled).all():
        raise InputError(
            f"--target-transform {transform.name}: {int((~np.isfinite(scaled)).sum())} values of "
            f"{column!r} cannot be transformed; use zscore"
        )
    return TargetInfo(column, (), transform), values, scaled, keys


def prepare_categories(
    samples: Samples, config: FinetuneConfig, train_rows: np.ndarray
) -> tuple[np.ndarray | None, dict[str, list[str]]]:
    """Codes (samples, columns) of the categorical columns, and each column's classes.

    Classes are those of the training part; a value that only validation has is unknown (0).
    """
    columns = config.categorical.categorical_columns
    metadata = samples.metadata
    assert metadata is not None
    if not columns:
        return None, {}
    if config.target.metadata_column in columns:
        raise InputError(
            f"--categorical-columns: {config.target.metadata_column!r} is the target itself"
        )
    classes: dict[str, list[str]] = {}
    for column in columns:
        values = metadata.text(column)
        classes[column] = sorted(
            {str(values[row]) for row in train_rows if values[row] is not None}
        )
        if not classes[column]:
            raise InputError(
                f"{metadata.source}: column {column!r} has no values in the training part; "
                "leave it out of --categorical-columns"
            )
    codes = encode_categories(samples, classes)
    unknown = codes == 0
    for place, column in enumerate(columns):
        if unknown[:, place].any():
            what = f"samples whose {column!r} is missing or not in the training part"
            samples.facts.append(DataFact(what, int(unknown[:, place].sum()), "taken as unknown"))
    return codes, classes


def make_predictor(
    config: FinetuneConfig,
    target: TargetInfo,
    category_classes: dict[str, list[str]],
    state: dict[str, Any] | None,
) -> Predictor:
    """The predictor, its base loaded from the pretrained run, or all of it from a checkpoint."""
    shape = EncoderShape(**asdict(config.model), max_bp=config.data.max_bp)
    impl, recompute = config.run.attn_implementation, config.run.gradient_checkpointing
    encoder = AsvEncoder(shape, impl=impl, recompute=recompute)
    if config.pretrained_encoder is not None and state is None:
        print_loaded(load_encoder(encoder, config.pretrained_encoder), config.pretrained_encoder)
    own = PredictorShape(
        outputs=target.outputs,
        count_embedding=config.count_embedding,
        category_sizes=tuple(len(one) for one in category_classes.values()),
        categorical_embed_dim=config.categorical.categorical_embed_dim,
        categorical_fusion=config.categorical.categorical_fusion,
        target_head=config.target.target_head,
        predict_counts=bool(config.losses.count_penalty),
    )
    predictor = Predictor(encoder, own, impl=impl, recompute=recompute)
    if state is not None:
        load_weights(predictor, state, config)
    return predictor


def load_weights(predictor: Predictor, state: dict[str, Any], config: FinetuneConfig) -> None:
    """Load a checkpoint's weights, before a frozen base encodes anything."""
    weights = {name.removeprefix("predictor."): value for name, value in state["objective"].items()}
    try:
        predictor.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{config.run.resume_from}: the checkpoint is of another model; use the run's own "
            "options"
        ) from error


def print_loaded(rows: list[tuple[str, str, int]], run: Path) -> None:
    """Print which parts of the encoder were loaded, are new, or were skipped."""
    log(f"encoder from {run}:")
    for part, what, size in rows:
        log(f"  {part:20}{what:10}{size:>12,} parameters")


def write_results(run: Run, task: Task, samples: Samples, summary: dict[str, Any]) -> None:
    """Predictions of both parts, the metrics beside their baselines, and the summary."""
    header, rows = prediction_header(task.target), []
    measured: dict[str, float | None] = {}
    for part, chosen in (("train", task.train_rows), ("validation", task.validation_rows)):
        predicted, _ = task.predict(chosen)
        if part == "validation":
            measured = target_metrics(predicted, task.truth[chosen], len(task.target.classes))
        for row, cells in zip(chosen, prediction_cells(predicted, task.target), strict=True):
            true = task.truth[row]
            shown = task.target.classes[int(true)] if task.target.classes else repr(float(true))
            rows.append([samples.ids[row], part, shown, *cells])
    run.write_table("predictions.tsv", ["sample-id", "part", "true", *header], rows)
    simple = baselines.target_baselines(
        samples.table.counts,
        task.truth,
        task.train_rows,
        task.validation_rows,
        kind=task.target.kind,
        number_of_classes=len(task.target.classes) or None,
        seed=BASELINE_SEED,
    )
    names = {"r2": "R2", "mae": "MAE", "auc": "AUC", "balanced_accuracy": "balanced accuracy"}
    results = [
        result(
            f"{task.target.column} {names.get(name, name)}",
            value,
            simple.get(name, {}),
            higher_is_better=name != "mae",
        )
        for name, value in measured.items()
    ]
    summary["results"] = results
    summary["target"] = {
        "column": task.target.column,
        "kind": task.target.kind,
        "classes": list(task.target.classes),
        "unit": "",
    }
    run.write_summary(summary)
    print_results(results)
