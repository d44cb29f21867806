"""The training loop: thin, exact to resume, and the same for every objective.

All randomness of a step (masks, dropout, ASV sampling) is drawn from seeds that are a function
of (seed, step), and the order of an epoch is a function of (seed, epoch). A resumed run
therefore continues bit for bit without any saved generator.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from aam.batching import EpochPlan
from aam.config import OptimizerOptions
from aam.data.dataset import SampleDataset
from aam.errors import InputError
from aam.training.checkpoint import FORMAT, load_state, save_state
from aam.training.progress import ProgressDisplay
from aam.training.runs import CHECKPOINTS, Run, resume_checkpoint, say
from aam.training.schedule import make_optimizer, set_learning_rate, warmup_cosine

LOWER_IS_BETTER = ("loss", "mae", "mse")
LAST, BEST = "last.pt", "best.pt"
REGULAR_BEST = "best-before-end.pt"  # the best, where the validation at the end was better
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
    validated: int = 0  # step of the last validation that was due


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

    def train(self, state: dict[str, Any] | None) -> None:
        """Train to the end, from a checkpoint if one is given, and load the best weights.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the run was saved first, and how to go on was said.
            InputError: see :meth:`resume` and :meth:`fit`.
        """
        if state is not None:
            self.resume(state)
        try:
            self.fit()
        except Interrupted:
            self.run.close()
            say(
                f"saved at step {self.progress.step}; continue with "
                f"aam {self.description['command']} --resume-from {self.run.path}"
            )
            raise
        best = self.run.path / CHECKPOINTS / BEST
        if best.is_file():
            self.objective.load_state_dict(load_state(best)["objective"])

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            InputError: the checkpoint does not fit the model.
        """
        try:
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress(**state["progress"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                "--resume-from: the checkpoint is of another model; use the run's own options"
            ) from error
        self.run.take_over_metrics(self.progress.step, self.progress.validated)
        self._take_over_best()
        say(f"continuing at step {self.progress.step}")

    def _take_over_best(self) -> None:
        """Put the checkpoint of the best step known so far where this run expects it."""
        at = self.progress
        assert self.run.source is not None
        own = self.run.path / CHECKPOINTS
        theirs = resume_checkpoint(self.run.source).parent
        if at.best is not None:
            for name in (REGULAR_BEST, BEST):
                found = theirs / name
                if not found.is_file():
                    continue
                state = load_state(found)
                if state["progress"]["step"] == at.best_step:
                    save_state(own / BEST, state)
                    break
            else:
                say(
                    f"warning: the best checkpoint (step {at.best_step}) is not in {theirs}; the "
                    "best is chosen among the validations to come"
                )
                at.best, at.best_step, at.not_better = None, 0, 0
        if at.best is None:
            (own / BEST).unlink(missing_ok=True)
        (own / REGULAR_BEST).unlink(missing_ok=True)

    def fit(self) -> None:
        """Train to the end, validating on the way.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the run was saved first.
            InputError: the loss is no longer finite, or a checkpoint cannot be written.
        """
        at = self.progress
        if at.step >= self.last_step or self._stopped_early():
            say(
                f"step {at.step} of {self.last_step} is reached already, nothing is left to train; "
                "a larger --max-steps goes on"
            )
        with ProgressDisplay(self.last_step, at.step) as display, self._stop_on_signal():
            batches = self.plan.batches(at.epoch)
            while True:
                if at.batch >= len(batches):
                    at.epoch, at.batch = at.epoch + 1, 0
                    batches = self.plan.batches(at.epoch)
                ended = at.step >= self.last_step
                due = at.batch == 0 and at.epoch % self.options.validate_every == 0
                if at.step > at.validated and (due or ended):
                    display.validated(at.step, self._validate(due))
                if not self._stop and (ended or self._stopped_early()):
                    break
                if not self._stop:
                    chosen = batches[at.batch : at.batch + self.options.accumulate]
                    display.update(at.step + 1, at.epoch, self.step(chosen))
                if self._stop or time.monotonic() - self._saved > CHECKPOINT_SECONDS:
                    self.save(LAST)
                if self._stop:
                    raise Interrupted
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

    def _validate(self, due: bool) -> dict[str, float | None]:
        """Measure the validation part, keep the best weights, save.

        A validation that is only there because the run ends here is not remembered in the last
        checkpoint: a continued run would not have made it, and must equal an uninterrupted one.
        """
        at = self.progress
        self.wrapped.eval()
        with torch.no_grad():
            measured = self.validate()
        self.run.log(at.step, at.epoch, "validation", measured)
        if self.best_metric not in measured:
            raise InputError(
                f"--best-metric {self.best_metric}: not measured here; choose {', '.join(measured)}"
            )
        value = measured[self.best_metric]
        better = (
            value is not None
            and not math.isnan(value)
            and (at.best is None or self._better(value, at.best))
        )
        regular = replace(at)
        if better:
            folder = self.run.path / CHECKPOINTS
            if not due and (folder / BEST).is_file():
                os.replace(folder / BEST, folder / REGULAR_BEST)
            at.best, at.best_step = value, at.step
        if due:
            at.not_better = 0 if better else at.not_better + 1
            at.validated = at.step
        if better:
            self.save(BEST)
        self.save(LAST, None if due else regular)
        return measured

    def _better(self, value: float, than: float) -> bool:
        lower = self.best_metric.endswith(LOWER_IS_BETTER)
        return value < than if lower else value > than

    def _stopped_early(self) -> bool:
        patience = self.options.early_stopping
        return bool(patience) and self.progress.not_better >= patience

    def save(self, name: str, progress: Progress | None = None) -> None:
        """Write a checkpoint, with another progress than the run's if one is given."""
        self.run.flush()
        save_state(
            self.run.path / CHECKPOINTS / name,
            {
                "format": FORMAT,
                "objective": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": asdict(progress or self.progress),
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
            say("stopping after this step; once more to stop at once, without saving")

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
