"""Whole training steps on real tables: the trainer's own, and the padded baseline's.

Both see the same samples in the same order, at the defaults of `aam pretrain`. True distances are
part of our step where there is a tree (`ibd`); the baseline always gets them for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aam.batching import EpochPlan
from aam.config import OptimizerOptions, PenaltyOptions
from aam.data import FeatureTable, SampleDataset, read_table
from aam.data.phylogeny import UniFrac
from aam.model import CommunityEncoder
from aam.model.encoder import EncoderShape
from aam.training.loop import Trainer
from aam.training.objectives import DistanceLoss, PretrainObjective
from benchmarks.baselines.padded_transformer import (
    STACKS,
    PaddedBatch,
    PaddedTransformer,
    pad_batch,
    training_step,
)

TABLES = {"ibd": "table-rarefied-5000.biom", "oral": "table-rarefied-1000.biom"}
BATCHES = 4  # steps go round these, so that no single batch decides
Step = Callable[[], dict[str, float]]


class Jaccard:
    """Distances between the samples of a table without a tree."""

    def __init__(self, table: FeatureTable):
        self.present = (table.counts > 0).astype(np.float64)

    def pairwise(self, rows: np.ndarray) -> np.ndarray:
        """(n, n) share of features that only one of two samples has."""
        present = self.present[rows]
        shared = (present @ present.T).toarray()
        richness = np.diag(shared)
        return 1 - shared / (richness[:, None] + richness[None] - shared)


@dataclass(frozen=True)
class Problem:
    """Samples to train on, in fixed batches."""

    folder: str
    token_limit: int
    batch_size: int = 8

    @cached_property
    def table(self) -> FeatureTable:
        """The rarefied table."""
        return read_table(Path(self.folder) / TABLES[Path(self.folder).name])

    @cached_property
    def dataset(self) -> SampleDataset:
        """Its samples as tokens."""
        return SampleDataset(self.table, token_limit=self.token_limit)

    @cached_property
    def distances(self) -> Any:
        """True distances: unweighted UniFrac, or Jaccard where there is no tree."""
        tree = Path(self.folder) / "tree.nwk"
        return UniFrac(self.table, tree) if tree.exists() else Jaccard(self.table)

    def distance_loss(self) -> DistanceLoss:
        """That of `aam pretrain` at its defaults: with mixtures where there is a tree."""
        if not isinstance(self.distances, UniFrac):
            return DistanceLoss(self.distances)
        return DistanceLoss(self.distances, mixtures=1.0, columns=self.dataset.columns)

    @cached_property
    def batches(self) -> list[np.ndarray]:
        """Rows of each batch."""
        plan = EpochPlan(np.arange(len(self.dataset)), self.batch_size, seed=0)
        return plan.batches(0)[:BATCHES]

    def describe(self) -> dict[str, str]:
        """Measured on these batches: what sharing and not padding can save."""
        batches = [self.dataset.batch(rows) for rows in self.batches]
        slots = sum(len(batch.slots.values) for batch in batches)
        distinct = sum(len(batch.asv_ids) for batch in batches)
        limit = self.token_limit * self.batch_size * len(batches)
        return {
            "distinct ASVs over (sample, ASV) slots": f"{distinct / slots:.2f}",
            "filled slots over padded ones": f"{slots / limit:.2f}",
        }


@lru_cache
def problem(folder: str, token_limit: int) -> Problem:
    """The same problem for every contestant."""
    return Problem(folder, token_limit)


class Unlogged:
    """Where the trainer logs when nothing is kept."""

    def log(self, *_: Any) -> None:
        """Forget."""


def trainer_step(folder: str, token_limit: int, recompute: bool = True, impl: str = "auto") -> Step:
    """`Trainer.step` of `aam pretrain` at its defaults, ready to run.

    Args:
        folder: data set.
        token_limit: most ASVs of a sample.
        recompute: what `--no-gradient-checkpointing` turns off.
        impl: attention implementation.
    """
    from lightning_fabric import Fabric

    torch.manual_seed(0)
    data = problem(folder, token_limit)
    shape = EncoderShape(token_limit=token_limit)
    encoder = CommunityEncoder(shape, impl=impl, recompute=recompute)
    options = OptimizerOptions(batch_size=data.batch_size)
    trainer = Trainer(
        Fabric(accelerator="cpu", devices=1),
        PretrainObjective(encoder, PenaltyOptions(), data.distance_loss()),
        data.dataset,
        EpochPlan(np.arange(len(data.dataset)), data.batch_size, seed=0),
        options,
        Unlogged(),
        validate=dict,
        best_metric="loss",
        description={},
        config={},
        seed=0,
    )
    return _in_turn([lambda rows=rows: trainer.step([rows]) for rows in data.batches])


def padded_step(
    folder: str, token_limit: int, checkpointed: bool = True, dropout: float = 0.1
) -> Step:
    """The baseline's step, ready to run; its batches are padded beforehand.

    Args:
        folder: data set.
        token_limit: slots a sample.
        checkpointed: recompute the layers of all three stacks in backward.
        dropout: everywhere.
    """
    torch.manual_seed(0)
    data = problem(folder, token_limit)
    model = PaddedTransformer(
        token_limit=token_limit, checkpointed=STACKS if checkpointed else (), dropout=dropout
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)

    def step(batch: PaddedBatch, distances: torch.Tensor) -> dict[str, float]:
        return training_step(model, optimizer, batch, distances)

    steps = []
    for rows in data.batches:
        packed = data.dataset.batch(rows)
        padded = pad_batch(
            packed.tokens.values, packed.tokens.offsets,
            packed.slots.values, packed.slots.offsets, token_limit,
        )  # fmt: skip
        distances = torch.from_numpy(data.distances.pairwise(rows))
        steps.append(lambda padded=padded, distances=distances: step(padded, distances))
    return _in_turn(steps)


def _in_turn(steps: list[Step]) -> Step:
    """One call is one step; the next call takes the next batch."""
    count = 0

    def step() -> dict[str, float]:
        nonlocal count
        count += 1
        return steps[(count - 1) % len(steps)]()

    return step
