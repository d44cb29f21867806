"""Processes that share a run: who they are, how they wait, agree, stop and end together."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

PREPARE = """
import os, sys, time
from pathlib import Path
from aam.config import RunOptions
from aam.errors import InputError
from aam.training import ranks
from aam.training.setup import make_fabric
from aam.train import guarded, shared
from aam.training.layout import silence_others
silence_others()
def work(_):
    fabric = make_fabric(RunOptions(output_dir=Path(), device="cpu"))
    rank = fabric.global_rank
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


def ends(processes: list[subprocess.Popen], seconds: float = 60) -> list[tuple[int, str]]:
    """Exit code and what was said, of each process."""
    deadline = time.monotonic() + seconds
    found = []
    for one in processes:
        said = one.communicate(timeout=max(0.1, deadline - time.monotonic()))[1]
        found.append((one.returncode, said))
    return found


def test_what_rank_0_knows_reaches_all_and_only_rank_0_speaks():
    body = """
print(f"said by {rank}", file=sys.stderr)
assert ranks.tell(rank) == 0
assert ranks.on_first(lambda: rank + 7) == 7
assert ranks.highest(rank) == 1
ranks.agree("the data", 5)
"""
    assert ends(start(2, body)) == [(0, "said by 0\n"), (0, "")]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("1", ["error: rank 1: no such file; give another\n", ""]),
        ("0", ["error: no such file; give another\n", ""]),
        ("(0, 1)", ["error: no such file; give another\n", ""]),
    ],
)
def test_bad_input_on_any_rank_ends_all_with_one_line(where, expected):
    body = f"""
if rank in ({where},):
    raise InputError("no such file; give another")
ranks.tell(rank)
ranks.tell(rank)
"""
    if where == "(0, 1)":
        body = body.replace("((0, 1),)", "(0, 1)")
    assert ends(start(2, body), 120) == [(2, said) for said in expected]


WAIT_FOR_EVER = """
while True:
    ranks.highest(rank)
"""


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_ends_the_others_with_one_line_that_names_it(victim):
    processes = start(3, WAIT_FOR_EVER)
    until_ready(processes)
    processes[victim].kill()
    killed = time.monotonic()
    found = ends(processes)
    assert time.monotonic() - killed < 60
    assert found.pop(victim) == (-signal.SIGKILL, "")
    assert [code for code, _ in found] == [1, 1]
    lines = [line for _, said in found for line in said.splitlines()]
    wanted = f"rank {victim} has ended (killed, out of memory, or its machine is lost); continue"
    assert all(wanted in line for line in lines)
    assert len(lines) == (1 if victim else 2)  # where rank 0 is gone, each says it for itself
