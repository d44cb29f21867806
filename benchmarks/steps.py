"""Whole training steps and inference on real tables: aam's own, and the padded baseline's.

Both see the same samples (or ASVs) in the same order, at the defaults of `aam pretrain`. Distances
are Jaccard's: ours are computed in the step, the baseline gets them for nothing. What is returned
runs a short piece of the work on its first call, to warm up, and goes round the batches from then
on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from aam.commands.pretrain import EPOCHS, FREE_CLADES, LEARNING_RATE
from aam.commands.training import usual_options
from aam.config import OptimizerOptions, PenaltyOptions, RunOptions
from aam.data.clades import Clades
from aam.data.dataset import AsvDataset, SampleDataset
from aam.data.table import FeatureTable, read_table
from aam.data.table_distances import TableDistances
from aam.data.tree import read_tree
from aam.evaluation.outputs import predicted_distances
from aam.learning.batches import Batching, fixed_batches
from aam.learning.loop import Trainer
from aam.learning.losses import CladeLoss, DistanceLoss, Terms
from aam.learning.objective import CladeObjective, Objective, PairObjective, SamplePart, Work
from aam.learning.run import Run
from aam.learning.task import Task
from aam.model import AsvEncoder, CladeHead, EncoderShape, FreeClades, PretrainedModel
from benchmarks.baselines.padded_transformer import (
    Labelled,
    PaddedBatch,
    PaddedEncoder,
    pad_batch,
    padded_profiles,
    training_step,
)

TABLES = {"ibd": "table-rarefied-5000.biom", "oral": "table-rarefied-1000.biom"}
BATCHES = 4  # steps go round these, so that no single batch decides
SHORT = 2, 8  # samples and slots of the run that warms up
Step = Callable[[], dict[str, float]]


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
    def distances(self) -> TableDistances:
        """Those of `--distance jaccard`."""
        return TableDistances(self.table, "jaccard")

    @cached_property
    def batches(self) -> list[np.ndarray]:
        """Rows of each batch."""
        return first_batches(len(self.dataset), self.batch_size)

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
        return pad_batch(packed.tokens, packed.slots, self.token_limit)


problem = lru_cache(Problem)
"""The same problem for every contestant."""


def first_batches(rows: int, size: int) -> list[np.ndarray]:
    """The first batches of an epoch."""
    return fixed_batches(np.arange(rows), size, seed=0)[:BATCHES]


def pair_objective(encoder: AsvEncoder, distances: TableDistances) -> PairObjective:
    """That of `aam pretrain --distance jaccard` at its defaults."""
    pairs = FreeClades(encoder.shape.embedding_dim, FREE_CLADES, abundance=False)
    return PairObjective(encoder, pairs, PenaltyOptions(), DistanceLoss(distances))


def make_trainer(
    objective: Objective,
    dataset: SampleDataset | AsvDataset,
    rows: np.ndarray | None = None,
    seed: int = 0,
    **options: Any,
) -> Trainer:
    """A trainer on the CPU that keeps nothing.

    Args:
        objective: what is learned.
        dataset: samples or ASVs.
        rows: which of them; None: all.
        seed: of order, masks and dropout.
        options: of `OptimizerOptions`.
    """
    rows = np.arange(len(dataset)) if rows is None else rows
    usual = usual_options(OptimizerOptions(**options), EPOCHS, LEARNING_RATE)
    task = SimpleNamespace(
        config=SimpleNamespace(run=RunOptions(output_dir=Path("nowhere"), seed=seed)),
        device=torch.device("cpu"), dataset=dataset, optimizer=usual,
    )  # fmt: skip
    batching = Batching(rows, dataset, objective, usual, task.device, seed)
    return Trainer(cast(Task, task), objective, batching, cast(Run, Unlogged()))


def forward(objective: Objective, work: Work) -> Terms:
    """Every stage of a step once, in one piece; the losses, and the rest of what it tells."""
    found = []
    if work.noisy is not None:
        found.append(objective.asv_losses(work.noisy, work, 0))
    if work.batch is not None:
        slots, counts = work.batch.slots, work.batch.counts
        part = SamplePart(slots, counts, 0, slice(0, len(slots)), work.batch.categories)
        outputs = objective.encode_samples(objective.encode_asvs(work.batch.tokens, 0), part)
        found.append(objective.losses(outputs, work, 0, len(slots)))
    total = torch.stack([one["loss"] for one in found]).sum()
    return {name: value for one in found for name, value in one.items()} | {"loss": total}


class Unlogged:
    """Where the trainer logs when nothing is kept."""

    def log(self, *_: Any) -> None:
        """Forget."""


def pair_step(
    folder: str,
    token_limit: int,
    *,
    batch_size: int = 8,
    recompute: bool = True,
) -> Step:
    """`Trainer.step` of `aam pretrain --distance jaccard` at its defaults, ready to run.

    Args:
        folder: data set.
        token_limit: most ASVs of a sample.
        batch_size: samples a step.
        recompute: what `--no-gradient-checkpointing` turns off.
    """
    torch.manual_seed(0)
    data = problem(folder, token_limit, batch_size)
    objective = pair_objective(AsvEncoder(EncoderShape(), recompute=recompute), data.distances)
    trainer = make_trainer(objective, data.dataset, batch_size=batch_size)
    return _in_turn(trainer.step, data.batches[0][: SHORT[0]], data.batches)


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
        checkpointed: recompute the layers in backward.
        dropout: everywhere.
    """
    data, model = problem(folder, token_limit, batch_size), padded_model(checkpointed, dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def known(rows: np.ndarray) -> Labelled:
        true = torch.from_numpy(data.distances.pairwise(rows)).float()
        return data.padded(rows), true

    batches = [[known(part) for part in np.array_split(rows, parts)] for rows in data.batches]
    first, true = known(data.batches[0][: SHORT[0]])
    return _in_turn(
        lambda batch: training_step(model, optimizer, batch), [(first.cut(SHORT[1]), true)], batches
    )


def padded_model(checkpointed: bool = True, dropout: float = 0.1) -> PretrainedModel:
    """The baseline."""
    torch.manual_seed(0)
    encoder = PaddedEncoder(EncoderShape(dropout=dropout), checkpointed=checkpointed)
    return PretrainedModel(encoder, free_clades=FREE_CLADES)


def clade_step(
    folder: str,
    asvs: int | None = None,
    *,
    padded: bool = False,
    recompute: bool = True,
    dropout: float = 0.1,
    stack: bool = True,
) -> Step:
    """`Trainer.step` of `aam pretrain --tree` at its defaults, ready to run.

    Args:
        folder: data set with a tree, of which every tip is known.
        asvs: of a step; the default's, if not given.
        padded: with the baseline's encoder in the place of ours.
        recompute: what `--no-gradient-checkpointing` turns off.
        dropout: of the stack.
        stack: with the transformer, as in the last third of a run; else the wide path alone.
    """
    torch.manual_seed(0)
    clades = Clades(read_tree(Path(folder) / "tree.nwk"))
    shape = EncoderShape(dropout=dropout)
    encoder = (
        PaddedEncoder(shape, checkpointed=recompute)
        if padded
        else AsvEncoder(shape, recompute=recompute)
    )
    head = CladeHead(shape.embedding_dim, len(clades))
    head.begin_at(torch.from_numpy((clades.stop - clades.start) / len(clades.sequences)))
    objective = CladeObjective(
        encoder, head, PenaltyOptions(), CladeLoss(clades), stack_joins=0.0 if stack else 2.0
    )
    dataset = AsvDataset(clades.sequences, shape.max_bp)
    batches = first_batches(len(dataset), asvs or dataset.default_batch)
    trainer = make_trainer(objective, dataset, batch_size=asvs)
    return _in_turn(trainer.step, batches[0][: SHORT[1]], batches)


def distances(folder: str, token_limit: int) -> Step:
    """Predicted distances of samples, as validation and `aam evaluate` compute them."""
    torch.manual_seed(0)
    data = problem(folder, token_limit)
    model = PretrainedModel(AsvEncoder(EncoderShape()), free_clades=FREE_CLADES)

    def predict(rows: np.ndarray) -> dict[str, float]:
        return {"samples": float(len(predicted_distances(model, data.dataset, rows)))}

    rows = np.concatenate(data.batches)
    return _in_turn(predict, rows[: SHORT[0]], [rows])


def padded_distances(folder: str, token_limit: int) -> Step:
    """The baseline's, its samples encoded batch by batch."""
    data, model = problem(folder, token_limit), padded_model().eval()
    encoder, pairs = model.encoder, model.pairs
    assert isinstance(encoder, PaddedEncoder) and pairs is not None

    @torch.no_grad()
    def predict(batches: list[PaddedBatch]) -> dict[str, float]:
        profiles = torch.cat(
            [
                padded_profiles(pairs, encoder.encode(one.tokens.flatten(0, 1))[0], one.present)
                for one in batches
            ]
        )
        return {"samples": float(len(pairs.distances(profiles, profiles)))}

    first = data.padded(data.batches[0][: SHORT[0]]).cut(SHORT[1])
    return _in_turn(predict, [first], [[data.padded(rows) for rows in data.batches]])


def _in_turn(step: Callable[[Any], dict[str, float]], first: Any, batches: list[Any]) -> Step:
    """The first call warms up; each later one is a step, the next one with the next batch."""
    calls = itertools.chain([first], itertools.cycle(batches))
    return lambda: step(next(calls))
