"""UniFrac of a whole table as a frame, by the built-in computation or by the package `unifrac`.

The package (biocore's, from conda or PyPI) computes on a GPU where it finds one. It is given what
the built-in computation has matched: the table's features that are on the tree, and the tree
sheared to them, as files, which every version of it takes.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from aam.data.newick import newick
from aam.data.table import FeatureTable
from aam.data.unifrac import METRICS, UniFrac
from aam.errors import InputError

FUNCTIONS = {  # what the package calls the metrics
    "unweighted": "unweighted",
    "weighted": "weighted_unnormalized",
    "weighted-normalized": "weighted_normalized",
    "faith-pd": "faith_pd",
}


def unifrac_frame(table: FeatureTable, source: UniFrac, metric: str, engine: str) -> Any:
    """Distances of all samples of a table, a square frame, or a frame of their ``faith_pd``.

    `source` is UniFrac of the table, unweighted; `engine` is builtin, or unifrac: the package.
    """
    import pandas as pd

    if metric not in FUNCTIONS:
        raise InputError(f"unknown metric {metric!r}; choose {', '.join(METRICS)} or faith-pd")
    if engine == "unifrac":
        values = _by_package(table, source, metric)
    elif metric == "faith-pd":
        values = source.faith_pd()
    else:
        values = source.pairwise(metric=metric)
    index = pd.Index(source.sample_ids, name="sample-id")
    return pd.DataFrame(values, index, ["faith_pd"] if values.ndim == 1 else index.rename(None))


def _by_package(table: FeatureTable, source: UniFrac, metric: str) -> np.ndarray:
    """What the package computes: (n, n) distances or (n,) Faith PD."""
    import biom
    import h5py

    try:
        package = importlib.import_module("unifrac")
    except ImportError as error:
        raise InputError(
            "--engine unifrac: the package is not installed "
            f"({error}); conda install -c bioconda unifrac, or use --engine builtin"
        ) from error
    kept = np.flatnonzero(source.tip_of_column >= 0)
    kept = kept[np.argsort(source.tip_of_column[kept])]  # in the order of the tips
    names = [table.feature_ids[int(column)] for column in kept]
    counts = biom.Table(csr_matrix(table.counts[:, kept].T), names, table.sample_ids)
    compute = getattr(package, FUNCTIONS[metric])
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("table.biom", "tree.nwk")]
        with h5py.File(paths[0], "w") as file:
            counts.to_hdf5(file, "aam")
        text = newick(source.tree.parent, source.tree.length, names)
        Path(paths[1]).write_text(text, encoding="utf-8")
        if metric == "faith-pd":
            return compute(*paths)[list(table.sample_ids)].to_numpy(dtype=np.float64)
        found = compute(*paths, threads=torch.get_num_threads())
    return found.filter(table.sample_ids).data.astype(np.float64)
