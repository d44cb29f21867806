"""`aam pretrain`: learn the clades of a tree, or distances between samples, and nucleotides."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array

from aam.commands.inputs import (
    attach_distances,
    attach_tree,
    data_description,
    evaluation_rows,
    split,
)
from aam.commands.pretrain_pairs import PairTask, write_pair_results
from aam.commands.pretrain_tree import (
    LEFT_OUT,
    STACK_JOINS,
    TreeTask,
    calibration_tips,
    placed_rows,
    read_reference,
    split_by_samples,
    tree_options,
    write_tree_results,
)
from aam.commands.train_and_report import Job, train_and_report, usual_options
from aam.config import PretrainConfig, TableOptions
from aam.data.clades import MOST_CLADES, Clades, TreeSplit, known_arrays
from aam.data.dataset import AsvDataset
from aam.data.embedding import COMMUNITIES
from aam.data.samples import make_dataset, read_samples
from aam.data.splits import Split
from aam.data.texts import Texts, match_names
from aam.data.tree import read_tree
from aam.errors import DataFact, InputError, log_facts
from aam.evaluation import metrics
from aam.evaluation.tree_results import EvaluationSubset
from aam.learning.launch import start
from aam.learning.losses import CladeLoss, DistanceLoss
from aam.learning.objective import CladeObjective, PairObjective
from aam.learning.resume import compatible_state, fingerprint
from aam.learning.run import check_output
from aam.model import AsvEncoder, EncoderShape, PretrainedModel

FREE_CLADES = 512
PAIR_EPOCHS, PAIR_LEARNING_RATE = 40, 1e-3  # of distances, where none are given
UNIT_SAMPLES = 64  # whose distances say what a distance of 1 is
USUAL_DISTANCE = 0.7  # of two samples, in units of the largest


def pretrain(config: PretrainConfig) -> Path:
    """Run `aam pretrain`.

    Returns:
        The run folder.
    """
    started = time.time()
    check_output(config.run)
    check_options(config)
    state = compatible_state(config)
    device = start(config.run)
    torch.manual_seed(config.run.seed)
    if config.data.table is None:
        job = reference_job(config, device)
    elif config.distances.tree is not None:
        job = tree_job(config, device)
    else:
        job = pair_job(config, device)
    return train_and_report(config, device, state, job, started)


def check_options(config: PretrainConfig) -> None:
    """Refuse combinations that cannot mean anything.

    Raises:
        InputError: names the options.
    """
    if not (config.losses.unifrac_penalty or config.losses.nucleotide_penalty):
        raise InputError("--unifrac-penalty and --nucleotide-penalty are both 0: nothing to learn")
    distances = config.distances
    other = distances.unifrac_matrix or distances.distance
    if distances.tree is not None and other:
        raise InputError(
            "give one of --tree, --unifrac-matrix and --distance: what samples are compared by"
        )
    if config.data.table is None and (other or config.metadata.metadata):
        raise InputError("pretrain needs --table for --unifrac-matrix, --distance and --metadata")


def make_model(config: PretrainConfig, **heads: Any) -> PretrainedModel:
    """The model that the options ask for."""
    shape = EncoderShape(**asdict(config.model), max_bp=config.data.max_bp)
    impl, recompute = config.run.attn_implementation, config.run.gradient_checkpointing
    return PretrainedModel(AsvEncoder(shape, impl=impl, recompute=recompute), **heads)


def reference_job(config: PretrainConfig, device: torch.device) -> Job:
    """Learn from a tree and the sequences of its tips alone."""
    known, parts, facts = read_reference(config)
    facts += cut_facts(known, config) + limit_facts(known)
    log_facts(facts)
    return clade_job(config, device, known, parts, None, facts, [])


def tree_job(config: PretrainConfig, device: torch.device) -> Job:
    """Learn from the tree of a table."""
    options = table_options(config)
    samples = read_samples(options, config.run.seed, metadata=config.metadata.metadata)
    assert config.distances.tree is not None
    tree = read_tree(config.distances.tree, sequences=options.sequences)
    truth = attach_tree(samples, tree, config.distances.drop_missing_tips)
    parts = split(samples, config.metadata, config.run.seed)
    known = split_by_samples(samples, truth, samples.rows(parts.train))
    rows = placed_rows(samples, evaluation_rows(samples, parts), samples.rows(parts.train))
    samples.facts += cut_facts(known, config) + limit_facts(known)
    log_facts(samples.facts, samples.warnings)
    judged = EvaluationSubset(samples, truth, rows, samples.rows(parts.train), config.metadata)
    return clade_job(config, device, known, parts, judged, samples.facts, samples.warnings)


def table_options(config: PretrainConfig) -> TableOptions:
    """The table's options, where there is a table."""
    assert config.data.table is not None
    return config.data


def cut_facts(known: TreeSplit, config: PretrainConfig) -> list[DataFact]:
    """What is longer than the encoder's positions."""
    lengths, most = known.clades.sequences.lengths, config.data.max_bp
    cut = int((lengths > most).sum())
    if not cut:
        return []
    return [DataFact(f"sequences cut at {most} bases", cut, f"longest {int(lengths.max())}", "cut")]


