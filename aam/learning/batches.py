"""Which samples share a step and in how many pieces it is computed, within a memory budget.

`Batching` joins the plan of an epoch with what steps are measured to take. Fixed steps (a number
of samples) are cut into the fewest pieces that fit; filling steps hold as many samples as fit. A
step that still runs out of memory is computed again, the same one, in smaller pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from aam.config import OptimizerOptions
from aam.data.dataset import AsvDataset, SampleDataset
from aam.errors import InputError, log
from aam.learning import distributed
from aam.learning.calibration import CALIBRATION_STEPS, Calibration
from aam.learning.cost_model import CostModel, StepSize
from aam.learning.cost_model import memory_budget as budget_of
from aam.learning.meter import Meter
from aam.learning.objective import Objective
from aam.learning.planner import Contents, EpochPlan, MemoryPlan
from aam.learning.step import StepTooLarge

GB = 1e9
Compute = Callable[[np.ndarray, int], dict[str, float]]


class Batching:
    """The samples of every step, and the pieces in which it fits into the memory."""

    def __init__(
        self,
        rows: np.ndarray,
        dataset: SampleDataset | AsvDataset,
        objective: Objective,
        options: OptimizerOptions,
        device: torch.device,
        seed: int,
    ) -> None:
        """Plan fixed steps; filling ones are planned once steps are measured.

        Args:
            rows: (n,) rows of the dataset to train on.
            dataset: the samples; ``--oversize subsample`` limits their ASVs.
            objective: what is learned of them.
            options: batch sizes and memory.
            device: whose memory is filled.
            seed: of the order.
        """
        self.rows, self.options, self.seed = rows, options, seed
        self.dataset, self.objective = dataset, objective
        self.contents = contents_of(dataset, objective)
        self.meter = Meter.for_device(device)
        self.limited = options.max_memory_gb is not None or options.max_memory_fraction is not None
        whole, part = options.effective_batch_size, options.batch_size
        self.least_pieces = 1
        self.fixed: EpochPlan | None = None
        if whole is not None:
            self.fixed = EpochPlan(rows, whole, seed, "--effective-batch-size")
            self.least_pieces = math.ceil(whole / part) if part else 1
        elif part is not None or not self.limited or not dataset.fills_memory:
            size = part or min(dataset.default_batch, len(rows))
            self.fixed = EpochPlan(rows, size, seed)
        self.calibration = Calibration()
        self.budget = 0.0
        self.failures = 0  # times that memory ran out
        self.largest: StepSize | None = None  # a piece that did not fit
        self.limits: dict[int, int] = {}  # most ASVs of rows, by --oversize subsample
        self._epoch = -1  # that is planned
        self._plan: list[tuple[int, CostModel]] = []  # from which batch on, with which costs
        self._batches: list[np.ndarray] = []
        self._settled: CostModel | None = None  # by which samples that do not fit were looked for

    @property
    def calibrates(self) -> bool:
        """Whether steps are measured before the first one of training."""
        return self.limited or self.options.effective_batch_size is not None

    def prepare(self, compute: Compute) -> None:
        """Set the budget and, where it decides anything, measure a few steps.

        Called when data, weights and optimizer state are there. The steps are real ones, up to
        the change of the weights.

        Args:
            compute: a step of some rows in some pieces; leaves no gradients.
        """
        if not self.budget:
            self.budget = float(
                budget_of(
                    self.meter,
                    max_memory_gb=self.options.max_memory_gb,
                    max_memory_fraction=self.options.max_memory_fraction,
                )
            )
        if not self.calibrates or self.calibration.model is not None:
            return
        order = np.random.default_rng([self.seed, CALIBRATION_STEPS]).permutation(self.rows)
        self._warm_up(order[:2], compute)
        self.calibration.floor = float(self.meter.now())
        richest = self.rows[np.argsort(-self.contents.counts[self.rows], kind="stable")]
        most = None if self.fixed is None else self.fixed.batch_size
        for rows, pieces in self.calibration.steps(order, richest, self.size, self.budget, most):
            size = self.size(rows)
            self.meter.reset()
            try:
                compute(rows, pieces)
            except StepTooLarge:
                self._note_failure(size, pieces)
                break
            self.calibration.add(size.split(pieces), distributed.all_reduce_max(self.meter.peak()))
        model = self.calibration.model
        if model is not None:
            log(
                f"memory: {self.budget / GB:.2f} GB to fill, {model.constant / GB:.2f} GB taken "
                f"before a step; measured in {len(self.calibration.peaks)} steps"
            )

    def _warm_up(self, rows: np.ndarray, compute: Compute) -> None:
        """Take the first step of the process, which needs more than later ones, unmeasured."""
        size, pieces = self.size(rows), 1
        while True:
            try:
                compute(rows, pieces)
                return
            except StepTooLarge:
                self._note_failure(size, pieces)
                pieces *= 2

    def batches(self, epoch: int, done: int = 0) -> list[np.ndarray]:
        """The rows of each step of an epoch.

        Args:
            epoch: its number.
            done: batches that were taken already. Where steps are filled and their costs are known
                better by now, those after them are planned again.
        """
        if self.fixed is not None:
            if epoch != self._epoch:
                self._epoch, self._batches = epoch, self.fixed.batches(epoch)
            return self._batches
        model = self.calibration.model
        assert model is not None
        if epoch != self._epoch or not done:
            if epoch == self._epoch and self._plan == [(0, model)]:
                return self._batches
            self._epoch, self._plan, self._batches = epoch, [], []
        if not self._plan or self._plan[-1][1] != model:
            self._plan_from(done if self._plan else 0, model)
        return self._batches

    @property
    def steps_an_epoch(self) -> int:
        """Steps of an epoch; where they are filled, of the one that is planned."""
        if self.fixed is not None:
            return len(self.fixed)
        return len(self._batches or self.batches(0))

    def _plan_from(self, first: int, model: CostModel) -> None:
        """Plan the epoch's batches from one on."""
        if not first and model != self._settled:
            self._settle_oversize(model)
            self._settled = model
        left = self._batches[first:] if first else [self.rows]
        if left:
            plan = MemoryPlan(np.concatenate(left), self.contents, model, self.budget, self.seed)
            self._batches = self._batches[:first] + plan.batches(self._epoch)
        self._plan.append((first, model))

    def _settle_oversize(self, model: CostModel) -> None:
        """Do with samples that do not fit what ``--oversize`` says.

        Raises:
            InputError: it says that they are an error.
        """
        found = MemoryPlan(self.rows, self.contents, model, self.budget, self.seed).oversize()
        if not found:
            return
        assert isinstance(self.dataset, SampleDataset)  # a step of ASVs is never filled
        worst = max(found, key=lambda one: one.needed)
        what = (
            f"{len(found)} samples do not fit into {self.budget / GB:.2f} GB in one piece "
            f"(largest: {self.dataset.sample_ids[worst.row]}, {worst.asvs} ASVs, "
            f"{worst.needed / GB:.2f} GB)"
        )
        if self.options.oversize == "error":
            raise InputError(
                f"{what}: give more memory, a smaller --token-limit or --oversize chunk"
            )
        if self.options.oversize == "chunk":
            log(f"{what}: computed in pieces")
            return
        lost = sum(one.asvs - max(1, one.keep) for one in found)
        log(f"{what}: {lost} of their ASVs are left out (--oversize subsample)")
        self._limit({one.row: max(1, one.keep) for one in found})

    def _limit(self, limits: dict[int, int]) -> None:
        """Let rows have no more than so many ASVs."""
        self.limits |= limits
        assert isinstance(self.dataset, SampleDataset)
        self.dataset.limit_asvs(np.array(list(limits)), np.array(list(limits.values())))
        self.contents = contents_of(self.dataset, self.objective)

    def size(self, rows: np.ndarray) -> StepSize:
        """What each rank holds of a step in one piece."""
        return self.contents.size(rows)

    def pieces(self, size: StepSize) -> int:
        """Into how many pieces a step is cut."""
        pieces, model = self.least_pieces, self.calibration.model
        if model is not None and self.calibrates:
            found = model.pieces_that_fit(size, self.budget)
            if found is None:
                raise InputError(
                    f"a step does not fit into {self.budget / GB:.2f} GB in pieces of any size "
                    f"(at least {model.bound(size.split(1 << 12)) / GB:.2f} GB): give more memory"
                )
            pieces = max(pieces, found)
        most = max(size.asvs, size.samples)  # the largest sample is never cut
        while (
            self.largest is not None
            and pieces < most
            and _as_large(size.split(pieces), self.largest)
        ):
            pieces *= 2
        return distributed.all_reduce_max(pieces)

    def run(self, rows: np.ndarray, compute: Compute) -> tuple[dict[str, float], dict[str, float]]:
        """Compute a step, again in twice as many pieces each time the memory is too small.

        Args:
            rows: the step's samples.
            compute: the step of some rows in some pieces; leaves no gradients where it fails.

        Returns:
            What the step returned, and what it took: pieces, predicted and measured memory.

        Raises:
            InputError: even the smallest pieces do not fit.
        """
        size = self.size(rows)
        pieces = self.pieces(size)
        while True:
            self.meter.reset()
            try:
                terms = compute(rows, pieces)
            except StepTooLarge:
                self._note_failure(size, pieces)
                pieces *= 2
                log(f"out of memory: the same step again in {pieces} pieces")
                continue
            return terms, self._measure(size.split(pieces), pieces)

    def _measure(self, size: StepSize, pieces: int) -> dict[str, float]:
        """Compare the peak with its prediction, and learn from it."""
        peak = distributed.all_reduce_max(self.meter.peak())
        model, known = self.calibration.model, len(self.calibration.sizes)
        found = {"pieces": float(pieces), "memory_gb": peak / GB}
        if model is not None:
            found["memory_predicted_gb"] = model.predict(size) / GB
        if self.failures:
            found["out_of_memory"] = float(self.failures)
        if not self.calibrates and known < CALIBRATION_STEPS:
            self.calibration.add(size, peak)
        elif self.calibrates and self.calibration.check(size, peak):
            log(f"memory: predictions were off, fitted again ({self.calibration.refits} times)")
        return found

    def _note_failure(self, size: StepSize, pieces: int) -> None:
        """Remember a step that did not fit.

        Raises:
            InputError: it cannot be cut any further.
        """
        self.failures += 1
        self.largest = size.split(pieces)
        if pieces >= max(size.asvs, size.samples):
            raise InputError(
                "out of memory: a step does not fit even one sequence at a time; use a smaller "
                "model or --token-limit"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: a resumed epoch is planned as the first time."""
        return {
            "budget": self.budget,
            "failures": self.failures,
            "largest": None if self.largest is None else asdict(self.largest),
            "calibration": self.calibration.to_dict(),
            "limits": self.limits,
            "epoch": self._epoch,
            "plan": [(first, model.to_dict()) for first, model in self._plan],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self.budget, self.failures = state["budget"], state["failures"]
        self.largest = None if state["largest"] is None else StepSize(**state["largest"])
        self.calibration = Calibration.from_dict(state["calibration"])
        if state["limits"]:
            self._limit(state["limits"])
        if self.fixed is None:
            self._epoch, self._plan, self._batches = state["epoch"], [], []
            for first, model in state["plan"]:
                self._plan_from(first, CostModel.from_dict(model))


def contents_of(dataset: SampleDataset | AsvDataset, objective: Objective) -> Contents:
    """What each sample of a dataset holds, for an objective."""
    starts, asvs = dataset.entries()
    lengths = dataset.sequence_lengths
    if objective.frozen_asvs is not None:
        lengths = np.zeros_like(lengths)  # known already
    return Contents(
        starts,
        asvs,
        lengths,
        masked_share=objective.masked_share,
        squares=objective.holds_matrices,
        shares=distributed.world_size(),
    )


def _as_large(one: StepSize, other: StepSize) -> bool:
    return one.tokens >= other.tokens and one.slots >= other.slots
