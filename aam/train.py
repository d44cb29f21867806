"""The command line: ``python -m aam.train COMMAND``, installed also as ``aam COMMAND``.

Commands: pretrain, finetune (alias train), predict, evaluate, inspect, unifrac, demo. With no
command it runs demo. Bad input gives one line on standard error and exit code 2.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aam import config
from aam.errors import InputError

COMMANDS: dict[str, type] = {
    "pretrain": config.PretrainConfig,
    "finetune": config.FinetuneConfig,
    "predict": config.PredictConfig,
    "evaluate": config.EvaluateConfig,
    "inspect": config.InspectConfig,
    "unifrac": config.UnifracConfig,
    "demo": config.DemoConfig,
}
ALIASES = {"train": "finetune"}
INTERRUPTED = 130  # what shells expect after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: as on the command line, without the program's name.

    Returns:
        The exit code: 0, 2 for input that cannot be used, 130 after Ctrl-C.
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
    try:
        if name not in COMMANDS:
            raise InputError(f"unknown command {name!r}; choose {', '.join(COMMANDS)}")
        options = parse(name, words[1:])
        quiet_libraries()
        runner(name)(options)
    except InputError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def parse(name: str, words: Sequence[str]) -> Any:
    """Options of a command, from the command line over a TOML file over the defaults.

    Raises:
        InputError: the TOML file cannot be used.
        SystemExit: an option is unknown or missing (code 2, said on standard error), or --help.
    """
    import tyro

    config_class = COMMANDS[name]
    values = config.read_toml(saved, config_class) if (saved := saved_options(words)) else {}
    default = config.from_dict(config_class, values, missing=tyro.MISSING)
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[config_class],  # type: ignore[valid-type]
        prog=f"aam {name}",
        args=list(words),
        default=default,
        description=config_class.__doc__,
    )


def saved_options(words: Sequence[str]) -> Path | None:
    """The TOML file that --config names, or that of the run that --resume-from names."""
    for option in ("--config", "--resume-from"):
        for place, word in enumerate(words):
            value = None
            if word == option and place + 1 < len(words):
                value = words[place + 1]
            elif word.startswith(f"{option}="):
                value = word.partition("=")[2]
            if value is None:
                continue
            if option == "--config":
                return Path(value)
            from aam.training.runs import CONFIG_FILE, resume_folder

            path = resume_folder(Path(value)) / CONFIG_FILE
            return path if path.is_file() else None
    return None


def runner(name: str) -> Callable[[Any], Any]:
    """The function that runs a command; only its own modules are imported."""
    if name == "pretrain":
        from aam.training.pretrain import pretrain as run
    elif name == "finetune":
        from aam.training.finetune import finetune as run
    elif name == "predict":
        from aam.training.predict import predict as run
    elif name == "evaluate":
        from aam.training.evaluate import evaluate as run
    elif name == "inspect":
        from aam.training.inspect import inspect as run
    elif name == "unifrac":
        from aam.training.unifrac import unifrac as run
    else:
        from aam.training.demo import demo as run
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
    import logging

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"(tensorboard|lightning_fabric)\b.*")


if __name__ == "__main__":
    sys.exit(main())
