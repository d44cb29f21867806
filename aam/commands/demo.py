"""`aam demo`: a small simulated study from raw files to a report, in minutes on a laptop."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from aam.commands.finetune import finetune
from aam.commands.predict import predict
from aam.commands.pretrain import pretrain
from aam.config import DemoConfig, MetadataOptions, from_options
from aam.data.simulate import simulate_community
from aam.errors import InputError, log
from aam.evaluation.results import print_results
from aam.files import is_run

MARK = "simulated"  # folder of the simulated files; tells a demo's folder from any other
BATCH = 16  # samples a step of fine-tuning


def demo(config: DemoConfig) -> Path:
    """Run `aam demo`; returns its folder."""
    started, folder = time.monotonic(), prepare_folder(config.output_dir)
    log(f"simulating {config.samples} samples in {folder / MARK}")
    files = simulate_community(folder / MARK, samples=config.samples, seed=config.seed)
    shared = {
        "table": files.table, "rarefy_depth": 0, "metadata": files.metadata,
        "group_column": "subject", "seed": config.seed,
    }  # fmt: skip
    pretrained, age = runs = folder / "pretrained", folder / "age"
    log("pretraining on the tree's clades and masked nucleotides")
    own: dict[str, Any] = {"tree": files.tree, "epochs": config.pretrain_epochs}
    pretrain(from_options("pretrain", **shared, **own, output_dir=pretrained))

    log("fine-tuning on age, given the site")
    train_samples = max(2, round(config.samples * (1 - MetadataOptions().validation_fraction)))
    epochs = max(1, round(config.finetune_steps * BATCH / train_samples))  # end where the steps do
    own = {
        "metadata_column": "age", "categorical_columns": ("site",), "freeze_base": True,
        "pretrained_encoder": pretrained, "dropout": 0.0, "batch_size": BATCH, "lr": 3e-4,
        "epochs": epochs, "max_steps": config.finetune_steps, "validate_every": 3,
    }  # fmt: skip
    finetune(from_options("finetune", **shared, **own, output_dir=age))

    log("predicting age")
    own = {"table": files.table, "metadata": files.metadata}
    predict(from_options("predict", model=age, **own, output=folder / "predicted-age.tsv"))
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    print_results([result for summary in summaries for result in summary["results"]])
    log(f"demo finished in {time.monotonic() - started:.0f} s; open these in a browser:")
    for run in runs:
        log(f"  {run / 'report.html'}")
    return folder


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
