"""The command line: options from argv and TOML, and one line for everything that is wrong."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import aam
from aam import cli, config
from aam.errors import InputError

PRETRAIN = ("pretrain", "--sequences", __file__, "--tree", __file__, "--output-dir", "run")


def parse(*argv: str):
    return cli.parse(argv[0], argv[1:])


def refused(capsys, *argv: object) -> str:
    """The one line on standard error of a command that exits with 2."""
    assert cli.main([*map(str, argv)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert said.out == ""
    return said.err.removeprefix("error: ").rstrip("\n")


def test_defaults_and_the_command_line():
    options = parse(*PRETRAIN)
    assert options == config.PretrainConfig(
        data=config.OptionalTableOptions(sequences=Path(__file__)),
        distances=config.DistanceOptions(tree=Path(__file__)),
        run=config.RunOptions(output_dir=Path("run")),
    )
    options = parse(
        "finetune", "--table", __file__, "--output-dir", "r", "--metadata-column", "age",
        "--metadata", __file__, "--categorical-columns", "sex", "site", "--lr=1e-3",
        "--no-gradient-checkpointing", "--max_steps", "7", "--class-weights", "--epochs", "3",
        "--epochs", "None",
    )  # fmt: skip
    assert options.categorical.categorical_columns == ("sex", "site")
    assert not options.run.gradient_checkpointing and options.target.class_weights
    optimizer = options.optimizer
    assert (optimizer.lr, optimizer.max_steps, optimizer.epochs) == (1e-3, 7, None)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_saved_configuration_is_read_back(command, tmp_path):
    kind = config.CONFIGS[command]
    values = {name: "a/b" for name, one in config.options_of(kind).items() if one.required}
    options = config.from_dict(kind, values)
    if hasattr(options, "categorical"):
        options.categorical.categorical_columns = ("a", 'b "c"')
    config.write_toml(options, tmp_path / "run.toml")
    assert config.from_dict(kind, config.read_toml(tmp_path / "run.toml", kind)) == options
    assert config.from_dict(kind, config.to_dict(options)) == options


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'batch-size = 16\noutput_dir = "from-file"\n[optimizer]\nlr = 1\nepochs = 3\n'
        '[data]\ntable = "from-file"\n'
    )
    options = parse("pretrain", "--config", str(file), "--epochs", "5", "--table", __file__)
    assert options.data.table == Path(__file__) and options.run.output_dir == Path("from-file")
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
        ("lr = 0", "lr = 0: expected a number, above 0"),
        ("overwrite = 1", "overwrite = 1: expected true or false"),
        ("table = 3", "table = 3: expected a path"),
        ("asv_sampling = 'most'", "expected one of abundance, first, random"),
        ("best_metric = 'f1'", "best_metric = 'f1': expected one of loss,"),
        ("batchsize = 8", "unknown option 'batchsize'; did you mean batch_size?"),
        ("[optimiser]\nlr = 1", "'lr' is not of the group [optimiser]; it stands in [optimizer]"),
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


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("pretrian",), "unknown command 'pretrian'; choose pretrain, finetune"),
        (("pretrain", "--table", "t"), "aam pretrain needs --output-dir; aam pretrain --help"),
        (("--completion", "sh"), "--completion: expected one of bash, zsh, fish, tcsh"),
        (("predict",), "aam predict needs --table and --model and --output"),
        (("finetune", "--output-dir", "run", "--metadata-column", "x"), "finetune needs --table;"),
        (("inspect", "--rarefy-depth", 0), "aam inspect needs --table;"),
        (("embed", "--table", "t"), "aam embed needs --model and --output"),
        ((*PRETRAIN, "--batchsize", 8), "unknown option --batchsize; did you mean --batch-size?"),
        ((*PRETRAIN, "--no-tensorbord"), "did you mean --no-tensorboard?"),
        ((*PRETRAIN, "--no-seed"), "unknown option --no-seed; did you mean"),
        ((*PRETRAIN, "--distance-scale", 1), "unknown option --distance-scale; did you mean"),
        (("demo", "--xyz", 1), "unknown option --xyz; aam demo --help lists the options"),
        ((*PRETRAIN, "more"), "'more' belongs to no option"),
        ((*PRETRAIN, "--lr"), "--lr: expected a value"),
        ((*PRETRAIN, "--lr", "fast"), "--lr fast: expected a number, above 0"),
        ((*PRETRAIN, "--asv-sampling", "most"), "expected one of abundance, first, random"),
        ((*PRETRAIN, "--lr", 0), "--lr 0: expected a number, above 0"),
        ((*PRETRAIN, "--lr", "nan"), "--lr nan: expected a number, above 0"),
        ((*PRETRAIN, "--lr", "inf"), "--lr inf: expected a number, above 0"),
        ((*PRETRAIN, "--dropout", 1), "--dropout 1: expected a number, at least 0 and below 1"),
        ((*PRETRAIN, "--max-steps", 0), "--max-steps 0: expected a whole number, at least 1"),
        ((*PRETRAIN, "--batch-size", 1.5), "--batch-size 1.5: expected a whole number, at least"),
        ((*PRETRAIN, "--seed", -1), "--seed -1: expected a whole number, at least 0"),
        ((*PRETRAIN, "--seed", 2**63), "expected a whole number, at least 0"),
        ((*PRETRAIN, "--metadata", "m", "--validation-fraction", 2), "--validation-fraction 2: ex"),
        ((*PRETRAIN, "--device", "tpu"), "--device tpu: expected auto, cpu, cuda or cuda:N"),
        ((*PRETRAIN, "--embedding-dim", 30), "--embedding-dim 30: expected a multiple of"),
        ((*PRETRAIN, "--config", "no.toml"), "no.toml: cannot be read (No such file or directory)"),
        ((*PRETRAIN, "--resume-from", "no"), "no such checkpoint; --resume-from needs a run"),
    ],
)  # fmt: skip
def test_wrong_argv_gives_one_line(capsys, argv, expected):
    assert expected in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"epoch": 3}, "aam.pretrain: unknown option 'epoch'; did you mean epochs?"),
        ({"epochs": "3"}, "aam.pretrain: epochs = '3': expected a whole number, at least 1"),
        ({"epochs": 0}, "aam.pretrain: epochs = 0: expected a whole number, at least 1"),
        ({"table": "no.biom"}, "no.biom: no such file; expected a feature table"),
        ({"output_dir": Path(__file__)}, "test_command_line.py: is a file; choose another"),
    ],
)
def test_keywords_are_checked_like_the_command_line(options, expected):
    given = {"sequences": __file__, "tree": Path(__file__), "output_dir": "run"}
    with pytest.raises(InputError, match=expected):
        aam.pretrain(**given | options)
    with pytest.raises(InputError, match=r"aam\.finetune needs table; aam finetune"):
        aam.finetune(output_dir="run", metadata_column="age")


def test_every_number_has_limits_and_every_option_help():
    for kind in config.CONFIGS.values():
        for option in config.options_of(kind).values():
            assert option.help, option.name
            if option.schema["type"] in ("integer", "number"):
                assert {"minimum", "exclusiveMinimum"} & set(option.schema), option.name


def test_help_and_version(capsys):
    for argv in ([], ["--help"]):
        assert cli.main(argv) == 0
        said = capsys.readouterr().out
        assert all(name in said for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"aam {aam.__version__}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_fits_the_screen_and_ends_with_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and all(len(line) <= 80 for line in said.splitlines())
    boxes = re.findall(r"^\W+([a-z]+) options\b", said, flags=re.M)
    assert boxes[0] == "common" and (len(boxes) > 1 or command == "demo")
    assert all(config.flag(one) in said for one in config.options_of(config.CONFIGS[command]))
    example = said.partition("example:\n")[2].replace("\\\n", " ").split()
    assert example[:2] == ["aam", command] and cli.read_argv(command, example[2:])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--help"], "0"),
        (["pretrain", "--help"], "0 pydantic tyro"),
        (["pretrain", "--table", "no.biom", "--output-dir", "x"], "2 pydantic tyro"),
        (["unifrac", "--table", __file__, "--output", "x.tsv"], "2 pydantic tyro"),
        ([*PRETRAIN, "--resume-from", "no"], "2 pydantic tyro"),
    ],
)
def test_help_and_errors_need_neither_torch_nor_numpy(argv, expected):
    code = (
        f"import sys; from aam.train import main\ntry: code = main({argv})\n"
        "except SystemExit as stop: code = stop.code\n"
        "heavy = {'torch', 'numpy', 'pandas', 'tyro', 'pydantic'} & set(sys.modules)\n"
        "print(code, *sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == expected


@pytest.mark.parametrize("argv", [["pretrain", "--help"], ["demo", "--help"], ["--version"]])
def test_a_reader_that_has_enough_is_no_error(argv):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "aam.train", *argv]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_shell_completion_knows_commands_options_and_choices(capsys):
    assert cli.main(["--completion", "bash"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("pretrain", "--rarefy-depth", "bf16-mixed"))


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (InputError("first\n  second"), 2, "error: first second\n"),
        (OSError(28, "No space left", "report.html"), 2, "error: report.html: No space left\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_how_a_command_ends(error, code, expected, capsys):
    def fail():
        raise error

    assert cli.guarded(fail) == code
    assert capsys.readouterr().err == expected
