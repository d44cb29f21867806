"""One step of training, exact however it is cut: in micro-batches that fit the memory, over ranks.

Losses of sequences (memberships in clades, masked nucleotides) are plain sums, so micro-batches
add up. A loss that compares all pairs of the step's samples is none; its gradient can be had from
their profiles (the gradient cache of Gao et al. 2021, arXiv:2101.06983), and here in two stages,
because a sample is made of ASVs that it shares:

    asv_losses       noisy sequences -> losses                    forward and backward
    encode_asvs      distinct ASVs of all samples -> vectors      without graph
    encode_samples   vectors -> profiles, predictions             without graph
    losses           all pairs -> gradients of these outputs      by block of samples
    encode_samples   again, backward -> gradients of the vectors
    encode_asvs      again, backward -> gradients of the weights

A stage of one micro-batch keeps its graph and is not computed again. Every distinct ASV is encoded
once in the whole step. Ranks share the ASVs and the samples among them, and exchange vectors,
outputs and their gradients; the weights' gradients are added up at the end. What is random about
the data is drawn before anything is cut, and dropout is a function of an element's place in the
whole, so loss and gradients are those of one micro-batch on one device, to float32 rounding.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from aam.data.dataset import AsvBatch, Batch
from aam.errors import InputError
from aam.learning.distributed import RankGroup, cut
from aam.learning.losses import Terms, blocks
from aam.learning.objective import Objective, SampleObjective, SamplePart, Work
from aam_kernels import Ragged

T = TypeVar("T")
FULL = (
    "out of memory", "can't allocate memory", "not enough memory", "bad_alloc",
    "could not create a primitive",  # oneDNN
)  # fmt: skip


class StepTooLarge(MemoryError):
    """A step ran out of memory on some rank; nothing of it is left in the gradients."""


@dataclass(frozen=True)
class MicroBatch:
    """Contiguous rows of a step's ASVs or samples, and where their values lie."""

    rows: slice
    values: slice

    def of(self, whole: Ragged) -> Ragged:
        """The rows as a ragged tensor of their own."""
        offsets = whole.offsets[self.rows.start : self.rows.stop + 1] - self.values.start
        return Ragged(whole.values[self.values], offsets, whole.max_length)


