"""What pretraining and fine-tuning do alike once their objective is made: train, save, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from aam.config import OptimizerOptions, to_dict
from aam.data.dataset import AsvDataset, SampleDataset
from aam.data.splits import Split
from aam.errors import DataFact, log
from aam.learning import distributed
from aam.learning.batches import Batching
from aam.learning.checkpoint import MODEL_FILE, save_model
from aam.learning.device import compile_stacks, run_facts
from aam.learning.loop import Trainer
from aam.learning.objective import Objective
from aam.learning.resume import check_same_data
from aam.learning.run import Run


@dataclass
class Job:
    """A model, what it learns from, and what is said of it in the end.

    Attributes:
        objective: what is learned.
        model: what of it is saved.
        dataset: samples or ASVs, on the device.
        rows: which of them train.
        parts: names of those that train and those that validate.
        options: of the optimizer, with every value given.
        validate: validation metrics of the current weights; all ranks call it.
        best_metric: the metric that chooses the best ones, if no option does.
        description: kept with the weights.
        arrays: gives what the model knows beside them, once it is trained.
        write_results: writes the final measurements, and the summary with them.
        facts: what was read, dropped and cut.
        warnings: what a reader should know before trusting a number.
        names: what `parts` name: samples or sequences.
    """

    objective: Objective
    model: nn.Module
    dataset: SampleDataset | AsvDataset
    rows: np.ndarray
    parts: Split
    options: OptimizerOptions
    validate: Callable[[], dict[str, float | None]]
    best_metric: str
    description: dict[str, Any]
    arrays: Callable[[], Mapping[str, np.ndarray]]
    write_results: Callable[[Run, dict[str, Any]], None]
    facts: list[DataFact]
    warnings: list[str]
    names: str = "samples"


def usual_options(options: OptimizerOptions, epochs: int, lr: float) -> OptimizerOptions:
    """Options of a run that samples teach: epochs and learning rate where none are given."""
    return replace(
        options,
        epochs=options.epochs or epochs,
        lr=lr if options.lr is None else options.lr,
        validate_every=options.validate_every or 1,
    )


def train_and_report(
    config: Any, fabric: Any, state: dict[str, Any] | None, job: Job, started: float
) -> Path:
    """Train, and leave the best model, its results and the report in the run folder.

    Args:
        config: all options of the command.
        fabric: a launched Lightning Fabric.
        state: of the checkpoint to continue; None: begin.
        job: what is trained.
        started: when the command was, in seconds since the epoch.

    Returns:
        The run folder.
    """
    check_same_data(state, config, job.description)
    if config.run.compile_model:
        compile_stacks(job.model)
    seed = config.run.seed
    batching = Batching(job.rows, job.dataset, job.objective, job.options, fabric.device, seed)
    run = Run(config.run, config, keep_steps=None if state is None else state["progress"]["step"])
    run.write_split(job.parts)
    trainer = Trainer(
        fabric,
        job.objective,
        job.dataset,
        batching,
        job.options,
        run,
        validate=job.validate,
        best_metric=job.options.best_metric or job.best_metric,
        description=job.description,
        config=to_dict(config),
        seed=seed,
    )
    trainer.train(state)
    if distributed.is_rank_zero():
        save_model(run.path / MODEL_FILE, job.model, job.description, job.arrays())
        job.write_results(run, run_facts(config, fabric, trainer, job, started))
        run.close()
        from aam.report import write_report

        log(f"report: {write_report(run.path)}")
    return run.path
