"""`aam evaluate`: measure a run on samples whose truth is known."""

from __future__ import annotations

import numpy as np

from aam.commands.inputs import attach_distances, read_ids
from aam.config import EvaluateConfig, NucleotideOptions
from aam.data.clades import places_by_tree
from aam.data.dataset import SampleDataset
from aam.data.samples import Samples
from aam.data.texts import Texts, match_names
from aam.data.tree import read_tree
from aam.data.unifrac import Distances, UniFrac
from aam.errors import InputError, log, log_facts, name_some
from aam.evaluation.baselines import EvaluationSubset
from aam.evaluation.loaded import Model, load
from aam.evaluation.outputs import in_units, predict_outputs, predicted_distances
from aam.evaluation.results import (
    Results,
    distance_results,
    membership_results,
    nucleotide_results,
    print_results,
    sample_results,
    target_results,
)
from aam.files import json_text, write_text
from aam.model import Predictor, PretrainedModel


def evaluate(config: EvaluateConfig) -> Results:
    """Run `aam evaluate`; gives the measured numbers, each beside its baselines."""
    model = load(config.model, config.device, config.attn_implementation)
    samples = model.read(
        config.table, config.metadata, sequences=config.sequences,
        rarefy_depth=config.rarefy_depth, allow_missing=config.allow_missing,
    )  # fmt: skip
    if isinstance(model.network, Predictor):
        results = _evaluate_predictor(model, samples, config)
    elif model.network.clades is not None:
        results = _evaluate_tree(model, samples, config)
    else:
        results = _evaluate_pairs(model, samples, config)
    print_results(results)
    if config.output is not None:
        write_text(config.output, json_text({"model": config.model, "results": results}))
        log(f"results: {config.output}")
    return results


def _chosen_rows(samples: Samples, config: EvaluateConfig) -> np.ndarray:
    """The samples to evaluate: those of a file, all, or the run's validation samples."""
    known, path = set(samples.ids), config.ids
    if config.all_samples and path is None:
        return np.arange(len(samples.ids))
    if path is None:
        path = config.model / "validation_ids.txt"
        if not path.is_file():
            raise InputError(f"{path}: no such file; choose samples with --ids or --all-samples")
        if known.isdisjoint(path.read_text(encoding="utf-8").split("\n")):
            raise InputError(
                f"{config.table}: has none of the run's validation samples; choose samples with "
                "--ids or --all-samples"
            )
    return samples.rows(read_ids(path, known))


def _training_rows(samples: Samples, config: EvaluateConfig, rows: np.ndarray) -> np.ndarray:
    """Rows that the baselines may learn from: the run's training samples in this table."""
    path = config.model / "train_ids.txt"
    train = set(path.read_text(encoding="utf-8").split("\n")) if path.is_file() else set()
    both = sorted(train.intersection(samples.ids[row] for row in rows))
    if both:
        log(
            f"warning: {len(both)} of {len(rows)} samples ({name_some(both)}) were trained on: "
            "their numbers are too good"
        )
    return samples.rows([name for name in samples.ids if name in train and name not in both])


def _evaluate_tree(model: Model, samples: Samples, config: EvaluateConfig) -> Results:
    """Distances, Faith PD and memberships by the model beside those by the tree."""
    if config.tree is None:
        raise InputError("evaluate needs --tree for a model that a tree taught: the truth")
    tree = read_tree(config.tree, sequences=config.sequences)
    truth = UniFrac(samples.table, tree, drop_missing=config.drop_missing_tips)
    samples.facts += truth.facts
    dataset = model.dataset(samples)[0]
    subset = _subset(samples, truth, config)
    placer = model.placer
    results = sample_results(placer, subset)
    features = Texts.of(samples.table.feature_ids)
    known = match_names(features, placer.clades.sequences) >= 0
    used = np.unique(samples.table.counts[subset.rows].indices)
    new = features.take(used[~known[used] & (truth.tip_of_column[used] >= 0)])
    places = places_by_tree(tree, placer.clades, new)
    if places is None:
        log(f"{config.tree}: is not the tree of the model: memberships are not compared")
    elif len(new):
        results += membership_results(placer, new, placer.place(new), places)
    return results + _nucleotides(model, subset, dataset)


def _evaluate_pairs(model: Model, samples: Samples, config: EvaluateConfig) -> Results:
    """Distances by the model beside those that it learned from."""
    assert isinstance(model.network, PretrainedModel)
    own = model.description["distance"]
    given = config.tree or config.unifrac_matrix or own == "matrix"
    truth = attach_distances(samples, config, None if given else own, config)
    dataset = model.dataset(samples)[0]
    subset = _subset(samples, truth, config)
    predicted = predicted_distances(model.network, dataset, subset.rows)
    return distance_results(subset, predicted) + _nucleotides(model, subset, dataset)


def _subset(samples: Samples, truth: Distances, config: EvaluateConfig) -> EvaluationSubset:
    """The samples to evaluate, and those that baselines may learn from."""
    rows = _chosen_rows(samples, config)
    train = _training_rows(samples, config, rows)
    log_facts(samples.facts, samples.warnings)
    return EvaluationSubset(samples, truth, rows, train, config.group_column)


def _nucleotides(model: Model, subset: EvaluationSubset, dataset: SampleDataset) -> Results:
    """Masked nucleotides, as many as in the run's own validations."""
    chosen, known = dataset.asvs_of(subset.rows), dataset.asvs_of(subset.train_rows)
    data = model.description["data"]
    options = NucleotideOptions(
        mask_probability=data["mask_probability"], mask_strategy=data["mask_strategy"]
    )
    return nucleotide_results(model.network.encoder, dataset, chosen, dataset, known, options)


def _evaluate_predictor(model: Model, samples: Samples, config: EvaluateConfig) -> Results:
    """Predictions beside the metadata column."""
    if samples.metadata is None:
        raise InputError("evaluate needs --metadata for a fine-tuned model")
    assert isinstance(model.network, Predictor)
    target, source, rows = model.target, samples.metadata.source, _chosen_rows(samples, config)
    truth, values = target.truth(samples.metadata), samples.metadata.text(target.column)
    lost = rows[np.isnan(truth[rows])]
    lacking = [samples.ids[row] for row in lost if values[row] is None]
    unknown = [samples.ids[row] for row in lost if values[row] is not None]
    if unknown:
        raise InputError(
            f"{source}: {len(unknown)} samples ({name_some(unknown)}) have a {target.column!r} "
            "that the model does not know; choose samples with --ids"
        )
    if lacking:
        log(f"dropped: {len(lacking)} samples without {target.column!r} ({name_some(lacking)})")
    rows = rows[np.isfinite(truth[rows])]
    if not len(rows):
        raise InputError(f"{source}: no sample has a value of {target.column!r}")
    train = _training_rows(samples, config, rows)
    dataset, keys = model.dataset(samples)
    log_facts(samples.facts, samples.warnings)
    outputs = predict_outputs(model.network, dataset, rows)
    predicted = in_units(outputs, target, None if keys is None else keys[rows])
    return target_results(target, predicted, truth, samples, train[np.isfinite(truth[train])], rows)
