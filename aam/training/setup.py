"""The device of a run, and the facts that its summary begins with."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aam import __version__
from aam.config import RunOptions, to_dict
from aam.data.splits import Split
from aam.errors import InputError
from aam.training.prepare import Samples
from aam_kernels import available_impls

COMPILERS = ("g++", "clang++", "c++")


def make_fabric(options: RunOptions) -> Any:
    """A launched Lightning Fabric on one device.

    Raises:
        InputError: the device does not exist, or cannot run the attention implementation.
    """
    from lightning_fabric import Fabric

    name = options.device
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise InputError(f"--device {name}: torch sees {count} GPUs; use --device cpu")
    if kind == "cpu" or (kind == "auto" and not count):
        fabric = Fabric(accelerator="cpu", devices=1)
    else:
        fabric = Fabric(accelerator="cuda", devices=[int(index or 0)])
    available = set.intersection(*map(set, available_impls(fabric.device).values()))
    chosen = options.attn_implementation
    if chosen not in ("auto", *available):
        raise InputError(
            f"--attn-implementation {chosen}: not available on {fabric.device} in this "
            f"installation; choose auto, {', '.join(sorted(available))}"
        )
    fabric.launch()
    return fabric


def pick_device(name: str, attn_implementation: Any = "auto") -> torch.device:
    """The device of a command that does not train."""
    options = RunOptions(output_dir=Path(), device=name, attn_implementation=attn_implementation)
    return make_fabric(options).device


def compile_stacks(module: nn.Module) -> None:
    """Compile every transformer stack in place.

    Raises:
        InputError: there is no C++ compiler, which torch.compile needs.
    """
    from aam_kernels.modules import TransformerEncoder

    if not any(shutil.which(os.environ.get("CXX") or name) for name in COMPILERS):
        raise InputError(
            "--compile-model: needs a C++ compiler such as g++; install one or leave it out"
        )
    for part in module.modules():
        if isinstance(part, TransformerEncoder):
            part.compile(dynamic=True)


def command_line(command: str) -> str:
    """What was typed, where that is known; else the command's name."""
    typed = Path(sys.argv[0]).name in ("aam", "train.py")
    return shlex.join(["aam", *sys.argv[1:]]) if typed and len(sys.argv) > 1 else f"aam {command}"


def run_facts(
    config: Any,
    fabric: Any,
    trainer: Any,
    samples: Samples,
    parts: Split,
    model: nn.Module,
    started: float,
) -> dict[str, Any]:
    """What summary.json says of the run before its results."""
    return {
        "title": f"{config.command} {config.run.output_dir.name}",
        "command": command_line(config.command),
        "aam_version": __version__,
        "torch_version": torch.__version__,
        "device": str(fabric.device),
        "threads": torch.get_num_threads(),
        "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
        "steps": trainer.progress.step,
        "epochs": trainer.progress.epoch,
        "best_step": trainer.progress.best_step,
        "samples_train": len(parts.train),
        "samples_validation": len(parts.validation),
        "parameters": sum(one.numel() for one in model.parameters()),
        "data": [asdict(fact) for fact in samples.facts],
        "results": [],
        "warnings": list(samples.warnings),
        "config": to_dict(config),
        "target": None,
    }
