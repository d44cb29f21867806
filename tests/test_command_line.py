"""The command line: options from words and TOML, and one line for everything that is wrong."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aam import config, train
from aam.errors import InputError

PRETRAIN = ("pretrain", "--table", "t.biom", "--output-dir", "run")


def parse(*words: str):
    return train.parse(words[0], words[1:])


def refused(capsys, *words: object) -> str:
    """The one line on standard error of a command that exits with 2."""
    assert train.main([*map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert said.out == ""
    return said.err.removeprefix("error: ").rstrip("\n")


# ------------------------------------------------------------------------------------- options
def test_defaults_and_the_command_line():
    options = parse(*PRETRAIN)
    assert options == config.PretrainConfig(
        data=config.TableOptions(table=Path("t.biom")),
        run=config.RunOptions(output_dir=Path("run")),
    )
    options = parse(
        "finetune", "--table", "t", "--output-dir", "r", "--metadata-column", "age",
        "--categorical-columns", "sex", "site", "--no-gradient-checkpointing", "--lr=1e-3",
        "--max_steps", "7", "--freeze-base",
    )  # fmt: skip
    assert options.categorical.categorical_columns == ("sex", "site")
    assert not options.run.gradient_checkpointing and options.freeze_base
    assert (options.optimizer.lr, options.optimizer.max_steps) == (1e-3, 7)


@pytest.mark.parametrize("command", train.COMMANDS)
def test_every_saved_configuration_is_read_back(command, tmp_path):
    kind = train.COMMANDS[command]
    hints = {"Path": "x/y", "str": "age"}
    values: dict = {}
    for leaf in config.leaves(kind):
        target = values
        for group in leaf[:-1]:
            target = target.setdefault(group, {})
        if leaf[-1] in ("table", "output_dir", "model", "output", "tree"):
            target[leaf[-1]] = hints["Path"]
        if leaf[-1] == "metadata_column":
            target[leaf[-1]] = hints["str"]
    options = config.from_dict(kind, values)
    if hasattr(options, "categorical"):
        options.categorical.categorical_columns = ("a", 'b "c"')
    config.write_toml(options, tmp_path / "run.toml")
    assert config.from_dict(kind, config.read_toml(tmp_path / "run.toml", kind)) == options


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'batch-size = 16\noutput_dir = "from-file"\n[optimizer]\nlr = 1\nepochs = 3\n'
        '[data]\ntable = "from-file"\n'
    )
    options = parse("pretrain", "--config", str(file), "--epochs", "5", "--table", "words")
    assert options.data.table == Path("words") and options.run.output_dir == Path("from-file")
    optimizer = options.optimizer
    assert (optimizer.batch_size, optimizer.lr, optimizer.epochs) == (16, 1.0, 5)
    assert isinstance(optimizer.lr, float)


def test_a_saved_run_does_not_make_the_next_one_overwrite_or_resume(tmp_path):
    options = parse(*PRETRAIN, "--overwrite", "--seed", "3")
    config.write_toml(options, tmp_path / "config.toml")
    again = parse("pretrain", "--config", str(tmp_path / "config.toml"))
    assert again.run.seed == 3 and not again.run.overwrite and again.run.resume_from is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch_size = 'eight'", "batch_size = 'eight': expected a whole number"),
        ("batch_size = 8.5", "batch_size = 8.5: expected a whole number"),
        ("batch_size = true", "batch_size = True: expected a whole number"),
        ("lr = '1e-3'", "lr = '1e-3': expected a number"),
        ("overwrite = 1", "overwrite = 1: expected true or false"),
        ("table = 3", "table = 3: expected a path in quotes"),
        ("asv_sampling = 'most'", "expected one of abundance, first, random"),
        ("best_metric = 'f1'", "best_metric = 'f1': expected one of loss,"),
        ("batchsize = 8", "unknown option 'batchsize'; did you mean 'batch_size'?"),
        ("[optimiser]\nlr = 1", "unknown group [optimiser]; did you mean 'optimizer'?"),
        ("[model]\nlr = 1", "option 'lr' is not of the group [model]; it stands in [optimizer]"),
        ("lr = 1\n[optimizer]\nlr = 2", "option 'lr' is given twice"),
        ("lr = ", "not a TOML file"),
        ("\xff", "not a TOML file"),
    ],
)
def test_a_wrong_toml_file_gives_one_line(capsys, tmp_path, text, expected):
    file = tmp_path / "run.toml"
    file.write_bytes(text.encode("latin-1"))
    said = refused(capsys, *PRETRAIN, "--config", file)
    assert said.startswith(f"{file}: ") and expected in said


def test_a_missing_toml_file_gives_one_line(capsys, tmp_path):
    said = refused(capsys, *PRETRAIN, f"--config={tmp_path / 'none.toml'}")
    assert "none.toml: cannot be read (No such file or directory)" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("pretrian",), "unknown command 'pretrian'; choose pretrain, finetune"),
        (("pretrain", "--table", "t"), "aam pretrain needs --output-dir; aam pretrain --help"),
        (("predict",), "aam predict needs --model and --table and --output"),
        ((*PRETRAIN, "--batchsize", 8), "unknown option --batchsize; did you mean --batch-size?"),
        ((*PRETRAIN, "more"), "more"),
        ((*PRETRAIN, "--lr"), "--lr"),
        ((*PRETRAIN, "--lr", "fast"), "--lr"),
        ((*PRETRAIN, "--asv-sampling", "most"), "abundance"),
        ((*PRETRAIN, "--best-metric", "f1"), "mantel_r"),
        ((*PRETRAIN, "--lr", 0), "--lr 0: expected above 0"),
        ((*PRETRAIN, "--lr", "nan"), "--lr nan: expected above 0"),
        ((*PRETRAIN, "--dropout", 1), "--dropout 1: expected at least 0 and below 1"),
        ((*PRETRAIN, "--max-steps", 0), "--max-steps 0: expected at least 1"),
        ((*PRETRAIN, "--epochs", 0), "--epochs 0: expected at least 1"),
        ((*PRETRAIN, "--validate-every", 0), "--validate-every 0: expected at least 1"),
        ((*PRETRAIN, "--seed", -1), "--seed -1: expected at least 0"),
        ((*PRETRAIN, "--rarefy-depth", -5), "--rarefy-depth -5: expected at least 0"),
        ((*PRETRAIN, "--mask-probability", 1.5), "--mask-probability 1.5: expected above 0"),
        ((*PRETRAIN, "--embedding-dim", 30), "--embedding-dim 30: expected a multiple of"),
    ],
)
def test_wrong_words_give_one_line(capsys, words, expected):
    assert expected in refused(capsys, *words)


def test_every_numeric_option_has_limits():
    import typing

    from aam.option_files import LIMITS

    for kind in train.COMMANDS.values():
        for leaf in config.leaves(kind):
            hint: typing.Any = kind
            for name in leaf:
                hint = typing.get_type_hints(hint)[name]
            if {int, float} & {hint, *typing.get_args(hint)}:
                assert leaf[-1] in LIMITS, leaf


def test_help_and_version(capsys):
    assert train.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in train.COMMANDS)
    assert train.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("aam ")
    with pytest.raises(SystemExit) as stop:
        train.main(["pretrain", "--help"])
    assert stop.value.code == 0 and "--unifrac-metric" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ bad input
@pytest.fixture(scope="module")
def broken(community, tmp_path_factory) -> dict[str, str]:
    """Files that cannot be used, by a name that the cases below write in capitals."""
    import biom
    import h5py

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
        body += ["\t".join([one, *map(repr, map(float, row))]) for one, row in zip(ids, values)]  # noqa: B905
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
        "NOLENGTHS": text("nolengths.nwk", __import__("re").sub(r":[0-9.e-]+", "", tree)),
        "NEGATIVETREE": text("negative.nwk", tree.replace(":", ":-", 1)),
        "MISSINGTIP": text("missing.nwk", missing_tip()),
        "NOTREE": text("no.nwk", "((a:1,b:1"),
        "NOWHERE": folder / "nowhere",
        "FILE": text("file", "I am a file\n"),
        "TABLE": community.table,
        "TREE": community.tree,
        "META": community.metadata,
    }
    return {name: str(path) for name, path in files.items()}


PRE, FINE = "pretrain --tree TREE --table ", "finetune --table TABLE --metadata "
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
    "no tree": ("pretrain --table TABLE", "--tree or --unifrac-matrix"),
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
    "tree and matrix": (PRE + "TABLE --unifrac-matrix NPY", "either --tree or --unifrac-matrix"),
    "faith from a matrix": (
        "pretrain --table TABLE --unifrac-matrix NPY --unifrac-metric faith-pd", "--tree",
    ),
    "nothing to learn": (
        PRE + "TABLE --unifrac-penalty 0 --nucleotide-penalty 0", "nothing to learn",
    ),
    "batch of one": (PRE + "TABLE --batch-size 1", "--batch-size 1"),
    "batch larger than the set": (PRE + "TABLE --batch-size 64", "--batch-size 64 is larger"),
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
    "finetune without distances": (
        FINE + "META --metadata-column age --unifrac-penalty 1", "--tree",
    ),
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


@pytest.mark.parametrize("command", ["predict", "evaluate", "inspect", "unifrac"])
def test_other_commands_name_a_missing_file(broken, capsys, tmp_path, command):
    words = {
        "predict": ("--model", broken["NOWHERE"], "--output", tmp_path / "o.tsv"),
        "evaluate": ("--model", broken["NOWHERE"]),
        "inspect": (),
        "unifrac": ("--tree", broken["TREE"], "--output", tmp_path / "o.h5"),
    }[command]
    table = broken["TABLE"] if command in ("predict", "evaluate") else broken["NOWHERE"]
    assert broken["NOWHERE"] in refused(capsys, command, "--table", table, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("case", "code"), [("table is plain text", 2), ("sample not in metadata", 2)]
)
def test_a_real_process_says_one_line_and_exits_with_2(broken, tmp_path, case, code):
    words = [broken.get(word, word) for word in BAD[case][0].split()]
    result = subprocess.run(
        [sys.executable, "-m", "aam.train", *words, "--output-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == "" and not (tmp_path / "run").exists()


def test_errors_are_one_line_whatever_the_message(monkeypatch, capsys):
    def fail(_options):
        raise InputError("first\n  second")

    monkeypatch.setattr(train, "runner", lambda name: fail)
    assert refused(capsys, *PRETRAIN) == "first second"

    def full(_options):
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr(train, "runner", lambda name: full)
    assert refused(capsys, *PRETRAIN) == "report.html: No space left on device"
