"""One step of training, exact however it is cut: in pieces that fit the memory, over many ranks.

Losses of sequences (memberships in clades, masked nucleotides) are plain sums, so pieces add up.
A loss that compares all pairs of the step's samples is none; its gradient can be had from their
profiles (the gradient cache of Gao et al. 2021, arXiv:2101.06983), and here in two stages,
because a sample is made of ASVs that it shares:

    asv_losses       noisy sequences -> losses                    forward and backward, by piece
    encode_asvs      distinct ASVs of all samples -> vectors      by piece, without graph
    encode_samples   vectors -> profiles, predictions             by piece, without graph
    losses           all pairs -> gradients of these outputs      by block of samples
    encode_samples   again, backward -> gradients of the vectors  by piece
    encode_asvs      again, backward -> gradients of the weights  by piece

A stage of one piece keeps its graph and is not computed again. Every distinct ASV is encoded once
in the whole step. Ranks share the ASVs and the samples among them, and exchange vectors, outputs
and their gradients; the weights' gradients are added up at the end. What is random about the data
is drawn before anything is cut, and dropout is a function of an element's place in the whole, so
loss and gradients are those of one piece on one device, to float32 rounding.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from aam.data.asvs import AsvBatch
from aam.data.dataset import Batch
from aam.errors import InputError
from aam.learning.collectives import RankGroup, cut
from aam.learning.losses import Terms, blocks
from aam.learning.objective import Objective, SamplePart, Work
from aam_kernels import Ragged

T = TypeVar("T")
FULL = (
    "out of memory", "can't allocate memory", "not enough memory", "bad_alloc",
    "could not create a primitive",  # oneDNN
)  # fmt: skip


class StepTooLarge(MemoryError):
    """A step ran out of memory on some rank; nothing of it is left in the gradients."""


@dataclass(frozen=True)
class Part:
    """Contiguous rows of a ragged tensor, and where their values lie."""

    rows: slice
    values: slice

    @property
    def first_row(self) -> int:
        """Where the values begin."""
        return int(self.values.start)

    def of(self, whole: Ragged) -> Ragged:
        """The rows as a ragged tensor of their own."""
        offsets = whole.offsets[self.rows.start : self.rows.stop + 1] - self.values.start
        return Ragged(whole.values[self.values], offsets, whole.max_length)


class Step:
    """Computes the loss terms of a batch and leaves the gradients in the weights."""

    def __init__(
        self, objective: Objective, exchange: RankGroup, *, equal_calls: bool = False
    ) -> None:
        """Set up.

        Args:
            objective: in training mode, on its device.
            exchange: this process's place among the ranks.
            equal_calls: call every stage `pieces` times on every rank, with empty parts if need
                be: stages of sharded weights meet in collectives.
        """
        self.objective, self.exchange = objective, exchange
        self.equal_calls = equal_calls
        self.parameters = [one for one in objective.parameters() if one.requires_grad]

    def __call__(self, batch: Batch | AsvBatch, pieces: int = 1) -> dict[str, float]:
        """Compute loss terms and gradients; draws from torch's default generators.

        Args:
            batch: all samples (or ASVs) of the step, on the device; the same on every rank.
            pieces: into how many each stage is cut.

        Returns:
            Loss terms of the whole step, the same on every rank.

        Raises:
            StepTooLarge: the memory does not hold it; the gradients are those of before the call.
        """
        work = self.objective.draw(batch)
        seeds = torch.randint(1 << 62, (3,)).tolist()
        try:
            return self._compute(work, seeds, pieces)
        except StepTooLarge:
            for parameter in self.parameters:
                parameter.grad = None
            release_memory(self.parameters[0].device)
            raise

    def _compute(self, work: Work, seeds: list[int], pieces: int) -> dict[str, float]:
        sums: Terms = {}
        if work.noisy is not None:
            self._together(lambda: self._asvs(work, seeds[0], pieces, sums))
        if work.batch is not None:
            self._samples(work, work.batch, seeds, pieces, sums)
        self.exchange.sum_gradients(self.parameters)
        values = self.exchange.sum_(torch.stack([one.float() for one in sums.values()]))
        return dict(zip(sums, values.tolist(), strict=True))

    def _asvs(self, work: Work, seed: int, pieces: int, sums: Terms) -> None:
        """Losses that are plain sums over sequences: each piece forward and backward."""
        assert work.noisy is not None
        for part in self._parts(work.noisy.tokens, pieces):
            own = work.noisy.part(part.rows, part.values)
            terms = self._stage(seed, "asv_losses", own, work, part.first_row)
            terms["loss"].backward()
            add(sums, terms)

    def _samples(
        self, work: Work, batch: Batch, seeds: list[int], pieces: int, sums: Terms
    ) -> None:
        """Everything that is learned from samples."""
        asvs = Stage(self._parts(batch.tokens, pieces))
        samples = Stage(self._parts(batch.slots, pieces))
        frozen = self.objective.frozen_asvs
        if frozen is None:
            own = self._together(
                lambda: asvs.forward(lambda part: {"vectors": self._vectors(batch, part, seeds[1])})
            )
            vectors = self.exchange.gather(own["vectors"], self._counts(batch.tokens))
            vectors = vectors.detach().requires_grad_()
        else:
            vectors = frozen[batch.asv_ids]
        outputs = self._together(
            lambda: samples.forward(lambda part: self._outputs(batch, vectors, part, seeds[2]))
        )
        counts = self._counts(batch.slots)
        leaves = {
            name: self.exchange.gather(value, counts).detach().requires_grad_()
            for name, value in outputs.items()
        }
        self._together(lambda: self._losses(work, leaves, sums))
        low, high = samples.rows
        gradients = {}
        for name, leaf in leaves.items():
            whole = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            gradients[name] = self.exchange.sum_(whole)[low:high]
        self._together(
            lambda: samples.backward(
                gradients, lambda part: self._outputs(batch, vectors, part, seeds[2])
            )
        )
        if frozen is None:
            whole = torch.zeros_like(vectors) if vectors.grad is None else vectors.grad
            low, high = asvs.rows
            gradient = {"vectors": self.exchange.sum_(whole)[low:high]}
            self._together(
                lambda: asvs.backward(
                    gradient, lambda part: {"vectors": self._vectors(batch, part, seeds[1])}
                )
            )

    def _vectors(self, batch: Batch, part: Part, seed: int) -> Tensor:
        return self._stage(seed, "encode_asvs", part.of(batch.tokens), part.first_row)

    def _outputs(self, batch: Batch, vectors: Tensor, part: Part, seed: int) -> Terms:
        """Outputs of some samples, from the vectors of their own ASVs alone."""
        slots = part.of(batch.slots)
        if len(slots) < len(batch.slots):
            used, place = torch.unique(slots.values, return_inverse=True)
            slots, vectors = slots.with_values(place), vectors[used]
        own = SamplePart(
            slots, batch.counts[part.values], part.first_row, part.rows, batch.categories
        )
        return self._stage(seed, "encode_samples", vectors, own)

    def _losses(self, work: Work, leaves: Terms, sums: Terms) -> None:
        """This rank's blocks of the loss; leaves its part of the gradients in the leaves."""
        assert work.batch is not None
        samples = len(work.batch.slots)
        width = max(leaf[0].numel() for leaf in leaves.values())
        own = blocks(samples, width, self.exchange.size)[self.exchange.rank :: self.exchange.size]
        for first, last in own or [(0, 0)]:
            terms = self.objective("losses", leaves, work, first, last)
            terms["loss"].backward()
            add(sums, terms)

    def _stage(self, seed: int, name: str, *arguments: object) -> Any:
        """Run a stage with the random numbers that it has in every piece and on every rank."""
        torch.manual_seed(seed)
        return self.objective(name, *arguments)

    def _parts(self, whole: Ragged, pieces: int) -> list[Part]:
        """This rank's share of the rows, in pieces of about equal length; at least one."""
        bounds = whole.offsets.cpu().numpy().astype(np.int64)
        low, high = self.exchange.share(bounds)
        cuts = (low + cut(bounds[low : high + 1] - bounds[low], pieces)).tolist()
        if not self.equal_calls:  # no empty ones, unless there is nothing else
            cuts = [low, *(b for a, b in pairwise(cuts) if a < b)]
            cuts = cuts if len(cuts) > 1 else [low, high]
        return [Part(slice(a, b), slice(int(bounds[a]), int(bounds[b]))) for a, b in pairwise(cuts)]

    def _counts(self, whole: Ragged) -> list[int]:
        """Rows of every rank."""
        cuts = cut(whole.offsets.cpu().numpy().astype(np.int64), self.exchange.size)
        return np.diff(cuts).tolist()

    def _together(self, work: Callable[[], T]) -> T:
        """Run what needs no other rank; if the memory of any was too small, all give up."""
        result: T | None = None
        full = False
        try:
            result = work()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if self.equal_calls:  # the others wait for this rank within the stage
                raise InputError(
                    "out of memory; with --strategy fsdp a step cannot be computed again: use a "
                    "smaller --max-memory-gb, --batch-size or --token-limit"
                ) from error
            full = True  # the error, and with it the graph, is gone when this block is left
        if self.exchange.any(full, self.parameters[0].device):
            raise StepTooLarge
        return result  # type: ignore[return-value]


