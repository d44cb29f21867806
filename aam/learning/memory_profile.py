"""`--memory-profile`: what takes the memory of a step, and the batch that would fill it.

One real step is computed before training, its gradients and the change of the weights undone, so
that the run is the one it would have been. See `aam.learning.memory_watch` for what is counted.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from aam.errors import InputError, log
from aam.files import write_text
from aam.learning import distributed
from aam.learning.batches import GB, Batching
from aam.learning.calibration import Calibration
from aam.learning.cost_model import CostModel, StepSize
from aam.learning.fsdp import clip_gradients
from aam.learning.memory_watch import Amounts, Held, Phase, StepWatch, bytes_of
from aam.learning.planner import EpochPlan
from aam.learning.step import StepTooLarge
from aam_kernels import Ragged, available_impls
from aam_kernels.modules import TransformerEncoder

if TYPE_CHECKING:
    from aam.learning.loop import Trainer

TABLE, FIGURE = "memory.tsv", "memory.svg"
LEAST_CALIBRATED, CALIBRATED_STEPS = 16, 4  # samples; times the run's step
BATCHES_TRIED = 32  # of an epoch, to find its largest
SEQUENCES = 8  # through the layer whose kept bytes are counted
DRAW = "from aam.report.memory_figure import main; main()"
KEPT = "kept for backward"


@dataclass(frozen=True)
class Row:
    """A line of memory.tsv.

    Attributes:
        section: stage, peak, module, layer, tensor or batch.
        name: of the stage, module, implementation or tensor.
        part: what of it.
        bytes: how much.
        detail: in words.
    """

    section: str
    name: str
    part: str
    bytes: int
    detail: str = ""


@dataclass(frozen=True)
class Fit:
    """A batch, the fewest pieces in which it fits, and its predicted peak in bytes."""

    samples: int
    pieces: int
    bytes: float


def write_memory_profile(trainer: Trainer) -> None:
    """Profile the coming step of a run and write memory.tsv and memory.svg into its folder.

    Weights, optimizer state, random generators and progress are as before; all ranks call it.
    """
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        rows = next_rows(trainer)
        model = cost_model(trainer, len(rows))
        watch, pieces, before = watched_step(trainer, rows)
        layers = kept_by_layers(trainer)
    if not distributed.is_rank_zero():
        return
    table = [
        *stage_rows(watch, before),
        *peak_rows(trainer, watch, before),
        *module_rows(trainer, watch),
        *layers,
        *tensor_rows(watch),
        *batch_rows(model, trainer.batching, len(rows)),
    ]
    header = [field.name for field in fields(Row)]
    trainer.run.write_table(TABLE, header, [astuple(row) for row in table])
    draw(trainer.run.path)
    summarise(trainer, watch, table, f"a step of {len(rows)} samples in {_pieces(pieces)}")


def draw(folder: Path) -> None:
    """Draw the figure in a process of its own: matplotlib would stay in the memory of training."""
    command = [sys.executable, "-c", DRAW, str(folder / TABLE)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        reason = ["no reason given", *done.stderr.decode(errors="replace").splitlines()][-1]
        log(f"warning: {folder / FIGURE} could not be drawn: {reason}")
    else:
        write_text(folder / FIGURE, done.stdout.decode())


# ------------------------------------------------------------------------------------ the step
def next_rows(trainer: Trainer) -> np.ndarray:
    """The samples of the step that comes next."""
    at = trainer.progress
    batches = trainer.batching.batches(at.epoch, at.batch)
    return batches[at.batch] if at.batch < len(batches) else batches[0]


def cost_model(trainer: Trainer, count: int) -> CostModel:
    """The cost model of the run, or where it has none one of steps up to a few times its own.

    Args:
        trainer: of the run.
        count: samples of its step.
    """
    own = trainer.batching
    if own.calibration.model is None:
        own = copy.copy(own)
        order = np.random.default_rng(own.seed).permutation(own.rows)
        own.rows = order[: max(LEAST_CALIBRATED, CALIBRATED_STEPS * count)]
        own.limited, own.calibration = True, Calibration()
        own.prepare(trainer.compute_all)
    assert own.calibration.model is not None
    return own.calibration.model


def watched_step(trainer: Trainer, rows: np.ndarray) -> tuple[StepWatch, int, int]:
    """Compute a step in as many pieces as it will take, and undo it.

    Returns:
        What was seen, the pieces, and the bytes in use before the step.
    """
    batching = trainer.batching
    pieces = batching.pieces(batching.size(rows))
    while True:
        watch = StepWatch(trainer.trained, batching.meter)
        try:
            trainer.compute_all(
                rows[:2], pieces
            )  # the first of a process takes more than later ones
            trainer.optimizer.zero_grad(set_to_none=True)
            batching.meter.reset()
            before = batching.meter.peak()  # as the phases are measured
            with watch.watching(trainer._step):
                trainer.compute_all(rows, pieces)
                change_and_restore(trainer, watch)
        except StepTooLarge:
            if pieces >= len(rows) and pieces >= batching.size(rows).asvs:
                raise InputError("--memory-profile: the step does not fit in any pieces") from None
            pieces *= 2
            continue
        trainer.optimizer.zero_grad(set_to_none=True)
        return watch, pieces, before


def change_and_restore(trainer: Trainer, watch: StepWatch) -> None:
    """Change the weights as a step does, and put everything back, bit for bit."""
    watch.end()
    weights = [one for group in trainer.optimizer.param_groups for one in group["params"]]
    note_state(trainer, watch)
    changed = list(weights)
    for state in trainer.optimizer.state.values():
        changed += [one for one in state.values() if isinstance(one, Tensor)]
    with torch.no_grad():
        copies = [one.detach().clone() for one in changed]
        watch.turn("optimizer", "step")
        clip_gradients(weights, trainer.options.clip)
        trainer.optimizer.step()
        watch.end(sum(map(bytes_of, copies)))
        for one, saved in zip(changed, copies, strict=True):
            one.copy_(saved)


def note_state(trainer: Trainer, watch: StepWatch) -> None:
    """Weights, gradients, optimizer state and frozen vectors are tensors too."""
    for name, one in trainer.trained.named_parameters():
        watch.note(Held.of(one, f"weight {name}", "whole run"))
        if one.grad is not None:
            watch.note(Held.of(one.grad, f"gradient of {name}", "backward to the step's end"))
        for key, value in trainer.optimizer.state.get(one, {}).items():
            if isinstance(value, Tensor):
                watch.note(Held.of(value, f"optimizer's {key} of {name}", "whole run"))
    if trainer.objective.frozen_asvs is not None:
        watch.note(Held.of(trainer.objective.frozen_asvs, "frozen ASV vectors", "whole run"))


# ------------------------------------------------------------------------------------ one layer
def kept_by_layers(trainer: Trainer) -> list[Row]:
    """Bytes a token a layer of the ASV stack, for every implementation that runs here."""
    if not trainer.objective.encoder.has_stack:
        return []
    stack: Any = trainer.objective.encoder.stack
    layer = stack.layers[0]
    dim, hidden = layer.linear1.in_features, layer.linear1.out_features
    length = max(1, int(np.median(trainer.dataset.sequence_lengths)))
    rows, own = [], stack.impl
    for impl in available_impls(trainer.device)["encoder_layer"]:
        for recompute in (True, False):
            try:
                kept = kept_a_token(
                    dim, stack.num_heads, hidden, impl, recompute, trainer.device, length=length
                )
            except (RuntimeError, ValueError) as error:  # refused for this shape or device
                reason = str(error).partition("\n")[0]
                rows.append(Row("layer", impl, _mode(recompute), 0, f"does not run: {reason}"))
                continue
            own = impl if own == "auto" else own  # the first that runs, as "auto" chooses
            used = impl == own and recompute == stack.recompute
            rows.append(Row("layer", impl, _mode(recompute), kept, "as in this run" * used))
    return rows


def kept_a_token(
    dim: int,
    num_heads: int,
    hidden: int,
    impl: str,
    recompute: bool,
    device: torch.device | str,
    *,
    length: int = 150,
) -> int:
    """Bytes that a float32 encoder layer keeps for its backward pass, for each token.

    Args:
        dim: width.
        num_heads: divides it.
        hidden: width of the feed-forward part.
        impl: implementation, as in `aam_kernels`.
        recompute: keep the layer's input only.
        device: where it runs.
        length: tokens a sequence.

    Raises:
        RuntimeError, ValueError: the implementation does not take this.
    """
    total = SEQUENCES * length
    stack = TransformerEncoder(dim, num_heads, 1, hidden, 0.0, recompute, impl).to(device)
    stack.norm = torch.nn.Identity()  # type: ignore[assignment]  # the stack's, not a layer's
    offsets = torch.arange(0, total + 1, length, dtype=torch.int32, device=device)
    x = torch.zeros(total, dim, device=device, requires_grad=True)
    known = {one.untyped_storage()._cdata for one in (*stack.parameters(), offsets)}
    kept: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        own = tensor.detach()
        if own.untyped_storage()._cdata not in known:
            kept.setdefault(own.untyped_storage()._cdata, own)
        return own

    with saved_tensors_hooks(save, lambda tensor: tensor):
        stack(Ragged(x, offsets, length))
    return math.ceil(sum(one.untyped_storage().nbytes() for one in kept.values()) / total)


def _pieces(count: int) -> str:
    return "1 piece" if count == 1 else f"{count} pieces"


def _mode(recompute: bool) -> str:
    return "recompute" if recompute else "all kept"


# ------------------------------------------------------------------------------------ the table
def highest(watch: StepWatch) -> Phase:
    """The phase of the step's peak."""
    return max(watch.phases, key=lambda phase: phase.peak)


