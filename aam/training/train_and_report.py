"""What pretraining and fine-tuning do alike once their objective is made: train, save, report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from aam.config import to_dict
from aam.data.dataset import SampleDataset
from aam.data.splits import Split
from aam.training import ranks
from aam.training.checkpoint import MODEL_FILE, save_model
from aam.training.loop import Trainer
from aam.training.memory import Batching
from aam.training.objectives import Objective
from aam.training.prepare import Samples
from aam.training.runs import Run, say
from aam.training.setup import compile_stacks, run_facts


def train_and_report(
    config: Any,
    fabric: Any,
    state: dict[str, Any] | None,
    objective: Objective,
    model: nn.Module,
    dataset: SampleDataset,
    samples: Samples,
    parts: Split,
    *,
    validate: Callable[[], dict[str, float | None]],
    best_metric: str,
    description: dict[str, Any],
    write_results: Callable[[Run, dict[str, Any]], None],
    started: float,
) -> Path:
    """Train, and leave the best model, its results and the report in the run folder.

    Args:
        config: all options of the command.
        fabric: a launched Lightning Fabric.
        state: of the checkpoint to continue; None: begin.
        objective: what is learned.
        model: what of it is saved.
        dataset: the samples as tensors.
        samples: their names and facts.
        parts: which of them train and which validate.
        validate: validation metrics of the current weights.
        best_metric: the metric that chooses the best ones, if no option does.
        description: kept with the weights.
        write_results: writes the final measurements, and the summary with them.
        started: when the command was, in seconds since the epoch.

    Returns:
        The run folder.
    """
    if config.run.compile_model:
        compile_stacks(model)
    options, seed = config.optimizer, config.run.seed
    rows = samples.rows(parts.train)
    batching = Batching(rows, dataset, objective, options, fabric.device, seed)
    run = Run(config.run, config, keep_steps=None if state is None else state["progress"]["step"])
    run.write_split(parts)
    trainer = Trainer(
        fabric,
        objective,
        dataset,
        batching,
        options,
        run,
        validate=validate,
        best_metric=options.best_metric or best_metric,
        description=description,
        config=to_dict(config),
        seed=seed,
    )
    trainer.train(state)
    if ranks.first():
        save_model(run.path / MODEL_FILE, model, description)
        write_results(run, run_facts(config, fabric, trainer, samples, parts, model, started))
        run.close()
        from aam.report import write_report

        say(f"report: {write_report(run.path)}")
    return run.path
