"""Watches one step: what it holds for its backward pass, whose it is, and the peak of each stage.

Nothing of the step is changed. Hooks on the objective say which stage runs, hooks on its modules
whose tensors autograd saves, and torch's saved-tensor hooks hand over every tensor that is kept
until it is released. Tensors that share their storage are counted once, weights not at all.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from aam.learning.meter import Meter

OWNERS = {
    "sample_encoder": "sample", "encoder": "ASV", "predictor": "target", "pairs": "free clades",
    "head": "clade head",
}  # fmt: skip
REST = {"target": "head", "ASV": "embeddings", "sample": "embeddings"}  # neither stack nor pool
LARGEST = 10
OWN = "the step itself"  # where no module runs: gathers, losses, what stages hand on
Amounts = dict[str, int]


@dataclass
class Phase:
    """A stage in one direction; pieces are one phase, of which the largest counts.

    Attributes:
        stage: as in `aam.learning.step`, "batch" before them, "optimizer" after them.
        way: "making", "forward", "forward without graph", "forward again", "backward" or "step".
        peak: measured, bytes.
        kept: bytes held for the backward pass when they were most, by module.
        gradients: bytes of the weights' gradients at the end, by module.
    """

    stage: str
    way: str
    peak: int = 0
    kept: Amounts = field(default_factory=dict)
    gradients: Amounts = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Stage and way in words."""
        return f"{self.stage}, {self.way}"


@dataclass(frozen=True, order=True)
class Held:
    """A tensor: how much it holds in memory, where it comes from, when it was there."""

    bytes: int
    origin: str
    shape: tuple[int, ...]
    dtype: str
    stage: str

    @classmethod
    def of(cls, tensor: Tensor, origin: str, stage: str, size: int | None = None) -> Held:
        """Describe a tensor, of `size` bytes if not only its own elements are held."""
        own = local(tensor)
        dtype = str(own.dtype).removeprefix("torch.")
        return cls(own.nbytes if size is None else size, origin, tuple(own.shape), dtype, stage)


class _Ticket:
    """What autograd keeps instead of a tensor: the tensor, and a note of its release."""

    __slots__ = ("release", "tensor")

    def __init__(self, tensor: Tensor, release: Callable[[], None] | None) -> None:
        self.tensor, self.release = tensor, release

    def __del__(self) -> None:
        if self.release is not None:
            self.release()


