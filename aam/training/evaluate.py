"""`aam evaluate`: measure a run on samples whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np

from aam.config import DistanceOptions, EvaluateConfig, PenaltyOptions
from aam.data.facts import name_some
from aam.errors import InputError
from aam.model import Predictor
from aam.training import baselines, metrics
from aam.training.checkpoint import load_model, write_text
from aam.training.evaluation import (
    check_nucleotides,
    distance_metrics,
    predict_outputs,
    predicted_distances,
    sample_embeddings,
    target_metrics,
)
from aam.training.predict import covariates_as_trained, samples_as_trained
from aam.training.predictions import in_units
from aam.training.prepare import Samples, attach_distances, make_dataset, read_ids, tell
from aam.training.pretrain import CHECK_SEED
from aam.training.results import print_results, result
from aam.training.runs import check_file_output, json_text, say
from aam.training.setup import pick_device
from aam.training.targets import TargetInfo


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Run `aam evaluate`.

    Returns:
        The measured numbers, each beside its baselines.
    """
    if config.output is not None:
        check_file_output(config.output, config.overwrite)
    model, described = load_model(config.model, impl=config.attn_implementation)
    model.to(pick_device(config.device, config.attn_implementation))
    samples, options = samples_as_trained(config, described, config.metadata)
    if isinstance(model, Predictor):
        results = _evaluate_predictor(model, described, samples, options, config)
    else:
        results = _evaluate_encoder(model, described, samples, options, config)
    print_results(results)
    if config.output is not None:
        write_text(config.output, json_text({"model": config.model, "results": results}))
        say(f"results: {config.output}")
    return results


def chosen_ids(samples: Samples, config: EvaluateConfig) -> tuple[str, ...]:
    """The samples to evaluate: those of a file, all, or the run's validation samples."""
    known = set(samples.ids)
    if config.ids is not None:
        return read_ids(config.ids, known)
    if config.all_samples:
        return samples.ids
    path = config.model / "validation_ids.txt"
    if not path.is_file():
        raise InputError(f"{path}: no such file; choose samples with --ids or --all-samples")
    return read_ids(path, known)


def training_rows(samples: Samples, config: EvaluateConfig, chosen: tuple[str, ...]) -> np.ndarray:
    """Rows that the baselines may learn from: the run's training samples in this table."""
    path = config.model / "train_ids.txt"
    if not path.is_file():
        return np.empty(0, dtype=np.int64)
    train = set(path.read_text(encoding="utf-8").split("\n"))
    both = sorted(train & set(chosen))
    if both:
        say(
            f"warning: {len(both)} of {len(chosen)} samples ({name_some(both)}) were trained on: "
            "their numbers are too good"
        )
    return samples.rows([name for name in samples.ids if name in train and name not in both])


def _evaluate_encoder(
    model: Any, described: dict[str, Any], samples: Samples, options: Any, config: EvaluateConfig
) -> list[dict[str, Any]]:
    metric = described["metric"]
    if metric == "faith-pd":
        raise InputError(f"{config.model}: learned Faith PD; evaluate measures distances")
    distances = attach_distances(
        samples,
        options,
        DistanceOptions(
            tree=config.tree,
            unifrac_metric=metric,
            unifrac_matrix=config.unifrac_matrix,
            unifrac_matrix_ids=config.unifrac_matrix_ids,
            drop_missing_tips=config.drop_missing_tips,
        ),
    )
    dataset = make_dataset(samples, options)
    ids = chosen_ids(samples, config)
    train = training_rows(samples, config, ids)
    tell(samples.facts, samples.warnings)
    rows = samples.rows(ids)
    true = distances.pairwise(rows)
    predicted = predicted_distances(model, sample_embeddings(model, dataset, rows))
    measured = distance_metrics(predicted, true)
    groups = samples.groups(config.group_column)
    simple: dict[str, Any] = {}
    if len(train):
        simple = baselines.distance_baselines(
            samples.table.counts,
            distances.pairwise,
            train,
            rows,
            groups=groups,
            sequences=samples.table.feature_ids,
            seed=CHECK_SEED,
        )
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
        between = metrics.mantel_r(predicted, true, groups=[groups[row] for row in rows])
        own = {n: b.r_between for n, b in simple.items()}
        results.insert(1, result("Mantel r between groups", between, own))
    return [*results, _nucleotides(model, dataset, rows, train)]


def _nucleotides(model: Any, dataset: Any, rows: np.ndarray, train: np.ndarray) -> dict[str, Any]:
    """Masked-nucleotide accuracy beside the training part's consensus."""
    check = check_nucleotides(
        model, dataset, dataset.asvs_of(rows), PenaltyOptions(), seed=CHECK_SEED
    )
    simple: dict[str, float | None] = {}
    if len(train):
        seen = dataset.sequences_of(dataset.asvs_of(train))
        consensus = baselines.consensus_bases(seen)
        simple["consensus"] = baselines.consensus_accuracy(consensus, check.positions, check.bases)
    return result("masked-nucleotide accuracy", check.accuracy, simple)


def _evaluate_predictor(
    model: Predictor,
    described: dict[str, Any],
    samples: Samples,
    options: Any,
    config: EvaluateConfig,
) -> list[dict[str, Any]]:
    if samples.metadata is None:
        raise InputError("evaluate needs --metadata for a fine-tuned model")
    target = TargetInfo.from_dict(described["target"])
    wanted = set(chosen_ids(samples, config))
    values = samples.metadata.text(target.column)
    lacking = [n for n, v in zip(samples.ids, values, strict=True) if n in wanted and v is None]
    unknown = [
        n
        for n, v in zip(samples.ids, values, strict=True)
        if n in wanted and target.classes and v is not None and v not in target.classes
    ]
    if unknown:
        raise InputError(
            f"{samples.metadata.source}: {len(unknown)} samples ({name_some(unknown)}) have a "
            f"{target.column!r} that the model does not know; choose samples with --ids"
        )
    if lacking:
        say(f"dropped: {len(lacking)} samples without {target.column!r} ({name_some(lacking)})")
    ids = tuple(n for n in samples.ids if n in wanted and n not in set(lacking))
    if not ids:
        raise InputError(f"{samples.metadata.source}: no sample has a value of {target.column!r}")
    train = training_rows(samples, config, ids)
    dataset, keys = covariates_as_trained(samples, options, described, target)
    tell(samples.facts, samples.warnings)
    rows = samples.rows(ids)
    outputs = predict_outputs(model, dataset, rows)
    own = None if keys is None else [keys[row] for row in rows]
    predicted = in_units(outputs, target, own)
    truth = _truth(samples, target)
    measured = target_metrics(predicted, truth[rows], len(target.classes))
    train = train[np.isfinite(truth[train])]
    simple: dict[str, dict[str, float | None]] = {}
    if len(train):
        simple = baselines.target_baselines(
            samples.table.counts,
            truth if not target.classes else np.nan_to_num(truth, nan=-1).astype(np.int64),
            train,
            rows,
            kind=target.kind,
            number_of_classes=len(target.classes) or None,
        )
    return [
        result(
            f"{target.column} {name}", value, simple.get(name, {}), higher_is_better=name != "mae"
        )
        for name, value in measured.items()
    ]


def _truth(samples: Samples, target: TargetInfo) -> np.ndarray:
    """True values or class codes of all samples as float64; NaN where missing or unknown."""
    assert samples.metadata is not None
    if not target.classes:
        return samples.metadata.numeric(target.column)
    code = {name: float(i) for i, name in enumerate(target.classes)}
    return np.array(
        [code.get(value or "", np.nan) for value in samples.metadata.text(target.column)]
    )
