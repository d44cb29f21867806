"""Input that cannot be used: one line on standard error, exit code 2, and nothing is written."""

import re
import subprocess
import sys
from pathlib import Path

import biom
import h5py
import numpy as np
import pytest

from aam.cli import main
from aam.data.simulate import simulate_community


def write_tables(community, folder: Path) -> None:
    """Tables that cannot be used, or only for some purposes, under their names in capitals."""
    table = biom.load_table(str(community.table))
    asvs, ids = table.ids("observation"), table.ids()
    # What tells regions apart needs longer sequences.
    long = simulate_community(
        folder / "long", samples=8, asvs=40, asvs_per_sample=8, sequence_length=100, seed=1
    )
    other = biom.load_table(str(long.table))
    complement, generator = str.maketrans("ACGT", "TGCA"), np.random.default_rng(1)

    def renamed(table: biom.Table, name, axis: str) -> biom.Table:
        return table.update_ids({one: name(one) for one in table.ids(axis)}, axis, inplace=False)

    def changed(value: float) -> biom.Table:
        counts = table.matrix_data.toarray().astype(float)
        counts[0, 0] = value
        return biom.Table(counts, asvs, ids)

    tables = {
        "EMPTY": biom.Table(np.zeros((0, 0)), [], []),
        "NEGATIVE": changed(-1),
        "FRACTION": changed(0.5),
        "MD5": renamed(table, lambda one: f"{asvs.tolist().index(one):032x}", "observation"),
        "TABS": renamed(table, lambda one: f"{one}\tx" if one == ids[0] else one, "sample"),
        "TWO": biom.Table(np.ones((2, len(ids))), asvs[:2], ids),
        "BACKWARDS": renamed(other, lambda one: one.translate(complement)[::-1], "observation"),
        "ELSEWHERE": renamed(
            other, lambda one: "".join(generator.choice(list("ACGT"), 100)), "observation"
        ),
    }
    for name, one in tables.items():
        with h5py.File(folder / f"{name}.biom", "w") as file:
            one.to_hdf5(file, "test")
    content = community.table.read_bytes()
    (folder / "TRUNCATED.biom").write_bytes(content[: len(content) // 2])


@pytest.fixture(scope="module")
def broken(community, tmp_path_factory) -> dict[str, str]:
    """Files that cannot be used, by a name that the cases below write in capitals."""
    folder = tmp_path_factory.mktemp("broken")
    write_tables(community, folder)
    table = biom.load_table(str(community.table))
    asvs, ids = table.ids("observation"), list(table.ids())
    tree, metadata = community.tree.read_text(), community.metadata.read_text()
    header, types, *rows = metadata.splitlines()

    def column(value) -> str:
        lines = [f"{row}\t{value(n)}" for n, row in enumerate(rows)]
        return "\n".join([f"{header}\tx", *lines]) + "\n"

    square = np.random.default_rng(0).random((24, 24))
    square = (square + square.T) * (1 - np.eye(24))
    np.save(folder / "NPY.npy", square)

    def matrix(value: float) -> str:
        wrong = square.copy()
        wrong[2, 3] = value
        lines = ["\t".join([one, *map(str, row)]) for one, row in zip(ids, wrong, strict=True)]
        return "\n".join(["\t".join(["", *ids]), *lines]) + "\n"

    texts = {
        "PLAIN.biom": "this is no table\n",
        "TWICE.tsv": f"#OTU ID\tS1\tS1\n{'ACGT' * 8}\t3\t4\n",
        "FEWER.tsv": "\n".join([header, types, *rows[2:]]),
        "OTHER.tsv": "\n".join([header, types, *("x" + row for row in rows)]),
        "DUPLICATE.tsv": "\n".join([header, types, *rows, rows[0]]),
        "BLANK.tsv": column(lambda n: ""),
        "SINGLE.tsv": column(lambda n: "same"),
        "LONELY.tsv": column(lambda n: "rare" if n == 3 else "ab"[n % 2]),
        "WORDS.tsv": column(lambda n: "many" if n == 3 else n),
        "COMMAS.tsv": "sample-id,age\ns1,3\n",
        "NAN.tsv": matrix(np.nan),
        "ASYMMETRIC.tsv": matrix(9.0),
        "SHORTER.txt": "\n".join(ids[:-1]),
        "OTHERIDS.txt": "\n".join(f"x{one}" for one in ids),
        "IDS.txt": "\n".join([*ids[:5], "nobody"]),
        "NOLENGTHS.nwk": re.sub(r":[0-9.e-]+", "", tree),
        "NEGATIVETREE.nwk": tree.replace(":", ":-", 1),
        "MISSINGTIP.nwk": tree.replace(asvs[0], "ACGT" * 9),
        "TWOTIPS.nwk": f"(({asvs[0]}:1,{asvs[1]}:1):1,other:1);",
        "NOTREE.nwk": "((a:1,b:1",
        "FASTA.fasta": "".join(f">{one}\n{one}\n" for one in asvs),
        "FILE.tsv": "mine",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return {path.stem: str(path) for path in folder.iterdir()} | {
        "TABLE": str(community.table), "TREE": str(community.tree), "META": str(community.metadata),
        "LONG": str(folder / "long" / "table.biom"), "LONGTREE": str(folder / "long" / "tree.nwk"),
        "NOWHERE": str(folder / "nowhere"),
    }  # fmt: skip


TREE, MATRIX = "pretrain --tree TREE --table ", "pretrain --table TABLE --unifrac-matrix "
PAIRS, TIPS = "pretrain --table TABLE --distance jaccard ", "pretrain --table TABLE --tree "
FINE, AGE = "finetune --table TABLE --metadata ", "finetune --table TABLE --metadata META "
AGE += "--metadata-column age "
TRAINING = {
    TREE + "NOWHERE": "NOWHERE",
    TREE + "TRUNCATED": "TRUNCATED",
    TREE + "PLAIN": "PLAIN",
    TREE + "EMPTY": "EMPTY",
    TREE + "NEGATIVE": "negative",
    TREE + "FRACTION": "not whole numbers",
    TREE + "TWICE": "'S1'",
    TREE + "MD5": "--sequences",
    TREE + "TABS": "tab or a line break",
    TREE + "TABLE --rarefy-depth 99999999": "99999999",
    "pretrain --table TABLE": "one of --tree, --unifrac-matrix and --distance",
    "pretrain --tree TREE": "--table, or --sequences with --tree",
    "pretrain --sequences FASTA": "--table, or --sequences with --tree",
    "pretrain --unifrac-matrix NPY": "--table for --unifrac-matrix",
    "pretrain --table TWO --tree TWOTIPS": "2 training ASVs are tips of the tree; at least 3",
    "pretrain --sequences FASTA --tree TWOTIPS --drop-missing-tips": "2 training sequences of",
    "pretrain --sequences FASTA --tree MISSINGTIP": "--drop-missing-tips",
    TIPS + "NOWHERE": "no such file; expected a Newick tree",
    TIPS + "NOTREE": "NOTREE",
    TIPS + "NOLENGTHS": "NOLENGTHS",
    TIPS + "NEGATIVETREE": "negative",
    TIPS + "MISSINGTIP": "--drop-missing-tips",
    MATRIX + "NAN": "NAN",
    MATRIX + "ASYMMETRIC": "symmetric",
    MATRIX + "NPY": "--unifrac-matrix-ids",  # a matrix by position
    MATRIX + "NPY --unifrac-matrix-ids SHORTER": "23",
    MATRIX + "NPY --unifrac-matrix-ids OTHERIDS": "none of the 24 samples",
    MATRIX + "NPY --tree TREE": "one of --tree, --unifrac-matrix",
    PAIRS + "--tree TREE": "one of --tree, --unifrac-matrix",
    PAIRS + "--unifrac-matrix NPY": "one of --tree, --unifrac-matrix",
    TREE + "TABLE --unifrac-penalty 0 --nucleotide-penalty 0": "nothing to learn",
    PAIRS + "--batch-size 1": "--batch-size 1",
    PAIRS + "--batch-size 64": "--batch-size 64: choose 2 to",
    TREE + "TABLE --batch-size 64": "--batch-size 64: choose 2 to",
    TREE + "TABLE --group-column subject": "--metadata",
    TREE + "TABLE --metadata META --group-column sbject": "'subject'",
    TREE + "TABLE --train-ids IDS": "'nobody'",
    TREE + "TABLE --train-ids NOWHERE": "no such file; expected one id a line",
    TREE + "TABLE --validation-fraction 0.04": "each part needs 2",
    TREE + "TABLE --device cuda:99": "--device cuda:99",
    TREE + "TABLE --attn-implementation triton": "triton",
    FINE + "NOWHERE --metadata-column age": "NOWHERE",
    "finetune --table TABLE --metadata-column age": "--metadata",
    FINE + "COMMAS --metadata-column age": "commas",
    FINE + "FEWER --metadata-column age": "--allow-missing",
    FINE + "OTHER --metadata-column age": "none of the 24 samples",
    FINE + "DUPLICATE --metadata-column age": "more than one row",
    FINE + "META --metadata-column agee": "'age'",
    FINE + "BLANK --metadata-column x": "no value",
    FINE + "SINGLE --metadata-column x": "single class",
    FINE + "LONELY --metadata-column x": "'rare'",
    FINE + "WORDS --metadata-column x --task regression": "'many'",
    AGE + "--pretrained-encoder NOWHERE": "no such model",
    AGE + "--categorical-columns age": "is the target itself",
    AGE + "--categorical-columns sitee": "'site'",
    AGE + "--target-transform zscore-category": "--categorical-columns",
    AGE + "--freeze-base": "--pretrained-encoder",
}


def refused(capsys, argv: list[str]) -> str:
    """The error, which is the last line, of a command that exits with 2 and prints no result."""
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.err.endswith(errors[0] + "\n") and not said.out, said
    return errors[0]


@pytest.mark.parametrize("text", TRAINING)
def test_training_is_refused_in_one_line_and_writes_nothing(text, broken, capsys, tmp_path):
    argv = [broken.get(one, one) for one in text.split()]
    for option, value in (("--batch-size", "4"), ("--rarefy-depth", "0"), ("--max-steps", "1")):
        argv += [option, value] * (option not in argv)
    said = refused(capsys, [*argv, "--output-dir", str(tmp_path / "run")])
    assert broken.get(TRAINING[text], TRAINING[text]) in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("FILE", "is a file"), ("FILE/run", "cannot be written"), ("/proc/run", "cannot be written")],
)
def test_an_output_folder_that_cannot_be_written(broken, capsys, folder, expected):
    path = folder.replace("FILE", broken["FILE"])
    argv = ["pretrain", "--table", broken["TABLE"], "--tree", broken["TREE"], "--output-dir", path]
    assert refused(capsys, argv).startswith(f"error: {path}: {expected}")


RUNS = {
    "TREERUN": "pretrain --table TABLE --tree TREE",
    "PAIRRUN": "pretrain --table TABLE --distance jaccard",
    "FINERUN": "finetune --table TABLE --metadata META --metadata-column age",
    "LONGRUN": "pretrain --table LONG --tree LONGTREE",
    "REFERENCERUN": "pretrain --sequences FASTA --tree TREE",
}
EMBED, UNIFRAC = "embed --output out.tsv --model ", "unifrac --output out.tsv --table "
PREDICT = "predict --output out.tsv --model "
OTHERS = {
    PREDICT + "NOWHERE --table TABLE": "NOWHERE",
    PREDICT + "FINERUN --table NOWHERE": "NOWHERE",
    PREDICT + "TREERUN --table TABLE": "finetune",
    "evaluate --model NOWHERE --table TABLE": "NOWHERE",
    "evaluate --model TREERUN --table TABLE": "evaluate needs --tree",
    "evaluate --model FINERUN --table TABLE": "needs --metadata",
    "evaluate --model REFERENCERUN --table TABLE --tree TREE": "--all-samples",
    "evaluate --model FINERUN --table TABLE --output FILE": "FILE",
    "inspect --table NOWHERE": "NOWHERE",
    "inspect --table TABLE --rarefy-depth 0 --model NOWHERE": "NOWHERE",
    "inspect --table TABLE --rarefy-depth 0 --tree TREE --distance jaccard": "one of --tree",
    UNIFRAC + "NOWHERE --tree TREE": "NOWHERE",
    UNIFRAC + "TABLE --model NOWHERE": "NOWHERE",
    UNIFRAC + "TABLE": "either --tree or --model",
    UNIFRAC + "TABLE --tree TREE --model TREERUN": "either --tree or --model",
    "unifrac --output FILE --model TREERUN --table TABLE": "FILE",
    UNIFRAC + "TABLE --model PAIRRUN": "pretrain with --tree",
    UNIFRAC + "TABLE --model FINERUN": "is a run of finetune",
    UNIFRAC + "BACKWARDS --model LONGRUN": "reverse complements",
    UNIFRAC + "ELSEWHERE --model LONGRUN": "another region",
    EMBED + "TREERUN --table NOWHERE": "NOWHERE",
    "embed --output FILE --model TREERUN --table TABLE": "FILE",
    "embed --output out.csv --model TREERUN --table TABLE": "out.csv: write to .tsv or .npz",
    EMBED + "TREERUN --table TABLE --dimensions 999": "--dimensions 999: pretraining",
    EMBED + "TREERUN --table TABLE --dimensions 4 --asvs": "is for samples",
    EMBED + "PAIRRUN --table TABLE": "pretrain with --tree",
    EMBED + "FINERUN --table TABLE": "is a run of finetune",
    EMBED + "LONGRUN --table BACKWARDS": "reverse complements",
    EMBED + "LONGRUN --table ELSEWHERE": "another region",
}


@pytest.fixture(scope="module")
def runs(broken, aam, tmp_path_factory) -> dict[str, str]:
    """The broken files, and finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    for name, text in RUNS.items():
        argv = [broken.get(one, one) for one in text.split()]
        argv += ["--encoder", "wide", "--max-steps", 1, "--output-dir", folder / name]
        assert aam(*argv, files=False) == 0
    return {**broken, **{name: str(folder / name) for name in RUNS}}


@pytest.mark.parametrize("text", OTHERS)
def test_other_commands_refuse_in_one_line(text, runs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, [runs.get(one, one) for one in text.split()])
    assert runs.get(OTHERS[text], OTHERS[text]) in said
    assert not list(tmp_path.iterdir()) and Path(runs["FILE"]).read_text() == "mine"


def test_a_real_process_says_one_line_and_exits_with_2(broken, tmp_path):
    argv = [broken.get(one, one) for one in (FINE + "FEWER --metadata-column age").split()]
    result = subprocess.run(
        [sys.executable, "-m", "aam.train", *argv, "--output-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == "" and not (tmp_path / "run").exists()
