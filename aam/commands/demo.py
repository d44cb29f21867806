"""`aam demo`: a small simulated study from raw files to a report, in minutes on a laptop."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from aam.config import (
    CategoricalOptions,
    DemoConfig,
    DistanceOptions,
    FinetuneConfig,
    MetadataOptions,
    ModelOptions,
    OptimizerOptions,
    OptionalTableOptions,
    PredictConfig,
    PretrainConfig,
    RunOptions,
    TableOptions,
    TargetOptions,
)
from aam.data.simulate import DemoFiles, simulate_community
from aam.errors import InputError, log
from aam.evaluation.results import print_results
from aam.files import is_run

MARK = "simulated"  # folder of the simulated files; tells a demo's folder from any other
FINETUNE_BATCH = 16
GROUPS = MetadataOptions(group_column="subject")


def demo(config: DemoConfig) -> Path:
    """Run `aam demo`.

    Returns:
        The folder of the demo.
    """
    from aam.commands.finetune import finetune
    from aam.commands.predict import predict
    from aam.commands.pretrain import pretrain

    started = time.monotonic()
    folder = prepare_folder(config.output_dir)
    log(f"simulating {config.samples} samples in {folder / MARK}")
    files = simulate_community(folder / MARK, samples=config.samples, seed=config.seed)
    log("pretraining on the tree's clades and masked nucleotides")
    pretrained = pretrain(pretrain_options(config, files, folder / "pretrained"))
    log("fine-tuning on age, given the site")
    age = finetune(finetune_options(config, files, pretrained, folder / "age", "age"))
    log("predicting age")
    predict(
        PredictConfig(
            model=age,
            table=files.table,
            metadata=files.metadata,
            output=folder / "predicted-age.tsv",
        )
    )
    print_results([one for name in ("pretrained", "age") for one in results_of(folder / name)])
    log(f"demo finished in {time.monotonic() - started:.0f} s; open these in a browser:")
    for name in ("pretrained", "age"):
        log(f"  {folder / name / 'report.html'}")
    return folder


def results_of(run: Path) -> list[dict[str, Any]]:
    """The measured numbers of a finished run."""
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))["results"]


def prepare_folder(folder: Path) -> Path:
    """An empty folder; an earlier demo there is removed, anything else is refused."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another --output-dir")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARK).is_dir() or is_run(folder):
            raise InputError(
                f"{folder}: is not empty and holds no demo; choose another --output-dir"
            )
        shutil.rmtree(folder)
    return folder


def pretrain_options(config: DemoConfig, files: DemoFiles, output: Path) -> PretrainConfig:
    """Options of the demo's pretraining."""
    return PretrainConfig(
        data=OptionalTableOptions(table=files.table, rarefy_depth=0),
        distances=DistanceOptions(tree=files.tree),
        metadata=MetadataOptions(metadata=files.metadata, group_column=GROUPS.group_column),
        optimizer=OptimizerOptions(epochs=config.pretrain_epochs),
        run=RunOptions(output_dir=output, seed=config.seed),
    )


def finetune_options(
    config: DemoConfig, files: DemoFiles, pretrained: Path, output: Path, column: str
) -> FinetuneConfig:
    """Options of the demo's fine-tuning on a column, with the site as covariate."""
    return FinetuneConfig(
        data=TableOptions(table=files.table, rarefy_depth=0),
        metadata=MetadataOptions(metadata=files.metadata, group_column=GROUPS.group_column),
        target=TargetOptions(metadata_column=column),
        pretrained_encoder=pretrained,
        freeze_base=True,
        categorical=CategoricalOptions(categorical_columns=("site",)),
        model=ModelOptions(dropout=0.0),
        optimizer=OptimizerOptions(
            batch_size=FINETUNE_BATCH, epochs=epochs_for(config.finetune_steps, config), lr=3e-4,
            max_steps=config.finetune_steps, validate_every=3,
        ),
        run=RunOptions(output_dir=output, seed=config.seed),
    )  # fmt: skip


def epochs_for(steps: int, config: DemoConfig) -> int:
    """Epochs whose schedule ends about where the steps do."""
    training = max(2, round(config.samples * (1 - MetadataOptions().validation_fraction)))
    return max(1, round(steps * FINETUNE_BATCH / training))
