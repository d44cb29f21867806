"""Every option of every command, from the command line to what it writes."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import biom
import h5py
import numpy as np
import pytest

from aam.cli import COMMANDS
from aam.config import CONFIGS, flag, options_of
from aam.data.distances import read_distances
from aam.data.table import read_table
from aam.data.tree import read_tree
from aam.data.unifrac import UniFrac

STEPS = ("--epochs", 1, "--max-steps", 2)

# Words in capitals are files (see `files`), RUN:name is the run of a case; each case has several
# options. --encoder wide where a case is not about transformers.
PRETRAIN = {
    "tree": (
        "--table T --tree TREE --metadata META --group-column subject --ffn-dim 48 --dropout 0.3 "
        "--attn-implementation math --device cpu --no-gradient-checkpointing"
    ),
    "wide": (
        "--table T --tree TREE --encoder wide --wide-dim 64 --validation-fraction 0.4 --seed 3 "
        "--tensorboard --mask-strategy span --mask-probability 0.3 --masked-share 1.0 "
        "--config CONFIG"
    ),
    "clades": (
        "--table T --tree FEWERTIPS --drop-missing-tips --encoder wide --nucleotide-penalty 0 "
        "--best-metric clade_loss --rarefy-depth 1000 --max-bp 20 --weight-decay 0 "
        "--warmup-fraction 0.5 --clip 0.1 --lr 1e-3 --early-stopping 1 --validate-every 2 "
        "--effective-batch-size 8 --max-memory-fraction 0.5 --checkpoint-minutes 1"
    ),
    "nucleotides": (
        "--table T --tree TREE --unifrac-penalty 0 --nucleotide-penalty 2 "
        "--attn-implementation sdpa"
    ),
    "reference": "--sequences FASTA --tree HASHEDTREE --encoder wide",
    "indexed": (
        "--table HASHED --sequences FASTA --tree HASHEDTREE --encoder wide --on-disk always "
        "--index-dir INDEX --train-ids TRAIN --validation-ids VALIDATION --max-memory-gb 4"
    ),
    "jaccard": "--table T --distance jaccard --asv-sampling random --token-limit 8",
    "filling": (
        "--table T --distance bray-curtis --max-memory-gb 4 --oversize subsample "
        "--asv-sampling first --token-limit 8"
    ),
    "aitchison": "--table T --distance aitchison --encoder wide --best-metric distance_mae",
    "matrix": (
        "--table T --unifrac-matrix FEWERNPY --unifrac-matrix-ids FEWERIDS --allow-missing "
        "--encoder wide"
    ),
}
FINETUNE = {
    "plain": "age",
    "pretrained": (
        "age --pretrained-encoder RUN:tree --best-metric mae --target-transform none "
        "--target-loss mae"
    ),
    "frozen": (
        "diagnosis --pretrained-encoder RUN:wide --freeze-base --class-weights "
        "--group-column subject"
    ),
    "counts": (
        "age --pretrained-encoder RUN:filling --freeze-base --count-penalty 0.5 "
        "--count-embedding add --target-transform log-zscore --target-head mlp"
    ),
    "visits": (
        "visits --task classification --count-penalty 1 --nucleotide-penalty 1 --mask-strategy span"
    ),
    "categories": (
        "age --target-transform zscore-category --categorical-columns site "
        "--categorical-fusion add --target-loss quantile --quantile 0.8"
    ),
    "mse": (
        "age --target-transform minmax --target-loss mse --target-head linear+mlp "
        "--target-penalty 2 --categorical-columns site diagnosis --categorical-embed-dim 4"
    ),
    "asymmetric": (
        "age --target-transform log-minmax --target-loss asymmetric --quantile 0.7 "
        "--encoder wide --task regression"
    ),
}
OTHERS = {
    "predict": (
        "predict --model RUN:plain --table T --output out.tsv --rarefy-depth 0 --device cpu",
        "predict --model RUN:plain --table HASHED --sequences FASTA --output out.tsv --overwrite "
        "--rarefy-depth 1000 --batch-size 3 --attn-implementation math",
        "predict --model RUN:categories --table T --output out.tsv --metadata FEWERMETA "
        "--allow-missing --overwrite",
    ),
    "evaluate": (
        "evaluate --model RUN:tree --table T --tree TREE --output out.json --device cpu",
        "evaluate --model RUN:tree --table HASHED --sequences FASTA --tree HASHEDTREE "
        "--ids VALIDATION --output out.json --overwrite --attn-implementation sdpa",
        "evaluate --model RUN:wide --table T --tree FEWERTIPS --drop-missing-tips --all-samples "
        "--metadata META --group-column subject --rarefy-depth 1000",
        "evaluate --model RUN:reference --table T --tree TREE --all-samples",
        "evaluate --model RUN:filling --table T",
        "evaluate --model RUN:filling --table T --unifrac-matrix NPY --unifrac-matrix-ids IDS",
        "evaluate --model RUN:filling --table T --tree TREE",
        "evaluate --model RUN:plain --table T --metadata FEWERMETA --allow-missing --all-samples",
    ),
    "inspect": (
        "inspect --table T --tree TREE --model RUN:wide --rarefy-depth 0 --metadata META "
        "--group-column subject --metadata-column age --batch-size 4 --seed 1",
        "inspect --table HASHED --sequences FASTA --model RUN:filling --distance jaccard "
        "--rarefy-depth 1000 --max-bp 20 --token-limit 8 --asv-sampling first "
        "--validation-fraction 0.4",
        "inspect --table T --unifrac-matrix NPY --unifrac-matrix-ids IDS --rarefy-depth 0 "
        "--train-ids TRAIN --validation-ids VALIDATION --model RUN:plain",
        "inspect --table T --tree FEWERTIPS --drop-missing-tips --rarefy-depth 0 "
        "--metadata FEWERMETA --allow-missing --on-disk always --index-dir INDEX",
        # --max-memory-gb and --max-memory-fraction: test_inspect
    ),
    "unifrac": (
        "unifrac --table T --tree TREE --output out.h5 --metric weighted",
        "unifrac --table HASHED --sequences FASTA --tree HASHEDTREE --output out.h5 --overwrite "
        "--rarefy-depth 1000 --seed 1",
        "unifrac --table T --tree FEWERTIPS --drop-missing-tips --output out.tsv",
        "unifrac --table T --model RUN:tree --output weighted.tsv --metric weighted-normalized",
        "unifrac --table T --model RUN:wide --output faith.tsv --metric faith-pd --device cpu",
        "unifrac --table HASHED --sequences FASTA --model RUN:reference --output other.h5 "
        "--rarefy-depth 1000",
    ),
    "embed": (
        "embed --table T --model RUN:tree --output out.tsv --dimensions 6",
        "embed --table T --model RUN:tree --output out.tsv --overwrite",
        "embed --table T --model RUN:wide --output out.npz --rarefy-depth 1000 --seed 1",
        "embed --table T --model RUN:tree --output asvs.tsv --asvs --attn-implementation math",
        "embed --table HASHED --sequences FASTA --model RUN:reference --output asvs.npz --asvs "
        "--device cpu",
    ),
    "demo": ("--seed", "--output-dir"),  # test_demo
}
ELSEWHERE = {
    "--metadata-column", "--output-dir", "--overwrite", "--resume-from",  # below, test_resume
    "--compile-model",  # below
    "--memory-profile",  # test_memory_profile
    "--devices", "--data-parallel", "--strategy",  # test_ranks, test_layout
    "--precision", "--tf32",  # of learning
    "--max-memory-gb", "--max-memory-fraction",  # of inspect: test_inspect
    "--engine",  # test_loaded
    "--samples", "--pretrain-epochs", "--finetune-steps",  # test_demo
}  # fmt: skip
LOSSES = ("clade_loss", "unifrac_loss", "nucleotide_loss", "count_loss", "target_loss")


@pytest.fixture(scope="module")
def files(community, aam, tmp_path_factory) -> dict[str, Path]:
    """What the options above name in capitals."""
    folder = tmp_path_factory.mktemp("files")
    names = {
        "NPY": "d.npy", "IDS": "ids.txt", "FEWERNPY": "fewer.npy", "FEWERIDS": "fewer.txt",
        "TRAIN": "train.txt", "VALIDATION": "validation.txt", "CONFIG": "run.toml",
        "META": "metadata.tsv", "FEWERMETA": "fewer-metadata.tsv", "INDEX": "index",
        "HASHED": "hashed.biom", "FASTA": "sequences.fasta", "HASHEDTREE": "hashed.nwk",
        "FEWERTIPS": "fewer.nwk",
    }  # fmt: skip
    found = {name: folder / file for name, file in names.items()}
    found |= {"T": community.table, "TREE": community.tree}
    unifrac = UniFrac(read_table(community.table), read_tree(community.tree))
    ids, distances = unifrac.sample_ids, unifrac.pairwise()
    for kind, count in (("", 24), ("FEWER", 22)):
        np.save(found[f"{kind}NPY"], distances[:count, :count])
        found[f"{kind}IDS"].write_text("\n".join(ids[:count]))
    found["TRAIN"].write_text("\n".join(ids[:10]))
    found["VALIDATION"].write_text("\n".join(ids[10:16]) + "\n")
    found["CONFIG"].write_text('best-metric = "nucleotide_loss"\n[optimizer]\nlr = 1e-3\n')
    lines = community.metadata.read_text().splitlines()
    extra = ["visits", "numeric", *(str(n % 3) for n in range(len(lines) - 2))]
    lines = [f"{line}\t{one}" for line, one in zip(lines, extra, strict=True)]
    found["META"].write_text("\n".join(lines) + "\n")
    found["FEWERMETA"].write_text("\n".join(lines[:-2]) + "\n")

    table, tree = biom.load_table(str(community.table)), community.tree.read_text()
    tips = [str(one) for one in read_tree(community.tree).tip_names]
    hashes = {one: f"{n:032x}" for n, one in enumerate(tips)}
    found["FASTA"].write_text("".join(f">{hashes[one]}\n{one}\n" for one in tips))
    found["HASHEDTREE"].write_text(re.sub("[ACGT]{9,}", lambda one: hashes[one[0]], tree))
    found["FEWERTIPS"].write_text(tree.replace(str(table.ids("observation")[0]), "other"))
    table.update_ids(hashes, "observation", strict=False)
    with h5py.File(found["HASHED"], "w") as file:
        table.to_hdf5(file, "test")
    return found


@pytest.fixture(scope="module")
def argv_of(files, aam, tmp_path_factory) -> Callable[[str], list[str]]:
    """Gives the argv of a case, its files in place; a run that it names is made when needed."""
    folder = tmp_path_factory.mktemp("runs")

    def run_of(name: str) -> Path:
        text, run = (PRETRAIN | FINETUNE)[name], folder / name
        if not run.exists():
            command = "pretrain"
            if name in FINETUNE:
                command, text = "finetune", f"--table T --metadata META --metadata-column {text}"
            words = ("--output-dir", run, *STEPS, *resolve(text))
            assert aam(command, *words, files=False, filling="memory" in text) == 0
        return run

    def resolve(text: str) -> list[str]:
        return [
            str(run_of(word.removeprefix("RUN:")) if "RUN:" in word else files.get(word, word))
            for word in text.split()
        ]

    return resolve


def check_run(run: Path) -> dict:
    """The files that every run has, with losses that are finite and add up."""
    summary = json.loads((run / "summary.json").read_text())
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows} == {"train", "validation"}
    values = {row["metric"]: float(row["value"]) for row in rows if row["part"] == "train"}
    assert all(np.isfinite(float(row["value"])) for row in rows)
    penalties = dict(summary["config"]["losses"])
    if summary["config"].get("distances", {}).get("tree"):
        penalties["clade_penalty"] = penalties.pop("unifrac_penalty")
    weights = {name: penalties.get(name.replace("loss", "penalty"), 0) for name in LOSSES}
    assert {name for name in weights if weights[name]} == {one for one in values if "_loss" in one}
    assert sum(weights[name] * values.get(name, 0) for name in LOSSES) == pytest.approx(
        values["loss"], rel=1e-5
    )
    # No loss swamps the others, whatever the transform.
    assert max(values.get(name, 0) for name in LOSSES) < 60
    assert (run / "model.safetensors").is_file() and (run / "checkpoints" / "last.pt").is_file()
    assert summary["results"]
    return summary


@pytest.mark.parametrize("case", PRETRAIN)
def test_pretrain(case, argv_of):
    run = Path(*argv_of(f"RUN:{case}"))
    summary = check_run(run)
    facts = {fact["what"]: fact["count"] for fact in summary["data"]}
    units = "sequences" if case == "reference" else "samples"
    parts = summary[f"{units}_train"], summary[f"{units}_validation"]
    if case == "wide":
        assert list((run / "tensorboard").glob("events*")) and parts == (14, 10)
        assert summary["config"]["optimizer"]["best_metric"] == "nucleotide_loss"
        assert summary["config"]["optimizer"]["lr"] == 1e-3
    if case == "clades":
        assert facts["sequences cut at 20 bases"] > 0
        assert facts["features left out of UniFrac: not in the tree"] == 1
    if case == "indexed":
        assert parts == (10, 6)
    if case == "reference":
        assert parts == (48, 12)
    if case == "matrix":
        assert sum(parts) == 22


@pytest.mark.parametrize("case", FINETUNE)
def test_finetune_and_predict(case, aam, argv_of, tmp_path):
    run, output = Path(*argv_of(f"RUN:{case}")), tmp_path / "out.tsv"
    assert check_run(run)["target"]["column"] == FINETUNE[case].split()[0]
    metadata, table = argv_of("--metadata META"), argv_of("--table T")
    for given in (metadata, ()) if "categorical" in FINETUNE[case] else ((),):
        words = (*table, *given, "--model", run, "--output", output, "--overwrite")
        assert aam("predict", *words, files=False) == 0
        with open(output) as file:
            rows = [line.rstrip("\n").split("\t") for line in file]
        assert rows[0][:2] == ["sample-id", "predicted"] and len(rows) == 25
    assert aam("evaluate", "--model", run, *table, *metadata, files=False) == 0


@pytest.mark.parametrize("command", [one for one in OTHERS if one != "demo"])
def test_other_commands(command, aam, files, argv_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for text in OTHERS[command]:
        words = argv_of(text)
        capsys.readouterr()  # of runs that were made for it
        assert aam(*words, files=False) == 0, text
        said = capsys.readouterr()
        if command != "unifrac" or "--model" in text:
            assert ("ASVs that the model knows" in said.err) == ("--model" in text), text
    if command == "evaluate":
        found = json.loads(Path("out.json").read_text())
        assert found["results"][0]["name"] == "Mantel r" and found["results"][0]["value"] > 0.9
    if command == "unifrac":
        by_model = read_distances(Path("weighted.tsv"))
        true = UniFrac(read_table(files["T"]), read_tree(files["TREE"]))
        distances = true.pairwise(metric="weighted-normalized")
        assert by_model.sample_ids == true.sample_ids
        assert np.abs(by_model.matrix - distances).max() < 0.1
        assert len(Path("faith.tsv").read_text().splitlines()) == 25
    if command == "embed":
        rows = [line.split("\t") for line in Path("out.tsv").read_text().splitlines()]
        assert rows[0][:3] == ["sample-id", "faith_pd", "e0"] and len(rows) == 25
        with np.load("out.npz") as arrays:
            assert arrays["vectors"].shape == (len(arrays["ids"]), len(rows[0]) - 2)
        rows = [line.split("\t") for line in Path("asvs.tsv").read_text().splitlines()]
        assert rows[0][:5] == ["sequence", "nearest", "edits", "support", "e0"]
        assert len(rows) == 45 and len(rows[0]) == 4 + 32
        with np.load("asvs.npz") as arrays:
            assert arrays["vectors"].shape == (44, 32)
            assert set(map(len, arrays["sequences"])) == {30}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_left_out(command):
    """Every option stands in a case above, in TINY, or in a named test."""
    from tests.conftest import TINY

    texts = OTHERS.get(command)
    if texts is None:  # what pretrain and finetune share is one class
        texts = [*TINY, *map(str, STEPS), *PRETRAIN.values()]
        texts += FINETUNE.values() if command == "finetune" else []
    options = {flag(one) for one in options_of(CONFIGS[command])}
    written = set(" ".join(texts).replace("--no-", "--").split())
    assert options - written - ELSEWHERE == set()


def losses(run: Path) -> list[float]:
    with open(run / "metrics.csv", newline="") as file:
        rows = csv.DictReader(file)
        return [float(r["value"]) for r in rows if r["part"] == "train" and r["metric"] == "loss"]


def test_interchangeable_settings_give_the_same_losses(aam, community, tmp_path):
    """Compilation and recomputation change speed and memory, not what is learned."""
    table = ("--table", community.table)
    pairs = ("pretrain", *table, "--distance", "jaccard", "--epochs", 1, "--dropout", 0)
    fine = (
        "finetune", *table, "--metadata", community.metadata, "--metadata-column", "age",
        "--count-penalty", 0.1, "--epochs", 1, "--dropout", 0.2, "--attn-implementation", "sdpa",
    )  # fmt: skip
    tree = (
        "pretrain", *table, "--tree", community.tree, "--epochs", 3, "--max-steps", 26,
        "--validate-every", 9,
    )  # fmt: skip
    for name, words, option in (
        ("pairs", pairs, "--compile-model"),
        ("fine", fine, "--no-gradient-checkpointing"),
        ("tree", tree, "--no-gradient-checkpointing"),
    ):
        if "compile" in option and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            continue  # torch.compile needs one
        found = []
        for place, own in (("one", words), ("other", (*words, option))):
            assert aam(*own, "--output-dir", tmp_path / name / place, files=False) == 0
            found.append(losses(tmp_path / name / place))
        assert len(found[0]) == (26 if name == "tree" else 5)
        if name == "pairs":
            found[1] = pytest.approx(found[1], rel=1e-4)
        assert found[0] == found[1]  # bit for bit, dropout included, but for compiled steps


def test_overwrite_replaces_the_run_and_nothing_else(aam, tmp_path, capsys):
    run = tmp_path / "run"
    words = ("pretrain", "--encoder", "wide", *STEPS, "--output-dir", run)
    assert aam(*words) == 0
    (run / "notes.txt").write_text("mine")
    (run / "embeddings.tsv").write_text("old")
    assert aam(*words) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert aam(*words, "--overwrite") == 0
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "embeddings.tsv").read_text() != "old"
    assert "overwrite =" not in (run / "config.toml").read_text()
