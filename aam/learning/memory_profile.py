"""`--memory-profile`: what takes the memory of a step, and the batch that would fill it.

The coming step is computed once before training, watched, and undone, so that the run is to the bit
the one that it would have been.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from aam.errors import log
from aam.files import write_text
from aam.learning import distributed
from aam.learning.batches import Batching, fixed_batches, shuffled
from aam.learning.cost_model import StepSize
from aam.learning.fsdp import clip_gradients
from aam.learning.meter import GB, Meter
from aam.learning.step import Step

if TYPE_CHECKING:
    from aam.learning.loop import Trainer

TABLE, FIGURE = "memory.tsv", "memory.svg"
COLUMNS = ("section", "name", "part", "bytes", "detail")
DRAW = "from aam.report.memory_figure import main; main()"
LEAST_MEASURED, TIMES_MEASURED = 16, 4  # samples; times the run's step
BATCHES_TRIED = 32  # of an epoch, to find its largest
KEPT = "kept for backward"
STEP = "the step itself"  # where no module runs: gathers, losses, what stages hand on
Row = tuple[str, str, str, int, str]


@dataclass(eq=False)
class Kept:
    """What autograd holds instead of a tensor, for as long as it needs it."""

    tensor: Tensor
    part: str  # of the model


class StepWatch:
    """Peaks of a step's stages, and what autograd keeps for the backward pass.

    Tensors that share their storage count once, weights not at all; of the micro-batches of a stage
    the largest counts.
    """

    def __init__(self, trained: nn.Module, meter: Meter) -> None:
        self.trained, self.meter = trained, meter
        self.before = 0  # bytes in use before the step
        self.peaks: dict[str, int] = {}  # of every stage
        self.kept: dict[str, Counter[str]] = {}  # in every stage, by part of the model
        self._held: WeakValueDictionary[int, Kept] = WeakValueDictionary()
        self._number, self._running = 0, [STEP]
        self._stage, self._kept_before = "", Counter[str]()

    @contextmanager
    def watching(self, step: Step) -> Iterator[None]:
        """Watch what is computed inside; what torch has compiled runs as it is written."""
        self.meter.reset()
        self.before, self.peaks, self._stage = self.meter.peak(), {}, "batch made"
        with ExitStack() as stack:
            for name, module in self.trained.named_modules():
                stack.callback(module.register_forward_pre_hook(partial(self._enter, name)).remove)
                leave = module.register_forward_hook(self._leave, always_call=True)
                stack.callback(leave.remove)
            stack.enter_context(saved_tensors_hooks(self._keep, lambda kept: kept.tensor))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(setattr, step, "on_stage", None)
            step.on_stage = self.begin
            yield

    def begin(self, stage: str, beside: int = 0) -> None:
        """A stage begins, the one before it ends; `beside` are bytes that are not the step's."""
        peak, kept = self.meter.peak() - beside, self._kept_now()
        if peak > self.peaks.get(self._stage, 0):
            self.peaks[self._stage] = peak
            self.kept[self._stage] = max(self._kept_before, kept, key=Counter.total)
        self._stage, self._kept_before = stage, kept
        self.meter.reset()

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(part_of_model(name))

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def _keep(self, tensor: Tensor) -> Kept:
        self._number += 1
        kept = self._held[self._number] = Kept(tensor.detach(), self._running[-1])
        return kept

    def _kept_now(self) -> Counter[str]:
        found = Counter[str]()
        seen = {local(one).untyped_storage().data_ptr() for one in self.trained.parameters()}
        for one in list(self._held.values()):
            storage = local(one.tensor).untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[one.part] += storage.nbytes()
        return found


def write_memory_profile(trainer: Trainer) -> None:
    """Profile the coming step of a run and write memory.tsv and memory.svg into its folder.

    Weights, optimizer state, random generators and progress are as before; all ranks call it.
    """
    at, device = trainer.progress, trainer.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        batches = trainer.batching.batches(at.epoch, at.batch)
        rows = batches[at.batch] if at.batch < len(batches) else batches[0]
        batching = measured(trainer, len(rows))
        watch = StepWatch(trainer.trained, batching.meter)
        _, taken = batching.run(rows, lambda *step: watched_step(trainer, watch, *step))
        table = [
            *peak_rows(trainer, watch),
            *batch_rows(batching, trainer.batching.rows, len(rows)),
        ]
        trainer.optimizer.zero_grad(set_to_none=True)
    if not distributed.is_rank_zero():
        return
    trainer.run.write_table(TABLE, list(COLUMNS), table)
    draw(trainer.run.path)
    stage = max(watch.peaks, key=lambda name: watch.peaks[name])
    parts = [
        f"{part} {size_text(size)}" for section, _, part, size, _ in table if section == "peak"
    ]
    log(
        f"memory profile of a step of {len(rows)} {trainer.dataset.unit} in "
        f"{in_words(round(taken['micro_batches']))}: peak {size_text(watch.peaks[stage])} ({stage})"
    )
    log(f"  {', '.join(parts[:-1])}")
    for _, name, part, size, detail in table:
        if detail.startswith("recommended"):
            log(f"  fits into what is free: {name} in {part}, {size_text(size)}")
    log(f"  {trainer.run.path / TABLE}, {trainer.run.path / FIGURE}")


