"""`aam pretrain`: learn sample embeddings from UniFrac distances and masked nucleotides."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aam.config import PretrainConfig
from aam.data.dataset import SampleDataset
from aam.data.phylogeny import UniFrac
from aam.errors import InputError
from aam.model import CommunityEncoder
from aam.model.encoder import EncoderShape
from aam.training import baselines, metrics
from aam.training.evaluation import (
    check_nucleotides,
    distance_metrics,
    predicted_distances,
    sample_embeddings,
)
from aam.training.exchange import Exchange
from aam.training.losses import DistanceLoss, FaithLoss
from aam.training.objectives import PretrainObjective
from aam.training.prepare import (
    Samples,
    attach_distances,
    data_description,
    judged_rows,
    make_dataset,
    read_samples,
    split,
    tell,
)
from aam.training.results import print_results, result
from aam.training.resume import check_same_data, compatible_state, fingerprint
from aam.training.runs import Run, check_output, say
from aam.training.setup import make_fabric
from aam.training.train_and_report import train_and_report

CALIBRATION_SAMPLES = 64  # samples that set the distance scale
MODE_SAMPLES = 48  # training samples whose distances are compared in train and eval mode
MODE_TOLERANCE = 0.02  # difference of mean distances that is worth a warning
VALIDATION_ASVS = 2000  # sequences whose masked nucleotides are checked at each validation
LISTED_PAIRS = 100_000  # most validation pairs written to distances.tsv
CHECK_SEED = 20_231


@dataclass
class Task:
    """Everything that validation and the final measurements look at."""

    encoder: CommunityEncoder
    dataset: SampleDataset
    distances: Any
    faith: FaithLoss | None
    train_rows: np.ndarray
    validation_rows: np.ndarray
    config: PretrainConfig

    def validate(self) -> dict[str, float | None]:
        """Validation metrics of the current weights, in evaluation mode; all ranks call it."""
        measured: dict[str, float | None] = {}
        penalties, exchange = self.config.losses, Exchange()
        if penalties.unifrac_penalty:
            z = sample_embeddings(self.encoder, self.dataset, self.validation_rows, exchange)
            if self.faith is not None:
                measured |= self.faith_metrics(z)
            else:
                measured |= distance_metrics(
                    predicted_distances(self.encoder, z),
                    self.distances.pairwise(self.validation_rows),
                )
        if penalties.nucleotide_penalty:
            check = check_nucleotides(
                self.encoder,
                self.dataset,
                self.validation_asvs(),
                penalties,
                seed=CHECK_SEED,
                exchange=exchange,
            )
            measured |= {"nucleotide_loss": check.loss, "nucleotide_accuracy": check.accuracy}
        weights = {
            "unifrac_loss": penalties.unifrac_penalty,
            "nucleotide_loss": penalties.nucleotide_penalty,
        }
        total = sum(weight * (measured.get(name) or 0.0) for name, weight in weights.items())
        return {"loss": total, **measured}

    def faith_metrics(self, z: torch.Tensor) -> dict[str, float | None]:
        """Metrics of predicted Faith PD, in the tree's units."""
        assert self.faith is not None
        with torch.no_grad():
            scaled = self.encoder.unifrac_encoder.faith_head(z)[:, 0].cpu().double().numpy()
        predicted = scaled * self.faith.deviation + self.faith.mean
        true = self.faith.values[self.validation_rows]
        return {
            "unifrac_loss": float((((predicted - true) / self.faith.deviation) ** 2).mean()),
            "faith_pd_r2": metrics.r2(predicted, true),
            "faith_pd_mae": metrics.mean_absolute_error(predicted, true),
        }

    def validation_asvs(self, most: int = VALIDATION_ASVS) -> np.ndarray:
        """Distinct ASVs of the validation samples, the same ones every time."""
        asv_ids = self.dataset.asvs_of(self.validation_rows)
        if len(asv_ids) <= most:
            return asv_ids
        return np.sort(np.random.default_rng(CHECK_SEED).choice(asv_ids, most, replace=False))


