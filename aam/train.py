"""The command line: ``python -m aam.train COMMAND``, installed also as ``aam COMMAND``.

Commands: pretrain, finetune (alias train), predict, evaluate, inspect, unifrac, embed, demo. With
no command it runs demo. Bad input gives one line on standard error and exit code 2.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import itertools
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aam import config
from aam.errors import InputError
from aam.learning.launch import complain, own_ranks, refuse_several, silence_others, starter

COMMANDS: dict[str, type] = {
    "pretrain": config.PretrainConfig,
    "finetune": config.FinetuneConfig,
    "predict": config.PredictConfig,
    "evaluate": config.EvaluateConfig,
    "inspect": config.InspectConfig,
    "unifrac": config.UnifracConfig,
    "embed": config.EmbedConfig,
    "demo": config.DemoConfig,
}
ALIASES = {"train": "finetune"}
BOX = " |+\u2502\u256d\u256e\u2570\u256f\u2500"  # drawn around the messages of the option parser
AUTO = "auto"  # --resume-from
STOPPED = 128  # and the number of the signal, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: as on the command line, without the program's name.

    Returns:
        The exit code: 0, 2 for input that cannot be used, 130 after Ctrl-C, 143 after SIGTERM,
        138 after SIGUSR1.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = ALIASES.get(words[0], words[0]) if words else "demo"
    if name in ("-h", "--help"):
        print_help()
        return 0
    if name == "--version":
        from aam import __version__

        sys.stdout.write(f"aam {__version__}\n")
        return 0

    silence_others()

    def work() -> None:
        if name not in COMMANDS:
            raise InputError(f"unknown command {name!r}; choose {', '.join(COMMANDS)}")
        options = parse(name, words[1:])
        quiet_libraries()
        run = runner(name)
        if name in ("pretrain", "finetune"):
            run = shared(run, words)
        else:
            refuse_several(name)
        run(options)

    return guarded(work)


def guarded(work: Callable[[], Any]) -> int:
    """The exit code of work that may meet bad input, a full disk or a signal."""
    try:
        work()
    except InputError as error:
        tell_error(error, str(error))
        return 2
    except OSError as error:  # a disk that fills up while a log or a report is written
        place = f"{error.filename}: " if error.filename else ""
        tell_error(error, f"{place}{error.strerror or error}")
        return 2
    except KeyboardInterrupt as stop:
        return STOPPED + getattr(stop, "number", signal.SIGINT)
    return 0


def tell_error(error: Exception, text: str) -> None:
    """One line: by rank 0, or by the first of another machine, which may see other files."""
    rank, local_rank = own_ranks()
    if not rank:
        sys.stderr.write(f"error: {' '.join(text.split())}\n")
    elif not local_rank and not getattr(error, "told", False):
        complain(f"rank {rank}: {text}")


def shared(run: Callable[[Any], Any], words: Sequence[str]) -> Callable[[Any], None]:
    """A command whose steps other processes may share, started with these words."""
    from aam.learning.distributed import together
    from aam.learning.stopping import Stopped, requeue

    def run_together(options: Any) -> None:
        try:
            with together(words):
                run(options)
        except Stopped as stop:
            requeue(stop.number)
            raise

    return run_together


def parse(name: str, words: Sequence[str]) -> Any:
    """Options of a command: the command line over --config over --resume-from over the defaults.

    Raises:
        InputError: an option is unknown, missing or has a value that it cannot have.
        SystemExit: --help was asked for (code 0).
    """
    import tyro

    config_class = COMMANDS[name]
    if ("run", "resume_from") in set(config.leaves(config_class)):
        words = settle_resume(words)
    values = saved_options(config_class, words)
    default = config.from_dict(config_class, values, missing=tyro.MISSING)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = tyro.cli(
                tyro.conf.OmitArgPrefixes[config_class],  # type: ignore[valid-type]
                prog=f"aam {name}",
                args=list(words),
                default=default,
                description=config_class.__doc__,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(complaint(name, words, said.getvalue())) from None
    config.check(options)
    return options


def complaint(name: str, words: Sequence[str], said: str) -> str:
    """One line for what the command-line library says in a box of many.

    Args:
        name: the command.
        words: what was typed.
        said: the library's message.
    """
    remedy = f"aam {name} --help lists the options"
    known = {"help"}
    defaults = config.from_dict(COMMANDS[name], {}, missing=...)
    for leaf in config.leaves(COMMANDS[name]):
        option = leaf[-1].replace("_", "-")
        is_switch = isinstance(functools.reduce(getattr, leaf, defaults), bool)
        known |= {option, f"no-{option}"} if is_switch else {option}
    for word in words:
        option = option_of(word).removeprefix("--")
        if word.startswith("--") and option not in known:
            near = difflib.get_close_matches(option, sorted(known), n=1)
            hint = f"did you mean --{near[0]}? " if near else ""
            return f"unknown option --{option}; {hint}{remedy}"
    lines = [line.strip(BOX) for line in said.splitlines()]
    lines = ["" if set(line) == {"-"} else line for line in lines]  # rules, where text is ASCII
    while lines and not lines[0]:
        del lines[0]
    title = lines[0].strip("- ") if lines else ""
    rest = list(itertools.dropwhile(lambda line: not line, lines[1:]))
    body = list(itertools.takewhile(bool, rest))  # up to the first rule
    if title.startswith("Required"):
        missing = [found for line in body if (found := re.match(r"--[a-z-]+", line))]
        return f"aam {name} needs {' and '.join(one.group() for one in missing)}; {remedy}"
    text = " ".join(line for line in body if not line.startswith("For full helptext"))
    text = text.removeprefix("Error parsing ")
    return f"{text.rstrip('.') or title.lower()}; {remedy}"


def settle_resume(words: Sequence[str]) -> list[str]:
    """The words, with what ``--resume-from auto`` means: the run in --output-dir, or nothing.

    A run that was ended before its first checkpoint is replaced.

    Raises:
        InputError: there are checkpoints, but none of them can be read.
    """
    if value_of("--resume-from", words) != AUTO:
        return list(words)
    from aam.learning.checkpoint import usable_checkpoint
    from aam.learning.run import is_run

    folder = value_of("--output-dir", words)
    if folder is None:
        raise InputError("--resume-from auto: needs --output-dir, the folder of the run")
    kept, rest = [], iter(words)
    for word in rest:
        if option_of(word) != "--resume-from":
            kept.append(word)
        elif "=" not in word:
            next(rest, None)  # its value
    found = usable_checkpoint(Path(folder))
    if found is not None:
        return [*kept, "--resume-from", str(found)]
    return [*kept, "--overwrite"] if is_run(Path(folder)) else kept


def saved_options(config_class: type, words: Sequence[str]) -> dict[str, Any]:
    """Options of the run that --resume-from names, and over them those of the --config file.

    A continued run stays in its folder wherever that is now, unless --output-dir says otherwise,
    and has as many devices as before, unless torchrun or SLURM have started others.
    """
    values: dict[str, Any] = {}
    if resumed := value_of("--resume-from", words):
        from aam.learning.run import CONFIG_FILE, resume_checkpoint, resume_folder

        if ("run", "resume_from") not in set(config.leaves(config_class)):
            return {}  # this command has no such option: the parser says so
        folder = resume_folder(resume_checkpoint(Path(resumed)))
        if (folder / CONFIG_FILE).is_file():
            values = config.read_toml(folder / CONFIG_FILE, config_class)
        if starter() != "aam":
            for name in ("devices", "data_parallel"):
                values.get("run", {}).pop(name, None)
        values = config.merge(values, {"run": {"output_dir": str(folder)}})
    if (chosen := value_of("--config", words)) and ("run", "config") in config.leaves(config_class):
        values = config.merge(values, config.read_toml(Path(chosen), config_class))
    return values


def value_of(option: str, words: Sequence[str]) -> str | None:
    """What was typed for an option, before the words are parsed; the last one counts."""
    value = None
    for place, word in enumerate(words):
        if option_of(word) == option:
            following = words[place + 1] if place + 1 < len(words) else None
            value = word.partition("=")[2] if "=" in word else following
    return value


def option_of(word: str) -> str:
    """The option that a word names, however it is written; its value may follow."""
    return word.partition("=")[0].replace("_", "-")


def runner(name: str) -> Callable[[Any], Any]:
    """The function that runs a command; only its own modules are imported."""
    if name == "pretrain":
        from aam.commands.pretrain import pretrain as run
    elif name == "finetune":
        from aam.commands.finetune import finetune as run
    elif name == "predict":
        from aam.commands.predict import predict as run
    elif name == "evaluate":
        from aam.commands.evaluate import evaluate as run
    elif name == "inspect":
        from aam.commands.inspect import inspect as run
    elif name == "unifrac":
        from aam.commands.unifrac import unifrac as run
    elif name == "embed":
        from aam.commands.embed import embed as run
    else:
        from aam.commands.demo import demo as run
    return run


def print_help() -> None:
    """List the commands."""
    lines = ["usage: aam COMMAND [OPTIONS]   (aam COMMAND --help lists its options)", ""]
    for name, config_class in COMMANDS.items():
        lines.append(f"  {name:10}{(config_class.__doc__ or '').splitlines()[0]}")
    lines += ["", "Without a command, demo runs. train is another name of finetune.", ""]
    sys.stdout.write("\n".join(lines))


def quiet_libraries() -> None:
    """Keep other packages' notices off the screen; ours are plain lines."""
    others = r"(tensorboard|torch\.distributed)\b.*"
    warnings.filterwarnings("ignore", module=others)


if __name__ == "__main__":
    sys.exit(main())
