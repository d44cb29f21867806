"""`aam evaluate`: measure a run on samples whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np

from aam.commands.inputs import attach_distances, attach_tree, read_ids
from aam.commands.predict import covariates_as_trained, samples_as_trained
from aam.config import (
    DistanceOptions,
    EvaluateConfig,
    MetadataOptions,
    NucleotideOptions,
    TableOptions,
)
from aam.data.clades import places_by_tree
from aam.data.dataset import SampleDataset
from aam.data.samples import Samples, make_dataset
from aam.data.texts import Texts, match_names
from aam.data.tree import read_tree
from aam.errors import InputError, log, log_facts, name_some
from aam.evaluation import baselines
from aam.evaluation.applicability import add_applicability
from aam.evaluation.measurements import distance_results, nucleotide_results
from aam.evaluation.outputs import predict_outputs, predicted_distances, target_metrics
from aam.evaluation.placer import Placer
from aam.evaluation.predictions import in_units
from aam.evaluation.results import print_results, result
from aam.evaluation.tree_results import EvaluationSubset, membership_results, sample_results
from aam.files import json_text, write_text
from aam.learning.device import pick_device
from aam.learning.model_file import SavedModel, read_model
from aam.learning.targets import TargetInfo
from aam.model import AsvEncoder, Predictor, PretrainedModel


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Run `aam evaluate`.

    Returns:
        The measured numbers, each beside its baselines.
    """
    saved = read_model(config.model)
    model, described = saved.build(impl=config.attn_implementation), saved.description
    model.to(pick_device(config.device, config.attn_implementation))
    samples, options = samples_as_trained(config, described, config.metadata)
    add_applicability(samples, saved)
    if isinstance(model, Predictor):
        results = _evaluate_predictor(model, described, samples, options, config)
    elif model.clades is not None:
        results = _evaluate_tree(saved, model, samples, options, config)
    else:
        results = _evaluate_pairs(model, described, samples, options, config)
    print_results(results)
    if config.output is not None:
        write_text(config.output, json_text({"model": config.model, "results": results}))
        log(f"results: {config.output}")
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
    if known.isdisjoint(path.read_text(encoding="utf-8").split("\n")):
        raise InputError(
            f"{config.table}: has none of the run's validation samples; choose samples with --ids "
            "or --all-samples"
        )
    return read_ids(path, known)


def training_rows(samples: Samples, config: EvaluateConfig, chosen: tuple[str, ...]) -> np.ndarray:
    """Rows that the baselines may learn from: the run's training samples in this table."""
    path = config.model / "train_ids.txt"
    if not path.is_file():
        return np.empty(0, dtype=np.int64)
    train = set(path.read_text(encoding="utf-8").split("\n"))
    both = sorted(train & set(chosen))
    if both:
        log(
            f"warning: {len(both)} of {len(chosen)} samples ({name_some(both)}) were trained on: "
            "their numbers are too good"
        )
    return samples.rows([name for name in samples.ids if name in train and name not in both])


def _evaluate_tree(
    saved: SavedModel,
    model: PretrainedModel,
    samples: Samples,
    options: TableOptions,
    config: EvaluateConfig,
) -> list[dict[str, Any]]:
    """Distances, Faith PD and memberships by the model beside those by the tree."""
    if config.tree is None:
        raise InputError("evaluate needs --tree for a model that a tree taught: the truth")
    tree = read_tree(config.tree, sequences=config.sequences)
    truth = attach_tree(samples, tree, config.drop_missing_tips)
    ids = chosen_ids(samples, config)
    train = training_rows(samples, config, ids)
    log_facts(samples.facts, samples.warnings)
    placer = Placer.of(saved, model)
    rows = samples.rows(ids)
    metadata = MetadataOptions(group_column=config.group_column)
    results = sample_results(placer, EvaluationSubset(samples, truth, rows, train, metadata))
    known = match_names(samples.table.feature_ids, placer.clades.sequences) >= 0
    used = np.unique(samples.table.counts[rows].indices)
    new = [one for one in used if not known[one] and truth.tip_of_column[one] >= 0]
    sequences = Texts.of(samples.table.feature_ids).take(np.array(new, dtype=np.int64))
    places = places_by_tree(tree, placer.clades, sequences)
    if places is None:
        log(f"{config.tree}: is not the tree of the model: memberships are not compared")
    elif len(new):
        results += membership_results(placer, placer.place(sequences), places)
    dataset = make_dataset(samples, options)
    return results + _nucleotides(model.encoder, dataset, rows, train)


def _evaluate_pairs(
    model: PretrainedModel,
    described: dict[str, Any],
    samples: Samples,
    options: TableOptions,
    config: EvaluateConfig,
) -> list[dict[str, Any]]:
    """Distances by the model beside those that it learned from."""
    own = None if described["distance"] == "matrix" else described["distance"]
    distances = attach_distances(
        samples,
        options,
        DistanceOptions(
            tree=config.tree,
            unifrac_matrix=config.unifrac_matrix,
            unifrac_matrix_ids=config.unifrac_matrix_ids,
            distance=None if config.tree or config.unifrac_matrix else own,
            drop_missing_tips=config.drop_missing_tips,
        ),
    )
    dataset = make_dataset(samples, options)
    ids = chosen_ids(samples, config)
    train = training_rows(samples, config, ids)
    log_facts(samples.facts, samples.warnings)
    rows = samples.rows(ids)
    results = distance_results(
        samples,
        distances.pairwise,
        predicted_distances(model, dataset, rows),
        distances.pairwise(rows),
        train,
        rows,
        samples.groups(config.group_column),
    )
    return results + _nucleotides(model.encoder, dataset, rows, train)


def _nucleotides(
    encoder: AsvEncoder, dataset: SampleDataset, rows: np.ndarray, train: np.ndarray
) -> list[dict[str, Any]]:
    """Masked-nucleotide accuracy beside the training part's consensus."""
    judged, known = dataset.asvs_of(rows), dataset.asvs_of(train)
    return nucleotide_results(encoder, dataset, judged, dataset, known, NucleotideOptions())


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
        log(f"dropped: {len(lacking)} samples without {target.column!r} ({name_some(lacking)})")
    ids = tuple(n for n in samples.ids if n in wanted and n not in set(lacking))
    if not ids:
        raise InputError(f"{samples.metadata.source}: no sample has a value of {target.column!r}")
    train = training_rows(samples, config, ids)
    dataset, keys = covariates_as_trained(samples, options, described, target)
    log_facts(samples.facts, samples.warnings)
    rows = samples.rows(ids)
    outputs = predict_outputs(model, dataset, rows)
    own = None if keys is None else [keys[row] for row in rows]
    predicted = in_units(outputs, target, own)
    truth = target.truth(samples.metadata)
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