def pretrain(config: PretrainConfig) -> Path:
    """Run `aam pretrain`.

    Returns:
        The run folder.
    """
    started = time.time()
    check_output(config.run)
    state = compatible_state(config)
    fabric = make_fabric(config.run)
    device = fabric.device
    samples = read_samples(config.data, config.run.seed, metadata=config.metadata.metadata)
    if not (config.losses.unifrac_penalty or config.losses.nucleotide_penalty):
        raise InputError("--unifrac-penalty and --nucleotide-penalty are both 0: nothing to learn")
    distances = None
    if config.losses.unifrac_penalty:
        distances = attach_distances(samples, config.data, config.distances)
    parts = split(samples, config.metadata, config.run.seed)
    dataset = make_dataset(samples, config.data).to(device)
    validation_rows = judged_rows(samples, parts)
    tell(samples)
    train_rows = samples.rows(parts.train)
    near = None if distances is None else distances.pairwise(train_rows[:16])
    description = {
        "command": "pretrain",
        "data": data_description(config),
        "metric": config.distances.unifrac_metric,
        "fingerprint": fingerprint(samples.table, parts, near),
    }
    check_same_data(state, config, description)

    torch.manual_seed(config.run.seed)
    impl, recompute = config.run.attn_implementation, config.run.gradient_checkpointing
    encoder = CommunityEncoder(encoder_shape(config), impl=impl, recompute=recompute).to(device)
    faith = make_faith_loss(config, distances, len(samples.ids), train_rows)
    task = Task(encoder, dataset, distances, faith, train_rows, validation_rows, config)
    if distances is not None and faith is None and state is None:
        calibrate(task)
    unifrac = faith or make_distance_loss(config, distances, dataset)
    return train_and_report(
        config,
        fabric,
        state,
        PretrainObjective(encoder, config.losses, unifrac),
        encoder,
        dataset,
        samples,
        parts,
        validate=task.validate,
        best_metric=default_metric(config),
        description=description,
        write_results=lambda run, summary: write_results(run, task, samples, summary),
        started=started,
    )


def encoder_shape(config: PretrainConfig) -> EncoderShape:
    """The encoder that the options ask for."""
    return EncoderShape(
        **asdict(config.model), max_bp=config.data.max_bp, token_limit=config.data.token_limit
    )


def make_distance_loss(
    config: PretrainConfig, distances: Any, dataset: SampleDataset
) -> DistanceLoss | None:
    """The distance loss, with mixtures where a tree knows their distances."""
    if distances is None:
        return None
    if not isinstance(distances, UniFrac):
        if config.mixed_samples:
            say("no mixed samples: their distances need --tree, --unifrac-matrix has none")
        return DistanceLoss(distances)
    return DistanceLoss(distances, mixtures=config.mixed_samples, columns=dataset.columns)


def make_faith_loss(
    config: PretrainConfig, distances: Any, count: int, train_rows: np.ndarray
) -> FaithLoss | None:
    """The Faith PD loss, where that is the metric."""
    if config.distances.unifrac_metric != "faith-pd" or distances is None:
        return None
    values = distances.faith_pd(np.arange(count))
    own = values[train_rows]
    return FaithLoss(values, float(own.mean()), float(own.std()) or 1.0)


def default_metric(config: PretrainConfig) -> str:
    """The validation metric that chooses the best weights."""
    if not config.losses.unifrac_penalty:
        return "nucleotide_accuracy"
    return "faith_pd_r2" if config.distances.unifrac_metric == "faith-pd" else "mantel_r"


def calibrate(task: Task) -> None:
    """Set the distance scale so that the mean prediction is the mean distance."""
    order = np.random.default_rng(CHECK_SEED).permutation(task.train_rows)
    rows = np.sort(order[:CALIBRATION_SAMPLES])
    z = sample_embeddings(task.encoder, task.dataset, rows)
    true = metrics.condensed(task.distances.pairwise(rows))
    task.encoder.unifrac_encoder.calibrate(z, float(true.mean()))


def write_results(run: Run, task: Task, samples: Samples, summary: dict[str, Any]) -> None:
    """Final measurements beside their baselines: tables, summary, and a printed table."""
    config = task.config
    results: list[dict[str, Any]] = []
    if config.losses.unifrac_penalty:
        z = sample_embeddings(task.encoder, task.dataset, task.validation_rows)
        header = ["sample-id", "part", *(f"e{i}" for i in range(z.shape[1]))]
        ids = [samples.ids[row] for row in task.validation_rows]
        rows = (
            [name, "validation", *map(repr, one)] for name, one in zip(ids, z.tolist(), strict=True)
        )
        run.write_table("embeddings.tsv", header, rows)
        if task.faith is not None:
            results += faith_results(task.faith_metrics(z), task)
        else:
            groups = samples.groups(config.metadata.group_column)
            predicted = predicted_distances(task.encoder, z)
            true = task.distances.pairwise(task.validation_rows)
            own = None if groups is None else [groups[row] for row in task.validation_rows]
            write_pairs(run, ids, true, predicted, own)
            results += distance_results(task, samples, predicted, true, groups)
            summary["distance_check"] = mode_check(task, summary["warnings"])
    if config.losses.nucleotide_penalty:
        results += nucleotide_results(task)
    summary["results"] = results
    run.write_summary(summary)
    print_results(results)