def stage_rows(watch: StepWatch, before: int) -> list[Row]:
    """Peak of every phase, above what was there before the step."""
    return [
        Row(
            "stage", phase.stage, phase.way, phase.peak - before,
            f"{size_text(phase.peak)} in all, {size_text(sum(phase.kept.values()))} of it {KEPT}",
        )
        for phase in watch.phases
    ]  # fmt: skip


def peak_rows(trainer: Trainer, watch: StepWatch, before: int) -> list[Row]:
    """What the peak is made of; the parts add up to it."""
    phase = highest(watch)
    weights, state = (sum(found.values()) for found in _held_by_weights(trainer, watch))
    frozen = trainer.objective.frozen_asvs
    vectors = {} if frozen is None else {"frozen ASV vectors": frozen.nbytes}
    parts = {
        "program and data": before - weights - state - sum(vectors.values()),
        **vectors,
        "weights": weights,
        "optimizer state": state,
        "gradients": sum(phase.gradients.values()),
        KEPT: sum(phase.kept.values()),
    }
    parts["working memory and unexplained"] = phase.peak - sum(parts.values())
    rows = [Row("peak", phase.name, part, size) for part, size in parts.items()]
    return [*rows, Row("peak", phase.name, "measured", phase.peak)]


def module_rows(trainer: Trainer, watch: StepWatch) -> list[Row]:
    """What belongs to each part of the model."""
    weights, state = _held_by_weights(trainer, watch)
    columns = {
        "weights": weights,
        "gradients": watch.phases[-1].gradients,
        "optimizer state": state,
        KEPT: watch.most,
        f"{KEPT}, at the peak": highest(watch).kept,
    }
    return [
        Row("module", group, part, found.get(group, 0))
        for group in dict.fromkeys(name for found in columns.values() for name in found)
        if any(found.get(group) for found in columns.values())
        for part, found in columns.items()
    ]


