"""`aam embed`: one vector a sample, or an ASV, by a pretrained model."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from aam.config import EmbedConfig
from aam.errors import log
from aam.evaluation.loaded import load
from aam.files import atomic_path


def embed(config: EmbedConfig) -> Path:
    """Run `aam embed`; the result is the file that was written."""
    path = config.output
    frame = load(config.model, config.device, config.attn_implementation).embed(
        config.table, config.asvs, config.dimensions, sequences=config.sequences,
        rarefy_depth=config.rarefy_depth, seed=config.seed,
    )  # fmt: skip
    vectors = frame.loc[:, "e0":]
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".tsv":
            frame.to_csv(temporary, sep="\t", float_format="%.6g", quoting=csv.QUOTE_NONE)
        else:
            columns = {"sequences" if config.asvs else "ids": frame.index}
            columns |= {name: frame[name] for name in frame.columns.difference(vectors.columns)}
            arrays: dict[str, Any] = {k: np.array(one.tolist()) for k, one in columns.items()}
            with temporary.open("wb") as file:
                np.savez(file, **arrays, vectors=vectors.to_numpy())
    what = "ASVs" if config.asvs else "samples"
    more = "" if config.asvs else " and Faith PD"
    log(f"{len(frame)} {what}, {vectors.shape[1]} dimensions{more}: {path}")
    return path
