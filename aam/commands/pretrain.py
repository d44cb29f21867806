"""`aam pretrain`: learn the clades of a tree, or distances between samples, and nucleotides."""

from __future__ import annotations

from pathlib import Path

from aam.commands.pretrain_pairs import PairPretraining
from aam.commands.pretrain_tree import TreePretraining
from aam.commands.training import train
from aam.config import PretrainConfig


def pretrain(config: PretrainConfig) -> Path:
    """Run `aam pretrain`; returns the run folder."""
    return train(config, PairPretraining if config.distances.tree is None else TreePretraining)
