"""Whole training steps and inference on real tables: aam's own, and the padded baseline's.

Both see the same samples in the same order, at the defaults of `aam pretrain`. True distances are
part of our step where there is a tree (`ibd`); the baseline always gets them for nothing. What is
returned runs a short piece of the work on its first call, to warm up, and goes round the batches
from then on.
"""

from __future__ import annotations

import itertools
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
from aam.training.evaluation import sample_embeddings
from aam.training.loop import Trainer
from aam.training.losses import DistanceLoss
from aam.training.memory import Batching
from aam.training.objectives import PretrainObjective
from benchmarks.baselines.padded_transformer import (
    STACKS,
    Labelled,
    PaddedBatch,
    PaddedTransformer,
    pad_batch,
    training_step,
)

TABLES = {"ibd": "table-rarefied-5000.biom", "oral": "table-rarefied-1000.biom"}
BATCHES = 4  # steps go round these, so that no single batch decides
SHORT = 2, 8  # samples and slots of the run that warms up
Step = Callable[[], dict[str, float]]


class Jaccard:
    """Distances between the samples of a table without a tree."""

    def __init__(self, table: FeatureTable):
        self.present = (table.counts > 0).astype(np.float64)

    def pairwise(self, rows: np.ndarray) -> np.ndarray:
        """(n, n) share of features that only one of two samples has."""
        return self.cross(rows, rows)

    def cross(self, rows_a: np.ndarray, rows_b: np.ndarray) -> np.ndarray:
        """(n, m) the same of two lists of samples."""
        a, b = self.present[rows_a], self.present[rows_b]
        shared = (a @ b.T).toarray()
        richness = a.sum(axis=1)[:, None] + b.sum(axis=1)[None]
        return 1 - shared / (richness - shared)


@dataclass(frozen=True)
class Problem:
    """Samples to train on, in fixed batches."""

    folder: str
    token_limit: int
    batch_size: int = 8
    share_asvs: bool = True

    @cached_property
    def table(self) -> FeatureTable:
        """The rarefied table."""
        return read_table(Path(self.folder) / TABLES[Path(self.folder).name])

    @cached_property
    def dataset(self) -> SampleDataset:
        """Its samples as tokens."""
        return SampleDataset(self.table, token_limit=self.token_limit, share_asvs=self.share_asvs)

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

    def padded(self, rows: np.ndarray) -> PaddedBatch:
        """Samples at fixed size."""
        packed = self.dataset.batch(rows)
        return pad_batch(
            packed.tokens.values, packed.tokens.offsets,
            packed.slots.values, packed.slots.offsets, self.token_limit,
        )  # fmt: skip


problem = lru_cache(Problem)
"""The same problem for every contestant."""


class Unlogged:
    """Where the trainer logs when nothing is kept."""

    def log(self, *_: Any) -> None:
        """Forget."""


def trainer_step(
    folder: str,
    token_limit: int,
    *,
    batch_size: int = 8,
    share_asvs: bool = True,
    recompute: bool = True,
) -> Step:
    """`Trainer.step` of `aam pretrain` at its defaults, ready to run.

    Args:
        folder: data set.
        token_limit: most ASVs of a sample.
        batch_size: samples a step.
        share_asvs: what `--no-share-asvs` turns off.
        recompute: what `--no-gradient-checkpointing` turns off.
    """
    from lightning_fabric import Fabric

    torch.manual_seed(0)
    data = problem(folder, token_limit, batch_size, share_asvs)
    encoder = CommunityEncoder(EncoderShape(token_limit=token_limit), recompute=recompute)
    options = OptimizerOptions(batch_size=batch_size)
    objective = PretrainObjective(encoder, PenaltyOptions(), data.distance_loss())
    trainer = Trainer(
        Fabric(accelerator="cpu", devices=1),
        objective,
        data.dataset,
        Batching(
            np.arange(len(data.dataset)),
            data.dataset,
            objective,
            options,
            torch.device("cpu"),
            seed=0,
        ),
        options,
        Unlogged(),
        validate=dict,
        best_metric="loss",
        description={},
        config={},
        seed=0,
    )
    return _in_turn(
        lambda: trainer.step(data.batches[0][: SHORT[0]]),
        [lambda rows=rows: trainer.step(rows) for rows in data.batches],
    )


def padded_step(
    folder: str,
    token_limit: int,
    *,
    batch_size: int = 8,
    parts: int = 1,
    checkpointed: bool = True,
    dropout: float = 0.1,
) -> Step:
    """The baseline's step, ready to run; its batches are padded beforehand.

    Args:
        folder: data set.
        token_limit: slots a sample.
        batch_size: samples a step.
        parts: batches in which they are taken, one after the other, to bound memory.
        checkpointed: recompute the layers of all three stacks in backward.
        dropout: everywhere.
    """
    torch.manual_seed(0)
    data = problem(folder, token_limit, batch_size)
    model = PaddedTransformer(
        token_limit=token_limit, checkpointed=STACKS if checkpointed else (), dropout=dropout
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)

    def known(rows: np.ndarray) -> Labelled:
        return data.padded(rows), torch.from_numpy(data.distances.pairwise(rows))

    def step(batches: list[Labelled]) -> dict[str, float]:
        return training_step(model, optimizer, batches)

    batches = [[known(part) for part in np.array_split(rows, parts)] for rows in data.batches]
    first, true = known(data.batches[0][: SHORT[0]])
    return _in_turn(
        lambda: step([(first.cut(SHORT[1]), true)]),
        [lambda batch=batch: step(batch) for batch in batches],
    )


def embeddings(folder: str, token_limit: int) -> Step:
    """Sample embeddings as `aam evaluate` and `aam predict` compute them."""
    torch.manual_seed(0)
    data = problem(folder, token_limit)
    encoder, rows = (
        CommunityEncoder(EncoderShape(token_limit=token_limit)),
        np.concatenate(data.batches),
    )

    def embed(rows: np.ndarray) -> dict[str, float]:
        return {"samples": float(len(sample_embeddings(encoder, data.dataset, rows)))}

    return _in_turn(lambda: embed(rows[: SHORT[0]]), [lambda: embed(rows)])


def padded_embeddings(folder: str, token_limit: int) -> Step:
    """The baseline's sample embeddings, batch by batch."""
    torch.manual_seed(0)
    data = problem(folder, token_limit)
    model = PaddedTransformer(token_limit=token_limit).eval()
    batches = [data.padded(rows) for rows in data.batches]

    @torch.no_grad()
    def embed(batches: list[PaddedBatch]) -> dict[str, float]:
        return {"samples": float(sum(len(model(b.tokens, b.present)[0]) for b in batches))}

    first = data.padded(data.batches[0][: SHORT[0]]).cut(SHORT[1])
    return _in_turn(lambda: embed([first]), [lambda: embed(batches)])


def _in_turn(first: Step, steps: list[Step]) -> Step:
    """The first call warms up; each later one is a step, the next one with the next batch."""
    calls = itertools.chain([first], itertools.cycle(steps))
    return lambda: next(calls)()
