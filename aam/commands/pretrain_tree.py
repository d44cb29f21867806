"""Pretraining that a tree teaches: what is known, what is left out, and how it is validated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array

from aam.config import OptimizerOptions, PretrainConfig
from aam.data.clades import Grafts, TreeSplit, split_tree
from aam.data.dataset import AsvDataset
from aam.data.embedding import Embedding
from aam.data.neighbours import Found, Neighbours
from aam.data.phylogeny import UniFrac
from aam.data.placement import Law, Placement
from aam.data.samples import Samples
from aam.data.sequences import is_dna, read_fasta
from aam.data.splits import Split
from aam.data.texts import Texts, match_names
from aam.data.tree import read_tree
from aam.errors import DataFact, InputError, name_some
from aam.evaluation.measurements import nucleotide_results
from aam.evaluation.outputs import check_nucleotides
from aam.evaluation.placer import WEIGHT, Placer
from aam.evaluation.results import print_results
from aam.evaluation.tree_results import (
    EvaluationSubset,
    colours,
    membership_results,
    sample_results,
    write_placements,
)
from aam.learning.distributed import RankGroup
from aam.learning.losses import CladeLoss
from aam.learning.run import Run
from aam.model import PretrainedModel

LEAST_TIPS = 3
TOKENS_SEEN = 30_000_000  # of a run whose epochs are not given
EPOCHS = (3, 60)  # least and most that they make
VALIDATIONS = 10  # of a run
LEARNING_RATE = 4e-3
STACK_JOINS = 5 / 6  # share of the run that the wide path learns alone
LEFT_OUT = 2000  # most tips of a reference that are left out, and most unseen ASVs of a validation
PLACED = 5000  # most new ASVs of validation samples that are placed in the end
CHECK_SEED = 20_231
CALIBRATION_SHARE, MOST_CALIBRATION = 0.025, 300
NETWORK_WEIGHTS = (1.0, 0.5, 0.25, 0.0)  # of the network's logits beside those of the vote


def tree_options(options: OptimizerOptions, asvs: AsvDataset) -> OptimizerOptions:
    """Epochs and learning rate of a run that a tree teaches, where none are given."""
    tokens = max(1, int(asvs.sequence_lengths.sum()))
    epochs = options.epochs
    if epochs is None:
        epochs = int(np.clip(round(TOKENS_SEEN / tokens), *EPOCHS))
    return replace(
        options,
        epochs=epochs,
        lr=LEARNING_RATE if options.lr is None else options.lr,
        validate_every=options.validate_every or max(1, epochs // VALIDATIONS),
    )


def split_by_samples(samples: Samples, truth: UniFrac, train_rows: np.ndarray) -> TreeSplit:
    """The ASVs of the training samples, and those that only others have.

    Args:
        samples: of the table.
        truth: UniFrac of the table by its tree.
        train_rows: (n,) rows of the training samples.

    Raises:
        InputError: too few ASVs are on the tree to have a clade.
    """
    table = samples.table
    seen = np.zeros(len(table.feature_ids), dtype=bool)
    seen[table.counts[train_rows].indices] = True
    columns = np.flatnonzero(truth.tip_of_column >= 0)
    tips = truth.tip_of_column[columns]
    column_of = np.empty(len(columns), dtype=np.int64)
    column_of[tips] = columns
    names = Texts.of(table.feature_ids).take(column_of)
    known = seen[column_of]
    require_tips(truth.tree.source, int(known.sum()), "training ASVs")
    return split_tree(replace(truth.tree, tip_names=names), known)


def placed_rows(samples: Samples, rows: np.ndarray, train_rows: np.ndarray) -> np.ndarray:
    """Validation samples whose new ASVs are placed in the end; what is left out is a fact.

    Args:
        samples: of the table.
        rows: (n,) rows of the validation samples.
        train_rows: rows of the training samples.
    """
    counts = samples.table.counts
    seen = np.zeros(counts.shape[1], dtype=bool)
    seen[counts[train_rows].indices] = True
    left = PLACED
    kept: list[int] = []
    for row in np.random.default_rng(CHECK_SEED).permutation(rows):
        own = counts.indices[counts.indptr[row] : counts.indptr[row + 1]]
        own = own[~seen[own]]
        if len(own) > left and len(kept) > 1:
            break
        kept.append(int(row))
        seen[own] = True
        left -= len(own)
    if len(kept) < len(rows):
        what = f"validation samples not looked at: {PLACED:,} new ASVs are placed"
        samples.facts.append(DataFact(what, len(rows) - len(kept), "drawn at random", "cut"))
    return np.sort(np.array(kept))


def read_reference(config: PretrainConfig) -> tuple[TreeSplit, Split, list[DataFact]]:
    """A tree and the sequences of its tips, without a table; some tips are left out.

    Returns:
        Known and left-out ASVs, their ids, and what was dropped.

    Raises:
        InputError: files cannot be used, or sequences are not tips.
    """
    options, path = config.data, config.distances.tree
    if options.sequences is None or path is None:
        raise InputError(
            "pretrain needs --table, or --sequences with --tree to learn from a reference alone"
        )
    sequences, facts = distinct_sequences(read_fasta(options.sequences), str(options.sequences))
    tree = read_tree(path)
    ids = Texts.of(list(sequences))
    tips = match_names(ids, tree.tip_names)
    missing = np.flatnonzero(tips < 0)
    if len(missing):
        named = name_some([ids[int(one)] for one in missing[:3]])
        if not config.distances.drop_missing_tips:
            raise InputError(
                f"{path}: {len(missing)} of {len(ids)} sequences of {options.sequences} are not "
                f"tips of the tree ({named}); leave them out with --drop-missing-tips"
            )
        facts.append(DataFact("sequences that are not in the tree", len(missing), named, "dropped"))
    kept = np.zeros(len(tree.tip_names), dtype=bool)
    kept[tips[tips >= 0]] = True
    require_tips(str(path), int(kept.sum()), f"sequences of {options.sequences}")
    tree = tree.shear(kept)
    names = list(tree.tip_names)
    count = min(round(config.metadata.validation_fraction * len(names)), LEFT_OUT)
    left_out = np.random.default_rng(config.run.seed).permutation(len(names))[:count]
    known = np.ones(len(names), dtype=bool)
    known[left_out] = False
    parts = Split(
        tuple(name for name, has in zip(names, known, strict=True) if has),
        tuple(name for name, has in zip(names, known, strict=True) if not has),
    )
    facts.append(DataFact("sequences on the tree", len(names), str(options.sequences)))
    return split_tree(tree.rename(sequences), known), parts, facts


def distinct_sequences(
    sequences: dict[str, str], source: str
) -> tuple[dict[str, str], list[DataFact]]:
    """Sequences of A, C, G and T, each once; what is left out is counted."""
    facts: list[DataFact] = []
    kept: dict[str, str] = {}
    first_with: dict[str, str] = {}
    ambiguous, repeated = [], []
    for name, one in sequences.items():
        if not is_dna(one):
            ambiguous.append(name)
        elif first_with.setdefault(one, name) != name:
            repeated.append(name)
        else:
            kept[name] = one
    for names, what in (
        (ambiguous, "sequences with other letters than A, C, G and T"),
        (repeated, "sequences that repeat another"),
    ):
        if names:
            facts.append(DataFact(f"{what} ({source})", len(names), name_some(names), "dropped"))
    return kept, facts


def require_tips(source: str, count: int, what: str) -> None:
    """Refuse a tree that has next to nothing of what is to be learned."""
    if count < LEAST_TIPS:
        raise InputError(
            f"{source}: {count} {what} are tips of the tree; at least {LEAST_TIPS} are needed: "
            "use the tree that was made for these sequences"
        )


@dataclass
class TreeTask:
    """What is learned from a tree, and what validation looks at.

    Attributes:
        model: with a clade head.
        split: known ASVs and those that are left out.
        unseen: the left-out ones as tokens.
        calibration: known ASVs that the network does not train on: they say how much it counts
            beside the vote of the neighbours.
        config: all options.
        communities: gives ``(n, known ASVs)`` reads of training samples; n may be 0.
    """

    model: PretrainedModel
    split: TreeSplit
    unseen: AsvDataset
    calibration: np.ndarray
    config: PretrainConfig
    communities: Callable[[], csr_array]

    def __post_init__(self) -> None:
        order = np.random.default_rng(CHECK_SEED).permutation(len(self.unseen))
        self.judged: np.ndarray = np.sort(order[:LEFT_OUT])

    @cached_property
    def placer(self) -> Placer:
        """Places the left-out ASVs; made when it is first needed, after training has begun."""
        clades = self.split.clades
        neighbours = Neighbours(clades.sequences)
        law = Law.fit(clades, neighbours, seed=self.config.run.seed)
        return Placer(self.model, Placement(clades, law), neighbours=neighbours)

    @cached_property
    def found(self) -> tuple[np.ndarray, Found]:
        """Neighbours of the left-out ASVs that validation looks at."""
        return self.placer.find(self.split.unseen.take(self.judged))

    @cached_property
    def found_of_calibration(self) -> Found:
        """Neighbours of the known ASVs that the network does not train on, but for themselves."""
        sequences = self.split.clades.sequences.take(self.calibration)
        return self.placer.neighbours.find(sequences, leave_out=self.calibration)

    @cached_property
    def embedding(self) -> Embedding:
        """Directions of sample vectors."""
        return Embedding.fit(self.split.clades, self.communities(), self.config.run.seed)

    @property
    def metric(self) -> str:
        """The validation metric that chooses the best weights."""
        if not self.config.losses.unifrac_penalty:
            return "nucleotide_accuracy"
        return "clade_jaccard"

    def calibrate(self) -> None:
        """Choose the network's weight beside the vote, on ASVs that it was not trained on.

        The largest one that is not worse than the best by more than a standard error.
        """
        clades, near, found = self.split.clades, self.found_of_calibration, []
        if not len(self.calibration):
            return
        true = clades.ends(self.without_pairs(clades.lowest[self.calibration]))
        for weight in NETWORK_WEIGHTS:
            self.placer.network_weight = weight
            decoded = self.without_pairs(self.placer.place_new(near)[1])
            found.append(clades.jaccard(clades.ends(decoded), true))
        best = max(found, key=np.mean)
        for weight, own in zip(NETWORK_WEIGHTS, found, strict=True):
            worse = best - own
            if worse.mean() <= worse.std() / np.sqrt(len(worse)):
                self.placer.network_weight = weight
                return

    def without_pairs(self, lowest: np.ndarray) -> np.ndarray:
        """Smallest clades (n,) of calibration ASVs in the tree without each of them.

        A clade of the ASV and one other is none then.
        """
        clades = self.split.clades
        size = clades.stop[lowest] - clades.start[lowest]
        inside = (clades.start[lowest] <= self.calibration) & (
            self.calibration < clades.stop[lowest]
        )
        return np.where((lowest >= 0) & inside & (size == 2), clades.parent[lowest], lowest)

    def validate(self) -> dict[str, float | None]:
        """Validation metrics of the current weights, in evaluation mode; all ranks call it."""
        penalties = self.config.losses
        measured: dict[str, float | None] = {self.metric: None}
        if not len(self.judged):
            return measured
        if penalties.unifrac_penalty:
            measured |= self.membership_metrics()
        if penalties.nucleotide_penalty:
            check = check_nucleotides(
                self.model.encoder, self.unseen, self.judged, penalties,
                seed=CHECK_SEED, exchange=RankGroup(),
            )  # fmt: skip
            measured |= {"nucleotide_loss": check.loss, "nucleotide_accuracy": check.accuracy}
        total = penalties.unifrac_penalty * (measured.get("clade_loss") or 0.0)
        total += penalties.nucleotide_penalty * (measured.get("nucleotide_loss") or 0.0)
        return {"loss": total, **measured}

    def membership_metrics(self) -> dict[str, float | None]:
        """Loss of the network's logits, and Jaccard of the decoded clades, of left-out ASVs.

        Of very many clades the loss, which would take them all, is not measured.
        """
        clades, truth = self.split.clades, self.split.truth.take(self.judged)
        self.calibrate()
        placed = self.placer.place(self.split.unseen.take(self.judged), self.found)
        jaccard = clades.jaccard(clades.ends(placed.clade), truth)
        measured: dict[str, float | None] = {
            "clade_jaccard": float(jaccard.mean()),
            "network_weight": self.placer.network_weight,
        }
        if len(clades) <= CladeLoss.SAMPLED_ABOVE:
            measured["clade_loss"] = self.clade_loss(truth)
        return measured

    def clade_loss(self, truth: Grafts) -> float:
        """Loss of the network's logits on left-out ASVs."""
        clades, near, loss = self.split.clades, self.found[1], 0.0
        lowest, weight = clades.clade_of_node[truth.node], torch.from_numpy(clades.weight).float()
        for part in self.placer.parts(len(near.index)):
            logits = torch.from_numpy(self.placer.network_logits(near.take(part)))
            true = np.zeros(logits.shape, dtype=np.float32)
            clades.spread(lowest[part], np.ones(len(true), dtype=np.float32), true)
            loss += float(
                F.binary_cross_entropy_with_logits(
                    logits, torch.from_numpy(true), weight=weight, reduction="sum"
                )
            )
        return CladeLoss.WEIGHT * loss / len(self.judged)

    def arrays(self) -> dict[str, np.ndarray]:
        """What the model's file holds beside the weights that were chosen."""
        self.calibrate()
        return {
            **self.split.clades.to_arrays(),
            **self.placer.placement.law.to_arrays(),
            **self.embedding.to_arrays(),
            WEIGHT: np.array(self.placer.network_weight),
        }