def measured(trainer: Trainer, count: int) -> Batching:
    """A batching like the run's that may be used up, and that knows what steps cost."""
    batching = copy.copy(trainer.batching)
    batching.costs = copy.deepcopy(batching.costs)
    if batching.costs is None:
        order = shuffled(batching.rows, batching.seed, 0)
        batching.rows = order[: max(LEAST_MEASURED, TIMES_MEASURED * count)]
        batching.limited, batching.batch_size = True, len(batching.rows)
        batching.prepare(trainer.compute_all)
    return batching


def watched_step(
    trainer: Trainer, watch: StepWatch, rows: np.ndarray, count: int
) -> dict[str, float]:
    """Compute a step and change the weights, then put them and the optimizer's state back."""
    weights = [one for group in trainer.optimizer.param_groups for one in group["params"]]
    changed = [*weights, *(one for key in weights for one in state_of(trainer, key))]
    trainer.compute_all(rows[:2], count)  # the first step of a process takes more than later ones
    trainer.optimizer.zero_grad(set_to_none=True)
    with watch.watching(trainer._step):
        terms = trainer.compute_all(rows, count)
        watch.begin("")
        copies = [one.detach().clone() for one in changed]
        watch.begin("optimizer step")
        clip_gradients(weights, trainer.options.clip)
        trainer.optimizer.step()
        watch.begin("", beside=sum(local(one).nbytes for one in copies))
        del watch.peaks[""]
    with torch.no_grad():
        for one, saved in zip(changed, copies, strict=True):
            one.copy_(saved)
    return terms


def peak_rows(trainer: Trainer, watch: StepWatch) -> list[Row]:
    """Peaks of the stages above what was there before, what the highest is made of, and whose."""
    highest = max(watch.peaks, key=lambda name: watch.peaks[name])
    kept, peak = Counter[str](), watch.peaks[highest]
    for stage in watch.peaks:
        kept |= watch.kept[stage]  # the larger of both, for each part of the model
    modules = {
        "weights": by_module(trainer, lambda one: [one]),
        "gradients": by_module(trainer, lambda one: [one.grad]),
        "optimizer state": by_module(trainer, lambda one: state_of(trainer, one)),
        KEPT: kept,
    }
    weights, gradients, state = (sum(found.values()) for found in list(modules.values())[:3])
    parts = {
        "program and data": watch.before - weights - state,
        "weights": weights,
        "optimizer state": state,
        "gradients": gradients,
        KEPT: watch.kept[highest].total(),
    }
    parts["working memory and unexplained"] = peak - sum(parts.values())
    table: list[Row] = []
    for stage, size in watch.peaks.items():
        name, _, way = stage.partition(" ")
        table.append(("stage", name, way, size - watch.before, f"{size_text(size)} in all"))
    table += [("peak", highest, part, size, "") for part, size in parts.items()]
    table.append(("peak", highest, "measured", peak, ""))
    for name in dict.fromkeys(name for found in modules.values() for name in +found):
        table += [("module", name, part, found[name], "") for part, found in modules.items()]
    return table


def batch_rows(batching: Batching, rows: np.ndarray, own: int) -> list[Row]:
    """The run's batch and the largest in one micro-batch, which is recommended: by its memory."""
    costs, budget, counts = batching.costs, batching.budget, range(2, len(rows) + 1)
    assert costs

    def largest(count: int) -> StepSize:
        """The most that a batch of so many samples holds."""
        batches = fixed_batches(rows, count, batching.seed)[:BATCHES_TRIED]
        return max(map(batching.contents.size, batches), key=costs.bound)

    best = max(2, 1 + bisect_right(counts, budget, key=lambda count: costs.bound(largest(count))))
    found: list[Row] = []
    for count in sorted({own, best}):
        cut = costs.micro_batches(largest(count), budget)
        if cut is not None:
            detail = "recommended; " * (count == best) + f"of {size_text(budget)}"
            bound = round(costs.bound(largest(count).split(cut)))
            found.append(("batch", f"{count} samples", in_words(cut), bound, detail))
    return found


def draw(folder: Path) -> None:
    """Draw the figure in a process of its own: matplotlib would stay in the memory of training."""
    command = [sys.executable, "-c", DRAW, str(folder / TABLE)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        reason = ["no reason given", *done.stderr.decode(errors="replace").splitlines()][-1]
        log(f"warning: {folder / FIGURE} could not be drawn: {reason}")
    else:
        write_text(folder / FIGURE, done.stdout.decode())


def part_of_model(name: str) -> str:
    """The part that a module belongs to: the first two names of its path, as in encoder.stack."""
    return ".".join(name.removeprefix("predictor.").split(".")[:2]) or STEP


def by_module(trainer: Trainer, tensors_of: Callable[[Any], list[Any]]) -> Counter[str]:
    """Bytes of what belongs to the weights, by part of the model."""
    found = Counter[str]()
    for name, parameter in trainer.trained.named_parameters():
        held = [local(one).nbytes for one in tensors_of(parameter) if one is not None]
        found[part_of_model(name.rpartition(".")[0])] += sum(held)
    return found


def state_of(trainer: Trainer, parameter: Tensor) -> list[Tensor]:
    """The optimizer's state of a weight."""
    state = trainer.optimizer.state.get(parameter, {})
    return [one for one in state.values() if isinstance(one, Tensor)]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def in_words(count: int) -> str:
    """A number of micro-batches."""
    return f"{count} micro-batch" + "es" * (count > 1)


def size_text(size: float) -> str:
    """Bytes in words."""
    return f"{size / GB:.2f} GB" if abs(size) >= 0.1 * GB else f"{size / 1e6:.1f} MB"
