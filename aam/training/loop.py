"""The training loop: thin, exact to resume, and the same for every objective.

All randomness of a step (masks, dropout, ASV sampling) is drawn from seeds that are a function
of (seed, step), and the order of an epoch is a function of (seed, epoch). A resumed run
therefore continues bit for bit without any saved generator.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from aam.batching import EpochPlan
from aam.config import OptimizerOptions
from aam.data.dataset import SampleDataset
from aam.errors import InputError
from aam.training.checkpoint import FORMAT, save_state
from aam.training.progress import ProgressDisplay
from aam.training.runs import CHECKPOINTS, Run
from aam.training.schedule import make_optimizer, set_learning_rate, warmup_cosine

LOWER_IS_BETTER = ("loss", "mae", "mse")
CHECKPOINT_SECONDS = 600.0  # between validations a long epoch saves this often


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    best: float | None = None
    best_step: int = 0
    not_better: int = 0  # validations since the best


class Interrupted(KeyboardInterrupt):
    """The user asked to stop; the run is saved."""


class Trainer:
    """Trains an objective on batches of a dataset."""

    def __init__(
        self,
        fabric: Any,
        objective: nn.Module,
        dataset: SampleDataset,
        plan: EpochPlan,
        options: OptimizerOptions,
        run: Run,
        *,
        validate: Callable[[], dict[str, float | None]],
        best_metric: str,
        description: dict[str, Any],
        config: dict[str, Any],
        seed: int,
    ) -> None:
        """Set up model and optimizer on the device.

        Args:
            fabric: a launched Lightning Fabric.
            objective: module that turns a batch into loss terms.
            dataset: the samples.
            plan: their order.
            options: how weights change.
            run: where it is logged.
            validate: validation metrics of the current weights.
            best_metric: the metric that chooses the best checkpoint.
            description: kept in every checkpoint beside the weights.
            config: all options, kept in every checkpoint.
            seed: of masks and dropout.
        """
        self.fabric, self.dataset, self.plan = fabric, dataset, plan
        self.options, self.run, self.validate = options, run, validate
        self.best_metric, self.description, self.config = best_metric, description, config
        self.seed = seed
        self.objective = objective
        optimizer = make_optimizer(objective, options.lr, options.weight_decay)
        self.wrapped, self.optimizer = fabric.setup(objective, optimizer)
        self.trainable = [p for p in objective.parameters() if p.requires_grad]
        self.steps_per_epoch = math.ceil(len(plan) / options.accumulate)
        self.scheduled_steps = options.epochs * self.steps_per_epoch
        self.last_step = min(self.scheduled_steps, options.max_steps or self.scheduled_steps)
        self.progress = Progress()
        self._stop = False
        self._saved = time.monotonic()

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        try:
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(
                "--resume-from: the checkpoint is of another model; use the run's own options"
            ) from error
        self.progress = Progress(**state["progress"])

    def fit(self) -> None:
        """Train to the end, validating on the way.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the run was saved first.
            InputError: the loss is no longer finite, or a checkpoint cannot be written.
        """
        at = self.progress
        display = ProgressDisplay(self.last_step, at.step)
        with display, self._stop_on_signal():
            while at.step < self.last_step and not self._stopped_early():
                batches = self.plan.batches(at.epoch)
                while at.batch < len(batches) and at.step < self.last_step:
                    chosen = batches[at.batch : at.batch + self.options.accumulate]
                    display.update(at.step, at.epoch, self.step(chosen))
                    if self._stop:
                        self.save("last.pt")
                        raise Interrupted
                    if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
                        self.save("last.pt")
                if at.batch >= len(batches):
                    at.epoch, at.batch = at.epoch + 1, 0
                due = at.batch == 0 and at.epoch % self.options.validate_every == 0
                if due or at.step >= self.last_step:
                    display.validated(at.step, self._validate())
        self.run.flush()

    def step(self, batches: list[np.ndarray]) -> dict[str, float]:
        """One change of the weights.

        Args:
            batches: rows of each micro-batch; their gradients are summed.

        Returns:
            What was measured: loss terms, learning rate, gradient norm, samples a second.
        """
        started = time.perf_counter()
        at = self.progress
        self.wrapped.train()
        rate = self.options.lr * warmup_cosine(
            at.step, self.scheduled_steps, self.options.warmup_fraction
        )
        set_learning_rate(self.optimizer, rate)
        sums: dict[str, float] = {}
        for part, rows in enumerate(batches):
            torch.manual_seed(step_seed(self.seed, at.step, part))
            batch = self.dataset.batch(rows).to(self.fabric.device)
            with self.fabric.no_backward_sync(self.wrapped, enabled=part < len(batches) - 1):
                terms = self.wrapped(batch)
                self.fabric.backward(terms["loss"] / len(batches))
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / len(batches)
        norm = float(nn.utils.clip_grad_norm_(self.trainable, self.options.clip))
        if not math.isfinite(sums["loss"]) or not math.isfinite(norm):
            raise InputError(
                f"step {at.step + 1}: loss {sums['loss']:g}, gradient norm {norm:g}: not finite; "
                "continue from the last checkpoint with a lower --lr"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        at.step += 1
        at.batch += len(batches)
        samples = sum(len(rows) for rows in batches)
        measured = {
            **sums,
            "learning_rate": rate,
            "gradient_norm": norm,
            "samples_per_second": samples / (time.perf_counter() - started),
        }
        self.run.log(at.step, at.epoch, "train", measured)
        return measured

    def _validate(self) -> dict[str, float | None]:
        """Measure the validation part, keep the best weights, save."""
        at = self.progress
        self.wrapped.eval()
        with torch.no_grad():
            measured = self.validate()
        self.run.log(at.step, at.epoch, "validation", measured)
        value = measured.get(self.best_metric)
        if value is None or math.isnan(value):
            value = None
        if value is not None and (at.best is None or self._better(value, at.best)):
            at.best, at.best_step, at.not_better = value, at.step, 0
            self.save("best.pt")
        else:
            at.not_better += 1
        self.save("last.pt")
        return measured

    def _better(self, value: float, than: float) -> bool:
        lower = self.best_metric.endswith(LOWER_IS_BETTER)
        return value < than if lower else value > than

    def _stopped_early(self) -> bool:
        patience = self.options.early_stopping
        return bool(patience) and self.progress.not_better >= patience

    def save(self, name: str) -> None:
        """Write a checkpoint."""
        self.run.flush()
        save_state(
            self.run.path / CHECKPOINTS / name,
            {
                "format": FORMAT,
                "objective": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": asdict(self.progress),
                "description": self.description,
                "config": self.config,
            },
        )
        self._saved = time.monotonic()

    @contextlib.contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM stops after the step; a second one at once."""

        def stop(number: int, _frame: Any) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for number in previous:
                signal.signal(number, stop)
        except ValueError:  # not the main thread: signals are the caller's
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def step_seed(seed: int, step: int, part: int = 0) -> int:
    """A seed that differs for every (seed, step, micro-batch)."""
    return int(np.random.SeedSequence([seed, step, part]).generate_state(1, np.uint64)[0] >> 1)
