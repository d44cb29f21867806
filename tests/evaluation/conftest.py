"""A study, half of whose samples a small model that a tree taught has learned from."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from aam.data.simulate import DemoFiles, simulate_community
from aam.data.table import FeatureTable, read_table
from aam.evaluation.loaded import Model, load


@dataclass(frozen=True)
class Study:
    files: DemoFiles
    table: FeatureTable
    run: Path
    known: FeatureTable  # the samples of training
    others: FeatureTable
    model: Model


@pytest.fixture(scope="session")
def study(aam, tmp_path_factory):
    folder = tmp_path_factory.mktemp("placing")
    files = simulate_community(
        folder, samples=60, asvs=400, asvs_per_sample=40, sequence_length=100, seed=1
    )
    table = read_table(files.table)
    parts = [table.select(table.sample_ids[low : low + 30]) for low in (0, 30)]
    for name, part in zip(("train", "others"), parts, strict=True):
        (folder / name).write_text("\n".join(part.sample_ids) + "\n")
    assert aam(
        "pretrain", "--table", files.table, "--tree", files.tree, "--encoder", "wide",
        "--wide-dim", 64, "--nucleotide-penalty", 0, "--epochs", 20, "--batch-size", 32,
        "--train-ids", folder / "train", "--validation-ids", folder / "others",
        "--output-dir", folder / "run", files=False, filling=True,
    ) == 0  # fmt: skip
    return Study(files, table, folder / "run", *parts, load(folder / "run", "cpu"))
