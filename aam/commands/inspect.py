"""`aam inspect`: what is in the files, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from aam.commands.inputs import attach_distances, split
from aam.commands.pretrain import FREE_CLADES
from aam.config import InspectConfig, OptimizerOptions, PenaltyOptions
from aam.data.dataset import SampleDataset
from aam.data.samples import Samples, read_samples
from aam.data.table_distances import TableDistances
from aam.errors import InputError, log, log_facts
from aam.evaluation.applicability import add_applicability
from aam.evaluation.metrics import condensed
from aam.learning.batches import Batching, fixed_batches
from aam.learning.device import pick_device
from aam.learning.distributed import RankGroup
from aam.learning.losses import DistanceLoss
from aam.learning.meter import GB
from aam.learning.model_file import read_model
from aam.learning.objective import PairObjective
from aam.learning.optimizer import make_optimizer
from aam.learning.step import Step
from aam.model import AsvEncoder, EncoderShape, PretrainedModel

LOOKED_AT = 200  # batches, and samples whose distances are described

Rows = dict[str, str]


def inspect(config: InspectConfig) -> None:
    """Run `aam inspect`; prints on standard output, writes nothing."""
    from rich.console import Console
    from rich.table import Table

    samples = read_samples(config.data, config.seed, metadata=config.metadata.metadata)
    found: Rows = {}
    labels = None
    if config.metadata_column is not None:
        labels = _describe_target(found, samples, config.metadata_column)
    given = config.distances
    if given.tree or given.unifrac_matrix or given.distance:
        distances = attach_distances(samples, given, given.distance, config.data)
        rows = np.random.default_rng(0).permutation(len(samples.ids))[:LOOKED_AT]
        values = condensed(distances.pairwise(np.sort(rows)))
        found["true distances"] = f"mean {values.mean():.3f}, sd {values.std():.3f}"
    dataset = samples.dataset(config.data)
    if config.model is not None:
        add_applicability(samples, read_model(config.model))
    parts = split(samples, config.metadata, config.seed, labels=labels)
    found["training / validation samples"] = f"{len(parts.train)} / {len(parts.validation)}"
    log_facts(samples.facts, samples.warnings)
    plan = _plan(found, samples, dataset, samples.rows(parts.train), config)
    _describe_cost(found, dataset, plan, config.data.token_limit)
    table = Table("what", "value")
    for row in found.items():
        table.add_row(*row)
    Console(highlight=False).print(table)


def _describe_target(found: Rows, samples: Samples, column: str) -> list[str] | None:
    """Kind and values of the target; its classes as labels for the split."""
    if samples.metadata is None:
        raise InputError("--metadata-column needs --metadata")
    labels = samples.keep_with(column, "auto", allow_missing=True)
    if labels is None:
        numbers = samples.metadata.numeric(column)
        found[f"target {column!r}"] = (
            f"number, mean {numbers.mean():.4g}, sd {numbers.std():.4g}, "
            f"{numbers.min():.4g} to {numbers.max():.4g}"
        )
        return None
    sizes = ", ".join(f"{name} {size}" for name, size in sorted(Counter(labels).items()))
    found[f"target {column!r}"] = f"classes: {sizes}"
    return labels


def _plan(
    found: Rows, samples: Samples, dataset: SampleDataset, rows: np.ndarray, config: InspectConfig
) -> Sequence[np.ndarray]:
    """The rows of each step of the first epoch; says what they take where a memory is given."""
    if config.max_memory_gb is None and config.max_memory_fraction is None:
        size = config.batch_size or min(dataset.default_batch, len(rows))
        return fixed_batches(rows, size, config.seed)
    options = OptimizerOptions(
        batch_size=config.batch_size,
        max_memory_gb=config.max_memory_gb,
        max_memory_fraction=config.max_memory_fraction,
    )
    device = pick_device("auto")
    encoder = AsvEncoder(EncoderShape(max_bp=config.data.max_bp))
    model = PretrainedModel(encoder, free_clades=FREE_CLADES, abundance=True)
    assert model.pairs is not None
    distances = TableDistances(samples.table, "jaccard")  # a step takes as much by any others
    objective = PairObjective(encoder, model.pairs, PenaltyOptions(), DistanceLoss(distances))
    objective.to(device).train()
    batching = Batching(rows, dataset, objective, options, device, config.seed)
    optimizer = make_optimizer(objective, lr=0.0, weight_decay=0.0)
    step = Step(objective, RankGroup())

    def compute(rows: np.ndarray, micro_batches: int) -> dict[str, float]:
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(config.seed)
        return step(dataset.batch(rows).to(device), micro_batches)

    log("measuring what steps of samples take, at the default options")
    batching.prepare(compute)
    plan = batching.batches(0)
    _describe_memory(found, batching, plan)
    return plan


def _describe_memory(found: Rows, batching: Batching, plan: Sequence[np.ndarray]) -> None:
    """Memory of a plan's steps."""
    costs, budget = batching.costs, batching.budget
    assert costs
    sizes = [batching.contents.size(one) for one in plan]
    counts = [batching.micro_batches(one) for one in sizes]
    peaks = [costs.predict(size.split(n)) for size, n in zip(sizes, counts, strict=True)]
    mean, most = (f"{one / GB:.2f} GB ({one / budget:.0%})" for one in (np.mean(peaks), max(peaks)))
    before = f"{costs.constant / GB:.2f} GB before a step"
    found["memory to fill"] = f"{budget / GB:.2f} GB, of which {before}"
    found["predicted peak of a step"] = f"mean {mean}, most {most}"
    found["error of the prediction"] = f"{costs.margin:.1%} kept free, by measured steps"
    if (cut := sum(n > 1 for n in counts)) > 0:
        found["steps in micro-batches"] = f"{cut} of {len(counts)}, most {max(counts)}"


def _describe_cost(
    found: Rows, dataset: SampleDataset, plan: Sequence[np.ndarray], limit: int
) -> None:
    """Lengths, shared ASVs and what a step computes."""
    count, lengths = dataset.asv_count, dataset.sequence_lengths - 1
    found["ASVs a sample"] = f"mean {count.mean():.0f}, most {count.max()}"
    found["nucleotides an ASV"] = f"{lengths.min()} to {lengths.max()}, mean {lengths.mean():.0f}"
    sizes = np.array([len(one) for one in plan])
    found["steps an epoch"] = str(len(plan))
    found["samples a step"] = f"{sizes.min()} to {sizes.max()}, mean {sizes.mean():.1f}"
    batches = [dataset.batch(one) for one in plan[:LOOKED_AT]]
    slots, distinct, tokens = np.array(
        [(len(one.slots.values), len(one.asv_ids), len(one.tokens.values)) for one in batches]
    ).T
    share = f"mean {distinct.mean():.0f} of {slots.mean():.0f} slots"
    found["distinct ASVs a step"] = f"{share} (share {distinct.sum() / slots.sum():.2f})"
    found["nucleotides a step"] = f"mean {tokens.mean():,.0f}, most {tokens.max():,}"
    padded = sizes[:LOOKED_AT].mean() * limit
    avoided = f"{1 - slots.mean() / padded:.0%} of {padded:,.0f} slots (--token-limit {limit})"
    found["padding avoided"] = avoided
