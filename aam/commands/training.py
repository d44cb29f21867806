"""What pretraining and fine-tuning do alike: build, train, save, measure and report."""

from __future__ import annotations

import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aam import __version__
from aam.config import FinetuneConfig, OptimizerOptions, PretrainConfig, to_dict
from aam.data.dataset import AsvDataset, SampleDataset
from aam.data.splits import Split
from aam.errors import DataFact, log, log_facts
from aam.evaluation.metrics import Measured
from aam.evaluation.outputs import check_nucleotides
from aam.evaluation.results import CHECK_SEED, print_results
from aam.files import MODEL_FILE
from aam.learning import distributed
from aam.learning.batches import Batching
from aam.learning.checkpoint import check_same_data, compatible_state
from aam.learning.device import compile_stacks
from aam.learning.distributed import RankGroup
from aam.learning.launch import start
from aam.learning.loop import Trainer
from aam.learning.model_file import save_model
from aam.learning.objective import Objective
from aam.learning.run import Run
from aam.model import AsvEncoder, EncoderShape, Predictor, PretrainedModel


class Task(ABC):
    """Something to learn: its data, read when it is made, its model, and how that is measured."""

    config: Any
    model: PretrainedModel | Predictor  # what is saved; there after `build`
    dataset: SampleDataset | AsvDataset
    rows: np.ndarray  # (n,) which of the dataset train
    parts: Split  # names of those that train and those that validate
    unit = "samples"  # what `parts` names
    optimizer: OptimizerOptions  # with every value given
    best_metric: str  # chooses the best weights, if no option does
    fingerprint: str  # of the data: a run is continued with the same alone
    description: dict[str, Any]  # what later commands must know beside the options
    facts: list[DataFact]  # what was read, dropped and cut
    warnings: list[str]  # what a reader should know before trusting a number

    @abstractmethod
    def build(self, state: dict[str, Any] | None) -> Objective:
        """Make the model, and what it is to learn; `state` is the checkpoint to continue from."""

    @abstractmethod
    def validate(self) -> Measured:
        """Validation metrics of the current weights, in evaluation mode; all ranks call it."""

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """What the trained model knows beside its weights."""

    @abstractmethod
    def results(self, run: Run) -> dict[str, Any]:
        """Final measurements: writes tables, returns ``results`` and more of summary.json."""


def train(
    config: PretrainConfig | FinetuneConfig, make_task: Callable[[Any, torch.device], Task]
) -> Path:
    """Train a task, and leave its best model, results and report in the run folder.

    Args:
        config: all options of the command.
        make_task: reads the task's data, for a device.

    Returns:
        The run folder.
    """
    started, seed = time.time(), config.run.seed
    state = compatible_state(config)
    device = start(config.run)
    task = make_task(config, device)
    log_facts(task.facts, task.warnings)
    description = {
        "command": config.command,
        "data": data_description(config),
        "fingerprint": task.fingerprint,
        **task.description,
    }
    check_same_data(state, config, description)

    torch.manual_seed(seed)
    objective = task.build(state)
    if config.run.compile_model:
        compile_stacks(task.model)
    batching = Batching(task.rows, task.dataset, objective, task.optimizer, device, seed)
    run = Run(config.run, config, keep_steps=None if state is None else state["progress"]["step"])
    run.write_split(task.parts)
    trainer = Trainer(
        device,
        objective,
        task.dataset,
        batching,
        task.optimizer,
        run,
        validate=task.validate,
        best_metric=task.optimizer.best_metric or task.best_metric,
        description=description,
        config=to_dict(config),
        seed=seed,
    )
    trainer.train(state)
    if distributed.is_rank_zero():
        from aam.report import write_report

        save_model(run.path / MODEL_FILE, task.model, description, task.arrays())
        measured = summary(config, task, trainer, started) | task.results(run)
        run.write_summary(measured)
        print_results(measured["results"])
        run.close()
        log(f"report: {write_report(run.path)}")
    return run.path


def data_description(config: PretrainConfig | FinetuneConfig) -> dict[str, Any]:
    """What a later command must do to a table and its ASVs, to treat them as this run did."""
    names = ("rarefy_depth", "max_bp", "token_limit", "asv_sampling")
    masking = {name: getattr(config.losses, name) for name in ("mask_probability", "mask_strategy")}
    data = {name: getattr(config.data, name) for name in names}
    return {**data, **masking, "seed": config.run.seed}


def summary(
    config: PretrainConfig | FinetuneConfig, task: Task, trainer: Trainer, started: float
) -> dict[str, Any]:
    """What summary.json says of a run before its results; `started` in seconds since the epoch."""
    ranks, device = distributed.world_size(), trainer.device
    typed = Path(sys.argv[0]).name in ("aam", "train.py") and len(sys.argv) > 1
    return {
        "title": f"{config.command} {config.run.output_dir.name}",
        "command": shlex.join(["aam", *sys.argv[1:]]) if typed else f"aam {config.command}",
        "aam_version": __version__,
        "torch_version": torch.__version__,
        "device": str(device) if ranks == 1 else f"{ranks} x {device.type}",
        "threads": torch.get_num_threads(),
        "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
        "steps": trainer.progress.step,
        "epochs": trainer.progress.epoch,
        "best_step": trainer.progress.best_step,
        f"{task.unit}_train": len(task.parts.train),
        f"{task.unit}_validation": len(task.parts.validation),
        "parameters": sum(one.numel() for one in task.model.parameters()),
        "data": [asdict(fact) for fact in task.facts],
        "warnings": task.warnings,
        "config": to_dict(config),
        "target": None,
    }


def make_encoder(config: PretrainConfig | FinetuneConfig) -> AsvEncoder:
    """The ASV encoder that the options ask for."""
    return AsvEncoder(
        EncoderShape(**asdict(config.model), max_bp=config.data.max_bp),
        impl=config.run.attn_implementation,
        recompute=config.run.gradient_checkpointing,
    )


def usual_options(
    options: OptimizerOptions, epochs: int, lr: float, validate_every: int = 1
) -> OptimizerOptions:
    """The options, with a task's own values where none are given."""
    return replace(
        options,
        epochs=options.epochs or epochs,
        lr=lr if options.lr is None else options.lr,
        validate_every=options.validate_every or validate_every,
    )


def pretraining_metrics(
    task: Task, measured: Measured, dataset: SampleDataset | AsvDataset, asvs: np.ndarray
) -> Measured:
    """Metrics with masked nucleotides of some ASVs (n,), and the sum of all losses by penalty."""
    penalties = task.config.losses
    if penalties.nucleotide_penalty:
        check = check_nucleotides(
            task.model.encoder, dataset, asvs, penalties, seed=CHECK_SEED, ranks=RankGroup()
        )
        measured |= {"nucleotide_loss": check.loss, "nucleotide_accuracy": check.accuracy}
    taught = measured.get("clade_loss", measured.get("unifrac_loss")) or 0.0
    total = penalties.unifrac_penalty * taught
    total += penalties.nucleotide_penalty * (measured.get("nucleotide_loss") or 0.0)
    return {"loss": total, **measured}
