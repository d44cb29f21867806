"""Checkpoints of which every rank writes its part: a folder beside the small rest.

Written by torch.distributed.checkpoint into a folder that all machines share, and read whole by
any number of ranks.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from aam.errors import InputError
from aam.learning import distributed

COMPLETE = ".metadata"  # written last


def write_shards(
    folder: Path, name: str, objective: dict[str, Any], optimizer: dict[str, Any]
) -> dict[str, Any]:
    """Write this rank's part of weights and optimizer state; all ranks call it.

    Args:
        folder: where the checkpoint will be.
        name: of the folder of the parts, new for every step.
        objective: the module's state.
        optimizer: its state.

    Returns:
        What the checkpoint itself keeps of them.
    """
    place = folder / name
    done = distributed.on_rank_zero(lambda: (place / COMPLETE).is_file() or remove(place))
    if not done:
        tensors = {f"objective/{key}": value for key, value in objective.items()}
        for number, values in optimizer["state"].items():
            tensors |= {f"optimizer/{number}/{key}": value for key, value in values.items()}
        dcp.save(tensors, checkpoint_id=place)
    return {"parts": name, "optimizer": {"param_groups": optimizer["param_groups"]}}


def read_shards(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with the weights and optimizer state that its ranks wrote, whole.

    Args:
        path: the checkpoint.
        state: what it holds.

    Raises:
        InputError: parts are missing or damaged.
    """
    place = path.parent / state["parts"]
    try:
        metadata = dcp.FileSystemReader(place).read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(one.size, dtype=one.properties.dtype)
            for name, one in metadata.items()
            if isinstance(one, TensorStorageMetadata)
        }
        alone = None
        if dist.is_initialized():
            own = [dist.get_rank()]
            alone = dist.new_group(own, backend="gloo", use_local_synchronization=True)
        dcp.load(tensors, checkpoint_id=place, process_group=alone)
    except (OSError, RuntimeError, ValueError, LookupError, dcp.CheckpointException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise InputError(
            f"{place}: parts of the checkpoint are missing or damaged ({reason}); resume from "
            "another one of the run's checkpoints"
        ) from error
    whole: dict[str, Any] = {**state, "objective": {}}
    del whole["parts"]
    numbered: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        kind, _, key = name.partition("/")
        if kind == "objective":
            whole["objective"][key] = value
        else:
            number, _, key = key.partition("/")
            numbered.setdefault(int(number), {})[key] = value
    whole["optimizer"] = {"state": numbered, **state["optimizer"]}
    return whole


def remove_older(folder: Path, kind: str, name: str) -> None:
    """Delete the parts that a new checkpoint has taken the place of.

    Args:
        folder: of the checkpoints.
        kind: what the names of such parts begin with.
        name: of the new parts.
    """
    for one in folder.glob(f"{kind}-*"):
        if one.is_dir() and one.name != name:
            remove(one)


def remove(place: Path) -> bool:
    """Delete a folder, if it is there."""
    shutil.rmtree(place, ignore_errors=True)
    return False
