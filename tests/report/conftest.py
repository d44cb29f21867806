"""Fabricated run directories: the files that training leaves, with numbers that look like runs."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest


def result(name, value, baselines, higher_is_better=True):
    return {
        "name": name,
        "part": "validation",
        "value": value,
        "higher_is_better": higher_is_better,
        "baselines": baselines,
    }


def write_summary(folder, **entries):
    facts = [
        ("samples read", 428, "table.biom", "info"),
        ("samples below the rarefaction depth", 42, "2538.1000102 and 41 more", "dropped"),
        ("sequences longer than max_bp", 3, "", "cut"),
    ]
    summary = {
        "title": "A run on ibd",
        "command": "aam pretrain --table table.biom --tree tree.nwk --output-dir runs/pre",
        "aam_version": "0.1.0",
        "torch_version": "2.13.0",
        "device": "cpu",
        "threads": 2,
        "started": "2026-01-02 03:04:05",
        "seconds": 1234.5,
        "steps": 400,
        "samples_train": 292,
        "samples_validation": 60,
        "parameters": 2_345_678,
        "data": [dict(zip(("what", "count", "detail", "kind"), one, strict=True)) for one in facts],
        "warnings": [],
        "config": {"model": {"dim": 128, "heads": 4}, "lr": 6e-4, "resume_from": None},
        "target": None,
        **entries,
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def write_table(path, table):
    """Write columns as a run does: without quotes."""
    lines = [list(table), *zip(*table.values(), strict=True)]
    path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines), encoding="utf-8")


def write_curves(folder, metrics, steps=400):
    rng, step = np.random.default_rng(0), np.arange(1, steps + 1)
    rows = []
    for metric, start, end in metrics:
        value = end + (start - end) * np.exp(-step / 60)
        noisy = value + 0.04 * abs(start) * rng.normal(size=steps)
        columns = {"step": step, "epoch": step // 36, "metric": metric}
        rows.append(pd.DataFrame(columns | {"part": "train", "value": noisy}))
        rows.append(pd.DataFrame(columns | {"part": "validation", "value": value})[35::36])
    pd.concat(rows).to_csv(folder / "metrics.csv", index=False)


def pretraining(folder, samples=60, **entries):
    """A pretraining run with distances, placements and curves."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    place = np.repeat(rng.normal(size=(samples // 4 + 1, 3)), 4, axis=0)[:samples]
    place += 0.4 * rng.normal(size=place.shape)
    ids = np.array([f"2538.{1000100 + i}" for i in range(samples)])
    first, second = np.triu_indices(samples, 1)
    true = 0.35 + 0.45 * np.tanh(np.linalg.norm(place[first] - place[second], axis=1) / 3)
    pairs = {
        "sample_a": ids[first],
        "sample_b": ids[second],
        "true": true,
        "predicted": 0.08 + 0.87 * true + 0.025 * rng.normal(size=len(true)),
        "same_group": (first // 4 == second // 4).astype(int),
    }
    write_table(folder / "distances.tsv", pairs)
    write_curves(
        folder,
        [
            ("loss", 2.1, 0.55), ("clade_loss", 7.0, 0.2), ("clade_jaccard", 0.4, 0.9),
            ("nucleotide_accuracy", 0.3, 0.84), ("mantel_r", 0.5, 0.94),
            ("distance_mae", 0.09, 0.03), ("learning_rate", 6e-4, 1e-5),
        ],
    )  # fmt: skip
    edits = np.append(rng.gamma(1.5, 3, size=199), np.inf)
    nearest = 1 / (1 + 0.05 * np.minimum(edits, 20))
    jaccard = nearest + 0.3 * (1 - nearest)
    columns = {"edits": edits, "support": jaccard**0.5, "jaccard": jaccard}
    write_table(folder / "placements.tsv", columns | {"jaccard_of_nearest": nearest})
    simple = {"placement": 0.9, "Bray-Curtis": 0.71, "constant": None}
    copied = "nearest known ASV"
    results = [
        result("Mantel r", 0.938, simple),
        result("Mantel r between groups", 0.842, {"placement": 0.849, "Bray-Curtis": 0.57}),
        result("distance MAE", 0.0041, {"placement": 0.0058, "constant": 0.081}, False),
        result("weighted normalised distance MAE", 9.5e-5, {"placement": 9.53e-5}, False),
        result("Faith PD R2", 0.99, {"placement": 0.968}),
        result("clade memberships of new ASVs, Jaccard", 0.9025, {copied: 0.8878}),
        result("the same, more than 6 edits from any known one", 0.797, {copied: 0.747}),
        result("masked-nucleotide accuracy, ASVs not in training", 0.836, {"consensus": 0.79}),
    ]
    write_summary(folder, **{"results": results, **entries})
    return folder


def regression(folder, **entries):
    """A fine-tuning run on a number."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(2)
    age = rng.uniform(20, 80, size=250)
    predictions = {
        "sample-id": [f's{i}"' for i in range(250)],  # a lone quote must not swallow rows
        "part": ["validation"] * 60 + ["train"] * 190,
        "true": age,
        "predicted": 50 + 0.7 * (age - 50) + 7 * rng.normal(size=250),
    }
    write_table(folder / "predictions.tsv", predictions)
    write_curves(folder, [("loss", 0.5, 0.2), ("target_loss", 0.5, 0.2), ("r2", -0.2, 0.43)])
    results = [
        result("age R2", 0.431, {"random forest": 0.458, "mean": -0.001}),
        result("age MAE", 5.91, {"random forest": 5.76, "mean": 9.04}, False),
    ]
    target = {"column": "age", "kind": "regression", "classes": []}
    write_summary(folder, **{"results": results, "target": target, **entries})
    return folder


def classification(folder, classes=("Control", "Crohns"), column="ibd", **entries):
    """A fine-tuning run on a class."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    true = rng.integers(0, len(classes), size=120)
    score = rng.normal(size=(120, len(classes)))
    score[np.arange(120), true] += 1.5
    probability = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)
    predictions = {
        "sample-id": [f"s{i}" for i in range(120)],
        "part": ["validation"] * 80 + ["train"] * 40,
        "true": [classes[i] for i in true],
        "predicted": [classes[i] for i in probability.argmax(axis=1)],
        **{f"probability_{name}": probability[:, i] for i, name in enumerate(classes)},
    }
    write_table(folder / "predictions.tsv", predictions)
    write_curves(folder, [("loss", 0.7, 0.4), ("accuracy", 0.5, 0.8)])
    results = [
        result("ibd accuracy", 0.8, {"random forest": 0.75, "majority": 0.62}),
        result("ibd balanced accuracy", 0.75, {"random forest": 0.75, "majority": 0.5}),
        result("ibd AUC", None, {"random forest": None, "majority": 0.5}),
    ]
    target = {"column": column, "kind": "classification", "classes": list(classes)}
    write_summary(folder, **{"results": results, "target": target, **entries})
    return folder


@pytest.fixture(scope="session")
def fabricate():
    """The functions of this file that write run directories."""
    return SimpleNamespace(
        pretraining=pretraining,
        regression=regression,
        classification=classification,
        write_table=write_table,
        result=result,
    )