class Step:
    """Computes the loss terms of a batch and leaves the gradients in the weights."""

    def __init__(
        self,
        objective: Objective,
        group: RankGroup,
        *,
        equal_calls: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Set up a step of an objective in training mode, on this process's place in a group.

        `equal_calls` runs every stage as often on every rank, with empty micro-batches if need be:
        stages of sharded weights meet in collectives. `autocast` is the half type of the model's
        products; losses of pairs stay in float32.
        """
        self.objective, self.group = objective, group
        self.equal_calls, self.autocast = equal_calls, autocast
        self.parameters = [one for one in objective.parameters() if one.requires_grad]
        self.on_stage: Callable[[str], None] | None = None  # told "encode_asvs forward" and so on

    def __call__(
        self, batch: Batch | AsvBatch, micro_batches: int = 1, scale: float = 1.0
    ) -> dict[str, float]:
        """Compute gradients, and loss terms of the whole step; the same batch is on every rank.

        Each stage is cut into micro-batches; `scale` multiplies the gradients (not the terms), for
        float16. Draws from torch's default generators. StepTooLarge: the memory does not hold it.
        """
        work = self.objective.draw(batch)
        seeds = torch.randint(1 << 62, (3,)).tolist()
        sums: Terms = {}
        try:
            if work.noisy is not None:
                self._together(lambda: self._asv_losses(work, seeds[0], micro_batches, scale, sums))
            if work.batch is not None:
                self._sample_losses(work, work.batch, seeds[1:], micro_batches, scale, sums)
            self.group.all_reduce_gradients(self.parameters)
            values = self.group.all_reduce(torch.stack([one.float() for one in sums.values()]))
            return dict(zip(sums, values.tolist(), strict=True))
        except StepTooLarge:
            for parameter in self.parameters:
                parameter.grad = None
            gc.collect()
            if self.parameters[0].device.type == "cuda":
                torch.cuda.empty_cache()
            raise

    def _asv_losses(self, work: Work, seed: int, count: int, scale: float, sums: Terms) -> None:
        """Losses that are plain sums over sequences: each micro-batch forward and backward."""
        assert work.noisy is not None
        for part in self._cut(work.noisy.tokens, count):
            own = work.noisy.part(part.rows, part.values)
            self._begin("asv_losses forward", seed)
            with self._precision():
                terms = self.objective.asv_losses(own, work, part.values.start)
            self._backward(terms, "asv_losses backward", scale, sums)

    def _sample_losses(
        self, work: Work, batch: Batch, seeds: list[int], count: int, scale: float, sums: Terms
    ) -> None:
        """Everything that is learned from samples."""
        objective = self.objective
        assert isinstance(objective, SampleObjective)

        def encode_asvs(part: MicroBatch, way: str) -> Terms:
            self._begin(f"encode_asvs {way}", seeds[0])
            with self._precision():
                return {"vectors": objective.encode_asvs(part.of(batch.tokens), part.values.start)}

        def encode_samples(part: MicroBatch, way: str) -> Terms:
            slots, used = part.of(batch.slots), vectors
            if len(slots) < len(batch.slots):  # the vectors of their own ASVs alone
                asvs, place = torch.unique(slots.values, return_inverse=True)
                slots, used = slots.with_values(place), vectors[asvs]
            counts, first = batch.counts[part.values], part.values.start
            samples = SamplePart(slots, counts, first, part.rows, batch.categories)
            self._begin(f"encode_samples {way}", seeds[1])
            with self._precision():
                return objective.encode_samples(used, samples)

        def begin(stage: str) -> Callable[[], None]:
            return lambda: self._begin(f"{stage} backward")

        asvs = GradientCache(self._cut(batch.tokens, count), encode_asvs)
        samples = GradientCache(self._cut(batch.slots, count), encode_samples)
        if objective.frozen_asvs is not None:
            vectors = objective.frozen_asvs[batch.asv_ids]
        else:
            own = self._together(asvs.forward)["vectors"]
            vectors = self.group.gather(own, self._rows_of_ranks(batch.tokens)).requires_grad_()
            del own
        outputs = self._together(samples.forward)
        counts = self._rows_of_ranks(batch.slots)
        leaves = {
            name: self.group.gather(one, counts).float().requires_grad_()
            for name, one in outputs.items()
        }
        del outputs
        self._together(lambda: self._pair_losses(work, leaves, scale, sums))
        gradients = {name: self._own_gradient(leaf, samples) for name, leaf in leaves.items()}
        self._together(lambda: samples.backward(gradients, begin("encode_samples")))
        if objective.frozen_asvs is None:
            gradient = {"vectors": self._own_gradient(vectors, asvs)}
            self._together(lambda: asvs.backward(gradient, begin("encode_asvs")))

    def _pair_losses(self, work: Work, leaves: Terms, scale: float, sums: Terms) -> None:
        """This rank's blocks of the loss; leaves its part of the gradients in the leaves."""
        assert work.batch is not None and isinstance(self.objective, SampleObjective)
        width = max(leaf[0].numel() for leaf in leaves.values())
        own = blocks(len(work.batch.slots), width, self.group.size)
        for first, last in own[self.group.rank :: self.group.size] or [(0, 0)]:
            self._begin("losses forward")
            terms = self.objective.losses(leaves, work, first, last)
            self._backward(terms, "losses backward", scale, sums)

    def _backward(self, terms: Terms, stage: str, scale: float, sums: Terms) -> None:
        self._begin(stage)
        (terms["loss"] * scale if scale != 1 else terms["loss"]).backward()
        for name, value in terms.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()

    def _begin(self, stage: str, seed: int | None = None) -> None:
        """A stage begins, with the random numbers that it has in every micro-batch and rank."""
        if seed is not None:
            torch.manual_seed(seed)
        if self.on_stage is not None:
            self.on_stage(stage)

    def _precision(self) -> torch.autocast:
        device = self.parameters[0].device.type
        return torch.autocast(device, self.autocast, enabled=self.autocast is not None)

    def _own_gradient(self, leaf: Tensor, stage: GradientCache) -> Tensor:
        """The gradient of this rank's rows of a gathered output, summed over the ranks."""
        whole = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        return self.group.all_reduce(whole)[stage.rows]

    def _cut(self, whole: Ragged, count: int) -> list[MicroBatch]:
        """This rank's share of the rows, in micro-batches of about equal length; at least one."""
        bounds = whole.offsets.cpu().numpy().astype(np.int64)
        low, high = cut(bounds, self.group.size)[self.group.rank :][:2].tolist()
        cuts = (low + cut(bounds[low : high + 1] - bounds[low], count)).tolist()
        if not self.equal_calls:  # no empty ones, unless there is nothing else
            cuts = [low, *(b for a, b in pairwise(cuts) if a < b)]
            cuts = cuts if len(cuts) > 1 else [low, high]
        places = bounds.tolist()
        return [MicroBatch(slice(a, b), slice(places[a], places[b])) for a, b in pairwise(cuts)]

    def _rows_of_ranks(self, whole: Ragged) -> list[int]:
        cuts = cut(whole.offsets.cpu().numpy().astype(np.int64), self.group.size)
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
        if self.group.any(full, self.parameters[0].device):
            raise StepTooLarge
        return result  # type: ignore[return-value]  # None only where `work` gave None


class GradientCache:
    """A stage on this rank's micro-batches: forward, and later backward.

    One micro-batch keeps its graph; several are computed again, one after the other.
    """

    def __init__(
        self, micro_batches: list[MicroBatch], compute: Callable[[MicroBatch, str], Terms]
    ) -> None:
        self.micro_batches, self.compute = micro_batches, compute
        self.rows = slice(micro_batches[0].rows.start, micro_batches[-1].rows.stop)
        self.kept: Terms | None = None

    def forward(self) -> Terms:
        """Outputs of all micro-batches, each (rows, ...)."""
        if len(self.micro_batches) == 1:
            self.kept = self.compute(self.micro_batches[0], "forward")
            return self.kept
        with torch.no_grad():
            found = [self.compute(one, "without graph") for one in self.micro_batches]
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}

    def backward(self, gradients: Terms, begin: Callable[[], None]) -> None:
        """Hand the outputs' gradients, each (rows, ...), to the weights and inputs."""
        kept, self.kept = self.kept, None
        for part in self.micro_batches:
            outputs = self.compute(part, "again") if kept is None else kept
            begin()
            own = slice(part.rows.start - self.rows.start, part.rows.stop - self.rows.start)
            reached = [name for name, value in outputs.items() if value.requires_grad]
            if reached:
                torch.autograd.backward(
                    [outputs[name] for name in reached],
                    [gradients[name][own].to(outputs[name].dtype) for name in reached],
                )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's, Python's or an allocator's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(one in str(error).lower() for one in FULL)
