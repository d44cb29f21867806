"""`aam predict`: a fine-tuned model's predictions for the samples of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aam.config import PredictConfig, TableOptions
from aam.data.dataset import SampleDataset
from aam.data.samples import Samples, make_dataset, read_samples
from aam.errors import InputError, log, log_facts
from aam.evaluation.applicability import add_applicability
from aam.evaluation.outputs import predict_outputs
from aam.evaluation.predictions import in_units, prediction_cells, prediction_header
from aam.files import write_table
from aam.learning.device import pick_device
from aam.learning.model_file import read_model
from aam.learning.targets import TargetInfo
from aam.model import Predictor


def predict(config: PredictConfig) -> Path:
    """Run `aam predict`.

    Returns:
        The file that was written.
    """
    saved = read_model(config.model)
    model, described = saved.build(impl=config.attn_implementation), saved.description
    if not isinstance(model, Predictor):
        raise InputError(
            f"{config.model}: holds a pretrained encoder; predict needs a run of finetune"
        )
    device = pick_device(config.device, config.attn_implementation)
    columns = list(described["categories"])
    if config.metadata is not None and not columns:
        log(f"{config.metadata}: not used, the model has no categorical columns")
    metadata = config.metadata if columns else None
    samples, options = samples_as_trained(config, described, metadata, keep_unmatched=True)
    if columns and metadata is None:
        samples.warnings.append(
            f"the model was trained with {', '.join(map(repr, columns))}: without --metadata these "
            "are unknown, and predictions are less certain"
        )
    target = TargetInfo.from_dict(described["target"])
    dataset, keys = covariates_as_trained(samples, options, described, target)
    add_applicability(samples, saved)
    log_facts(samples.facts, samples.warnings)
    model.to(device)
    rows = np.arange(len(samples.ids))
    outputs = predict_outputs(model, dataset, rows, chunk=config.batch_size)
    cells = prediction_cells(in_units(outputs, target, keys), target)
    write_table(
        config.output,
        ["sample-id", *prediction_header(target)],
        ([name, *one] for name, one in zip(samples.ids, cells, strict=True)),
    )
    log(f"{len(cells)} predictions of {target.column!r}: {config.output}")
    return config.output


def samples_as_trained(
    config: Any, described: dict[str, Any], metadata: Path | None, *, keep_unmatched: bool = False
) -> tuple[Samples, TableOptions]:
    """Read a table and treat it as the model's training did.

    Args:
        config: options of predict or evaluate.
        described: the model's description.
        metadata: sample metadata, or None.
        keep_unmatched: keep samples without metadata (where they are allowed) as unknown.
    """
    data = described["data"]
    depth = data["rarefy_depth"] if config.rarefy_depth is None else config.rarefy_depth
    options = TableOptions(
        table=config.table,
        sequences=config.sequences,
        rarefy_depth=depth,
        max_bp=data["max_bp"],
        token_limit=data["token_limit"],
        asv_sampling=data["asv_sampling"],
        allow_missing=config.allow_missing,
    )
    samples = read_samples(options, data["seed"], metadata=metadata, keep_unmatched=keep_unmatched)
    return samples, options


def covariates_as_trained(
    samples: Samples, options: TableOptions, described: dict[str, Any], target: TargetInfo
) -> tuple[SampleDataset, list[str] | None]:
    """The dataset with the model's categorical columns, and keys of zscore-category."""
    classes = described["categories"]
    codes = samples.category_codes(classes) if classes else None
    keys = None
    if target.transform.by_category and samples.metadata is not None:
        keys = samples.category_keys(list(classes))
    return make_dataset(samples, options, categories=codes), keys
