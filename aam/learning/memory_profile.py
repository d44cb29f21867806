"""`--memory-profile`: what takes the memory of a step, and the batch that would fill it.

The coming step is computed once before training, watched, and undone, so that the run is to the bit
the one that it would have been.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

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
DRAW = "from aam.report.memory_figure import main; main()"
LEAST_MEASURED, TIMES_MEASURED = 16, 4  # samples; times the run's step
BATCHES_TRIED = 32  # of an epoch, to find its largest
KEPT = "kept for backward"
STEP = "the step itself"  # where no module runs: gathers, losses, what stages hand on


class Row(NamedTuple):
    """A line of memory.tsv."""

    section: str
    name: str
    part: str
    bytes: int
    detail: str = ""


class Kept:
    """What autograd holds instead of a tensor, for as long as it needs it."""

    def __init__(self, tensor: Tensor, part: str) -> None:
        self.tensor, self.part = tensor, part


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
        self._saved: list[ref[Kept]] = []
        self._running = [STEP]
        self._stage, self._kept_before = "", Counter[str]()

    @contextmanager
    def watching(self, step: Step) -> Iterator[None]:
        """Watch what is computed inside; what torch has compiled runs as it is written."""
        self.meter.reset()
        self.before, self.peaks, self._stage = self.meter.peak(), {}, "batch made"
        with ExitStack() as stack:
            for name, module in self.trained.named_modules():
                enter = module.register_forward_pre_hook(partial(self._enter, part_of(name)))
                leave = module.register_forward_hook(self._leave, always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            stack.enter_context(saved_tensors_hooks(self._save, lambda kept: kept.tensor))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(setattr, step, "on_stage", None)
            step.on_stage = self.begin
            yield

    def begin(self, stage: str) -> None:
        """A stage begins, and the one before it ends."""
        peak, kept = self.meter.peak(), self._kept_now()
        if peak > self.peaks.get(self._stage, 0):
            self.peaks[self._stage] = peak
            self.kept[self._stage] = max(self._kept_before, kept, key=Counter.total)
        self._stage, self._kept_before = stage, kept
        self.meter.reset()

    def _enter(self, part: str, *_: Any) -> None:
        self._running.append(part)

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def _save(self, tensor: Tensor) -> Kept:
        kept = Kept(tensor.detach(), self._running[-1])
        self._saved.append(ref(kept))
        return kept

    def _kept_now(self) -> Counter[str]:
        seen = {local(one).untyped_storage().data_ptr() for one in self.trained.parameters()}
        found = Counter[str]()
        for kept in (saved() for saved in self._saved):
            storage = None if kept is None else local(kept.tensor).untyped_storage()
            if kept is not None and storage is not None and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[kept.part] += storage.nbytes()
        return found


def write_memory_profile(trainer: Trainer) -> None:
    """Profile the coming step of a run and write memory.tsv and memory.svg into its folder.

    Weights, optimizer state, random generators and progress are as before; all ranks call it.
    """
    at, device, path = trainer.progress, trainer.device, trainer.run.path
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        batches = trainer.batching.batches(at.epoch, at.batch)
        rows = batches[at.batch] if at.batch < len(batches) else batches[0]
        batching = measured(trainer, len(rows))
        watch = StepWatch(trainer.trained, batching.meter)
        _, taken = batching.run(rows, partial(watched_step, trainer, watch))
        table = [
            *peak_rows(trainer, watch),
            *batch_rows(batching, trainer.batching.rows, len(rows)),
        ]
        trainer.optimizer.zero_grad(set_to_none=True)
    if not distributed.is_rank_zero():
        return
    trainer.run.write_table(TABLE, list(Row._fields), table)
    draw(path)
    *parts, peak = (row for row in table if row.section == "peak")
    log(
        f"memory profile of a step of {len(rows)} {trainer.dataset.unit} in "
        f"{cut_text(round(taken['micro_batches']))}: peak {size_text(peak.bytes)} ({peak.name})"
    )
    log("  " + ", ".join(f"{row.part} {size_text(row.bytes)}" for row in parts))
    for row in table:
        if row.detail.startswith("recommended"):
            log(f"  fits into what is free: {row.name} in {row.part}, {size_text(row.bytes)}")
    log(f"  {path / TABLE}, {path / FIGURE}")


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
    optimizer, trained = trainer.optimizer, trainer.trained
    trainer.compute_all(rows[:2], count)  # the first step of a process takes more than later ones
    optimizer.zero_grad(set_to_none=True)
    with tempfile.TemporaryFile() as file:  # a copy in memory would be part of the peak
        torch.save((trained.state_dict(), optimizer.state_dict()), file)
        with watch.watching(trainer._step):
            terms = trainer.compute_all(rows, count)
            watch.begin("optimizer step")
            clip_gradients(trainer._step.parameters, trainer.options.clip)
            optimizer.step()
            watch.begin("")
        file.seek(0)
        weights, state = torch.load(file, weights_only=False)
        trained.load_state_dict(weights)
        optimizer.load_state_dict(state)
    return terms


def peak_rows(trainer: Trainer, watch: StepWatch) -> list[Row]:
    """Peaks of the stages above what was there before, what the highest is made of, and whose."""
    highest = max(watch.peaks, key=lambda stage: watch.peaks[stage])
    kept, peak = Counter[str](), watch.peaks[highest]
    for stage in watch.peaks:
        kept |= watch.kept[stage]  # the larger of both, for each part of the model
    state = trainer.optimizer.state
    modules = {
        "weights": by_module(trainer, lambda one: [one]),
        "gradients": by_module(trainer, lambda one: [one.grad]),
        "optimizer state": by_module(trainer, lambda one: state.get(one, {}).values()),
        KEPT: kept,
    }
    parts = {part: found.total() for part, found in modules.items()}
    parts[KEPT] = watch.kept[highest].total()
    parts["program and data"] = watch.before - parts["weights"] - parts["optimizer state"]
    parts["working memory and unexplained"] = peak - sum(parts.values())
    table = []
    for stage, size in watch.peaks.items():
        name, _, way = stage.partition(" ")
        table.append(Row("stage", name, way, size - watch.before, f"{size_text(size)} in all"))
    table += [
        Row("peak", highest, part, size) for part, size in (parts | {"measured": peak}).items()
    ]
    for name in dict.fromkeys(name for found in modules.values() for name in +found):
        table += [Row("module", name, part, found[name]) for part, found in modules.items()]
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
    found = []
    for count in sorted({own, best}):
        cut = costs.micro_batches(largest(count), budget)
        if cut is not None:
            detail = "recommended; " * (count == best) + f"of {size_text(budget)}"
            bound = round(costs.bound(largest(count).split(cut)))
            name = f"{count} {batching.dataset.unit}"
            found.append(Row("batch", name, cut_text(cut), bound, detail))
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


def by_module(trainer: Trainer, tensors_of: Callable[[Any], Any]) -> Counter[str]:
    """Bytes of what belongs to the weights, by part of the model."""
    found = Counter[str]()
    for name, parameter in trainer.trained.named_parameters():
        held = [local(one).nbytes for one in tensors_of(parameter) if isinstance(one, Tensor)]
        found[part_of(name.rpartition(".")[0])] += sum(held)
    return found


def part_of(name: str) -> str:
    """The part that a module belongs to: the first two names of its path, as in encoder.stack."""
    return ".".join(name.removeprefix("predictor.").split(".")[:2]) or STEP


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_text(count: int) -> str:
    """A number of micro-batches."""
    return f"{count} micro-batch" + "es" * (count > 1)


def size_text(size: float) -> str:
    """Bytes with their unit."""
    return f"{size / GB:.2f} GB" if abs(size) >= 0.1 * GB else f"{size / 1e6:.1f} MB"
