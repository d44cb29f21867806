"""Who started this process, and with how many others; known before torch is loaded."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aam.config import RunOptions
from aam.errors import InputError

if TYPE_CHECKING:
    import torch

PARENT = "AAM_PARENT"  # in the environment of a process that rank 0 started: rank 0's process id


@dataclass(frozen=True)
class Layout:
    """How many processes there are, and which of them this is."""

    starter: str  # aam, torchrun or slurm
    local: int  # processes of this machine
    nodes: int
    rank: int
    local_rank: int

    @property
    def size(self) -> int:
        """Processes of all machines."""
        return self.local * self.nodes


def starter() -> str:
    """Who started the processes of this run: torchrun, slurm (srun) or aam."""
    said = os.environ
    if "TORCHELASTIC_RUN_ID" in said:
        return "torchrun"
    step = "SLURM_STEP_ID" in said and int(said.get("SLURM_NTASKS", "1")) > 1
    return "slurm" if step else "aam"


def own_ranks() -> tuple[int, int]:
    """This process's rank among all, and among those of its machine."""
    said = os.environ
    by = starter()
    if by == "torchrun":
        return int(said["RANK"]), int(said["LOCAL_RANK"])
    if by == "slurm":
        return int(said["SLURM_PROCID"]), int(said["SLURM_LOCALID"])
    rank = int(said["LOCAL_RANK"]) if PARENT in said else 0
    return rank, rank


def silence_others() -> None:
    """Leave the screen to rank 0."""
    if own_ranks()[0]:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def complain(text: str) -> None:
    """Write an error line on the screen, of whatever rank."""
    if sys.__stderr__ is not None:
        sys.__stderr__.write(f"error: {' '.join(text.split())}\n")
        sys.__stderr__.flush()


def refuse_several(command: str) -> None:
    """Refuse to run a command in several processes that would all do the same.

    Raises:
        InputError: torchrun or SLURM have started several.
    """
    count = os.environ.get({"torchrun": "WORLD_SIZE", "slurm": "SLURM_NTASKS"}.get(starter(), ""))
    if count is not None and int(count) > 1:
        raise InputError(f"{command} runs in one process; {starter()} started {count} of them")


def find_layout(devices: int) -> Layout:
    """Who started this process, and with how many others.

    Args:
        devices: of this machine, as asked for; 1 under torchrun and srun: as they say.

    Raises:
        InputError: the options say another number than torchrun or SLURM.
    """
    said, by = os.environ, starter()
    if by == "aam":
        return Layout(by, devices, 1, *own_ranks())
    if by == "torchrun":
        size, local = int(said["WORLD_SIZE"]), int(said["LOCAL_WORLD_SIZE"])
        found = Layout(by, local, size // local, *own_ranks())
        if size % local:
            raise InputError(
                f"torchrun: {size} processes, {local} of them here: every machine needs as many; "
                "use the same --nproc-per-node everywhere"
            )
        many = "--nproc-per-node"
    else:
        found = _slurm_layout()
        many = "--ntasks-per-node"
    if devices not in (1, found.local):
        raise InputError(
            f"--devices {devices}: {found.starter} started {found.local} processes here; leave "
            f"the option out or use {many}={devices}"
        )
    return found


def _slurm_layout() -> Layout:
    """The tasks of a job step.

    Raises:
        InputError: there is no equal number of tasks a machine.
    """
    said = os.environ
    size, nodes = int(said["SLURM_NTASKS"]), int(said.get("SLURM_NNODES", "1"))
    if "SLURM_NTASKS_PER_NODE" not in said:
        raise InputError(
            f"srun: {size} tasks without --ntasks-per-node; set it to the devices of a machine"
        )
    local = int(said["SLURM_NTASKS_PER_NODE"])
    if local * nodes != size:
        raise InputError(
            f"srun: {size} tasks, but --nodes={nodes} with --ntasks-per-node={local} makes "
            f"{local * nodes}; leave --ntasks out"
        )
    return Layout("slurm", local, nodes, *own_ranks())


def start(options: RunOptions) -> torch.device:
    """The device of this process, which meets the other ranks of the run if there are any.

    Raises:
        InputError: the devices do not exist, cannot run the attention implementation, or are
            others than torchrun or SLURM have started.
    """
    import torch
    import torch.distributed as dist

    from aam.learning import distributed
    from aam.learning.device import check_attention, check_precision, find_device

    device = find_device(options.device)
    layout = find_layout(_local_devices(options, device))
    if layout.size > 1:
        _check_several(options, device, layout)
        device = torch.device("cuda", layout.local_rank) if device.type == "cuda" else device
    check_attention(options.attn_implementation, device)
    check_precision(options, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if layout.size > 1:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // layout.local))
        distributed.start_others(layout)
        if layout.starter == "slurm":
            _name_first_host()
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=layout.rank, world_size=layout.size)
        distributed.join(layout)
    return device


def _local_devices(options: RunOptions, device: torch.device) -> int:
    """How many devices of this machine are asked for.

    Raises:
        InputError: --data-parallel means no certain number, or --device names one device.
    """
    import torch

    if ":" in options.device and (options.devices > 1 or options.data_parallel):
        raise InputError(
            f"--device {options.device}: names one device; use --device {device.type} for several"
        )
    if not options.data_parallel:
        return options.devices
    if device.type == "cpu":
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


def _check_several(options: RunOptions, device: torch.device, layout: Layout) -> None:
    """Refuse more processes than devices, and what does not go together.

    Raises:
        InputError: says how many there are, or names the options.
    """
    import torch

    if options.strategy == "fsdp" and options.compile_model:
        raise InputError("--compile-model: does not go together with --strategy fsdp; leave it out")
    count = torch.cuda.device_count()
    if device.type != "cuda" or layout.local <= count:
        return
    if layout.starter == "aam":
        raise InputError(f"--devices {layout.local}: torch sees {count} GPUs")
    raise InputError(
        f"{layout.starter} started {layout.local} processes on this machine, each sees {count} "
        "GPUs: every process must see all GPUs of its machine (srun: --gpus-per-node, not "
        "--gpus-per-task)"
    )


def _name_first_host() -> None:
    """Say to torch where the tasks of a SLURM job meet, if nobody has."""
    said = os.environ
    first = re.match(r"([^,\[]+)(?:\[([^],-]+))?", said.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    assert first is not None
    said.setdefault("MASTER_ADDR", "".join(first.groups("")))
    said.setdefault("MASTER_PORT", str(20000 + int(said.get("SLURM_JOB_ID", "0")) % 10000))
