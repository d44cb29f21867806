"""The command line: from argv to options to a command, and from its errors to exit codes.

Nothing heavy is imported before the options and the paths that they name have been checked.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, Union

from aam.errors import InputError
from aam.files import CONFIG_FILE, is_run, resume_checkpoint, resume_folder

# What each command does, and an example of its options. The function of the same name in
# `aam.commands.NAME` runs it, with the options of `aam.config.CONFIGS`.
COMMANDS = {
    "pretrain": (
        "Learn a tree's clades, or distances, and masked nucleotides.",
        "--table table.biom --tree tree.nwk --output-dir runs/pretrained",
    ),
    "finetune": (
        "Train a predictor of a metadata column.",
        "--pretrained-encoder runs/pretrained --table table.biom \\\n"
        "      --metadata metadata.tsv --metadata-column age --output-dir runs/age",
    ),
    "predict": (
        "Predict with a fine-tuned model, in the target's units or classes.",
        "--model runs/age --table new.biom --output predictions.tsv",
    ),
    "evaluate": (
        "Measure a run on samples with known truth.",
        "--model runs/age --table new.biom --metadata new.tsv",
    ),
    "inspect": (
        "Dry run: ids that match, lengths, classes, shared ASVs, step cost.",
        "--table table.biom --metadata metadata.tsv --metadata-column age",
    ),
    "unifrac": (
        "UniFrac distances of a table's samples, by a tree or a model.",
        "--model runs/pretrained --table new.biom --output distances.h5",
    ),
    "embed": (
        "A vector for each sample or ASV by a pretrained model, without a tree.",
        "--model runs/pretrained --table new.biom --output vectors.tsv",
    ),
    "demo": (
        "Simulate a community, pretrain, fine-tune, predict, write a report.",
        "--output-dir runs/demo",
    ),
}
ALIASES = {"train": "finetune"}
# Options that `aam COMMAND --help` shows first, in this order; no required one is missing here.
COMMON = (
    "table", "sequences", "tree", "metadata", "metadata_column", "model", "pretrained_encoder",
    "output", "output_dir", "overwrite", "resume_from", "config", "metric", "group_column",
    "categorical_columns", "rarefy_depth", "allow_missing", "freeze_base", "encoder", "epochs",
    "batch_size", "max_memory_gb", "lr", "seed", "device", "devices", "precision",
)  # fmt: skip
METAVARS = {"integer": "INT", "number": "NUMBER", "array": "NAME", "string": "TEXT"}
SHELLS = ("bash", "zsh", "fish", "tcsh")
AUTO = "auto"  # --resume-from


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, given as on the command line without the program's name.

    Returns:
        The exit code: 0, 2 for input that cannot be used, 130 after Ctrl-C, 143 after SIGTERM,
        138 after SIGUSR1.
    """
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    return guarded(lambda: run(ALIASES.get(argv[0], argv[0]), argv[1:]))


