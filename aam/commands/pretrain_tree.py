"""Pretraining that a tree teaches: the clades of its ASVs, and masked nucleotides.

ASVs that only validation samples have are left out of the tree; validation places them.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array

from aam.commands.training import make_encoder, pretraining_metrics, usual_options
from aam.commands.tree_inputs import LEFT_OUT, read_reference, read_table_and_tree
from aam.config import OptimizerOptions, PretrainConfig
from aam.data.dataset import AsvDataset
from aam.data.embedding import COMMUNITIES, Embedding
from aam.data.neighbours import Found, Neighbours
from aam.data.placement import Law, Placement
from aam.data.texts import match_names
from aam.evaluation import results
from aam.evaluation.baselines import CHECK_SEED
from aam.evaluation.metrics import Measured
from aam.evaluation.placer import WEIGHT, Placer
from aam.learning.checkpoint import fingerprint
from aam.learning.losses import CladeLoss
from aam.learning.objective import CladeObjective
from aam.learning.run import Run
from aam.learning.task import Task
from aam.model import PretrainedModel

TOKENS_SEEN = 30_000_000  # of a run whose epochs are not given
EPOCHS = (3, 60)  # least and most that they make
VALIDATIONS = 10  # of a run
LEARNING_RATE = 4e-3
STACK_JOINS = 5 / 6  # share of the run that the wide path learns alone
CALIBRATION_SHARE, MOST_CALIBRATION = 0.025, 300
NETWORK_WEIGHTS = (1.0, 0.5, 0.25, 0.0)  # of the network's logits beside those of the vote


class TreePretraining(Task):
    """Learn which clades ASVs belong to, and masked nucleotides.

    A few known ASVs do not train: they say how much the network's opinion of an ASV counts beside
    the vote of its neighbours.
    """

    config: PretrainConfig
    model: PretrainedModel
    dataset: AsvDataset

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        """Read the tree, and the table or the reference sequences."""
        self.config, self.device, max_bp = config, device, config.data.max_bp
        inputs = (read_table_and_tree if config.data.table else read_reference)(config)
        self.unit = "samples" if config.data.table else "sequences"
        self.facts, self.warnings = inputs.facts, inputs.warnings
        self.parts, self.subset = inputs.parts, inputs.subset
        self.clades, unseen = inputs.known.clades, inputs.known.unseen
        self.dataset = AsvDataset(self.clades.sequences, max_bp)
        self.calibration = calibration_asvs(len(self.dataset), config.run.seed)
        self.rows = np.setdiff1d(np.arange(len(self.dataset)), self.calibration)
        self.unseen = AsvDataset(unseen, max_bp)  # ASVs that are left out of the tree
        order = np.random.default_rng(CHECK_SEED).permutation(len(unseen))
        self.placed = np.sort(order[:LEFT_OUT])  # those that validation places
        self.left_out, self.truth = unseen.take(self.placed), inputs.known.truth.take(self.placed)
        self.optimizer = tree_options(config.optimizer, self.dataset)
        learns_clades = bool(config.losses.unifrac_penalty)
        self.best_metric = "clade_jaccard" if learns_clades else "nucleotide_accuracy"
        self.known = {}
        contents = "tree" if self.subset is None else self.subset.samples.table.digest()
        hashes, tree = self.clades.sequences.hashes() >> np.uint64(1), self.clades.tree
        self.fingerprint = fingerprint(contents, self.parts, tree.parent, tree.length, hashes)

    def build(self, state: dict[str, Any] | None) -> CladeObjective:
        """The clade head begins at the share of ASVs in each clade."""
        clades, encoder = self.clades, make_encoder(self.config)
        self.model = PretrainedModel(encoder, clades=len(clades))
        head, losses = self.model.clades, self.config.losses
        assert head is not None
        head.begin_at(torch.from_numpy((clades.stop - clades.start) / len(clades.sequences)))
        self.model.to(self.device)
        return CladeObjective(encoder, head, losses, CladeLoss(clades), stack_joins=STACK_JOINS)

    @cached_property
    def placer(self) -> Placer:
        """Places the left-out ASVs; made when it is first needed, after training has begun."""
        neighbours = Neighbours(self.clades.sequences)
        law = Law.fit(self.clades, neighbours, seed=self.config.run.seed)
        return Placer(self.model, Placement(self.clades, law), neighbours=neighbours)

    @cached_property
    def found(self) -> tuple[np.ndarray, Found]:
        """Neighbours of the left-out ASVs."""
        return self.placer.find(self.left_out)

    @cached_property
    def found_of_calibration(self) -> Found:
        """Neighbours of the calibration ASVs, but for themselves."""
        sequences = self.clades.sequences.take(self.calibration)
        return self.placer.neighbours.find(sequences, leave_out=self.calibration)

    @cached_property
    def embedding(self) -> Embedding:
        """Directions of sample vectors."""
        return Embedding.fit(self.clades, self.communities(), self.config.run.seed)

    def communities(self) -> csr_array:
        """Reads (samples, known ASVs) of some training samples; of none where there is no table."""
        known = self.clades.sequences
        if self.subset is None:
            return csr_array((0, len(known)))
        rows = np.random.default_rng(0).permutation(self.subset.train_rows)[:COMMUNITIES]
        table = self.subset.samples.table
        return table.counts[np.sort(rows)][:, match_names(known, table.feature_ids)]

    def calibrate(self) -> None:
        """Choose the network's weight beside the vote, on ASVs that it was not trained on.

        The largest one that is not worse than the best by more than a standard error.
        """
        if not len(self.calibration):
            return
        clades, scores = self.clades, []
        true = clades.ends(self.without_pairs(clades.lowest[self.calibration]))
        for weight in NETWORK_WEIGHTS:
            self.placer.network_weight = weight
            decoded = self.without_pairs(self.placer.place_new(self.found_of_calibration)[1])
            scores.append(clades.jaccard(clades.ends(decoded), true))
        worse = max(scores, key=np.mean) - np.array(scores)  # (weights, ASVs)
        error = worse.std(axis=1) / np.sqrt(worse.shape[1])
        chosen = np.flatnonzero(worse.mean(axis=1) <= error)[0]
        self.placer.network_weight = NETWORK_WEIGHTS[chosen]

    def without_pairs(self, lowest: np.ndarray) -> np.ndarray:
        """Smallest clades (n,) of calibration ASVs in the tree without each of them.

        A clade of the ASV and one other is none then.
        """
        start, stop = self.clades.start[lowest], self.clades.stop[lowest]
        inside = (start <= self.calibration) & (self.calibration < stop)
        is_pair = (lowest >= 0) & inside & (stop - start == 2)
        return np.where(is_pair, self.clades.parent[lowest], lowest)

    def validate(self) -> Measured:
        """Memberships of left-out ASVs in clades, and their masked nucleotides."""
        measured: Measured = {self.best_metric: None}
        if not len(self.left_out):
            return measured
        if self.config.losses.unifrac_penalty:
            self.calibrate()
            placed = self.placer.place(self.left_out, self.found)
            jaccard = self.clades.jaccard(self.clades.ends(placed.clade), self.truth)
            measured["clade_jaccard"] = float(jaccard.mean())
            measured["network_weight"] = self.placer.network_weight
            if len(self.clades) <= CladeLoss.SAMPLED_ABOVE:  # else it would take all of very many
                measured["clade_loss"] = self.clade_loss()
        return pretraining_metrics(self, measured, self.unseen, self.placed)

    def clade_loss(self) -> float:
        """Loss of the network's logits on left-out ASVs."""
        near, loss = self.found[1], 0.0
        lowest = self.clades.clade_of_node[self.truth.node]
        weight = torch.from_numpy(self.clades.weight).float()
        for part in self.placer.parts(len(near.index)):
            logits = torch.from_numpy(self.placer.network_logits(near.take(part)))
            true = torch.from_numpy(self.clades.members(lowest[part])).float()
            each = F.binary_cross_entropy_with_logits(logits, true, weight, reduction="sum")
            loss += float(each)
        return CladeLoss.WEIGHT * loss / len(self.left_out)

    def arrays(self) -> dict[str, np.ndarray]:
        """The tree, how ASVs are placed on it, and the directions of sample vectors."""
        self.calibrate()
        return {
            **self.clades.to_arrays(),
            **self.placer.placement.law.to_arrays(),
            "embedding.directions": self.embedding.directions,
            WEIGHT: np.array(self.placer.network_weight),
        }

    def results(self, run: Run) -> dict[str, Any]:
        """Distances, Faith PD, memberships and masked nucleotides beside their baselines."""
        losses, subset = self.config.losses, self.subset
        found: results.Results = []
        if losses.unifrac_penalty and subset is not None:
            found += results.sample_results(self.placer, subset, run, self.embedding)
        if losses.unifrac_penalty and len(self.left_out):
            placed = self.placer.place(self.left_out, self.found)
            found += results.membership_results(self.placer, self.left_out, placed, self.truth, run)
        if losses.nucleotide_penalty and len(self.unseen):
            asvs, known = np.arange(len(self.unseen)), np.arange(len(self.dataset))
            found += results.nucleotide_results(
                self.model.encoder, self.unseen, asvs, self.dataset, known, losses
            )
        colour_by = None if subset is None else results.colours(subset.samples, subset.rows)
        return {"results": found, "colours": colour_by}


def tree_options(options: OptimizerOptions, asvs: AsvDataset) -> OptimizerOptions:
    """Epochs and learning rate of a run that a tree teaches, where none are given."""
    tokens = max(1, int(asvs.sequence_lengths.sum()))
    epochs = options.epochs or int(np.clip(round(TOKENS_SEEN / tokens), *EPOCHS))
    return usual_options(options, epochs, LEARNING_RATE, max(1, epochs // VALIDATIONS))


def calibration_asvs(asvs: int, seed: int) -> np.ndarray:
    """Known ASVs, (n,) ascending, that the network does not train on."""
    count = min(round(CALIBRATION_SHARE * asvs), MOST_CALIBRATION)
    return np.sort(np.random.default_rng([seed, count]).permutation(asvs)[:count])
