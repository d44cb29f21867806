"""The device of a run, and the facts that its summary begins with."""

from __future__ import annotations

import logging
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
from aam.errors import InputError
from aam.learning import distributed
from aam.learning.launch import Layout, find_layout
from aam_kernels import available_impls

COMPILERS = ("g++", "clang++", "c++")


def make_fabric(options: RunOptions) -> Any:
    """A launched Lightning Fabric: this process's device, and the other ranks of the run.

    Raises:
        InputError: the devices do not exist, cannot run the attention implementation, or are
            others than torchrun or SLURM have started.
    """
    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # its import sets it lower
    kind, index = _device(options)
    layout = find_layout(_local_devices(options, kind), 1)
    if layout.size == 1:
        fabric = Fabric(accelerator=kind, devices=1 if kind == "cpu" else [index])
    else:
        _check_several(options, kind, layout)
        fabric = Fabric(
            accelerator=kind,
            devices=layout.local,
            num_nodes=layout.nodes,
            strategy="ddp",  # its processes and their group; a step adds up gradients itself
            plugins=[_environment(layout)],
        )
    check_attention(options, torch.device(kind, index))
    distributed.start_others(layout)
    fabric.launch()
    distributed.join(layout)
    return fabric


def _device(options: RunOptions) -> tuple[str, int]:
    """Kind and index of ``--device``.

    Raises:
        InputError: there is no such device.
    """
    name = options.device
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise InputError(f"--device {name}: torch sees {count} GPUs; use --device cpu")
    if kind == "auto":
        kind = "cuda" if count else "cpu"
    if index and (options.devices > 1 or options.data_parallel):
        raise InputError(f"--device {name}: names one device; use --device {kind} for several")
    return kind, int(index or 0)


def _local_devices(options: RunOptions, kind: str) -> int:
    """How many devices of this machine are asked for.

    Raises:
        InputError: --data-parallel means no certain number.
    """
    if not options.data_parallel:
        return options.devices
    if kind == "cpu":
        raise InputError(
            "--data-parallel: a CPU is one device; --devices N shares it among N processes"
        )
    count = torch.cuda.device_count()
    if options.devices not in (1, count):
        raise InputError(
            f"--devices {options.devices} with --data-parallel, which means all {count}: use one "
            "of the two"
        )
    return count


def _check_several(options: RunOptions, kind: str, layout: Layout) -> None:
    """Refuse more processes than devices, and what does not go together.

    Raises:
        InputError: says how many there are, or names the options.
    """
    if options.strategy == "fsdp" and options.compile_model:
        raise InputError("--compile-model: does not go together with --strategy fsdp; leave it out")
    count = torch.cuda.device_count()
    if kind != "cuda" or layout.local <= count:
        return
    if layout.starter == "aam":
        raise InputError(f"--devices {layout.local}: torch sees {count} GPUs")
    raise InputError(
        f"{layout.starter} started {layout.local} processes on this machine, each sees {count} "
        "GPUs: every process must see all GPUs of its machine (srun: --gpus-per-node, not "
        "--gpus-per-task)"
    )


def _environment(layout: Layout) -> Any:
    """Fabric's view of who started the processes."""
    from lightning_fabric.plugins import environments

    if layout.starter == "torchrun":
        return environments.TorchElasticEnvironment()
    return (
        environments.SLURMEnvironment(auto_requeue=False)
        if layout.starter == "slurm"
        else environments.LightningEnvironment()
    )


def check_attention(options: RunOptions, device: torch.device) -> None:
    """Refuse an attention implementation that this device does not have.

    Raises:
        InputError: lists those that it has.
    """
    available = set.intersection(*map(set, available_impls(device).values()))
    chosen = options.attn_implementation
    if chosen not in ("auto", *available):
        raise InputError(
            f"--attn-implementation {chosen}: not available on {device} in this "
            f"installation; choose auto, {', '.join(sorted(available))}"
        )


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


def run_facts(config: Any, fabric: Any, trainer: Any, job: Any, started: float) -> dict[str, Any]:
    """What summary.json says of the run before its results."""
    parts, unit = job.parts, job.names
    device, ranks = fabric.device, distributed.world_size()
    return {
        "title": f"{config.command} {config.run.output_dir.name}",
        "command": command_line(config.command),
        "aam_version": __version__,
        "torch_version": torch.__version__,
        "device": str(device) if ranks == 1 else f"{ranks} x {device.type}",
        "threads": torch.get_num_threads(),
        "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
        "steps": trainer.progress.step,
        "epochs": trainer.progress.epoch,
        "best_step": trainer.progress.best_step,
        f"{unit}_train": len(parts.train),
        f"{unit}_validation": len(parts.validation),
        "parameters": sum(one.numel() for one in job.model.parameters()),
        "data": [asdict(fact) for fact in job.facts],
        "results": [],
        "warnings": list(job.warnings),
        "config": to_dict(config),
        "target": None,
    }