def write_pairs(
    run: Run, ids: list[str], true: np.ndarray, predicted: np.ndarray, groups: list[str] | None
) -> None:
    """Write validation pairs (all, or those of the first samples if they are too many)."""
    count = len(ids)
    while count * (count - 1) // 2 > LISTED_PAIRS:
        count -= 1
    rows = (
        [
            ids[i],
            ids[j],
            repr(float(true[i, j])),
            repr(float(predicted[i, j])),
            "" if groups is None else int(groups[i] == groups[j]),
        ]
        for i in range(count)
        for j in range(i + 1, count)
    )
    run.write_table(
        "distances.tsv", ["sample_a", "sample_b", "true", "predicted", "same_group"], rows
    )


def distance_results(
    task: Task,
    samples: Samples,
    predicted: np.ndarray,
    true: np.ndarray,
    groups: list[str] | None,
) -> list[dict[str, Any]]:
    """Mantel r and mean absolute error beside the simple distances."""
    simple = baselines.distance_baselines(
        samples.table.counts,
        task.distances.pairwise,
        task.train_rows,
        task.validation_rows,
        groups=groups,
        sequences=samples.table.feature_ids,
        seed=CHECK_SEED,
    )
    measured = distance_metrics(predicted, true)
    results = [
        result("Mantel r", measured["mantel_r"], {n: b.r for n, b in simple.items()}),
        result(
            "distance MAE",
            measured["distance_mae"],
            {n: b.mae for n, b in simple.items()},
            higher_is_better=False,
        ),
    ]
    if groups is not None:
        own = [groups[row] for row in task.validation_rows]
        between = metrics.mantel_r(predicted, true, groups=own)
        results.insert(
            1,
            result("Mantel r between groups", between, {n: b.r_between for n, b in simple.items()}),
        )
    return results


def faith_results(measured: dict[str, float | None], task: Task) -> list[dict[str, Any]]:
    """Faith PD beside the mean of the training part."""
    assert task.faith is not None
    true = task.faith.values[task.validation_rows]
    constant = np.full_like(true, task.faith.mean)
    mean = {"mean": metrics.mean_absolute_error(constant, true)}
    return [
        result("Faith PD R2", measured["faith_pd_r2"], {"mean": metrics.r2(constant, true)}),
        result("Faith PD MAE", measured["faith_pd_mae"], mean, higher_is_better=False),
    ]


def nucleotide_results(task: Task) -> list[dict[str, Any]]:
    """Masked-nucleotide accuracy beside the per-position consensus of the training part."""
    asv_ids = task.validation_asvs(most=len(task.dataset.sequences))
    seen_ids = task.dataset.asvs_of(task.train_rows)
    consensus = baselines.consensus_bases(task.dataset.sequences_of(seen_ids))
    seen = np.isin(asv_ids, seen_ids)
    results = []
    parts = (
        ("masked-nucleotide accuracy", asv_ids),
        ("masked-nucleotide accuracy, ASVs not in training", asv_ids[~seen]),
    )
    for name, chosen in parts:
        if not len(chosen):
            continue
        check = check_nucleotides(
            task.encoder, task.dataset, chosen, task.config.losses, seed=CHECK_SEED
        )
        simple = baselines.consensus_accuracy(consensus, check.positions, check.bases)
        results.append(result(name, check.accuracy, {"consensus": simple}))
    return results


def mode_check(task: Task, warnings: list[str]) -> dict[str, Any]:
    """Mean and spread of predicted distances in train and eval mode, beside the true ones.

    Whatever is random and differs between samples can be used as distance in training: then the
    two modes disagree, and a warning says so.
    """
    order = np.random.default_rng(CHECK_SEED).permutation(task.train_rows)
    rows = np.sort(order[:MODE_SAMPLES])
    encoder = task.encoder
    device = next(encoder.parameters()).device
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(CHECK_SEED)
        encoder.train()
        batch = task.dataset.batch(rows).to(device)
        vectors = encoder.encode_asvs(batch.tokens, dropout=False)
        z = encoder.embed(vectors, batch.slots, batch.counts)
        in_training = predicted_distances(encoder, z)
    in_evaluation = predicted_distances(encoder, sample_embeddings(encoder, task.dataset, rows))
    check = {
        "train_mode": metrics.mean_and_sd(in_training),
        "eval_mode": metrics.mean_and_sd(in_evaluation),
        "true": metrics.mean_and_sd(task.distances.pairwise(rows)),
    }
    if abs(check["train_mode"]["mean"] - check["eval_mode"]["mean"]) > MODE_TOLERANCE:
        warnings.append(
            "distances predicted in training mode and in evaluation mode disagree: "
            f"mean {check['train_mode']['mean']:.3f} and {check['eval_mode']['mean']:.3f}; "
            "the losses of training do not say what the model predicts"
        )
    return check
