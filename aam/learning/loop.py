"""The training loop: thin, exact to resume, and the same for every objective.

All randomness of a step (masks, dropout, ASV sampling) is drawn from seeds that are a function
of (seed, step), and the order of an epoch is a function of (seed, epoch). A resumed run
therefore continues bit for bit without any saved generator, and a step that ran out of memory is
the same step when it is computed again in smaller micro-batches.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from aam.config import to_dict
from aam.errors import InputError, log
from aam.files import CHECKPOINTS, resume_checkpoint
from aam.learning import distributed
from aam.learning.batches import Batching
from aam.learning.checkpoint import load_state, save_state
from aam.learning.distributed import RankGroup
from aam.learning.fsdp import clip_gradients, copy_whole, get_state, set_state, sharded_copy
from aam.learning.memory_profile import write_memory_profile
from aam.learning.model_file import FORMAT
from aam.learning.objective import Objective
from aam.learning.optimizer import make_optimizer, set_learning_rate, warmup_cosine
from aam.learning.prefetch import Prefetch
from aam.learning.progress import ProgressDisplay
from aam.learning.run import Run
from aam.learning.step import Step, StepTooLarge, is_out_of_memory
from aam.learning.stopping import Stopped, StopSignals
from aam.learning.task import Task

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # of the model's products
LOWER_IS_BETTER = ("loss", "mae", "mse")
LAST, BEST = "last.pt", "best.pt"
REGULAR_BEST = "best-before-end.pt"  # the best, where the validation at the end was better
MOST_SKIPPED = 50  # float16 steps in a row whose gradients overflow


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    samples: int = 0  # samples seen in all epochs
    best: float | None = None
    best_step: int = 0
    not_better: int = 0  # validations since the best
    validated: int = 0  # step of the last validation that was due
    skipped: int = 0  # last steps, in a row, that changed nothing: their gradients overflowed


class Trainer:
    """Trains a task's objective on batches of its dataset."""

    def __init__(self, task: Task, objective: Objective, batching: Batching, run: Run) -> None:
        """Set up model and optimizer on the task's device; `run` is where it is logged."""
        self.task, self.batching, self.run, self.options = task, batching, run, task.optimizer
        self.device, self.dataset, self.settings = task.device, task.dataset, task.config.run
        assert self.options.epochs and self.options.lr and self.options.validate_every
        self.epochs, self.lr = self.options.epochs, self.options.lr
        self.validate_every, self.seed = self.options.validate_every, self.settings.seed
        self.scheduled_samples = self.epochs * len(batching.rows)
        group = RankGroup()
        self.objective = objective.to(self.device)
        group.broadcast_weights(self.objective)
        # With fsdp the module that trains is another one, in parts; `objective` is filled from it.
        self.sharded = self.settings.strategy == "fsdp" and group.size > 1
        self.trained = sharded_copy(objective, self.device) if self.sharded else objective
        self.optimizer = make_optimizer(self.trained, self.lr, self.options.weight_decay)
        half = HALF.get(self.settings.precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half == torch.float16)
        self.scaler.scale(torch.zeros((), device=self.device))  # its state is made by the first use
        self._step = Step(self.trained, group, equal_calls=self.sharded, autocast=half)
        self.prefetch = Prefetch(self.dataset, self.device)
        self.progress = Progress()
        self.signals = StopSignals()
        self._saved = time.monotonic()

    @property
    def scheduled_steps(self) -> int:
        """Steps of the run, if all epochs are cut into as many as the first."""
        steps = self.epochs * self.batching.steps_an_epoch
        return min(steps, self.options.max_steps or steps)

    def train(self, state: dict[str, Any] | None) -> None:
        """Train to the end, from a checkpoint if one is given, and load the best weights.

        Stopped by Ctrl-C, SIGTERM or SIGUSR1, the run is saved, and how to go on is said.
        """
        if state is not None:
            self.resume(state)
        self.batching.prepare(self.compute_all)
        if self.settings.memory_profile:
            write_memory_profile(self)
        try:
            self.fit()
        except Stopped:
            self.run.close()
            again = f"aam {self.task.config.command} --resume-from {self.run.path}"
            log(f"saved at step {self.progress.step}; continue with {again}")
            raise
        finally:
            self.prefetch.close()
        best = self.run.path / CHECKPOINTS / BEST
        if distributed.is_rank_zero() and best.is_file():
            self.objective.load_state_dict(load_state(best)["objective"])

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; an InputError where it does not fit the model."""
        try:
            set_state(self.trained, self.optimizer, state)
            self.scaler.load_state_dict(state["scaler"])
            self.progress = Progress(**state["progress"])
            self.batching.load_state(state["memory"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            problem = "the checkpoint is of another model; use the run's own options"
            raise InputError(f"--resume-from: {problem}") from error
        self.run.take_over_metrics(self.progress.step, self.progress.validated)
        if distributed.is_rank_zero():
            self._take_over_best()
        self.progress = Progress(**distributed.broadcast(asdict(self.progress)))
        log(f"continuing at step {self.progress.step}")

    def _take_over_best(self) -> None:
        """Put the checkpoint of the best step known so far where this run expects it."""
        at = self.progress
        assert self.run.source is not None
        own, theirs = self.run.path / CHECKPOINTS, resume_checkpoint(self.run.source).parent
        found = [theirs / name for name in (REGULAR_BEST, BEST) if (theirs / name).is_file()]
        states = (load_state(path) for path in found)
        best = next((one for one in states if one["progress"]["step"] == at.best_step), None)
        if at.best is not None and best is not None:
            save_state(own / BEST, best)
        elif at.best is not None:
            log(
                f"warning: the best checkpoint (step {at.best_step}) is not in {theirs}; the "
                "best is chosen among the validations to come"
            )
            at.best, at.best_step, at.not_better = None, 0, 0
        if at.best is None:
            (own / BEST).unlink(missing_ok=True)
        (own / REGULAR_BEST).unlink(missing_ok=True)

    def fit(self) -> None:
        """Train to the end, validating on the way."""
        at = self.progress
        if self._ended() or self._stopped_early():
            reached = f"step {at.step} of {self.scheduled_steps} is reached already"
            log(f"{reached}, nothing is left to train; a larger --max-steps goes on")
        with ProgressDisplay(self.scheduled_steps, at.step) as display, self.signals:
            while True:
                batches = self.batching.batches(at.epoch, at.batch)
                if at.batch >= len(batches):
                    at.epoch, at.batch = at.epoch + 1, 0
                    batches = self.batching.batches(at.epoch)
                ended = self._ended()
                due = at.batch == 0 and at.epoch % self.validate_every == 0
                if at.step > at.validated and (due or ended):
                    display.validated(at.step, self._validate(due))
                stop, late = self._asked()
                if not stop and (ended or self._stopped_early()):
                    break
                if not stop:
                    measured = self.step(*batches[at.batch : at.batch + 2])
                    display.update(at.step, at.epoch, measured)
                    stop, late = self._asked()
                if stop or late:
                    self.save(LAST)
                if stop:
                    raise Stopped(stop)
        self.run.flush()

    def _asked(self) -> tuple[int, bool]:
        """The signal that asks to stop (0: none), and whether a checkpoint is due, on all ranks."""
        elapsed = time.monotonic() - self._saved
        late = distributed.is_rank_zero() and elapsed > self.run.checkpoint_seconds
        asked = distributed.all_reduce_max(2 * self.signals.number + late)
        return asked // 2, asked % 2 == 1

    def _ended(self) -> bool:
        """Whether all epochs are done, or --max-steps."""
        at, most = self.progress, self.options.max_steps
        return at.epoch >= self.epochs or (most is not None and at.step >= most)

    def step(self, rows: np.ndarray, coming: np.ndarray | None = None) -> dict[str, float]:
        """Change the weights by some rows of the dataset; `coming` are those of the next step.

        Returns what was measured: loss terms, learning rate, gradient norm, speed, memory.
        """
        started, at, warmup = time.perf_counter(), self.progress, self.options.warmup_fraction
        rate = self.lr * warmup_cosine(at.samples, len(rows), self.scheduled_samples, warmup)
        set_learning_rate(self.optimizer, rate)
        self.prefetch.begin(rows, step_seed(self.seed, at.step))
        if coming is not None:
            self.prefetch.begin(coming, step_seed(self.seed, at.step + 1))
        terms, memory = self.batching.run(rows, self.compute)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self._step.parameters, self.options.clip)
        finite = math.isfinite(norm)
        at.skipped = 0 if finite else at.skipped + 1
        may_skip = self.scaler.is_enabled() and at.skipped <= MOST_SKIPPED
        if not math.isfinite(terms["loss"]) or not (finite or may_skip):
            raise InputError(
                f"step {at.step + 1}: loss {terms['loss']:g}, gradient norm {norm:g}: not finite; "
                "continue from the last checkpoint with a lower --lr"
            )
        self.scaler.step(self.optimizer)  # with float16: nothing where a gradient overflowed
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        at.step += 1
        at.batch += 1
        at.samples += len(rows)
        speed = f"{self.dataset.unit.lower()}_per_second"
        measured = {**terms, "learning_rate": rate, "gradient_norm": norm}
        measured |= {speed: len(rows) / (time.perf_counter() - started), **memory}
        if self.scaler.is_enabled():
            measured |= {"loss_scale": self.scaler.get_scale(), "skipped": float(at.skipped)}
        self.run.log(at.step, at.epoch, "train", measured)
        return measured

    def compute(
        self, rows: np.ndarray, micro_batches: int, progress: float | None = None
    ) -> dict[str, float]:
        """Loss terms of a step of some rows, its gradients left in the weights.

        `progress` is the share of the run that is behind, by default as it is. StepTooLarge where
        the memory does not hold it; an InputError where no micro-batch would make it smaller.
        """
        self.trained.train()
        done = self.progress.samples / self.scheduled_samples
        self.trained.progress = done if progress is None else progress
        self.optimizer.zero_grad(set_to_none=True)
        seed = step_seed(self.seed, self.progress.step)
        torch.manual_seed(seed)
        try:
            batch = self.prefetch.take(rows, seed)
            return self._step(batch, micro_batches, self.scaler.get_scale())
        except StepTooLarge:
            raise
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"out of memory before a step of {len(rows)} samples could be cut: "
                "give more memory or smaller steps (--effective-batch-size, --batch-size)"
            ) from error

    def compute_all(self, rows: np.ndarray, micro_batches: int) -> dict[str, float]:
        """`compute` with everything that the run will train: for measuring memory."""
        return self.compute(rows, micro_batches, progress=1.0)

    def _validate(self, due: bool) -> dict[str, float | None]:
        """Measure the validation part, keep the best weights, save.

        One that is not due, but made because the run ends here, the last checkpoint does not
        remember: a continued run would not have made it, and must equal an uninterrupted one.
        """
        at = self.progress
        if self.sharded:
            copy_whole(self.trained, self.objective)
        self.objective.eval()
        with torch.no_grad():
            measured = distributed.broadcast(self.task.validate())
        self.run.log(at.step, at.epoch, "validation", measured)
        metric = self.options.best_metric or self.task.best_metric
        if metric not in measured:
            choices = ", ".join(measured)
            raise InputError(f"--best-metric {metric}: not measured here; choose {choices}")
        value, better = measured[metric], False
        if value is not None and not math.isnan(value):
            lower = metric.endswith(LOWER_IS_BETTER)
            better = at.best is None or (value < at.best if lower else value > at.best)
        regular = replace(at)
        if better:
            folder = self.run.path / CHECKPOINTS
            if distributed.is_rank_zero() and not due and (folder / BEST).is_file():
                os.replace(folder / BEST, folder / REGULAR_BEST)
            at.best, at.best_step = value, at.step
        if due:
            at.not_better = 0 if better else at.not_better + 1
            at.validated = at.step
        if better:
            self.save(BEST)
        self.save(LAST, None if due else regular)
        return measured

    def _stopped_early(self) -> bool:
        patience = self.options.early_stopping
        return bool(patience) and self.progress.not_better >= patience

    def save(self, name: str, progress: Progress | None = None) -> None:
        """Write a checkpoint, with another progress than the run's if one is given."""
        self.run.flush()
        state = {
            "format": FORMAT,
            **get_state(self.trained, self.optimizer),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(progress or self.progress),
            "memory": self.batching.state(),
            "description": self.task.describe(),
            "config": to_dict(self.task.config),
        }
        if distributed.is_rank_zero():
            save_state(self.run.path / CHECKPOINTS / name, state)
        self._saved = time.monotonic()


def step_seed(seed: int, step: int) -> int:
    """A seed that differs for every (seed, step)."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