class Stage:
    """A stage of the model on this rank's parts: forward, and later backward.

    One part keeps its graph; several are computed again, one after the other.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.kept: Terms | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """First row, and the one after the last."""
        return self.parts[0].rows.start, self.parts[-1].rows.stop

    def forward(self, compute: Callable[[Part], Terms]) -> Terms:
        """Outputs of all parts, each (rows, ...)."""
        if len(self.parts) == 1:
            self.kept = compute(self.parts[0])
            return self.kept
        with torch.no_grad():
            found = [compute(part) for part in self.parts]
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}

    def backward(self, gradients: Terms, compute: Callable[[Part], Terms]) -> None:
        """Hand the outputs' gradients, each (rows, ...), to the weights and inputs."""
        for outputs, part in self._again(compute):
            low = part.rows.start - self.parts[0].rows.start
            own = slice(low, low + part.rows.stop - part.rows.start)
            pairs = [(outputs[name], gradients[name][own]) for name in outputs]
            reached = [(value, grad) for value, grad in pairs if value.requires_grad]
            if reached:
                values, grads = zip(*reached, strict=True)
                torch.autograd.backward(values, grads)

    def _again(self, compute: Callable[[Part], Terms]) -> Iterator[tuple[Terms, Part]]:
        if self.kept is not None:
            kept, self.kept = self.kept, None
            yield kept, self.parts[0]
            return
        for part in self.parts:
            yield compute(part), part


def add(sums: Terms, terms: Terms) -> None:
    """Add detached terms to the sums."""
    for name, value in terms.items():
        value = value.detach()
        sums[name] = sums[name] + value if name in sums else value


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's, Python's or an allocator's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(one in str(error).lower() for one in FULL)


def release_memory(device: torch.device) -> None:
    """Give back what a failed step held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
