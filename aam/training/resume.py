"""Continuing a run: only with the options that made it."""

from __future__ import annotations

from typing import Any

from aam.config import to_dict
from aam.errors import InputError
from aam.training.checkpoint import load_state
from aam.training.runs import resume_checkpoint

# Options that a continued run may change: none of them changes a step that was already taken.
FREE = {
    "run": {
        "output_dir",
        "overwrite",
        "resume_from",
        "device",
        "tensorboard",
        "config",
        "gradient_checkpointing",
        "compile_model",
        "attn_implementation",
    },
    "optimizer": {"max_steps", "early_stopping", "validate_every", "best_metric"},
}


def compatible_state(config: Any) -> dict[str, Any] | None:
    """The checkpoint to continue from, or None for a new run.

    Raises:
        InputError: it is missing, damaged, or was made with other options.
    """
    if config.run.resume_from is None:
        return None
    path = resume_checkpoint(config.run.resume_from)
    state = load_state(path)
    if state["description"]["command"] != config.command:
        raise InputError(
            f"{path}: is a checkpoint of {state['description']['command']}, not of {config.command}"
        )
    before, now = _fixed(state["config"]), _fixed(to_dict(config))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        name = changed[0]
        raise InputError(
            f"{path}: was made with another --{name.split('.')[-1].replace('_', '-')} "
            f"({before.get(name)!r}, now {now.get(name)!r}); continue with the run's own options"
        )
    return state


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """Options that must not change, as ``group.option``."""
    flat: dict[str, Any] = {}
    for group, values in config.items():
        if not isinstance(values, dict):
            flat[group] = values
            continue
        for name, value in values.items():
            if name not in FREE.get(group, ()):
                flat[f"{group}.{name}"] = value
    return flat
