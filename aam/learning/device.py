"""The device that a process computes on: chosen, checked, and its model compiled."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from aam.config import RunOptions
from aam.errors import InputError
from aam_kernels import available_impls
from aam_kernels.modules import TransformerEncoder

COMPILERS = ("g++", "clang++", "c++")


def find_device(name: str) -> torch.device:
    """The device that ``--device`` names; auto takes a GPU if there is one."""
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
        raise InputError(f"device {name}: expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise InputError(f"--device {name}: torch sees {count} GPUs; use --device cpu")
    if kind == "cpu" or not count:
        return torch.device("cpu")
    return torch.device("cuda", int(index or 0))


def count_devices(options: RunOptions) -> int:
    """How many devices of this machine are asked for; refuses what cannot be meant."""
    device, count = find_device(options.device), torch.cuda.device_count()
    if options.strategy == "fsdp" and options.compile_model:
        raise InputError("--compile-model: does not go together with --strategy fsdp; leave it out")
    if ":" in options.device and (options.devices > 1 or options.data_parallel):
        remedy = f"use --device {device.type} for several"
        raise InputError(f"--device {options.device}: names one device; {remedy}")
    if device.type == "cuda" and options.devices > count:
        raise InputError(f"--devices {options.devices}: torch sees {count} GPUs")
    if not options.data_parallel:
        return options.devices
    if device.type == "cpu":
        remedy = "--devices N shares it among N processes"
        raise InputError(f"--data-parallel: a CPU is one device; {remedy}")
    if options.devices not in (1, count):
        both = f"--devices {options.devices} with --data-parallel, which means all {count}"
        raise InputError(f"{both}: use one of the two")
    return count


def check_attention(implementation: str, device: torch.device) -> None:
    """Refuse an attention implementation that this device does not have."""
    available = set.intersection(*map(set, available_impls(device).values()))
    if implementation not in ("auto", *available):
        raise InputError(
            f"--attn-implementation {implementation}: not available on {device} in this "
            f"installation; choose auto, {', '.join(sorted(available))}"
        )


def check_precision(options: RunOptions, device: torch.device) -> None:
    """Set how float32 products are computed, and refuse what a device or strategy cannot do.

    On a CPU the kernels compute in float32 whatever they are given; overflows of float16 in
    sharded weights each rank would see alone.
    """
    if device.type == "cpu" and (options.precision != "32" or options.tf32):
        what = "--tf32" if options.tf32 else f"--precision {options.precision}"
        raise InputError(f"{what}: needs a GPU; on a CPU everything is computed in 32 bits")
    if options.precision == "16-mixed" and options.strategy == "fsdp":
        raise InputError("--precision 16-mixed: not with --strategy fsdp; use bf16-mixed")
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high" if options.tf32 else "highest")


def pick_device(name: str, attn_implementation: str = "auto") -> torch.device:
    """The checked device of a command that runs in one process."""
    device = find_device(name)
    check_attention(attn_implementation, device)
    return device


def compile_stacks(module: nn.Module) -> None:
    """Compile every transformer stack in place, for which torch needs a C++ compiler."""
    if not any(shutil.which(os.environ.get("CXX") or name) for name in COMPILERS):
        raise InputError(
            "--compile-model: needs a C++ compiler such as g++; install one or leave it out"
        )
    for part in module.modules():
        if isinstance(part, TransformerEncoder):
            part.compile(dynamic=True)
