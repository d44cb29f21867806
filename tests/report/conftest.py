"""Fabricated run directories: the files that training leaves, with numbers that look like runs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest


def summary(title, **entries):
    return {
        "title": title,
        "command": "aam pretrain --table table.biom --tree tree.nwk --output-dir runs/pre",
        "aam_version": "0.1.0",
        "torch_version": "2.13.0",
        "device": "cpu",
        "threads": 2,
        "started": "2026-01-02 03:04:05",
        "seconds": 1234.5,
        "steps": 400,
        "epochs": 11,
        "samples_train": 292,
        "samples_validation": 60,
        "parameters": 2_345_678,
        "data": [
            {"what": "samples read", "count": 428, "detail": "table.biom", "kind": "info"},
            {
                "what": "samples below the rarefaction depth",
                "count": 42,
                "detail": "2538.1000102, 2538.1000103, 2538.1000104 and 39 more",
                "kind": "dropped",
            },
            {"what": "sequences longer than max_bp", "count": 3, "detail": "", "kind": "cut"},
        ],
        "results": [],
        "warnings": [],
        "config": {"model": {"dim": 128, "heads": 4}, "lr": 6e-4, "resume_from": None},
        "target": None,
        **entries,
    }


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def write_rows(path, header, rows, delimiter="\t"):
    lines = [delimiter.join(header), *(delimiter.join(str(cell) for cell in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_curves(path, metrics, steps=400):
    rng = np.random.default_rng(0)
    rows = []
    for name, start, end in metrics:
        for step in range(1, steps + 1):
            value = end + (start - end) * np.exp(-step / 60) + 0.04 * abs(start) * rng.normal()
            rows.append((step, step // 36, "train", name, value))
        for step in range(36, steps + 1, 36):
            value = end + (start - end) * np.exp(-step / 70)
            rows.append((step, step // 36, "validation", name, value))
    write_rows(path, ["step", "epoch", "part", "metric", "value"], rows, delimiter=",")


def pretraining(folder, samples=60, **entries):
    """A pretraining run with distances, placements and curves."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    place = np.repeat(rng.normal(size=(samples // 4 + 1, 3)), 4, axis=0)[:samples]
    place += 0.4 * rng.normal(size=place.shape)
    ids = [f"2538.{1000100 + i}" for i in range(samples)]
    first, second = np.triu_indices(samples, 1)
    gap = np.linalg.norm(place[first] - place[second], axis=1)
    true = 0.35 + 0.45 * np.tanh(gap / 3)
    predicted = 0.08 + 0.87 * true + 0.025 * rng.normal(size=len(true))
    group = (first // 4 == second // 4).astype(int)
    rows = zip(
        [ids[i] for i in first], [ids[i] for i in second], true, predicted, group, strict=True
    )
    write_rows(
        folder / "distances.tsv", ["sample_a", "sample_b", "true", "predicted", "same_group"], rows
    )
    write_curves(
        folder / "metrics.csv",
        [
            ("loss", 2.1, 0.55),
            ("clade_loss", 7.0, 0.2),
            ("clade_jaccard", 0.4, 0.9),
            ("nucleotide_loss", 1.9, 0.5),
            ("nucleotide_accuracy", 0.3, 0.84),
            ("mantel_r", 0.5, 0.94),
            ("distance_mae", 0.09, 0.03),
            ("learning_rate", 6e-4, 1e-5),
            ("gradient_norm", 3.0, 0.6),
        ],
    )
    edits = np.append(rng.gamma(1.5, 3, size=199), np.inf)
    nearest = 1 / (1 + 0.05 * np.minimum(edits, 20))
    jaccard = nearest + 0.3 * (1 - nearest)
    write_rows(
        folder / "placements.tsv",
        ["sequence", "nearest", "edits", "support", "jaccard", "jaccard_of_nearest"],
        zip(["ACGT"] * 200, ["ACGA"] * 200, edits, jaccard**0.5, jaccard, nearest, strict=True),
    )
    simple = {"placement": 0.9, "Bray-Curtis": 0.71, "constant": None}
    copied = "nearest known ASV"
    results = [
        _result("Mantel r", 0.938, simple),
        _result("Mantel r between groups", 0.842, {"placement": 0.849, "Bray-Curtis": 0.57}),
        _result("distance MAE", 0.0041, {"placement": 0.0058, "constant": 0.081}, False),
        _result("weighted normalised distance MAE", 9.5e-5, {"placement": 9.53e-5}, False),
        _result("Faith PD R2", 0.99, {"placement": 0.968}),
        _result("clade memberships of new ASVs, Jaccard", 0.9025, {copied: 0.8878}),
        _result("the same, more than 6 edits from any known one", 0.797, {copied: 0.747}),
        _result("masked-nucleotide accuracy, ASVs not in training", 0.836, {"consensus": 0.79}),
    ]
    values = {"results": results, **entries}
    write_json(folder / "summary.json", summary("Pretraining on ibd", **values))
    return folder


def regression(folder, **entries):
    """A fine-tuning run on a number."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(2)
    age = rng.uniform(20, 80, size=250)
    predicted = 50 + 0.7 * (age - 50) + 7 * rng.normal(size=250)
    part = ["validation" if i < 60 else "train" for i in range(250)]
    rows = zip([f"s{i}" for i in range(250)], part, age, predicted, strict=True)
    write_rows(folder / "predictions.tsv", ["sample-id", "part", "true", "predicted"], rows)
    write_curves(
        folder / "metrics.csv",
        [("loss", 0.5, 0.2), ("target_loss", 0.5, 0.2), ("r2", -0.2, 0.43), ("mae", 14, 5.9)],
    )
    values = {
        "results": [
            _result("age R2", 0.431, {"random forest": 0.458, "mean": -0.001}),
            _result("age MAE", 5.91, {"random forest": 5.76, "mean": 9.04}, False, "years"),
        ],
        "target": {"column": "age", "kind": "regression", "classes": [], "unit": "years"},
        **entries,
    }
    write_json(folder / "summary.json", summary("Fine-tuning on age", **values))
    return folder


def classification(folder, classes=("Control", "Crohns"), column="ibd", **entries):
    """A fine-tuning run on a class."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    true = rng.integers(0, len(classes), size=120)
    score = rng.normal(size=(120, len(classes)))
    score[np.arange(120), true] += 1.5
    probability = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)
    rows = [
        (
            f"s{i}",
            "validation" if i < 80 else "train",
            classes[true[i]],
            classes[probability[i].argmax()],
            *probability[i],
        )
        for i in range(120)
    ]
    header = ["sample-id", "part", "true", "predicted", *(f"probability_{c}" for c in classes)]
    write_rows(folder / "predictions.tsv", header, rows)
    write_curves(folder / "metrics.csv", [("loss", 0.7, 0.4), ("accuracy", 0.5, 0.8)])
    values = {
        "results": [
            _result("accuracy", 0.8, {"random forest": 0.75, "majority": 0.62}),
            _result("balanced accuracy", 0.75, {"random forest": 0.75, "majority": 0.5}),
            _result("auc", None, {"random forest": None, "majority": 0.5}),
        ],
        "target": {
            "column": column,
            "kind": "classification",
            "classes": list(classes),
            "unit": "",
        },
        **entries,
    }
    write_json(folder / "summary.json", summary("Fine-tuning", **values))
    return folder


def _result(name, value, baselines, higher_is_better=True, unit=""):
    return {
        "name": name,
        "part": "validation",
        "value": value,
        "unit": unit,
        "higher_is_better": higher_is_better,
        "baselines": baselines,
    }


@pytest.fixture
def fabricate():
    """The functions of this file that write run directories."""
    return SimpleNamespace(
        pretraining=pretraining,
        regression=regression,
        classification=classification,
        summary=summary,
        write_json=write_json,
        write_rows=write_rows,
        result=_result,
    )