def limit_facts(known: TreeSplit) -> list[DataFact]:
    """What is too much to be learned, or to be looked at in every validation."""
    tree = known.clades.tree
    facts: list[DataFact] = []
    branches = int((tree.tip_stop - tree.tip_start > 1).sum())
    if len(known.clades) == MOST_CLADES and branches > MOST_CLADES:
        what = f"branches that are no clade: {MOST_CLADES:,} with most members are learned"
        facts.append(DataFact(what, branches - MOST_CLADES, "nearest known ASVs decide", "cut"))
    if len(known.unseen) > LEFT_OUT:
        what = f"new ASVs whose clades are not measured: {LEFT_OUT:,} are"
        facts.append(DataFact(what, len(known.unseen) - LEFT_OUT, "drawn at random", "cut"))
    return facts


def clade_job(
    config: PretrainConfig,
    device: torch.device,
    known: TreeSplit,
    parts: Split,
    judged: EvaluationSubset | None,
    facts: list[DataFact],
    warnings: list[str],
) -> Job:
    """Learn the clades of known ASVs; the others are looked at in validation."""
    clades = known.clades
    if not len(clades):
        raise InputError(
            f"{clades.tree.source}: has no inner branch with a length: there is no clade to learn"
        )
    mapped = judged is not None and isinstance(judged.samples.table.feature_ids, Texts)
    asvs = AsvDataset(clades.sequences, config.data.max_bp, mapped=mapped).to(device)
    unseen = AsvDataset(known.unseen, config.data.max_bp, mapped=mapped).to(device)
    model = make_model(config, clades=len(clades))
    if model.clades is not None:
        share = (clades.stop - clades.start) / len(clades.tree.tip_names)
        model.clades.begin_at(torch.from_numpy(share))
    model.to(device)
    calibration = calibration_tips(len(asvs), config.run.seed)
    task = TreeTask(model, known, unseen, calibration, config, lambda: communities(clades, judged))
    objective = CladeObjective(
        model.encoder, model.clades, config.losses, CladeLoss(clades), stack_joins=STACK_JOINS
    )
    tree = clades.tree
    description = {
        "command": "pretrain",
        "data": data_description(config),
        "fingerprint": fingerprint(
            "tree" if judged is None else judged.samples.table.digest(),
            parts, tree.parent, tree.length, clades.sequences.hashes() >> np.uint64(1),
        ),
    }  # fmt: skip
    return Job(
        objective=objective,
        model=model,
        dataset=asvs,
        rows=np.setdiff1d(np.arange(len(asvs)), calibration),
        parts=parts,
        options=tree_options(config.optimizer, asvs),
        validate=task.validate,
        best_metric=task.metric,
        description=description,
        arrays=task.arrays,
        write_results=lambda run, summary: write_tree_results(run, task, judged, asvs, summary),
        facts=facts,
        warnings=warnings,
        names="samples" if judged is not None else "sequences",
    )


def communities(clades: Clades, judged: EvaluationSubset | None) -> csr_array:
    """Reads (samples, known ASVs) of some training samples; of none where there is no table."""
    count = len(clades.tree.tip_names)
    if judged is None:
        return csr_array((0, count))
    rows = np.random.default_rng(0).permutation(judged.train_rows)[:COMMUNITIES]
    table = judged.samples.table
    counts, tips = table.counts[np.sort(rows)], match_names(table.feature_ids, clades.sequences)
    known = tips[counts.indices] >= 0
    starts = np.concatenate(([0], np.cumsum(known)))[counts.indptr]
    found = csr_array(
        (counts.data[known], tips[counts.indices[known]], starts), (counts.shape[0], count)
    )
    found.sort_indices()
    return found


def pair_job(config: PretrainConfig, device: torch.device) -> Job:
    """Learn distances between samples that no tree gives."""
    options = table_options(config)
    samples = read_samples(options, config.run.seed, metadata=config.metadata.metadata)
    distances = attach_distances(samples, options, config.distances)
    parts = split(samples, config.metadata, config.run.seed)
    dataset = make_dataset(samples, options).to(device)
    rows = evaluation_rows(samples, parts)
    log_facts(samples.facts, samples.warnings)
    train_rows = samples.rows(parts.train)
    abundance = config.distances.distance != "jaccard"
    model = make_model(config, free_clades=FREE_CLADES, abundance=abundance)
    assert model.pairs is not None
    chosen = np.random.default_rng(config.run.seed).permutation(train_rows)[:UNIT_SAMPLES]
    mean = metrics.condensed(distances.pairwise(chosen)).mean()
    model.pairs.unit.fill_(max(float(mean), 1e-6) / USUAL_DISTANCE)
    model.to(device)
    task = PairTask(model, dataset, distances, train_rows, rows, config)
    objective = PairObjective(model.encoder, model.pairs, config.losses, DistanceLoss(distances))
    description = {
        "command": "pretrain",
        "data": data_description(config),
        "distance": config.distances.distance or "matrix",
        "fingerprint": fingerprint(
            samples.table.digest(), parts, distances.pairwise(train_rows[:16])
        ),
    }
    return Job(
        objective=objective,
        model=model,
        dataset=dataset,
        rows=train_rows,
        parts=parts,
        options=usual_options(config.optimizer, PAIR_EPOCHS, PAIR_LEARNING_RATE),
        validate=task.validate,
        best_metric=task.metric,
        description=description,
        arrays=lambda: known_arrays(dataset.sequences_of(dataset.asvs_of(train_rows))),
        write_results=lambda run, summary: write_pair_results(run, task, samples, summary),
        facts=samples.facts,
        warnings=samples.warnings,
    )