def guarded(work: Callable[[], int]) -> int:
    """The exit code of work that may meet bad input, a full disk or a signal."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read what we print has enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (InputError, OSError, KeyboardInterrupt) as error:
        from aam.learning import launch

        launch.complain(error)
        return launch.exit_code(error)


def run(name: str, argv: list[str]) -> int:
    """Check the options of a command, and then load and run it; what ends it early is raised."""
    if name in ("-h", "--help", "--version", "--completion"):
        print_about(name, argv)
        return 0
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}; choose {', '.join(COMMANDS)}")
    from aam.learning import launch

    launch.begin()
    trains = name in ("pretrain", "finetune")
    if not trains:
        launch.refuse_several(name)
    options = parse(name, argv)
    warnings.filterwarnings("ignore", module=r"(tensorboard|torch\.distributed)\b.*")
    work = getattr(importlib.import_module(f"aam.commands.{name}"), name)
    if not trains:
        work(options)
        return 0
    if options.run.resume_from is not None:
        argv = [*argv, "--resume-from", str(options.run.resume_from)]  # for others: not auto
    return launch.run(work, [name, *argv], options)


def parse(name: str, argv: Sequence[str]) -> Any:
    """Options of a command: the command line over --config over --resume-from over the defaults.

    Raises:
        InputError: an option is unknown, missing or wrong, or a path cannot be used.
        SystemExit: --help was asked for (code 0).
    """
    from aam.config import CONFIGS, check, from_dict, read_toml

    kind, given = CONFIGS[name], read_argv(name, argv)
    if given.get("resume_from") == AUTO:
        settle_resume(given)
    saved = saved_options(kind, Path(given["resume_from"])) if "resume_from" in given else {}
    if "config" in given:
        saved |= read_toml(Path(given["config"]), kind)
    options = from_dict(kind, {**saved, **given}, source="")
    check(options)
    return options


def read_argv(name: str, argv: Sequence[str]) -> dict[str, Any]:
    """The options that are given, as they were typed.

    Raises:
        InputError: an option is unknown or lacks its value, or there are words without an option.
        SystemExit: --help was asked for (code 0).
    """
    import tyro

    from aam.config import CONFIGS, flag, nearest, options_of

    summary, example = COMMANDS[name]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            boxes, rest = tyro.cli(
                option_boxes(name),
                prog=f"aam {name}",
                args=list(argv),
                description=summary,
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            print(f"\nexample:\n  aam {name} {example}", flush=True)
            raise
        lacking = re.search(r"--[a-z][a-z0-9-]*", errors.getvalue())
        raise InputError(f"{lacking.group() if lacking else name}: expected a value") from None
    if rest:
        known = options_of(CONFIGS[name])
        flags = [flag(one) for one in (*known, *(f"no_{one}" for one in known))]
        word = rest[0].partition("=")[0]
        problem = f"unknown option {word}{nearest(word, flags)}" if word.startswith("-") else ""
        problem = problem or f"{word!r} belongs to no option"
        raise InputError(f"{problem}; aam {name} --help lists the options")
    return {
        option: None if value == "None" else value
        for box in boxes.values()
        for option, value in box.items()
    }


def option_boxes(name: str, choices: bool = False) -> Any:
    """The options of a command as tyro takes them: common ones first, the others by group.

    Args:
        name: the command.
        choices: whether tyro checks choices, as shell completion wants it; else they are text.
    """
    import tyro

    from aam.config import CONFIGS, options_of

    known = options_of(CONFIGS[name])
    boxes: dict[str, dict[str, Any]] = {}
    for option in [known[one] for one in dict.fromkeys((*COMMON, *known)) if one in known]:
        schema, default = option.schema, option.default
        values = schema.get("enum", ())
        metavar = f"{{{','.join(values)}}}" if values else METAVARS.get(schema["type"])
        if isinstance(default, bool):
            default = "on" if default else "off"
        shown = tyro.conf.arg(
            help=option.help,
            metavar="PATH" if schema.get("format") == "path" else metavar,
            help_behavior_hint=(
                "(required)" if option.required
                else "" if default in (None, []) else f"(default: {default})"
            ),
        )  # fmt: skip
        kind: Any = {"boolean": bool, "array": tuple[str, ...]}.get(schema["type"], str)
        if values and choices:
            kind = Literal[tuple(values)]
        box = "common" if option.name in COMMON else option.group or "other"
        boxes.setdefault(box, {})[option.name] = Annotated[kind, shown]
    # Names and fields are known at run time alone, which the type checker does not follow.
    typed = {box: TypedDict(box, inner, total=False) for box, inner in boxes.items()}  # type: ignore[operator]
    return TypedDict(name, typed)  # type: ignore[operator]


def print_about(name: str, argv: list[str]) -> None:
    """Print the list of commands, the version, or what a shell reads to complete command lines."""
    from aam import __version__

    if name != "--completion":
        sys.stdout.write(f"aam {__version__}\n" if name == "--version" else HELP)
        return
    import tyro

    if argv[:1] not in ([one] for one in SHELLS):
        raise InputError(f"--completion: expected one of {', '.join(SHELLS)}")
    kinds = tuple(
        Annotated[option_boxes(name, choices=True), tyro.conf.subcommand(name, description=summary)]
        for name, (summary, _) in COMMANDS.items()
    )
    with contextlib.suppress(SystemExit):
        tyro.cli(
            Union[kinds],  # type: ignore[arg-type]  # noqa: UP007  (as many as there are)
            args=["--tyro-print-completion", argv[0]],
            prog="aam",
            config=(tyro.conf.OmitArgPrefixes,),
        )


def settle_resume(given: dict[str, Any]) -> None:
    """Decide what ``--resume-from auto`` means: the run in --output-dir, or nothing.

    A run that was ended before its first checkpoint is replaced; one whose checkpoints are all
    damaged is an error.
    """
    del given["resume_from"]
    if "output_dir" not in given:
        raise InputError("--resume-from auto: needs --output-dir, the folder of the run")
    folder = Path(given["output_dir"])
    if is_run(folder):
        from aam.learning.checkpoint import usable_checkpoint

        found = usable_checkpoint(folder)
        given |= {"overwrite": True} if found is None else {"resume_from": str(found)}


def saved_options(kind: type, resumed: Path) -> dict[str, Any]:
    """Options of the run that --resume-from names, wherever its folder is now.

    It has as many devices as before, unless torchrun or SLURM have started others.
    """
    from aam.config import read_toml
    from aam.learning.launch import find_layout

    folder = resume_folder(resume_checkpoint(resumed))
    file = folder / CONFIG_FILE
    saved = read_toml(file, kind) if file.is_file() else {}
    for name in ("devices", "data_parallel") if find_layout().starter != "aam" else ():
        saved.pop(name, None)
    return {**saved, "output_dir": str(folder)}


HELP = "\n".join(
    ["usage: aam COMMAND [OPTIONS]   (aam COMMAND --help lists its options)", ""]
    + [f"  {name:10}{summary}" for name, (summary, _) in COMMANDS.items()]
    + ["", "train is another name of finetune; aam demo shows all of it in minutes.", ""]
)
