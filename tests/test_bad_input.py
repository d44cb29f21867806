"""Input that cannot be used: one line on standard error, exit code 2, and nothing is written."""

import re
import subprocess
import sys
from pathlib import Path

import biom
import h5py
import numpy as np
import pytest

from aam import train
from aam.data.simulate import simulate_community


@pytest.fixture(scope="module")
def broken(community, tmp_path_factory) -> dict[str, str]:
    """Files that cannot be used, by a name that the cases below write in capitals."""
    folder = tmp_path_factory.mktemp("broken")
    table = biom.load_table(str(community.table))
    ids = list(table.ids())

    def write_biom(name: str, changed) -> Path:
        with h5py.File(folder / name, "w") as file:
            changed.to_hdf5(file, "test")
        return folder / name

    def text(name: str, content: str) -> Path:
        (folder / name).write_text(content)
        return folder / name

    lines = community.metadata.read_text().splitlines()
    header, types, rows = lines[0], lines[1], lines[2:]

    def metadata(name: str, change) -> Path:
        return text(name, "\n".join([header, types, *change(rows)]) + "\n")

    def column(name: str, value, where=lambda n: True) -> Path:
        extra = [f"{row}\t{value(n) if where(n) else ''}" for n, row in enumerate(rows)]
        return text(name, "\n".join([f"{header}\tx", *extra]) + "\n")

    half = community.table.read_bytes()
    (folder / "truncated.biom").write_bytes(half[: len(half) // 2])
    tree = community.tree.read_text()
    square = np.random.default_rng(0).random((24, 24))
    square = (square + square.T) * (1 - np.eye(24))
    np.save(folder / "d.npy", square)

    def matrix(name: str, change) -> Path:
        values = square.copy()
        change(values)
        body = ["\t".join(["", *ids])]
        body += [
            "\t".join([one, *map(repr, map(float, row))])
            for one, row in zip(ids, values, strict=True)
        ]
        return text(name, "\n".join(body) + "\n")

    def missing_tip() -> str:
        first = table.ids(axis="observation")[0]
        return tree.replace(first, "ACGT" * 9)

    md5 = table.copy()
    md5.update_ids({o: f"{n:032x}" for n, o in enumerate(md5.ids("observation"))}, "observation")
    quoted = table.copy()
    quoted.update_ids({one: (one + "\tx" if n == 0 else one) for n, one in enumerate(ids)})
    dense = table.matrix_data.toarray()
    negative, fraction = dense.copy(), dense.astype(float)
    negative[0, 0], fraction[0, 0] = -1, 0.5
    observations = table.ids("observation")
    two = table.filter(observations[:2], "observation", inplace=False)
    two = biom.Table(np.ones((2, 24)), two.ids("observation"), ids)
    # What tells regions apart needs longer sequences.
    long = simulate_community(
        folder, samples=8, asvs=40, asvs_per_sample=8, sequence_length=100, seed=1
    )
    backwards, elsewhere = biom.load_table(str(long.table)), biom.load_table(str(long.table))
    complement, generator = str.maketrans("ACGT", "TGCA"), np.random.default_rng(1)
    features = backwards.ids("observation")
    backwards.update_ids({o: o.translate(complement)[::-1] for o in features}, "observation")
    elsewhere.update_ids(
        {o: "".join(generator.choice(list("ACGT"), 100)) for o in features}, "observation"
    )
    files = {
        "TRUNCATED": folder / "truncated.biom",
        "PLAIN": text("plain.biom", "this is no table\n"),
        "EMPTY": write_biom("empty.biom", biom.Table(np.zeros((0, 0)), [], [])),
        "NEGATIVE": write_biom("negative.biom", biom.Table(negative, observations, ids)),
        "FRACTION": write_biom("fraction.biom", biom.Table(fraction, observations, ids)),
        "MD5": write_biom("md5.biom", md5),
        "TABS": write_biom("tabs.biom", quoted),
        "TWICE": text("twice.tsv", f"#OTU ID\tS1\tS1\n{'ACGT' * 8}\t3\t4\n"),
        "FEWER": metadata("fewer.tsv", lambda rows: rows[2:]),
        "OTHER": metadata("other.tsv", lambda rows: ["x" + row for row in rows]),
        "DUPLICATE": metadata("duplicate.tsv", lambda rows: [*rows, rows[0]]),
        "BLANK": column("blank.tsv", lambda n: ""),
        "SINGLE": column("single.tsv", lambda n: "same"),
        "LONELY": column("lonely.tsv", lambda n: "rare" if n == 3 else "ab"[n % 2]),
        "WORDS": column("words.tsv", lambda n: "many" if n == 3 else str(n)),
        "COMMAS": text("commas.tsv", "sample-id,age\ns1,3\n"),
        "NAN": matrix("nan.tsv", lambda m: m.__setitem__((2, 3), np.nan)),
        "ASYMMETRIC": matrix("asymmetric.tsv", lambda m: m.__setitem__((2, 3), 9.0)),
        "NPY": folder / "d.npy",
        "SHORTER": text("shorter.txt", "\n".join(ids[:-1]) + "\n"),
        "IDS": text("ids.txt", "\n".join([*ids[:5], "nobody"]) + "\n"),
        "NOLENGTHS": text("nolengths.nwk", re.sub(r":[0-9.e-]+", "", tree)),
        "NEGATIVETREE": text("negative.nwk", tree.replace(":", ":-", 1)),
        "MISSINGTIP": text("missing.nwk", missing_tip()),
        "TWO": write_biom("two.biom", two),
        "TWOTIPS": text("two.nwk", f"(({observations[0]}:1,{observations[1]}:1):1,other:1);"),
        "FASTA": text("s.fasta", "".join(f">{o}\n{o}\n" for o in observations)),
        "OTHERIDS": text("other.ids", "\n".join(f"x{one}" for one in ids)),
        "LONG": long.table,
        "LONGTREE": long.tree,
        "BACKWARDS": write_biom("backwards.biom", backwards),
        "ELSEWHERE": write_biom("elsewhere.biom", elsewhere),
        "NOTREE": text("no.nwk", "((a:1,b:1"),
        "NOWHERE": folder / "nowhere",
        "FILE": text("file", "I am a file\n"),
        "TABLE": community.table,
        "TREE": community.tree,
        "META": community.metadata,
    }
    return {name: str(path) for name, path in files.items()}


PRE, FINE = "pretrain --tree TREE --table ", "finetune --table TABLE --metadata "
PAIRS = "pretrain --table TABLE --distance jaccard "
BAD = {
    "table missing": (PRE + "NOWHERE", "NOWHERE"),
    "table truncated": (PRE + "TRUNCATED", "TRUNCATED"),
    "table is plain text": (PRE + "PLAIN", "PLAIN"),
    "table empty": (PRE + "EMPTY", "EMPTY"),
    "table negative": (PRE + "NEGATIVE", "negative"),
    "table fractional": (PRE + "FRACTION", "fraction"),
    "table duplicate ids": (PRE + "TWICE", "'S1'"),
    "table hashed ids": (PRE + "MD5", "--sequences"),
    "sample id with a tab": (PRE + "TABS", "tab or a line break"),
    "rarefied to nothing": (PRE + "TABLE --rarefy-depth 99999999", "99999999"),
    "tree missing": ("pretrain --table TABLE --tree NOWHERE", "NOWHERE"),
    "nothing teaches": ("pretrain --table TABLE", "one of --tree, --unifrac-matrix and --distance"),
    "no table and no sequences": ("pretrain --tree TREE", "--table, or --sequences with --tree"),
    "no table and no tree": ("pretrain --sequences FASTA", "--table, or --sequences with --tree"),
    "no table for a matrix": ("pretrain --unifrac-matrix NPY", "--table for --unifrac-matrix"),
    "two tips for a table": (
        "pretrain --table TWO --tree TWOTIPS", "2 training ASVs are tips of the tree; at least 3",
    ),
    "two tips for sequences": (
        "pretrain --sequences FASTA --tree TWOTIPS --drop-missing-tips", "2 sequences of",
    ),
    "sequences that are not tips": (
        "pretrain --sequences FASTA --tree MISSINGTIP", "--drop-missing-tips",
    ),
    "tree is none": ("pretrain --table TABLE --tree NOTREE", "NOTREE"),
    "tree without lengths": ("pretrain --table TABLE --tree NOLENGTHS", "NOLENGTHS"),
    "tree with negative lengths": ("pretrain --table TABLE --tree NEGATIVETREE", "negative"),
    "tips missing": ("pretrain --table TABLE --tree MISSINGTIP", "--drop-missing-tips"),
    "matrix with nan": ("pretrain --table TABLE --unifrac-matrix NAN", "NAN"),
    "matrix asymmetric": ("pretrain --table TABLE --unifrac-matrix ASYMMETRIC", "symmetric"),
    "matrix without ids": ("pretrain --table TABLE --unifrac-matrix NPY", "--unifrac-matrix-ids"),
    "matrix ids too few": (
        "pretrain --table TABLE --unifrac-matrix NPY --unifrac-matrix-ids SHORTER", "23",
    ),
    "matrix of other samples": (
        "pretrain --table TABLE --unifrac-matrix NPY --unifrac-matrix-ids OTHERIDS",
        "none of the 24 samples",
    ),
    "tree and matrix": (PRE + "TABLE --unifrac-matrix NPY", "one of --tree, --unifrac-matrix"),
    "tree and distance": (PRE + "TABLE --distance jaccard", "one of --tree, --unifrac-matrix"),
    "matrix and distance": (PAIRS + "--unifrac-matrix NPY", "one of --tree, --unifrac-matrix"),
    "nothing to learn": (
        PRE + "TABLE --unifrac-penalty 0 --nucleotide-penalty 0", "nothing to learn",
    ),
    "batch of one": (PAIRS + "--batch-size 1", "--batch-size 1"),
    "batch larger than the set": (PAIRS + "--batch-size 64", "--batch-size 64 is larger"),
    "batch larger than the tree": (PRE + "TABLE --batch-size 64", "--batch-size 64 is larger"),
    "group without metadata": (PRE + "TABLE --group-column subject", "--metadata"),
    "no such group": (PRE + "TABLE --metadata META --group-column sbject", "'subject'"),
    "ids unknown": (PRE + "TABLE --train-ids IDS", "'nobody'"),
    "ids missing": (PRE + "TABLE --train-ids NOWHERE", "NOWHERE"),
    "validation of one": (PRE + "TABLE --validation-fraction 0.04", "each part needs 2"),
    "no such device": (PRE + "TABLE --device cuda:99", "--device cuda:99"),
    "device is no word": (PRE + "TABLE --device tpu", "expected auto, cpu"),
    "kernel that is not there": (PRE + "TABLE --attn-implementation triton", "triton"),
    "metadata missing": (FINE + "NOWHERE --metadata-column age", "NOWHERE"),
    "no metadata": ("finetune --table TABLE --metadata-column age", "--metadata"),
    "metadata with commas": (FINE + "COMMAS --metadata-column age", "commas"),
    "sample not in metadata": (FINE + "FEWER --metadata-column age", "--allow-missing"),
    "no sample in metadata": (FINE + "OTHER --metadata-column age", "none of the 24 samples"),
    "metadata row twice": (FINE + "DUPLICATE --metadata-column age", "more than one row"),
    "no such column": (FINE + "META --metadata-column agee", "'age'"),
    "target all missing": (FINE + "BLANK --metadata-column x", "no value"),
    "target single class": (FINE + "SINGLE --metadata-column x", "single class"),
    "class with one sample": (FINE + "LONELY --metadata-column x", "'rare'"),
    "target not numeric": (FINE + "WORDS --metadata-column x --task regression", "'many'"),
    "no pretrained run": (
        FINE + "META --metadata-column age --pretrained-encoder NOWHERE", "no such model",
    ),
    "category is the target": (
        FINE + "META --metadata-column age --categorical-columns age", "is the target itself",
    ),
    "category not there": (
        FINE + "META --metadata-column age --categorical-columns sitee", "'site'",
    ),
    "category transform alone": (
        FINE + "META --metadata-column age --target-transform zscore-category",
        "--categorical-columns",
    ),
    "frozen and fresh": (FINE + "META --metadata-column age --freeze-base", "--pretrained-encoder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line_and_writes_nothing(case, broken, capsys, tmp_path):
    text, expected = BAD[case]
    words = [broken.get(word, word) for word in text.split()]
    run = tmp_path / "run"
    tiny = ["--max-steps", "1"] + ["--batch-size", "4"] * ("--batch-size" not in words)
    if "--rarefy-depth" not in words:
        tiny += ["--rarefy-depth", "0"]
    assert train.main([*words, *tiny, "--output-dir", str(run)]) == 2
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.endswith(errors[0] + "\n"), said
    assert broken.get(expected, expected) in errors[0]
    assert not run.exists() and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "expected"),
    [("FILE", "is a file"), ("FILE/run", "cannot be written"), ("/proc/run", "cannot be written")],
)
def test_an_output_folder_that_cannot_be_written(broken, capsys, target, expected):
    path = target.replace("FILE", broken["FILE"])
    words = ("--table", broken["TABLE"], "--tree", broken["TREE"], "--rarefy-depth", 0)
    assert train.main([*map(str, ("pretrain", *words, "--output-dir", path))]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"error: {path}: ") and expected in said[-1]
    assert "Traceback" not in "".join(said)


@pytest.fixture(scope="module")
def runs(broken, aam, tmp_path_factory) -> dict[str, str]:
    """Finished runs, by names in capitals."""
    folder = tmp_path_factory.mktemp("runs")
    words = {
        "TREERUN": ("pretrain", "--table", broken["TABLE"], "--tree", broken["TREE"]),
        "PAIRRUN": ("pretrain", "--table", broken["TABLE"], "--distance", "jaccard"),
        "FINERUN": (
            "finetune", "--table", broken["TABLE"], "--metadata", broken["META"],
            "--metadata-column", "age",
        ),
        "LONGRUN": ("pretrain", "--table", broken["LONG"], "--tree", broken["LONGTREE"]),
        "REFERENCERUN": ("pretrain", "--sequences", broken["FASTA"], "--tree", broken["TREE"]),
    }  # fmt: skip
    for name, own in words.items():
        own = (*own, "--encoder", "wide", "--max-steps", 1, "--output-dir", folder / name)
        assert aam(*own, files=False) == 0
    return {name: str(folder / name) for name in words}


EMBED, UNIFRAC = "embed --output out.tsv ", "unifrac --output out.tsv "
OF_OTHERS = {
    "predict: no model": ("predict --output out.tsv --model NOWHERE --table TABLE", "NOWHERE"),
    "predict: no table": ("predict --output out.tsv --model FINERUN --table NOWHERE", "NOWHERE"),
    "predict: pretrained": ("predict --output out.tsv --model TREERUN --table TABLE", "finetune"),
    "evaluate: no model": ("evaluate --model NOWHERE --table TABLE", "NOWHERE"),
    "evaluate: no tree": ("evaluate --model TREERUN --table TABLE", "evaluate needs --tree"),
    "evaluate: no metadata": ("evaluate --model FINERUN --table TABLE", "needs --metadata"),
    "evaluate: a reference has no samples": (
        "evaluate --model REFERENCERUN --table TABLE --tree TREE", "--all-samples",
    ),
    "inspect: no table": ("inspect --table NOWHERE", "NOWHERE"),
    "inspect: no model": ("inspect --table TABLE --rarefy-depth 0 --model NOWHERE", "NOWHERE"),
    "inspect: two distances": (
        "inspect --table TABLE --rarefy-depth 0 --tree TREE --distance jaccard", "one of --tree",
    ),
    "unifrac: no table": (UNIFRAC + "--tree TREE --table NOWHERE", "NOWHERE"),
    "unifrac: no model": (UNIFRAC + "--model NOWHERE --table TABLE", "NOWHERE"),
    "unifrac: neither": (UNIFRAC + "--table TABLE", "either --tree or --model"),
    "unifrac: both": (
        UNIFRAC + "--table TABLE --tree TREE --model TREERUN", "either --tree or --model",
    ),
    "unifrac: output there": ("unifrac --output FILE.tsv --model TREERUN --table TABLE", "FILE"),
    "unifrac: by pairs": (UNIFRAC + "--model PAIRRUN --table TABLE", "pretrain with --tree"),
    "unifrac: of finetune": (UNIFRAC + "--model FINERUN --table TABLE", "is a run of finetune"),
    "unifrac: backwards": (UNIFRAC + "--model LONGRUN --table BACKWARDS", "reverse complements"),
    "unifrac: elsewhere": (UNIFRAC + "--model LONGRUN --table ELSEWHERE", "another region"),
    "embed: no table": (EMBED + "--model TREERUN --table NOWHERE", "NOWHERE"),
    "embed: output there": ("embed --output FILE.tsv --model TREERUN --table TABLE", "FILE"),
    "embed: unknown kind": (
        "embed --output out.csv --model TREERUN --table TABLE", "out.csv: write to .tsv or .npz",
    ),
    "embed: too many dimensions": (
        EMBED + "--model TREERUN --table TABLE --dimensions 999", "--dimensions 999: pretraining",
    ),
    "embed: dimensions of ASVs": (
        EMBED + "--model TREERUN --table TABLE --dimensions 4 --asvs", "is for samples",
    ),
    "embed: by pairs": (EMBED + "--model PAIRRUN --table TABLE", "pretrain with --tree"),
    "embed: of finetune": (EMBED + "--model FINERUN --table TABLE", "is a run of finetune"),
    "embed: backwards": (EMBED + "--model LONGRUN --table BACKWARDS", "reverse complements"),
    "embed: elsewhere": (EMBED + "--model LONGRUN --table ELSEWHERE", "another region"),
}  # fmt: skip


@pytest.mark.parametrize("case", OF_OTHERS)
def test_other_commands_refuse_in_one_line(case, broken, runs, capsys, tmp_path, monkeypatch):
    text, expected = OF_OTHERS[case]
    monkeypatch.chdir(tmp_path)
    there = broken["FILE"] + ".tsv"
    Path(there).write_text("mine")
    named = {**broken, **runs, "FILE.tsv": there}
    capsys.readouterr()
    assert train.main([named.get(word, word) for word in text.split()]) == 2
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.err.endswith(errors[0] + "\n") and not said.out, said
    assert named.get(expected, expected) in errors[0]
    assert not list(tmp_path.iterdir()) and Path(there).read_text() == "mine"


def test_a_real_process_says_one_line_and_exits_with_2(broken, tmp_path):
    words = [broken.get(word, word) for word in BAD["sample not in metadata"][0].split()]
    result = subprocess.run(
        [sys.executable, "-m", "aam.train", *words, "--output-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == "" and not (tmp_path / "run").exists()
