"""Every option of pretrain and finetune, from the command line to the written model."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from aam import config
from aam.data.distances import compute_unifrac

STEPS = ("--epochs", 1, "--max-steps", 2)

PRETRAIN = {
    "defaults": "",
    "count add": "--count-embedding add",
    "count concat": "--count-embedding concat --sample-position slot --token-limit 8",
    "count film": "--count-embedding film --asv-sampling first --token-limit 8",
    "attention embedding": "--sample-embedding attention --asv-sampling random --token-limit 8",
    "fixed scale": "--distance-scale 10 --ffn-dim 48 --dropout 0.3 --max-bp 20",
    "faith": "--unifrac-metric faith-pd --best-metric faith_pd_mae",
    "weighted": "--unifrac-metric weighted --best-metric distance_mae",
    "weighted normalized": "--unifrac-metric weighted-normalized --drop-missing-tips",
    "spans": "--mask-strategy span --mask-probability 0.3 --masked-share 1.0",
    "nucleotides alone": "--unifrac-penalty 0 --nucleotide-penalty 2",
    "distances alone": "--nucleotide-penalty 0 --mixed-samples 0.5",
    "slots apart": "--no-share-asvs --no-gradient-checkpointing",
    "math": "--attn-implementation math --device cpu --nucleotide-embedding sum",
    "sdpa": "--attn-implementation sdpa",
    "optimizer": (
        "--weight-decay 0 --warmup-fraction 0.5 --clip 0.1 --lr 1e-3 "
        "--early-stopping 1 --validate-every 2"
    ),
    "groups": "--metadata META --group-column subject --validation-fraction 0.4 --seed 3",
    "ids": "--train-ids TRAIN --validation-ids VALIDATION",
    "rarefied": "--rarefy-depth 1000 --allow-missing",
    "h5": "NOTREE --unifrac-matrix H5",
    "tsv": "NOTREE --unifrac-matrix TSV",
    "npy": "NOTREE --unifrac-matrix NPY --unifrac-matrix-ids IDS",
    "toml": "--config CONFIG",
    "tensorboard": "--tensorboard",
    "effective batch": "--effective-batch-size 8 --max-memory-fraction 0.5 --checkpoint-minutes 1",
    "limited memory": "--max-memory-gb 4 --oversize subsample",
    "on disk": "--on-disk always --index-dir INDEX",
}
FINETUNE = {
    "defaults": "age",
    "task": "age --task regression",
    "classes": "diagnosis --class-weights",
    "numbers as classes": "visits --task classification",
    "minmax mse": "age --nucleotide-embedding sum --target-transform minmax --target-loss mse",
    "none mae": "age --target-transform none --target-loss mae",
    "category quantile": (
        "age --target-transform zscore-category --categorical-columns site "
        "--target-loss quantile --quantile 0.8"
    ),
    "log minmax asymmetric": (
        "age --target-transform log-minmax --target-loss asymmetric --quantile 0.7"
    ),
    "log zscore": "age --target-transform log-zscore --target-head mlp --no-target-norm",
    "linear and mlp": "age --target-head linear+mlp --target-penalty 2",
    "concat": "age --categorical-columns site diagnosis --categorical-embed-dim 4",
    "add": "age --categorical-columns site --categorical-fusion add",
    "penalties": "age --count-penalty 1 --unifrac-penalty 1 --nucleotide-penalty 1 TREE",
    "classes with matrix": "diagnosis --unifrac-penalty 1 --unifrac-matrix H5 --mask-strategy span",
    "pretrained": "age --pretrained-encoder PRE --best-metric mae",
    "frozen": "diagnosis --pretrained-encoder PRE --freeze-base --no-share-asvs",
    "frozen with counts": "age --pretrained-encoder PRE --freeze-base --count-penalty 0.5",
    "count film": "age --count-embedding film --sample-position slot --sample-embedding attention",
    "group": "diagnosis --group-column subject",
}
LOSSES = {
    "unifrac_penalty": "unifrac_loss",
    "nucleotide_penalty": "nucleotide_loss",
    "count_penalty": "count_loss",
    "target_penalty": "target_loss",
}


@pytest.fixture(scope="module")
def files(community, aam, tmp_path_factory) -> dict[str, Path]:
    """What the options above name in capitals."""
    folder = tmp_path_factory.mktemp("files")
    found = {
        name: folder / file
        for name, file in {
            "H5": "d.h5", "TSV": "d.tsv", "NPY": "d.npy", "IDS": "ids.txt", "TRAIN": "train.txt",
            "VALIDATION": "validation.txt", "CONFIG": "run.toml", "META": "metadata.tsv",
            "INDEX": "index",
            "PRE": "pre",
        }.items()
    }  # fmt: skip
    for name in ("H5", "TSV"):
        compute_unifrac(community.table, community.tree, "unweighted", found[name])
    with open(found["TSV"]) as file:
        rows = list(csv.reader(file, delimiter="\t"))
    ids = rows[0][1:]
    np.save(found["NPY"], np.array([row[1:] for row in rows[1:]], dtype=float))
    found["IDS"].write_text("\n".join(ids))
    found["TRAIN"].write_text("\n".join(ids[:10]))
    found["VALIDATION"].write_text("\n".join(ids[10:16]) + "\n")
    found["CONFIG"].write_text('mask-strategy = "span"\n[optimizer]\nlr = 1e-3\n')
    lines = community.metadata.read_text().splitlines()
    extra = ["visits", "numeric", *(str(n % 3) for n in range(len(lines) - 2))]
    found["META"].write_text(
        "\n".join(f"{line}\t{one}" for line, one in zip(lines, extra, strict=True)) + "\n"
    )
    assert aam("pretrain", *STEPS, "--output-dir", found["PRE"]) == 0
    return found


def words_of(text: str, files: dict[str, Path], community) -> list[str]:
    words = text.replace("TREE", f"--tree {community.tree}").split()
    return [str(files.get(word, word)) for word in words]


def check_run(run: Path) -> dict:
    """The files that every run has, with losses that are finite and add up."""
    summary = json.loads((run / "summary.json").read_text())
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows} == {"train", "validation"}
    values = {row["metric"]: float(row["value"]) for row in rows if row["part"] == "train"}
    assert all(np.isfinite(float(row["value"])) for row in rows)
    penalties = summary["config"]["losses"]
    parts = {name: penalties.get(name, 0) for name in LOSSES if penalties.get(name, 0)}
    assert {LOSSES[name] for name in parts} == {name for name in values if name.endswith("_loss")}
    assert sum(weight * values[LOSSES[name]] for name, weight in parts.items()) == pytest.approx(
        values["loss"], rel=1e-5
    )
    # No loss swamps the others, whatever the transform.
    assert max(values[LOSSES[name]] for name in parts) < 60
    assert (run / "model.safetensors").is_file() and (run / "checkpoints" / "last.pt").is_file()
    return summary


@pytest.mark.parametrize("case", PRETRAIN)
def test_pretrain(case, aam, community, files, tmp_path):
    text = PRETRAIN[case]
    without_tree = text.startswith("NOTREE")
    words = words_of(text.removeprefix("NOTREE"), files, community)
    given = ("--table", community.table, "--tree", community.tree)[: 2 if without_tree else 4]
    run = tmp_path / "run"
    assert aam("pretrain", *given, *STEPS, "--output-dir", run, *words, files=False) == 0
    summary = check_run(run)
    if case == "optimizer":
        assert summary["steps"] == 2
    if case == "tensorboard":
        assert list((run / "tensorboard").glob("events*"))
    if case == "ids":
        assert (summary["samples_train"], summary["samples_validation"]) == (10, 6)
    if case == "toml":
        assert summary["config"]["losses"]["mask_strategy"] == "span"
    if case == "fixed scale":
        assert any("cut at 20 bases" in fact["what"] for fact in summary["data"])


@pytest.mark.parametrize("case", FINETUNE)
def test_finetune_and_predict(case, aam, community, files, tmp_path):
    column, *words = words_of(FINETUNE[case], files, community)
    run, output = tmp_path / "run", tmp_path / "out.tsv"
    metadata = ("--metadata", files["META"], "--table", community.table)
    options = ("--metadata-column", column, "--output-dir", run, *STEPS, *words)
    assert aam("finetune", *metadata, *options, files=False) == 0
    summary = check_run(run)
    assert summary["target"]["column"] == column
    for given in (metadata[:2], ()):
        output.unlink(missing_ok=True)
        words = ("--table", community.table, "--model", run, "--output", output, *given)
        assert aam("predict", *words, files=False) == 0
        with open(output) as file:
            rows = [line.rstrip("\n").split("\t") for line in file]
        assert rows[0][:2] == ["sample-id", "predicted"] and len(rows) == 25
    assert aam("evaluate", "--model", run, *metadata, files=False) == 0


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_no_option_is_left_out(command):
    """Every option of the two commands stands in a case above, in TINY, or in a named test."""
    from tests.conftest import TINY

    cases = " ".join([*PRETRAIN.values(), *FINETUNE.values(), *TINY, *map(str, STEPS)])
    elsewhere = {
        "--table", "--tree", "--metadata", "--metadata-column", "--output-dir",
        "--overwrite", "--resume-from",  # test_resume, test_command_line
        "--sequences",  # test_command_line
        "--compile-model",  # below
        "--memory-profile",  # test_memory_profile
        "--devices", "--num-nodes", "--data-parallel", "--strategy",  # test_ranks, test_layout
        "--sharded-checkpoints",  # test_ranks_training
    }  # fmt: skip
    kind = {"pretrain": config.PretrainConfig, "finetune": config.FinetuneConfig}[command]
    options = {f"--{leaf[-1].replace('_', '-')}" for leaf in config.leaves(kind)}
    written = set(cases.replace("--no-", "--").split())
    assert options - written - elsewhere == set()


def test_compiled_and_plain_models_learn_the_same(aam, tmp_path):
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("torch.compile needs a C++ compiler, and there is none")
    words = ("pretrain", "--dropout", 0, "--max-steps", 1, "--epochs", 1)
    for name, more in (("plain", ()), ("compiled", ("--compile-model",))):
        assert aam(*words, *more, "--output-dir", tmp_path / name) == 0
    plain, compiled = (losses(tmp_path / name) for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)


def losses(run: Path) -> list[float]:
    with open(run / "metrics.csv", newline="") as file:
        rows = csv.DictReader(file)
        return [float(r["value"]) for r in rows if r["part"] == "train" and r["metric"] == "loss"]


def test_interchangeable_settings_give_the_same_losses(aam, tmp_path):
    """Kernels, sharing and recomputation change speed and memory, not what is learned."""
    words = ("pretrain", "--epochs", 1, "--lr", 1e-3)
    variants = {
        "plain": ("--dropout", 0),
        "math": ("--dropout", 0, "--attn-implementation", "math"),
        "sdpa": ("--dropout", 0, "--attn-implementation", "sdpa"),
        "apart": ("--dropout", 0, "--no-share-asvs", "--nucleotide-penalty", 0),
        "shared": ("--dropout", 0, "--nucleotide-penalty", 0),
        "recomputed": ("--dropout", 0.2),
        "kept": ("--dropout", 0.2, "--no-gradient-checkpointing"),
    }
    found = {}
    for name, more in variants.items():
        assert aam(*words, *more, "--output-dir", tmp_path / name) == 0
        found[name] = losses(tmp_path / name)
        assert len(found[name]) == 5
    assert found["math"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["sdpa"] == pytest.approx(found["math"], rel=1e-5)
    assert found["apart"] == pytest.approx(found["shared"], rel=1e-5)
    assert found["kept"] == found["recomputed"]  # bit for bit, dropout included


def test_overwrite_replaces_the_run_and_nothing_else(aam, tmp_path, capsys):
    run = tmp_path / "run"
    words = ("pretrain", *STEPS, "--output-dir", run)
    assert aam(*words) == 0
    (run / "notes.txt").write_text("mine")
    (run / "embeddings.tsv").write_text("old")
    assert aam(*words) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert aam(*words, "--overwrite") == 0
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "embeddings.tsv").read_text() != "old"
    assert "overwrite =" not in (run / "config.toml").read_text()
