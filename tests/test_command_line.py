"""The command line: options from words and TOML, and one line for everything that is wrong."""

from pathlib import Path

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


def test_defaults_and_the_command_line():
    options = parse(*PRETRAIN)
    assert options == config.PretrainConfig(
        data=config.OptionalTableOptions(table=Path("t.biom")),
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
        (("finetune", "--output-dir", "run", "--metadata-column", "x"), "finetune needs --table;"),
        (("inspect", "--rarefy-depth", 0), "aam inspect needs --table;"),
        (("embed", "--table", "t"), "aam embed needs --model and --output"),
        ((*PRETRAIN, "--batchsize", 8), "unknown option --batchsize; did you mean --batch-size?"),
        ((*PRETRAIN, "--no-tensorbord"), "did you mean --no-tensorboard?"),
        ((*PRETRAIN, "--no-seed"), "unknown option --no-seed; did you mean --seed?"),
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


@pytest.mark.parametrize(
    ("command", "option", "near"),
    [
        ("pretrain", "--mixed-samples", ""),
        ("pretrain", "--sample-embedding", "--embedding-dim"),
        ("pretrain", "--sample-position", ""),
        ("pretrain", "--nucleotide-embedding", "--nucleotide-penalty"),
        ("pretrain", "--distance-scale", "--distance"),
        ("pretrain", "--unifrac-metric", "--unifrac-matrix"),
        ("pretrain", "--count-embedding", "--embedding-dim"),
        ("finetune", "--unifrac-penalty", "--count-penalty"),
        ("finetune", "--tree", ""),
        ("demo", "--pretrain-steps", "--pretrain-epochs"),
    ],
)
def test_options_of_earlier_versions_are_unknown(capsys, command, option, near):
    said = refused(capsys, command, option, 1)
    hint = f"did you mean {near}? " if near else ""
    assert said == f"unknown option {option}; {hint}aam {command} --help lists the options"


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
    assert stop.value.code == 0 and "--encoder" in capsys.readouterr().out


def test_errors_are_one_line_whatever_the_message(monkeypatch, capsys):
    def fail(_options):
        raise InputError("first\n  second")

    monkeypatch.setattr(train, "runner", lambda name: fail)
    assert refused(capsys, *PRETRAIN) == "first second"

    def full(_options):
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr(train, "runner", lambda name: full)
    assert refused(capsys, *PRETRAIN) == "report.html: No space left on device"
