"""Processes that share a run: who they are, how they wait, agree, stop and end together."""

import os
import signal
import socket
import subprocess
import sys

from tests.processes import ends

PREPARE = """
import os, sys, time
from pathlib import Path
from aam.config import RunOptions
from aam.errors import InputError
from aam.learning import distributed
from aam.cli import guarded, shared
from aam.learning.launch import silence_others, start
silence_others()
def work(_):
    start(RunOptions(output_dir=Path(), device="cpu"))
    rank = distributed.rank()
    print("ready", file=sys.__stdout__, flush=True)
{body}
sys.exit(guarded(lambda: shared(work, ())(None)))
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(count: int, body: str) -> list[subprocess.Popen]:
    """Processes as torchrun starts them, each of which runs a body."""
    script = PREPARE.format(body="\n".join(f"    {line}" for line in body.strip().splitlines()))
    shared = {
        "TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    processes = []
    for rank in range(count):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        words = [sys.executable, "-c", script]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True)
        )
    return processes


def until_ready(processes: list[subprocess.Popen]) -> None:
    for one in processes:
        assert one.stdout.readline() == "ready\n", one.stderr.read()


def test_what_rank_0_knows_reaches_all_and_only_rank_0_speaks():
    body = """
print(f"said by {rank}", file=sys.stderr)
assert distributed.broadcast(rank) == 0
assert distributed.on_rank_zero(lambda: rank + 7) == 7
assert distributed.all_reduce_max(rank) == 1
distributed.check_equal("the data", 5)
try:
    distributed.check_equal("the data", rank)
except InputError as error:
    assert str(error).startswith("the data of rank 1 differs from that of rank 0: all machines")
else:
    raise AssertionError
"""
    assert ends(start(2, body)) == [(0, "said by 0\n"), (0, "")]


def test_bad_input_on_one_rank_ends_all_though_the_others_wait_for_it():
    body = """
if rank == 1:
    raise InputError("no such file; give another")
distributed.broadcast(rank)
distributed.all_reduce_max(rank)
"""
    assert ends(start(2, body), 120) == [
        (2, "error: rank 1: no such file; give another\n"),
        (2, ""),
    ]


WAIT_FOR_EVER = """
while True:
    distributed.all_reduce_max(rank)
"""


def test_where_rank_0_is_killed_the_others_say_so_and_nothing_of_their_collectives():
    processes = start(3, WAIT_FOR_EVER)
    until_ready(processes)
    processes[0].kill()
    gone = "rank 0 has ended (killed, out of memory, or its machine is lost); continue from the"
    (code, _), *others = ends(processes, 60)
    assert code == -signal.SIGKILL
    for rank, (code, said) in enumerate(others, 1):
        assert code == 1 and said.count("\n") == 1, said
        assert said.startswith(f"error: rank {rank}: {gone} last checkpoint")
