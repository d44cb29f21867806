"""The same step on several ranks of one thread each, over gloo.

The process that is timed is rank 0; it starts the others, and they follow it call by call.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from aam.learning.distributed import RankGroup
from aam.learning.step import Step
from benchmarks.batching import GB, Case, Epoch, Result, in_turn

RANKS = "AAM_BENCHMARK_RANKS"  # of a process that rank 0 started: rank, size, port
END, FIRST, LATER = 0, 1, 2
SHORT = 4  # samples of the step that warms up


def steps_on_ranks(
    folder: str, name: str, *, ranks: int, batch: int, exchanged: bool = True, **options: Any
) -> Epoch:
    """Steps of one epoch of the case, each over all ranks.

    Args:
        folder: of the data.
        name: see `benchmarks.batching.read`.
        ranks: processes; their environment says how many threads each has.
        exchanged: every distinct ASV of a step is encoded by one rank; False: each rank takes its
            own samples alone, with all ASVs that they have, and only the weights' gradients meet.
        batch: samples of a step, of all ranks together.
        options: of `Case`.
    """
    others = start_others(ranks)
    case = Case(folder, name, **options)
    batches = case.fixed(batch)

    def step(rows: np.ndarray) -> Result:
        return shared_step(case, rows) if exchanged else own_step(case, rows)

    def first() -> Result:
        return step(batches[0][:SHORT])

    def later() -> Result:
        found = [step(rows) for rows in batches]
        counted = ("samples", "asvs_encoded", "tokens_encoded")
        result = {key: sum(one[key] for one in found) for key in counted}
        peak = max(one["peak"] for one in found)
        return {**result, "loss": found[0]["loss"], "peak_megabytes": 1e3 * peak}

    if ranks > 1 and dist.get_rank():
        follow({FIRST: first, LATER: later})
    return in_turn(lambda: told(FIRST, first, others), lambda: told(LATER, later, others))


def shared_step(case: Case, rows: np.ndarray) -> Result:
    """A step of training, its work shared among the ranks."""
    batch = case.trainer.dataset.batch(rows)
    terms = case.trainer.step(rows)
    return {
        "samples": len(rows),
        "asvs_encoded": len(batch.asv_ids),
        "tokens_encoded": len(batch.tokens.values),
        "loss": terms["loss"],
        "peak": terms["memory_gb"],
    }


def own_step(case: Case, rows: np.ndarray) -> Result:
    """A step in which every rank knows its own samples only: no vectors are exchanged.

    Its loss has no pairs of samples of different ranks, and each rank masks its own ASVs.
    """
    trainer, exchange = case.trainer, RankGroup()
    own = np.array_split(rows, exchange.size)[exchange.rank]
    batch = trainer.dataset.batch(own)
    alone = RankGroup()
    alone.size, alone.rank = 1, 0
    trainer.batching.meter.reset()
    trainer.objective.train()
    trainer.optimizer.zero_grad(set_to_none=True)
    step = Step(trainer.objective, alone)
    terms = step(batch)
    exchange.all_reduce_gradients(step.parameters)
    trainer.optimizer.step()
    encoded = torch.tensor([len(batch.asv_ids), len(batch.tokens.values)])
    asvs, tokens = exchange.all_reduce(encoded).tolist()
    return {
        "samples": len(rows),
        "asvs_encoded": asvs,
        "tokens_encoded": tokens,
        "loss": terms["loss"],
        "peak": trainer.batching.meter.peak() / GB,
    }


def start_others(ranks: int) -> list[subprocess.Popen[bytes]]:
    """Start the other ranks with this process's own command line, and meet them."""
    if ranks == 1:
        return []
    if RANKS in os.environ:
        rank, ranks, port = map(int, os.environ[RANKS].split())
        meet(rank, ranks, port)
        return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.worker", *sys.argv[1:]]
    others = []
    for rank in range(1, ranks):
        environment = {**os.environ, RANKS: f"{rank} {ranks} {port}"}
        others.append(
            subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
        )
    meet(0, ranks, port)
    return others


def meet(rank: int, ranks: int, port: int) -> None:
    """Join the default process group."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks
    )


def told(call: int, work: Callable[[], Result], others: list[subprocess.Popen[bytes]]) -> Result:
    """Do some work with the other ranks; says the processor time of all but this one."""
    if not others:
        return {**work(), "other_processors": 0.0}
    dist.broadcast(torch.tensor(call), src=0)
    result = work()
    spent = torch.zeros(1, dtype=torch.float64)
    dist.all_reduce(spent)
    return {**result, "other_processors": float(spent)}


def follow(work: dict[int, Callable[[], Result]]) -> None:
    """Do what rank 0 does until its process ends; does not return."""
    while True:
        call = torch.tensor(END)
        try:
            dist.broadcast(call, src=0)
            started = time.process_time()
            work[int(call)]()
            dist.all_reduce(torch.tensor([time.process_time() - started], dtype=torch.float64))
        except (RuntimeError, KeyError):  # rank 0 has ended
            os._exit(0)
