"""The order of an epoch: every sample once, a pure function of (seed, epoch) and the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from aam.errors import InputError
from aam.learning.cost_model import FEATURES, GIGABYTE, CostModel, StepSize

MINIMUM_BATCH = 2  # a distance needs a pair
WINDOW = 64  # samples that may wait for a batch with room for them
FULL = 0.99  # of the budget: no further sample is looked for


def _check_rows(rows: np.ndarray) -> None:
    if len(rows) < MINIMUM_BATCH:
        raise InputError(
            f"{len(rows)} training samples: at least {MINIMUM_BATCH} are needed; "
            "use more samples or a smaller --validation-fraction"
        )


@dataclass(frozen=True)
class EpochPlan:
    """Random batches of a fixed number of samples.

    A remainder of one sample joins the batch before it, since one sample has no distances.
    """

    rows: np.ndarray  # (n,) rows of the dataset
    batch_size: int
    seed: int
    option: str = "--batch-size"  # that gave the number

    def __post_init__(self) -> None:
        if self.batch_size < MINIMUM_BATCH:
            raise InputError(
                f"{self.option} {self.batch_size}: at least {MINIMUM_BATCH} samples are needed"
            )
        _check_rows(self.rows)
        if self.batch_size > len(self.rows):
            raise InputError(
                f"{self.option} {self.batch_size} is larger than the {len(self.rows)} training "
                "samples; choose a smaller one"
            )

    def __len__(self) -> int:
        """Batches an epoch."""
        full, rest = divmod(len(self.rows), self.batch_size)
        return full + (rest >= MINIMUM_BATCH)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The rows of each batch of an epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        starts = np.arange(1, len(self)) * self.batch_size
        return np.split(order, starts)


@dataclass(frozen=True)
class Contents:
    """What each sample of a dataset holds.

    Without shared encodings every (sample, ASV) entry is an ASV of its own: ``asvs`` then counts
    up, and ``lengths`` has one number an entry.
    """

    indptr: np.ndarray  # (samples + 1,) int64: entries of sample i are indptr[i]:indptr[i + 1]
    asvs: np.ndarray  # (entries,) int64, indices of `lengths`
    lengths: np.ndarray  # (distinct ASVs,) tokens to encode; 0 where they are known already
    masked_share: float = 0.0  # of the tokens, of which a masked copy is encoded
    squares: bool = False  # whether the implementation holds attention matrices
    shares: int = 1  # processes that share the ASVs and the samples of each step

    @cached_property
    def counts(self) -> np.ndarray:
        """ASVs of each sample, (samples,)."""
        return np.diff(self.indptr)

    def of(self, row: int) -> np.ndarray:
        """ASVs of one sample."""
        return self.asvs[self.indptr[row] : self.indptr[row + 1]]

    def size(self, rows: Sequence[int] | np.ndarray) -> StepSize:
        """What a process holds of the step of these samples in one piece.

        With as many masked tokens as there are on average.
        """
        distinct = np.unique(np.concatenate([self.of(row) for row in rows]))
        lengths, counts = self.lengths[distinct], self.counts[np.asarray(rows)]
        tokens = float(lengths.sum()) / self.shares
        matrices = float(np.square(lengths).sum() + np.square(counts).sum()) / self.shares
        longest = float(counts.max())
        return StepSize(
            tokens=tokens,
            masked=self.masked_share * tokens,
            asvs=len(distinct),
            slots=max(float(counts.sum()) / self.shares, longest),
            samples=len(rows),
            squares=matrices if self.squares else 0.0,
            longest=longest,
        )


@dataclass(frozen=True)
class Oversize:
    """A sample that does not fit into the memory, even with the smallest other one."""

    row: int
    asvs: int  # it has
    needed: float  # bytes, for the two
    keep: int  # ASVs with which the two would fit, whichever of its ASVs these are


class MemoryPlan:
    """Random batches of as many samples as fit into the memory.

    Samples are taken in random order. One that does not fit any more waits, and later ones are
    tried; it is among the first of the next batches. A batch is over the budget only where two
    samples do not fit together and no other partner is there: such a batch has to be computed in
    pieces (`CostModel.pieces_that_fit`).

    Samples are not chosen by the ASVs they share. The best of the next four would save 1 to 7 % of
    the distinct ASVs (ibd, oral; batches of 9 to 140 samples), but its batches are no longer drawn
    at random: with 9 samples their mean UniFrac distance is .604, .613 without, .619 in the table.
    """

    def __init__(
        self,
        rows: np.ndarray,
        contents: Contents,
        model: CostModel,
        budget: float,
        seed: int,
        *,
        most: int | None = None,
        window: int = WINDOW,
    ) -> None:
        """Plan for a budget.

        Args:
            rows: (n,) rows of the dataset to train on.
            contents: of every row of the dataset.
            model: cost of a step.
            budget: bytes.
            seed: of the order.
            most: samples of the largest batch; any number if None.
            window: samples that may wait.

        Raises:
            InputError: there are fewer than two samples, or a step of nothing is over the budget.
        """
        _check_rows(rows)
        self.rows, self.contents, self.model, self.budget = rows, contents, model, budget
        self.seed, self.most, self.window = seed, most or len(rows), window
        self.room = budget / (1 + model.margin) - model.constant  # bytes, for what a step holds
        if self.room <= 0:
            raise InputError(
                f"the memory to fill is {budget / GIGABYTE:.3g} GB, but without any sample "
                f"training takes {model.constant * (1 + model.margin) / GIGABYTE:.3g} GB: give more"
            )
        rates = dict(zip(FEATURES, model.rates, strict=True))
        rates["squares"] *= contents.squares
        for shared in ("tokens", "masked", "slots", "squares"):
            rates[shared] /= contents.shares
        lengths, counts = contents.lengths.astype(np.float64), contents.counts
        self.asv_cost = (rates["tokens"] + rates["masked"] * contents.masked_share) * lengths
        self.asv_cost += rates["asvs"] + rates["squares"] * lengths**2
        self._rates = rates
        self.sample_cost = self._cost_of_slots(counts)
        sums = np.concatenate([[0.0], np.cumsum(self.asv_cost[contents.asvs])])
        self.alone = self.sample_cost + np.diff(sums[contents.indptr])

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The rows of each batch of an epoch, at least two in each."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        filling = _Filling(self, order)
        batches = []
        while (batch := filling.next()) is not None:
            batches.append(batch)
        if len(batches[-1]) < MINIMUM_BATCH:
            self._place_last(batches)
        return [np.array(one) for one in batches]

    def used(self, batches: Sequence[np.ndarray]) -> np.ndarray:
        """Share of the budget that each batch is planned to take, in one piece."""
        return np.array([self.model.bound(self.contents.size(one)) for one in batches]) / (
            self.budget
        )

    def oversize(self) -> list[Oversize]:
        """Samples that do not fit even with the smallest other one."""
        by_cost = self.rows[np.argsort(self.alone[self.rows], kind="stable")]
        found = []
        for row in self.rows:
            other = by_cost[1] if row == by_cost[0] else by_cost[0]
            if self.alone[row] + self.alone[other] <= self.room:
                continue
            size = self.contents.size([row, other])
            if (needed := self.model.bound(size)) > self.budget:
                asvs = int(self.contents.counts[row])
                found.append(Oversize(int(row), asvs, needed, self._keep(row, other)))
        return found

    def _keep(self, row: int, other: int) -> int:
        """How many ASVs of `row` fit beside `other`, were they those that cost most."""
        costs = np.sort(self.asv_cost[self.contents.of(row)])[::-1]
        own = np.cumsum(costs) + self._cost_of_slots(np.arange(1, len(costs) + 1))
        return int(np.searchsorted(own, self.room - self.alone[other], side="right"))

    def _cost_of_slots(self, counts: np.ndarray) -> np.ndarray:
        """Bytes of samples with so many ASVs each, beside those of the ASVs."""
        squares = self._rates["squares"] * counts.astype(np.float64) ** 2
        own: np.ndarray = self._rates["samples"] + self._rates["slots"] * counts + squares
        return own

    def _place_last(self, batches: list[list[int]]) -> None:
        """Find a place for one sample that is left: with others, or with one of them."""
        (row,) = batches.pop()
        recent = batches[-self.window :]
        for batch in reversed(recent):
            if len(batch) < self.most and self._cost([*batch, row]) <= self.room:
                batch.append(row)
                return
        partners = [
            (self.alone[one], one, batch)
            for batch in batches
            if len(batch) > MINIMUM_BATCH
            for one in batch
        ]
        if not partners:
            min(recent, key=lambda batch: self._cost([*batch, row])).append(row)
            return
        _, partner, batch = min(partners, key=lambda one: one[:2])
        batch.remove(partner)
        batches.append([partner, row])

    def _cost(self, rows: Sequence[int]) -> float:
        """Bytes that these samples take together."""
        distinct = np.unique(np.concatenate([self.contents.of(row) for row in rows]))
        return float(self.asv_cost[distinct].sum() + self.sample_cost[list(rows)].sum())


class _Filling:
    """The batches of one epoch, one after the other."""

    def __init__(self, plan: MemoryPlan, order: np.ndarray) -> None:
        self.plan, self.order = plan, order
        self.waiting: list[int] = []  # oldest first
        self.place = 0  # in the order, of the next sample
        self.taken = np.zeros(len(order), dtype=bool)  # out of turn
        self.batch_of = np.full(len(plan.contents.lengths), -1, dtype=np.int32)  # of an ASV
        self.number = -1

    def next(self) -> list[int] | None:
        """Rows of the next batch; None at the end."""
        first = self._pull()
        if first is None:
            return None
        self.number += 1
        plan, batch, missed = self.plan, [first], list[int]()
        left = plan.room - self._join(first)
        while len(batch) < plan.most and len(missed) < plan.window:
            if left < (1 - FULL) * plan.room and len(batch) >= MINIMUM_BATCH:
                break
            row = self._pull()
            if row is None:
                break
            if plan.alone[row] > left and self._cost(row) > left:
                missed.append(row)
                continue
            left -= self._join(row)
            batch.append(row)
        self.waiting = missed + self.waiting
        if len(batch) < MINIMUM_BATCH and (partner := self._partner(left)) is not None:
            batch.append(partner)
        return batch

    def _pull(self) -> int | None:
        """The next sample: of those that wait, then of the order."""
        if self.waiting:
            return self.waiting.pop(0)
        while self.place < len(self.order) and self.taken[self.place]:
            self.place += 1
        if self.place == len(self.order):
            return None
        self.place += 1
        return int(self.order[self.place - 1])

    def _partner(self, left: float) -> int | None:
        """Another sample for a batch of one: the next that fits, else the one that costs least."""
        plan = self.plan
        remaining = self.place + np.flatnonzero(~self.taken[self.place :])
        fits = remaining[plan.alone[self.order[remaining]] <= left]
        if len(fits):
            self.taken[fits[0]] = True
            return int(self.order[fits[0]])
        if not self.waiting and (row := self._pull()) is not None:
            return row
        if not self.waiting:
            return None
        best = min(self.waiting, key=self._cost)
        self.waiting.remove(best)
        return best

    def _cost(self, row: int) -> float:
        """Bytes by which a sample makes the batch larger."""
        asvs = self.plan.contents.of(row)
        new = asvs[self.batch_of[asvs] != self.number]
        return float(self.plan.asv_cost[new].sum() + self.plan.sample_cost[row])

    def _join(self, row: int) -> float:
        """Add a sample to the batch; returns its cost."""
        cost = self._cost(row)
        self.batch_of[self.plan.contents.of(row)] = self.number
        return cost
