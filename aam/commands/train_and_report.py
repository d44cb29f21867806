"""What pretraining and fine-tuning do alike once their objective is made: train, save, report."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from aam import __version__
from aam.config import OptimizerOptions, to_dict
from aam.data.dataset import AsvDataset, SampleDataset
from aam.data.splits import Split
from aam.errors import DataFact, log
from aam.learning import distributed
from aam.learning.batches import Batching
from aam.learning.checkpoint import MODEL_FILE, save_model
from aam.learning.device import compile_stacks
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
    config: Any, device: torch.device, state: dict[str, Any] | None, job: Job, started: float
) -> Path:
    """Train, and leave the best model, its results and the report in the run folder.

    Args:
        config: all options of the command.
        device: of this rank.
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
    batching = Batching(job.rows, job.dataset, job.objective, job.options, device, seed)
    run = Run(config.run, config, keep_steps=None if state is None else state["progress"]["step"])
    run.write_split(job.parts)
    trainer = Trainer(
        device,
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
        job.write_results(run, run_facts(config, device, trainer, job, started))
        run.close()
        from aam.report import write_report

        log(f"report: {write_report(run.path)}")
    return run.path


def command_line(command: str) -> str:
    """What was typed, where that is known; else the command's name."""
    typed = Path(sys.argv[0]).name in ("aam", "train.py")
    return shlex.join(["aam", *sys.argv[1:]]) if typed and len(sys.argv) > 1 else f"aam {command}"


def run_facts(
    config: Any, device: torch.device, trainer: Trainer, job: Job, started: float
) -> dict[str, Any]:
    """What summary.json says of the run before its results."""
    parts, unit = job.parts, job.names
    ranks = distributed.world_size()
    return {
        "title": f"{config.command} {config.run.output_dir.name}",
        "command": command_line(config.command),
        "aam_version": __version__,
        "torch_version": torch.__version__,
        "device": str(device) if ranks == 1 else f"{ranks} x {device.type}",
        "threads": torch.get_num_threads(),
        "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
        "steps": trainer.progress.step,
        "epochs": trainer.progress.epoch,
        "best_step": trainer.progress.best_step,
        f"{unit}_train": len(parts.train),
        f"{unit}_validation": len(parts.validation),
        "parameters": sum(one.numel() for one in job.model.parameters()),
        "data": [asdict(fact) for fact in job.facts],
        "results": [],
        "warnings": list(job.warnings),
        "config": to_dict(config),
        "target": None,
    }