def write_tree_results(
    run: Run,
    task: TreeTask,
    judged: EvaluationSubset | None,
    known: AsvDataset,
    summary: dict[str, Any],
) -> None:
    """Final measurements beside their baselines: tables, summary, and a printed table."""
    losses, results = task.config.losses, []
    everything = np.arange(len(task.unseen))
    if losses.unifrac_penalty:
        if judged is not None:
            results += sample_results(task.placer, judged, run, task.embedding)
        if len(task.judged):
            sequences = task.split.unseen.take(task.judged)
            placed = task.placer.place(sequences, task.found)
            truth = task.split.truth.take(task.judged)
            results += membership_results(task.placer, placed, truth)
            write_placements(run, task.placer, sequences, placed, truth)
    if losses.nucleotide_penalty and len(everything):
        results += nucleotide_results(
            task.model.encoder, task.unseen, everything, known, np.arange(len(known)), losses
        )
    if judged is not None:
        summary["colours"] = colours(judged.samples, judged.rows)
    summary["results"] = results
    run.write_summary(summary)
    print_results(results)


def calibration_tips(asvs: int, seed: int) -> np.ndarray:
    """Known ASVs, (n,) ascending, that the network does not train on."""
    count = min(round(CALIBRATION_SHARE * asvs), MOST_CALIBRATION)
    return np.sort(np.random.default_rng([seed, count]).permutation(asvs)[:count])
