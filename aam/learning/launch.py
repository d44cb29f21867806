"""Who started this process, and with how many others; known before torch is loaded."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from aam.errors import InputError

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


def find_layout(devices: int, nodes: int) -> Layout:
    """Who started this process, and with how many others.

    Args:
        devices: of this machine, as asked for; 1 under torchrun and srun: as they say.
        nodes: likewise.

    Raises:
        InputError: the options say another number than torchrun or SLURM.
    """
    said, by = os.environ, starter()
    if by == "torchrun":
        size, local = int(said["WORLD_SIZE"]), int(said["LOCAL_WORLD_SIZE"])
        found = Layout(by, local, size // local, *own_ranks())
        if size % local:
            raise InputError(
                f"torchrun: {size} processes, {local} of them here: every machine needs as many; "
                "use the same --nproc-per-node everywhere"
            )
        many, machines = "--nproc-per-node", "--nnodes"
    elif by == "slurm":
        found = _slurm_layout()
        many, machines = "--ntasks-per-node", "--nodes"
    else:
        if nodes > 1:
            raise InputError(
                f"--num-nodes {nodes}: start the same command on each machine with torchrun "
                "(--nnodes, --nproc-per-node) or srun (--nodes, --ntasks-per-node)"
            )
        return Layout(by, devices, 1, *own_ranks())
    if devices not in (1, found.local):
        raise InputError(
            f"--devices {devices}: {found.starter} started {found.local} processes here; leave "
            f"the option out or use {many}={devices}"
        )
    if nodes not in (1, found.nodes):
        raise InputError(
            f"--num-nodes {nodes}: {found.starter} started {found.nodes}; leave the option out "
            f"or use {machines}={nodes}"
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
