"""Checkpoints: written whole or not at all, and continued only with the options that made them."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aam.config import to_dict
from aam.data.splits import Split
from aam.errors import InputError, log
from aam.files import CHECKPOINTS, atomic_path, resume_checkpoint
from aam.learning import distributed
from aam.learning.model_file import FORMAT

DAMAGED = (  # whatever torch and pickle make of damaged bytes
    RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError, LookupError,
    AttributeError, TypeError,
)  # fmt: skip

# Options that a continued run may change: none of them changes a step that was already taken.
# Files may have moved: what they hold is compared instead (see `fingerprint`).
FREE = {
    "data": {"table", "sequences", "on_disk", "index_dir"},
    "distances": {"tree", "unifrac_matrix", "unifrac_matrix_ids"},
    "metadata": {"metadata", "train_ids", "validation_ids"},
    "optimizer": {"max_steps", "early_stopping", "validate_every"},
    "run": {
        "output_dir", "overwrite", "resume_from", "config", "device", "devices", "data_parallel",
        "strategy", "attn_implementation", "gradient_checkpointing", "compile_model",
        "tensorboard", "checkpoint_minutes", "memory_profile",
    },
}  # fmt: skip


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    # Through memory: torch's own writer reports a full disk as an internal error of its zip code.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint; an InputError where it is missing, truncated or none of this version."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        reason = str(error).split("\n")[0][:120] or type(error).__name__
        raise InputError(
            f"{path}: truncated or not a checkpoint ({reason}); "
            "resume from another one of the run's checkpoints"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this version of aam")
    return state


def compatible_state(config: Any) -> dict[str, Any] | None:
    """The checkpoint to continue from, made with the same options, or None for a new run."""
    if config.run.resume_from is None:
        return None
    path = resume_checkpoint(config.run.resume_from)
    state = load_state(path)
    command = state["description"]["command"]
    if command != config.command:
        raise InputError(f"{path}: is a checkpoint of {command}, not of {config.command}")
    before, now = _fixed(state["config"]), _fixed(to_dict(config))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        name = changed[0]
        raise InputError(
            f"{path}: was made with another --{name.split('.')[-1].replace('_', '-')} "
            f"({before.get(name)!r}, now {now.get(name)!r}); continue with the run's own options"
        )
    return state


def usable_checkpoint(folder: Path) -> Path | None:
    """What ``--resume-from auto`` continues: a run's folder, or its newest readable checkpoint.

    None where no checkpoint was ever saved.
    """
    paths = [one for one in (folder / CHECKPOINTS).glob("*.pt") if one.is_file()]
    steps: dict[Path, int] = {}
    reason = f"{folder / CHECKPOINTS}: last.pt is missing"
    for path in sorted(paths, key=lambda one: (one.name != "last.pt", one)):
        try:
            steps[path] = load_state(path)["progress"]["step"]
        except InputError as error:
            reason = str(error).split("; resume from")[0]
        else:
            if path.name == "last.pt":
                return folder
    if not paths:
        return None
    if not steps:
        raise InputError(
            f"{folder}: none of its checkpoints can be read ({reason}); start anew with "
            "--overwrite instead of --resume-from"
        )
    best = max(steps, key=steps.__getitem__)
    log(f"warning: {reason}; continuing from {best.name}, step {steps[best]}")
    return best


def fingerprint(contents: str, parts: Split, *arrays: np.ndarray | None) -> str:
    """A digest of what the data contribute to a step: the table's digest, split and targets.

    Real numbers count to 5 decimals, so that another machine's last bits are no difference.
    """
    digest = hashlib.sha256(contents.encode())
    for ids in (parts.train, parts.validation):
        digest.update("\n".join(ids).encode() + b"\0")
    for array in arrays:
        if array is None:
            continue
        if array.dtype.kind == "f":
            plain = np.round(array.astype(np.float64), 5) + 0.0  # no minus zero
        else:
            plain = array.astype(np.int64)
        digest.update(np.ascontiguousarray(plain).tobytes() + b"\0")
    return digest.hexdigest()


def check_same_data(state: dict[str, Any] | None, config: Any, description: dict[str, Any]) -> None:
    """Refuse to continue a run with other data, and ranks that do not see the same."""
    distributed.check_equal("the configuration", _fixed(to_dict(config)))
    distributed.check_equal("the data", description["fingerprint"])
    distributed.check_equal("the checkpoint", state and state["progress"])
    if state and state["description"].get("fingerprint") != description["fingerprint"]:
        raise InputError(
            f"{config.run.resume_from}: was made from other data: the table, metadata, distances "
            "or split have changed; continue with the files of the run"
        )


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """Options that must not change, as ``group.option``."""
    flat: dict[str, Any] = {}
    for group, values in config.items():
        if isinstance(values, dict):
            fixed = values.keys() - FREE.get(group, set())
            flat |= {f"{group}.{name}": values[name] for name in fixed}
        elif group != "pretrained_encoder":  # its weights are in the checkpoint
            flat[group] = values
    return flat
