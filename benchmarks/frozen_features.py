"""What frozen vectors of pretrained models tell about samples, beside a random forest.

    python -m benchmarks.frozen_features runs/wide runs/transformer

`ibd`: Crohn's disease or control, subjects kept apart; `oral`: age in years. Two features a sample:
the mean of its ASVs' vectors, and what `aam embed` gives. Linear models with a penalty chosen by
inner folds, five outer folds; the forest (on presence) sees the same folds.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aam.data.metadata import read_metadata
from aam.data.table import FeatureTable, read_table
from aam.evaluation.loaded import load
from benchmarks import machine

DATA = Path(os.environ.get("AAM_DATA") or machine.ROOT.parent / "shared" / "data")
STUDIES = {
    "ibd": ("table-rarefied-5000.biom", "ibd", "host_subject_id"),
    "oral": ("table-rarefied-1000.biom", "age", None),
}
FOLDS, SEED = 5, 0


def features(run: Path, table: FeatureTable) -> dict[str, np.ndarray]:
    """Features of each sample by name, (samples, width)."""
    model = load(run, "cpu")
    present = table.counts.sign()
    vectors = model.embed(table, asvs=True).loc[:, "e0":].to_numpy()
    mean = (present @ vectors) / np.maximum(present.sum(axis=1), 1)[:, None]
    embedded = model.embed(table)
    embedded = embedded[[*embedded.columns[1:], "faith_pd"]].to_numpy()
    return {"mean ASV vector": mean, "embed": embedded}


def score(inputs: np.ndarray, target: np.ndarray, groups: np.ndarray, *, forest: bool) -> float:
    """AUC of classes, or R2 of numbers, of held-out folds pooled."""
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.metrics import r2_score, roc_auc_score
    from sklearn.model_selection import GridSearchCV, GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes = target.dtype == bool
    found = np.zeros(len(target))
    for train, held in GroupKFold(FOLDS, shuffle=True, random_state=SEED).split(
        inputs, groups=groups
    ):
        if forest:
            kind = RandomForestClassifier if classes else RandomForestRegressor
            model = kind(200, max_features="sqrt", random_state=SEED, n_jobs=-1)
        else:
            base = LogisticRegression(max_iter=2000) if classes else Ridge()
            name = "logisticregression__C" if classes else "ridge__alpha"
            model = GridSearchCV(
                make_pipeline(StandardScaler(), base), {name: np.logspace(-4, 4, 9)},
                cv=list(GroupKFold(3).split(inputs[train], groups=groups[train])),
                scoring="roc_auc" if classes else "r2",
            )  # fmt: skip
        model.fit(inputs[train], target[train])
        found[held] = (
            model.predict_proba(inputs[held])[:, 1] if classes else model.predict(inputs[held])
        )
    return float(roc_auc_score(target, found) if classes else r2_score(target, found))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each study and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of `aam pretrain`")
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args(arguments)
    for study, (file, column, group) in STUDIES.items():
        table = read_table(options.data / study / file)
        metadata = read_metadata(options.data / study / "metadata.tsv").select(table.sample_ids)
        groups = np.arange(len(table.sample_ids))
        if group is not None:
            groups = np.unique(metadata.text(group), return_inverse=True)[1]
        if metadata.is_numeric(column):
            target = metadata.numeric(column)
        else:
            values = np.array(metadata.text(column))
            target = values == np.unique(values)[0]
        what = "AUC" if target.dtype == bool else "R2"
        presence = table.counts.sign().astype(np.float32).toarray()
        print(f"{study} {column} {what}: forest {score(presence, target, groups, forest=True):.3f}")
        for run in options.runs:
            for name, inputs in features(run, table).items():
                print(f"  {run.name:20}{name:20}{score(inputs, target, groups, forest=False):.3f}")


if __name__ == "__main__":
    main()