class StepWatch:
    """Phases, kept bytes and largest tensors of the steps inside `watching`."""

    def __init__(self, objective: nn.Module, meter: Meter) -> None:
        """Prepare to watch.

        Args:
            objective: computes the stages, called by their names.
            meter: of its device.
        """
        self.objective, self.meter = objective, meter
        self.phases: list[Phase] = []
        self.most: Amounts = {}
        """Most bytes kept at a time, by module."""
        self.most_kept = 0
        """The same of all modules together."""
        self.largest: dict[tuple[str, str], Held] = {}
        self.groups = {name: group_of(name) for name, _ in objective.named_modules()}
        self._weights = {local(one).untyped_storage()._cdata for one in objective.parameters()}
        self._now: Phase | None = None
        self._modules: list[str] = []
        self._ordinals: dict[str, int] = {}
        self._kept: Amounts = {}
        self._storages: dict[int, _Storage] = {}

    @contextmanager
    def watching(self, step: Any) -> Iterator[StepWatch]:
        """Watch what is computed inside; stacks compiled by torch run as they are written."""
        compiled = [one for one in self.objective.modules() if _compiled(one) is not None]
        calls = [_compiled(one) for one in compiled]
        with ExitStack() as stack:
            for one in compiled:
                one._compiled_call_impl = None
            for name, module in self.objective.named_modules():
                if not name:
                    continue
                enter, leave = self._hooks(name)
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            stack.enter_context(saved_tensors_hooks(self._save, _restore))
            step.on_stage = self._stage
            try:
                self.turn("batch", "making")
                yield self
                self.end()
            finally:
                step.on_stage = None
                for one, call in zip(compiled, calls, strict=True):
                    one._compiled_call_impl = call

    def turn(self, stage: str, way: str) -> None:
        """A phase begins; the one before it ends."""
        if self._now is not None and (self._now.stage, self._now.way) == (stage, way):
            return
        self.end()
        self._now = Phase(stage, way, kept=dict(self._kept))
        self._ordinals.clear()
        self.meter.reset()

    def end(self, beside: int = 0) -> None:
        """The phase ends; it joins its like from other pieces.

        Args:
            beside: bytes that were there and are not the step's.
        """
        now, self._now = self._now, None
        if now is None:
            return
        now.peak = self.meter.peak() - beside
        now.gradients = self.sizes(lambda one: [] if one.grad is None else [one.grad])
        for index, one in enumerate(self.phases):
            if one.name == now.name:
                self.phases[index] = max(one, now, key=lambda phase: phase.peak)
                return
        self.phases.append(now)

    def sizes(self, tensors_of: Callable[[nn.Parameter], Iterable[Tensor]]) -> Amounts:
        """Bytes of what belongs to the weights, by module."""
        found: Amounts = {}
        for name, parameter in self.objective.named_parameters():
            group = self.groups[name.rpartition(".")[0]]
            found[group] = found.get(group, 0) + sum(map(bytes_of, tensors_of(parameter)))
        return found

    def note(self, held: Held) -> None:
        """Remember a tensor if it is among the largest."""
        key = held.origin, held.stage
        if key not in self.largest or self.largest[key] < held:
            self.largest[key] = held

    def largest_tensors(self) -> list[Held]:
        """The largest, each origin once, largest first."""
        own: dict[str, Held] = {}
        for held in self.largest.values():
            if held.origin not in own or own[held.origin] < held:
                own[held.origin] = held
        return heapq.nlargest(LARGEST, own.values())

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """What is called before and after a module."""

        def enter(*_: Any) -> None:
            self._modules.append(name)

        def leave(*_: Any) -> None:
            self._modules.pop()

        return enter, leave

    def _stage(self, text: str) -> None:
        stage, _, way = text.partition(" ")
        self.turn(
            stage,
            {"without graph": "forward without graph", "again": "forward again"}.get(way, way),
        )

    def _save(self, tensor: Tensor) -> _Ticket:
        """Autograd saves a tensor."""
        own = tensor.detach()
        storage = local(own).untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._weights or not size:
            return _Ticket(own, None)
        if key in self._storages:
            self._storages[key].users += 1
        else:
            module = self._modules[-1] if self._modules else ""
            found = self._storages[key] = _Storage(self.groups.get(module, OWN), size)
            self._change(found.group, size)
            if self._now is not None:
                origin = module or self._now.stage
                number = self._ordinals[origin] = self._ordinals.get(origin, 0) + 1
                self.note(Held.of(own, f"kept by {origin}, number {number}", self._now.name, size))
        return _Ticket(own, lambda: self._release(key))

    def _release(self, key: int) -> None:
        """Autograd no longer needs a tensor."""
        found = self._storages[key]
        found.users -= 1
        if not found.users:
            del self._storages[key]
            self._change(found.group, -found.size)

    def _change(self, group: str, size: int) -> None:
        self._kept[group] = self._kept.get(group, 0) + size
        self.most[group] = max(self.most.get(group, 0), self._kept[group])
        now, kept = self._now, sum(self._kept.values())
        self.most_kept = max(self.most_kept, kept)
        if now is not None and kept > sum(now.kept.values()):
            now.kept = dict(self._kept)


@dataclass
class _Storage:
    group: str
    size: int
    users: int = 1


def _restore(ticket: _Ticket) -> Tensor:
    return ticket.tensor


def _compiled(module: nn.Module) -> Any:
    return getattr(module, "_compiled_call_impl", None)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bytes_of(tensor: Tensor) -> int:
    """Bytes that this rank holds of a tensor."""
    return local(tensor).nbytes


def group_of(name: str) -> str:
    """The part of the model that a module belongs to, in words.

    Args:
        name: path of the module in its objective.
    """
    parts = name.split(".")
    owner = next((part for part in OWNERS if part in parts[:2]), "")
    who = OWNERS.get(owner)
    if who is None or parts[-1] == "encoder":
        return OWN
    inner = [*parts[parts.index(owner) + 1 :], ""][0]
    if who not in REST:
        return who
    if inner in ("stack", "pool", "wide"):
        return f"{who} {inner}" if inner != "wide" else "wide path"
    if inner == "count_stack":
        return "count stack"
    if inner == "nucleotide_head":
        return "nucleotide head"
    return f"{who} {REST[who]}"
