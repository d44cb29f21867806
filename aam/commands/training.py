"""What pretraining and fine-tuning do alike: build, train, save, measure and report."""

from __future__ import annotations

import shlex
import sys
import time
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
from aam.errors import log, log_facts
from aam.evaluation.baselines import CHECK_SEED
from aam.evaluation.metrics import Measured
from aam.evaluation.outputs import check_nucleotides
from aam.evaluation.results import print_results
from aam.files import MODEL_FILE, check_run_output
from aam.learning import checkpoint, device, distributed, launch, model_file
from aam.learning.batches import Batching
from aam.learning.loop import Trainer
from aam.learning.run import Run
from aam.learning.task import Task
from aam.model import AsvEncoder, EncoderShape


def train(
    config: PretrainConfig | FinetuneConfig, make_task: Callable[[Any, torch.device], Task]
) -> Path:
    """Train a task, and leave its best model, results and report in the run folder.

    `make_task` reads the task's data, for a device. Returns the run folder.
    """
    started, seed, options = time.time(), config.run.seed, config.run
    check_run_output(options.output_dir, options.overwrite, options.resume_from)
    state = checkpoint.compatible_state(config)
    task = make_task(config, launch.start(config.run))
    log_facts(task.facts, task.warnings)
    checkpoint.check_same_data(state, config, task.describe())
    torch.manual_seed(seed)
    objective = task.build(state)
    if config.run.compile_model:
        device.compile_stacks(task.model)
    batching = Batching(task.rows, task.dataset, objective, task.optimizer, task.device, seed)
    run = Run(config.run, config, keep_steps=None if state is None else state["progress"]["step"])
    run.write_split(task.parts)
    trainer = Trainer(task, objective, batching, run)
    trainer.train(state)
    if distributed.is_rank_zero():
        from aam.report import write_report

        model_file.save_model(run.path / MODEL_FILE, task.model, task.describe(), task.arrays())
        summary = summarise(trainer, started) | task.results(run)
        run.write_summary(summary)
        print_results(summary["results"])
        run.close()
        log(f"report: {write_report(run.path)}")
    return run.path


def summarise(trainer: Trainer, started: float) -> dict[str, Any]:
    """What summary.json says of a run before its results; `started` in seconds since the epoch."""
    task, at = trainer.task, trainer.progress
    command, ranks = task.config.command, distributed.world_size()
    typed = Path(sys.argv[0]).name in ("aam", "train.py") and len(sys.argv) > 1
    return {
        "title": f"{command} {trainer.run.path.name}",
        "command": shlex.join(["aam", *sys.argv[1:]]) if typed else f"aam {command}",
        "aam_version": __version__,
        "torch_version": torch.__version__,
        "device": str(task.device) if ranks == 1 else f"{ranks} x {task.device.type}",
        "threads": torch.get_num_threads(),
        "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
        "steps": at.step,
        "epochs": at.epoch,
        "best_step": at.best_step,
        f"{task.unit}_train": len(task.parts.train),
        f"{task.unit}_validation": len(task.parts.validation),
        "parameters": sum(one.numel() for one in task.model.parameters()),
        "data": [asdict(fact) for fact in task.facts],
        "warnings": task.warnings,
        "config": to_dict(task.config),
        "target": None,
    }


def make_encoder(config: PretrainConfig | FinetuneConfig) -> AsvEncoder:
    """The ASV encoder that the options ask for."""
    shape = EncoderShape(**asdict(config.model), max_bp=config.data.max_bp)
    impl, recompute = config.run.attn_implementation, config.run.gradient_checkpointing
    return AsvEncoder(shape, impl=impl, recompute=recompute)


def usual_options(
    options: OptimizerOptions, epochs: int, lr: float, validate_every: int = 1
) -> OptimizerOptions:
    """The options, with a task's own values where none are given."""
    return replace(
        options,
        epochs=options.epochs or epochs,
        lr=options.lr or lr,
        validate_every=options.validate_every or validate_every,
    )


def pretraining_metrics(
    task: Task, measured: Measured, dataset: SampleDataset | AsvDataset, asvs: np.ndarray
) -> Measured:
    """Metrics with masked nucleotides of some ASVs (n,), and the sum of all losses by penalty."""
    penalties = task.config.losses
    if penalties.nucleotide_penalty:
        encoder, ranks = task.model.encoder, distributed.RankGroup()
        check = check_nucleotides(encoder, dataset, asvs, penalties, seed=CHECK_SEED, ranks=ranks)
        measured |= {"nucleotide_loss": check.loss, "nucleotide_accuracy": check.accuracy}
    taught = measured.get("clade_loss", measured.get("unifrac_loss")) or 0.0
    total = penalties.unifrac_penalty * taught
    total += penalties.nucleotide_penalty * (measured.get("nucleotide_loss") or 0.0)
    return {"loss": total, **measured}