def _held_by_weights(trainer: Trainer, watch: StepWatch) -> tuple[Amounts, Amounts]:
    """Bytes of the weights and of the optimizer's state, by module."""
    optimizer = trainer.optimizer

    def state(one: Any) -> list[Tensor]:
        return [v for v in optimizer.state.get(one, {}).values() if isinstance(v, Tensor)]

    return watch.sizes(lambda one: [one]), watch.sizes(state)


def tensor_rows(watch: StepWatch) -> list[Row]:
    """The largest tensors."""
    return [
        Row("tensor", one.origin, one.stage, one.bytes, f"{one.dtype} {one.shape}")
        for one in watch.largest_tensors()
    ]


# ------------------------------------------------------------------------------------ the batch
def fitting_batches(model: CostModel, batching: Batching, own: int) -> list[Fit]:
    """The largest batch that fits in one piece, this run's, and larger ones in their pieces.

    Args:
        model: of the run's steps.
        batching: of the run; its budget is what there is.
        own: samples of the run's step.
    """
    budget, most = batching.budget, len(batching.rows)

    def need(count: int) -> StepSize:
        """The most that a batch of so many samples holds."""
        batches = EpochPlan(batching.rows, count, batching.seed).batches(0)[:BATCHES_TRIED]
        return max(map(batching.size, batches), key=model.bound)

    low, high = 1, most + 1  # `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if model.bound(need(middle)) <= budget else (low, middle)
    found = []
    for count in sorted({own, low, 2 * low, 4 * low, most} & set(range(2, most + 1))):
        size = need(count)
        pieces = model.pieces_that_fit(size, budget)
        if pieces is not None:
            found.append(Fit(count, pieces, model.bound(size.split(pieces))))
    return found


