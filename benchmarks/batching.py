"""Steps that fill the memory, steps of a fixed number of samples, and steps in micro-batches.

What is returned prepares itself on its first call (warms up, measures a few steps, searches), and
trains on from then on, one epoch of some samples a call. Every step's peak is that of the process,
by the meter that training uses.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from aam.data.dataset import SampleDataset
from aam.data.table import FeatureTable, read_table
from aam.data.table_distances import TableDistances
from aam.learning.batches import fixed_batches
from aam.learning.cost_model import CostModel
from aam.model import AsvEncoder, EncoderShape
from benchmarks.large_tables import sequences
from benchmarks.steps import TABLES, forward, make_trainer, pair_objective

GB = 1e9
SIMULATED = 400, 8000  # samples and features
SIMULATED_ASVS = 60, 1.0, 5, 1000  # of a sample, log-normal: median, sigma, fewest, most
LARGEST_BATCH = 1024  # where halving starts
FAR = 1.25  # times the budget: so large a step fails at once, before it takes any time
NEAR = 0.98  # of the budget: a fixed size whose largest step takes that is not made larger
LEVELS = 5  # corrections of a fixed size by what its largest step really takes
Result = dict[str, Any]
Epoch = Callable[[], Result]


def read(folder: str, name: str) -> FeatureTable:
    """`ibd` or `oral` as rarefied, `mixed`: both in one table, or `simulated`."""
    if name == "simulated":
        return simulated(*SIMULATED)
    names = list(TABLES) if name == "mixed" else [name]
    return join([read_table(Path(folder) / one / TABLES[one]) for one in names])


def join(tables: Sequence[FeatureTable]) -> FeatureTable:
    """All samples of several tables, over all their sequences."""
    names = sorted({name for table in tables for name in table.feature_ids})
    column = {name: number for number, name in enumerate(names)}
    parts = []
    for table in tables:
        counts, columns = table.counts, np.array([column[name] for name in table.feature_ids])
        shape = (counts.shape[0], len(names))
        parts.append(sp.csr_array((counts.data, columns[counts.indices], counts.indptr), shape))
    counts = sp.csr_array(sp.vstack(parts))
    counts.sort_indices()
    ids = tuple(name for table in tables for name in table.sample_ids)
    return FeatureTable(ids, tuple(names), counts, "joined")


def simulated(samples: int, features: int, seed: int = 0) -> FeatureTable:
    """Samples whose sizes differ a hundredfold, of sequences of 100 to 150 bases.

    Half of a sample's ASVs come from a tenth of all.
    """
    generator = np.random.default_rng(seed)
    names = tuple(name.decode() for name in sequences(generator, features))
    middle, sigma, fewest, most = SIMULATED_ASVS
    sizes = generator.lognormal(np.log(middle), sigma, samples).clip(fewest, most).astype(int)
    weights = np.where(generator.random(features) < 0.1, 10.0, 10 / 9)
    weights /= weights.sum()
    rows = np.repeat(np.arange(samples), sizes)
    columns = np.concatenate(
        [generator.choice(features, size, replace=False, p=weights) for size in sizes]
    )
    reads = np.ceil(generator.lognormal(3.0, 1.4, len(rows))).astype(np.int64)
    counts = sp.csr_array(sp.coo_array((reads, (rows, columns)), (samples, features)))
    counts.sort_indices()
    return FeatureTable(tuple(f"s{row}" for row in range(samples)), names, counts, "simulated")


@lru_cache
def samples_of(folder: str, name: str, token_limit: int) -> tuple[SampleDataset, TableDistances]:
    """Samples and their Jaccard distances."""
    table = read(folder, name)
    dataset = SampleDataset(table, token_limit=token_limit)
    return dataset, TableDistances(table, "jaccard")


class Case:
    """A trainer of `aam pretrain --distance jaccard` on some samples, within a budget.

    Attributes:
        rows: of the samples that an epoch has.
        trainer: takes steps of them.
        budget: bytes.
    """

    def __init__(
        self,
        folder: str,
        name: str,
        *,
        budget_gb: float = 0.0,
        samples: int | None = None,
        token_limit: int = 1024,
        recompute: bool = True,
        effective: int | None = None,
        seed: int = 0,
    ) -> None:
        """Set up.

        Args:
            folder: with a folder for each data set.
            name: see `read`.
            budget_gb: memory to fill, 10^9 bytes; 0: none, steps have a fixed size.
            samples: of an epoch, drawn at random; None: all.
            token_limit: most ASVs of a sample.
            recompute: what `--no-gradient-checkpointing` turns off.
            effective: samples of a step, in micro-batches that fit the budget; None: as fit whole.
            seed: of weights, samples and order.
        """
        torch.manual_seed(seed)
        self.budget, self.seed = budget_gb * GB, seed
        dataset, distances = samples_of(folder, name, token_limit)
        self.rows = np.random.default_rng(seed).permutation(len(dataset))[:samples]
        objective = pair_objective(AsvEncoder(EncoderShape(), recompute=recompute), distances)
        self.trainer = make_trainer(
            objective, dataset, self.rows, seed,
            max_memory_gb=budget_gb or None, effective_batch_size=effective,
        )  # fmt: skip

    def fixed(self, size: int) -> list[np.ndarray]:
        """An epoch in batches of so many samples."""
        return fixed_batches(self.rows, size, self.seed)

    def predict(self, model: CostModel, batches: Sequence[np.ndarray]) -> np.ndarray:
        """Peaks of these steps in one micro-batch, bytes."""
        return np.array(
            [model.predict(self.trainer.batching.contents.size(rows)) for rows in batches]
        )

    def train(self, batches: Sequence[np.ndarray]) -> Result:
        """Take these steps; says samples, and peaks in GB."""
        found = [self.trainer.step(rows) for rows in batches]
        peaks = [one["memory_gb"] for one in found]
        return {
            "samples": sum(map(len, batches)),
            "sizes": list(map(len, batches)),
            "micro_batches": max(one["micro_batches"] for one in found),
            "peaks": peaks,
            "predicted": [one.get("memory_predicted_gb") for one in found],
            "peak_megabytes": 1e3 * max(peaks),
            "losses": [one["loss"] for one in found],
        }


def filling(
    folder: str,
    name: str,
    *,
    steps: int | None = None,
    keep: str | None = None,
    **options: Any,
) -> Epoch:
    """Steps that fill the budget, as `--max-memory-gb` takes them after the first few.

    Args:
        folder: of the data.
        name: see `read`.
        steps: take only the first ones of the epoch.
        keep: file from which the cost model comes, or into which it goes, for other contestants.
        options: of `Case`.
    """
    case = Case(folder, name, **options)
    batching = case.trainer.batching

    def calibrate() -> Result:
        started = time.perf_counter()
        if keep is not None and Path(keep).exists():
            batching.costs = model_of(keep)
        batching.prepare(case.trainer.compute)
        assert batching.costs is not None
        if keep is not None:
            Path(keep).write_text(json.dumps(asdict(batching.costs)))
        return {"measuring_seconds": time.perf_counter() - started}

    return in_turn(calibrate, lambda: case.train(batching.batches(0)[:steps]))


def largest_fixed(folder: str, name: str, *, keep: str, **options: Any) -> Epoch:
    """Steps of the largest fixed number of samples with which a whole epoch meets the budget.

    Args:
        folder: of the data.
        name: see `read`.
        keep: file with a cost model, where the search begins; the number goes beside it.
        options: of `Case`.
    """
    case, known = unlimited(folder, name, **options), Path(f"{keep}.size")

    def search() -> Result:
        case.train([case.rows[:2]])
        if known.exists():
            return {"fixed_size": size()}
        model, allowed, sizes = model_of(keep), case.budget, list[int]()
        for _ in range(LEVELS):
            number = largest_size(case, model, allowed)
            batches = case.fixed(number)
            predicted = case.predict(model, batches)
            peak = case.train([batches[predicted.argmax()]])["peaks"][0] * GB
            if peak <= case.budget:
                sizes.append(number)
            if number in sizes[:-1] or NEAR <= peak / case.budget <= 1:
                break
            allowed = case.budget * predicted.max() / peak
        known.write_text(str(max(sizes, default=2)))
        return {"fixed_size": size()}

    def size() -> int:
        return int(known.read_text())

    def epoch() -> Result:
        return {**case.train(case.fixed(size())), "fixed_size": size()}

    return in_turn(search, epoch)


def largest_size(case: Case, model: CostModel, budget: float) -> int:
    """The most samples of which every batch of an epoch is predicted to meet a budget."""
    low, high = 2, len(case.rows) + 1  # `high` does not fit
    while high - low > 1:
        middle = (low + high) // 2
        fits = (case.predict(model, case.fixed(middle)) <= budget).all()
        low, high = (middle, high) if fits else (low, middle)
    return low


def halving(folder: str, name: str, *, keep: str, **options: Any) -> Epoch:
    """An epoch that begins again with half as many samples a step whenever one does not fit.

    A step whose peak is over the budget has failed, as if the allocator had refused, and all that
    the epoch took so far is lost. Steps far over the budget fail at once and cost nothing. Steps of
    two samples are taken whatever they need.

    Args:
        folder: of the data.
        name: see `read`.
        keep: file with a cost model, to know those.
        options: of `Case`.
    """
    case = unlimited(folder, name, **options)

    def attempt(model: CostModel, size: int) -> Result | None:
        parts = []
        for rows in case.fixed(size):
            if size > 2 and case.predict(model, [rows])[0] > FAR * case.budget:
                return None
            parts.append(case.train([rows]))
            if size > 2 and parts[-1]["peaks"][0] * GB > case.budget:
                return None
        lists = ("sizes", "peaks", "predicted", "losses")
        return {
            "samples": len(case.rows),
            **{key: list(itertools.chain(*(one[key] for one in parts))) for key in lists},
            "peak_megabytes": max(one["peak_megabytes"] for one in parts),
        }

    def epoch() -> Result:
        model, size = model_of(keep), min(LARGEST_BATCH, len(case.rows))
        started, lost = time.perf_counter(), 0.0
        while (result := attempt(model, size)) is None:
            lost, size = time.perf_counter() - started, max(2, size // 2)
        return {**result, "fixed_size": size, "lost_seconds": lost}

    return in_turn(lambda: case.train([case.rows[:2]]), epoch)


def in_large_steps(folder: str, name: str, *, keep: str, times: float, **options: Any) -> Epoch:
    """Steps of far more samples than fit, exact, in micro-batches: `--effective-batch-size`.

    Args:
        folder: of the data.
        name: see `read`.
        keep: file beside which the largest fixed number of samples is.
        times: so many times that number, so that an epoch's steps are about equal.
        options: of `Case`.
    """
    cases: list[Case] = []

    def calibrate() -> Result:
        size = times * int(Path(f"{keep}.size").read_text())
        everything = len(unlimited(folder, name, **options).rows)
        steps = max(1, round(everything / size))
        case = Case(folder, name, effective=math.ceil(everything / steps), **options)
        case.trainer.batching.prepare(case.trainer.compute)
        cases.append(case)
        return {}

    return in_turn(calibrate, lambda: cases[0].train(cases[0].trainer.batching.batches(0)))


def unlimited(folder: str, name: str, *, budget_gb: float, **options: Any) -> Case:
    """A case that knows the budget and does not plan with it."""
    case = Case(folder, name, **options)
    case.budget = budget_gb * GB
    return case


def model_of(keep: str) -> CostModel:
    """The cost model that `filling` has kept."""
    return CostModel(**json.loads(Path(keep).read_text()))


def in_micro_batches(folder: str, name: str, *, count: int, **options: Any) -> Epoch:
    """One step, up to the gradients of the weights, of all samples of the case.

    Args:
        folder: of the data.
        name: see `read`.
        count: micro-batches of each stage; 0: only the forward pass, without a graph.
        options: of `Case`.
    """
    case = Case(folder, name, **options)
    trainer, meter = case.trainer, case.trainer.batching.meter

    def call(rows: np.ndarray) -> Result:
        meter.reset()
        if count:
            loss = trainer.compute(rows, count)["loss"]
        else:
            objective = trainer.objective.train()
            with torch.no_grad():
                work = objective.draw(trainer.dataset.batch(rows))
                loss = float(forward(objective, work)["loss"])
        peak = meter.peak() / GB
        return {"loss": loss, "peaks": [peak], "peak_megabytes": 1e3 * peak}

    return in_turn(lambda: call(case.rows[:2]), lambda: call(case.rows))


def in_turn(first: Epoch, later: Epoch) -> Epoch:
    """The first call prepares; each later one is an epoch."""
    calls = itertools.chain([first], itertools.repeat(later))
    return lambda: next(calls)()
