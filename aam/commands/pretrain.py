"""`aam pretrain`: learn the clades of a tree, or distances between samples, and nucleotides."""

from __future__ import annotations

from pathlib import Path

from aam.commands.pretrain_pairs import PairPretraining
from aam.commands.pretrain_tree import TreePretraining
from aam.commands.training import train
from aam.config import PretrainConfig
from aam.errors import InputError


def pretrain(config: PretrainConfig) -> Path:
    """Run `aam pretrain`; returns the run folder."""
    check_options(config)
    return train(config, PairPretraining if config.distances.tree is None else TreePretraining)


def check_options(config: PretrainConfig) -> None:
    """Refuse combinations that cannot mean anything.

    Raises:
        InputError: names the options.
    """
    if not (config.losses.unifrac_penalty or config.losses.nucleotide_penalty):
        raise InputError("--unifrac-penalty and --nucleotide-penalty are both 0: nothing to learn")
    tree, other = (
        config.distances.tree,
        config.distances.unifrac_matrix or config.distances.distance,
    )
    if tree is not None and other:
        raise InputError(
            "give one of --tree, --unifrac-matrix and --distance: what samples are compared by"
        )
    if config.data.table is None:
        if other or config.metadata.metadata:
            raise InputError(
                "pretrain needs --table for --unifrac-matrix, --distance and --metadata"
            )
        if tree is None or config.data.sequences is None:
            raise InputError(
                "pretrain needs --table, or --sequences with --tree to learn from a reference alone"
            )
