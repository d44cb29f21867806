"""`aam predict`: a fine-tuned model's predictions for the samples of a table."""

from __future__ import annotations

from pathlib import Path

from aam.config import PredictConfig
from aam.errors import log
from aam.evaluation.loaded import load
from aam.evaluation.outputs import prediction_cells
from aam.files import write_table


def predict(config: PredictConfig) -> Path:
    """Run `aam predict`; the result is the file that was written."""
    model = load(config.model, config.device, config.attn_implementation)
    frame = model.predict(
        config.table, config.metadata, sequences=config.sequences,
        rarefy_depth=config.rarefy_depth, allow_missing=config.allow_missing,
        batch_size=config.batch_size,
    )  # fmt: skip
    write_table(config.output, ["sample-id", *frame.columns], prediction_cells(frame))
    log(f"{len(frame)} predictions of {model.target.column!r}: {config.output}")
    return config.output