def best_fit(fits: Sequence[Fit]) -> Fit | None:
    """The largest batch in one piece, else the smallest in pieces."""
    whole = [fit for fit in fits if fit.pieces == 1]
    return max(whole, key=lambda fit: fit.samples) if whole else next(iter(fits), None)


def batch_rows(model: CostModel, batching: Batching, own: int) -> list[Row]:
    """Batches, their pieces and the peaks predicted for them; the recommended one is marked."""
    fits = fitting_batches(model, batching, own)
    best = best_fit(fits)
    limit = f"of {size_text(batching.budget)}; error of predictions {100 * model.error:.1f} %"
    rows = []
    for fit in fits:
        said = ["recommended"] if fit is best else []
        said += ["all training samples"] if fit.samples == len(batching.rows) else []
        rows.append(
            Row(
                "batch", f"{fit.samples} samples", _pieces(fit.pieces), round(fit.bytes),
                "; ".join([*said, limit]),
            )
        )  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------ the words
def size_text(size: float) -> str:
    """Bytes in words."""
    return f"{size / GB:.2f} GB" if abs(size) >= 0.1 * GB else f"{size / 1e6:.1f} MB"


def summarise(trainer: Trainer, watch: StepWatch, table: Sequence[Row], done: str) -> None:
    """Say the most important of it in a few lines."""
    phase = highest(watch)
    parts = {row.part: row.bytes for row in table if row.section == "peak"}
    own = [row for row in table if row.section == "module" and row.part == KEPT]
    most = max(own, key=lambda row: row.bytes, default=None)
    log(f"memory profile of {done}: peak {size_text(phase.peak)} ({phase.name})")
    said = [f"{name} {size_text(size)}" for name, size in parts.items() if name != "measured"]
    log(f"  {', '.join(said)}")
    layers = [row for row in table if row.section == "layer" and row.detail == "as in this run"]
    if most is not None:
        of_layers = f"; {layers[0].bytes:,} B a token a layer ({layers[0].name})" if layers else ""
        log(f"  kept most: {most.name}, {size_text(most.bytes)}{of_layers}")
    for row in table:
        if row.detail.startswith("recommended"):
            log(f"  fits into what is free: {row.name} in {row.part}, {size_text(row.bytes)}")
    log(f"  {trainer.run.path / TABLE}, {trainer.run.path / FIGURE}")
