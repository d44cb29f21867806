"""Which samples share a step, and in how many micro-batches it fits into a budget of memory.

Fixed steps (a number of samples) are cut into the fewest micro-batches that fit; filling steps
hold as many samples as fit. A step that still runs out of memory is computed again, the same one,
in smaller micro-batches.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from aam.config import OptimizerOptions
from aam.data.dataset import AsvDataset, SampleDataset
from aam.errors import InputError, log
from aam.learning import distributed
from aam.learning.cost_model import CostModel, StepContents, StepSize
from aam.learning.meter import GB, Meter
from aam.learning.objective import Objective
from aam.learning.step import StepTooLarge

WINDOW = 64  # samples that may wait for a step with room for them
MEASURED_ORDER = 10  # the epoch of whose order measured steps are
MEASURED_SHARE = 0.8  # of what steps may hold, which no measured one is predicted to exceed
GROWING_STEPS, GROWTH = 8, 4  # measured steps of more and more samples, at most times as many
MANY = 64  # micro-batches of a step of which a few small ones say that it fits in no number
KEPT = ("budget", "failures", "least", "asv_limits", "epoch", "stale")
Compute = Callable[[np.ndarray, int], dict[str, float]]


def shuffled(rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The rows in the order of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def fixed_batches(
    rows: np.ndarray, size: int, seed: int, epoch: int = 0, option: str = "--batch-size"
) -> list[np.ndarray]:
    """Random batches of a number of samples; one that is left joins the batch before it."""
    if len(rows) < 2:  # a distance needs a pair
        raise InputError(
            f"{len(rows)} training samples: at least 2 are needed; "
            "use more samples or a smaller --validation-fraction"
        )
    if not 2 <= size <= len(rows):
        raise InputError(
            f"{option} {size}: choose 2 to {len(rows)}, the number of training samples"
        )
    count = len(rows) // size + (len(rows) % size > 1)
    return np.split(shuffled(rows, seed, epoch), np.arange(1, count) * size)


class Filling:
    """Batches of as many samples as fit into the memory, by what their new ASVs cost.

    Samples are not chosen by the ASVs they share: that would save 1 to 7 % of the distinct ASVs
    (ibd, oral), but batches would no longer be random, and their distances too small.
    """

    def __init__(self, contents: StepContents, costs: CostModel, budget: float) -> None:
        self.contents = contents
        self.room = budget / (1 + costs.margin) - costs.constant  # for what a step holds
        rates = StepSize(*costs.rates)
        self.asv_cost = rates.asvs + rates.tokens * contents.lengths / contents.ranks
        self.slots_cost = rates.slots * contents.counts / contents.ranks
        sums = np.concatenate([[0.0], np.cumsum(self.asv_cost[contents.asvs])])
        self.alone = self.slots_cost + np.diff(sums[contents.starts])  # of each sample by itself

    def batches(self, order: np.ndarray) -> list[np.ndarray]:
        """Batches of all rows, at least two in each.

        A sample that does not fit any more waits and is among the first of the next batch. Only
        one that fits with none that is at hand shares a batch that is over the budget.
        """
        queue, batches = deque(order.tolist()), list[list[int]]()
        batch_of = np.full(len(self.asv_cost), -1)  # of an ASV
        while queue:
            batch, waiting, left = list[int](), list[int](), self.room
            while queue and len(waiting) < WINDOW:
                row = queue.popleft()
                asvs = self.contents.of(row)
                new = asvs[batch_of[asvs] != len(batches)]
                cost = self.asv_cost[new].sum() + self.slots_cost[row]
                if batch and cost > left:
                    waiting.append(row)
                    continue
                batch.append(row)
                batch_of[new] = len(batches)
                left -= cost
            if len(batch) == 1 and waiting:
                batch.append(waiting.pop(int(np.argmin(self.alone[waiting]))))
            queue.extendleft(reversed(waiting))
            batches.append(batch)
        if len(batches[-1]) == 1:  # another one joins it, or it joins two others
            row, before = batches.pop()[0], batches[-1]
            if len(before) > 2:
                batches.append([row, before.pop(int(np.argmin(self.alone[before])))])
            else:
                before.append(row)
        return [np.array(one) for one in batches]


class Batching:
    """The samples of every step, and the micro-batches in which it fits into the memory."""

    def __init__(
        self,
        rows: np.ndarray,
        dataset: SampleDataset | AsvDataset,
        objective: Objective,
        options: OptimizerOptions,
        device: torch.device,
        seed: int,
    ) -> None:
        """Choose the size of steps; filling ones are planned once some are measured."""
        self.rows, self.dataset, self.objective = rows, dataset, objective
        self.options, self.seed = options, seed
        self.contents, self.meter = self._contents(), Meter(device)
        self.limited = options.max_memory_gb is not None or options.max_memory_fraction is not None
        whole, part = options.effective_batch_size, options.batch_size
        self.least = math.ceil(whole / part) if whole and part else 1  # micro-batches of a step
        self.batch_size = part if whole is None else whole  # None: as many as fit
        if self.batch_size is None and not (self.limited and dataset.fills_memory):
            self.batch_size = min(dataset.default_batch, len(rows))
        option = "--batch-size" if whole is None else "--effective-batch-size"
        fixed_batches(rows, self.batch_size or 2, seed, option=option)  # refuses bad sizes
        self.budget = 0.0
        self.costs: CostModel | None = None
        self.failures = 0  # times that memory ran out
        self.asv_limits: dict[int, int] = {}  # most ASVs of rows, by --oversize subsample
        self.epoch, self.planned = -1, list[np.ndarray]()
        self.stale = False  # the costs have moved since the epoch was planned

    def _contents(self) -> StepContents:
        known = self.objective.frozen_asvs is not None
        starts, asvs = self.dataset.entries()
        lengths = self.dataset.sequence_lengths * (not known)
        return StepContents(starts, asvs, lengths, distributed.world_size())

    def prepare(self, compute: Compute) -> None:
        """Set the budget and, where a memory option or an effective batch asks, measure steps.

        Called when data, weights and optimizer state are there. The steps are real ones, up to
        the change of the weights: `compute` takes rows and micro-batches and leaves no gradients.
        """
        options = self.options
        if not self.budget:
            budget = self.meter.budget(options.max_memory_gb, options.max_memory_fraction)
            self.budget = -float(distributed.all_reduce_max(-int(budget)))
        if self.costs or not (self.limited or options.effective_batch_size):
            return
        order = shuffled(self.rows, self.seed, MEASURED_ORDER)
        self.run(order[:2], compute)  # the first step of a process takes more than later ones
        sizes, held = list[StepSize](), list[float]()
        for rows, count in self._steps_to_measure(order):
            self.meter.reset()
            base = self.meter.now()
            try:
                compute(rows, count)
            except StepTooLarge:
                break
            sizes.append(self.contents.size(rows).split(count))
            held.append(distributed.all_reduce_max(self.meter.peak() - base))
            self.costs = CostModel.fit(sizes, held, distributed.all_reduce_max(base))
        if self.costs is None:
            raise InputError("out of memory: a step of two samples does not fit; give more memory")
        log(
            f"memory: {self.budget / GB:.2f} GB to fill, {self.costs.constant / GB:.2f} GB "
            f"taken before a step; measured in {len(held)} steps"
        )
        if self.batch_size is None:
            self._settle_oversize()

    def _steps_to_measure(self, order: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Rows and micro-batches of steps; `costs` are those of the ones before.

        More and more samples, up to the most that are predicted to fit; some with many ASVs, which
        tell tokens from slots; the same in three micro-batches, which tells what these do not
        divide; and a step of training, in the micro-batches that it needs.
        """

        def fitting(rows: np.ndarray) -> int:
            """How many of the first of these samples are predicted to fit together."""
            assert self.costs
            bound, base = self.costs.bound, self.costs.base
            most = base + MEASURED_SHARE * (self.budget - base)
            numbers = range(1, len(rows) + 1)
            return bisect_right(numbers, most, key=lambda n: bound(self.contents.size(rows[:n])))

        whole = self.batch_size or len(order)
        count, following = 0, 2
        for _ in range(GROWING_STEPS):
            if following < 1.1 * count:
                break
            count = following
            yield order[:count], self.least if self.failures else 1
            following = fitting(order[: min(GROWTH * count, whole)])
        rich = order[np.argsort(-self.contents.counts[order], kind="stable")]
        rich = rich[len(order) // 16 :][:count]
        if count < len(order) and (few := fitting(rich)) > 1:
            yield rich[:few], 1
        if count > 2:
            yield order[:count], 3
        if self.batch_size and self.costs and count < whole:
            needed = self.costs.micro_batches(self.contents.size(order[:whole]), self.budget)
            yield order[:whole], needed or MANY

    def _settle_oversize(self) -> None:
        """Do what ``--oversize`` says with samples that do not fit even with the smallest other."""
        assert self.costs
        filling, counts = Filling(self.contents, self.costs, self.budget), self.contents.counts
        alone = filling.alone[self.rows]
        room = max(0.0, filling.room - alone.min())
        found, worst = self.rows[alone > room], self.rows[alone.argmax()]
        if not len(found):
            return
        assert isinstance(self.dataset, SampleDataset)  # a step of ASVs is never filled
        what = (
            f"{len(found)} samples do not fit into {self.budget / GB:.2f} GB in one micro-batch "
            f"(largest: {self.dataset.sample_ids[worst]}, {counts[worst]} ASVs)"
        )
        if self.options.oversize == "error":
            raise InputError(
                f"{what}: give more memory, a smaller --token-limit or --oversize chunk"
            )
        if self.options.oversize == "chunk":
            log(f"{what}: computed in more")
            return
        keep = np.maximum(1, counts[found] * room // filling.alone[found]).astype(int)
        lost = int((counts[found] - keep).sum())
        log(f"{what}: {lost} of their ASVs are left out (--oversize subsample)")
        self._limit_asvs(dict(zip(found.tolist(), keep.tolist(), strict=True)))

    def _limit_asvs(self, limits: dict[int, int]) -> None:
        assert isinstance(self.dataset, SampleDataset)
        self.asv_limits = limits
        self.dataset.limit_asvs(np.array(list(limits)), np.array(list(limits.values())))
        self.contents = self._contents()

    def batches(self, epoch: int, done: int = 0) -> list[np.ndarray]:
        """The rows of each step of an epoch.

        Those after the `done` ones are planned again where steps are filled and costs have moved.
        """
        if epoch != self.epoch:
            self.epoch, self.stale, self.planned, done = epoch, True, [self.rows], 0
        if self.stale and self.batch_size:
            self.planned = fixed_batches(self.rows, self.batch_size, self.seed, epoch)
        elif self.stale and done < len(self.planned):
            left = shuffled(np.concatenate(self.planned[done:]), self.seed, epoch)
            assert self.costs
            filling = Filling(self.contents, self.costs, self.budget)
            self.planned = self.planned[:done] + filling.batches(left)
        self.stale = False
        return self.planned

    @property
    def steps_an_epoch(self) -> int:
        """Steps of an epoch; where they are filled, of the one that is planned."""
        return len(self.planned or self.batches(0))

    def micro_batches(self, size: StepSize) -> int:
        """Into how many micro-batches a step is cut, on every rank."""
        needed = self.costs.micro_batches(size, self.budget) if self.costs else 1
        if needed is None:
            raise InputError(
                f"a step does not fit into {self.budget / GB:.2f} GB in micro-batches of any size: "
                "give more memory"
            )
        return distributed.all_reduce_max(max(self.least, needed))

    def run(self, rows: np.ndarray, compute: Compute) -> tuple[dict[str, float], dict[str, float]]:
        """Compute a step, again in twice as many micro-batches each time the memory is too small.

        Returns what `compute` did, and what it took.
        """
        whole = self.contents.size(rows)
        count = self.micro_batches(whole)
        while True:
            self.meter.reset()
            try:
                terms = compute(rows, count)
                break
            except StepTooLarge:
                self.failures += 1
                if count >= max(whole.asvs, len(rows)):
                    raise InputError(
                        "out of memory: a step does not fit even one sequence at a time; use a "
                        "smaller model or --token-limit"
                    ) from None
                self.least = count = 2 * count  # what did not fit once is not tried again
                log(f"out of memory: the same step again in {count} micro-batches")
        size, peak = whole.split(count), distributed.all_reduce_max(self.meter.peak())
        found = {"micro_batches": float(count), "memory_gb": peak / GB}
        if self.failures:
            found["out_of_memory"] = float(self.failures)
        if self.costs:
            found["memory_predicted_gb"] = self.costs.predict(size) / GB
            self.stale = self.costs.check(size, peak) or self.stale
        return terms, found

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: a resumed epoch goes on with the same batches."""
        planned = [one.tolist() for one in self.planned] if self.batch_size is None else []
        costs = asdict(self.costs) if self.costs else None
        return {name: getattr(self, name) for name in KEPT} | {"costs": costs, "planned": planned}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        for name in KEPT:
            setattr(self, name, state[name])
        self.costs = CostModel(**state["costs"]) if state["costs"] else None
        self.planned = [np.array(one) for one in state["planned"]]
        self.stale = self.stale or self.batch_size is not None  # fixed ones are not kept
        if self.asv_limits:
            self._limit_asvs(self.asv_limits)
