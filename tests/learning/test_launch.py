"""Who started the processes of a run, options that say something else, and how they end."""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aam.config import RunOptions
from aam.errors import InputError
from aam.learning import launch, workers
from aam.learning.launch import Layout, find_layout, start
from tests.processes import Fork

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5",
    "LOCAL_RANK": "1",
}  # fmt: skip
SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2",
    "SLURM_PROCID": "6", "SLURM_LOCALID": "2",
}  # fmt: skip
BATCH_SCRIPT = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}


@pytest.fixture
def said(monkeypatch):
    for name in (*TORCHRUN, *SRUN, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)

    def set_variables(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Layout()),
        ({"LOCAL_RANK": "3"}, Layout()),  # of somebody else
        (TORCHRUN, Layout("torchrun", 5, 1, 8, 4)),
        (SRUN, Layout("slurm", 6, 2, 8, 4)),
        (BATCH_SCRIPT, Layout()),  # srun was not used
        ({**SRUN, "SLURM_NTASKS": "1"}, Layout()),
    ],
)
def test_the_starter_says_how_many_processes_there_are(said, values, expected):
    said(values)
    assert find_layout() == expected


@pytest.mark.parametrize(
    ("values", "gpus", "options", "expected"),
    [
        ({}, 0, {"devices": 2}, "--devices: only the command line can start several processes"),
        (TORCHRUN, 0, {"devices": 2}, "--devices 2: torchrun started 4 processes here; leave the "
         "option out or use --nproc-per-node=2"),
        (SRUN, 0, {"devices": 8}, "--devices 8: slurm started 4 .* --ntasks-per-node=8"),
        (SRUN, 1, {}, "slurm started 4 .* sees 1 GPUs.* --gpus-per-node, not --gpus-per-task"),
        ({}, 0, {"data_parallel": True}, "a CPU is one device; --devices N shares it"),
        ({}, 0, {"device": "cuda", "devices": 2}, "--device cuda: torch sees 0 GPUs"),
        ({}, 2, {"devices": 4}, "--devices 4: torch sees 2 GPUs"),
        ({}, 4, {"devices": 3, "data_parallel": True}, "--devices 3 with --data-parallel, which"),
        ({}, 2, {"devices": 2, "device": "cuda:1"}, "use --device cuda for several"),
        ({}, 2, {"data_parallel": True, "device": "cuda:1"}, "use --device cuda for several"),
        (TORCHRUN, 0, {"strategy": "fsdp", "compile_model": True}, "--compile-model"),
        ({}, 0, {"attn_implementation": "triton"}, "not available on cpu .* choose auto, "),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused(said, monkeypatch, values, gpus, options, expected):
    said(values)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=expected):
        start(RunOptions(output_dir=Path(), **options))


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("node7", "node7"), ("node[07-09,12]", "node07"), ("a-1,b[2-3]", "a-1"), ("n[3,5]", "n3")],
)
def test_tasks_of_slurm_meet_on_the_first_machine(said, monkeypatch, hosts, first):
    met = {}
    said({**SRUN, "SLURM_JOB_NODELIST": hosts, "SLURM_JOB_ID": "123456"})
    monkeypatch.setattr("aam.learning.distributed.join", lambda *_: met.update(os.environ))
    start(RunOptions(output_dir=Path(), device="cpu"))
    assert (met["MASTER_ADDR"], met["MASTER_PORT"]) == (first, "23456")


def test_a_command_that_does_not_train_runs_once(said, aam, tmp_path, capsys):
    said({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"})
    words = ("--tree", "tree.nwk", "--output", tmp_path / "distances.tsv")
    assert aam("unifrac", *words) == 2
    said_to_user = capsys.readouterr().err
    assert said_to_user == "error: unifrac runs in one process; torchrun started 8 of them\n"


# What a worker does in place of training, once all have begun.
WORKER = """
import os, signal, sys, time
from aam.learning import launch
from aam.errors import InputError
launch.GRACE_SECONDS = 0.5
launch.begin()
rank, size = launch.find_layout().rank, launch.find_layout().size
try:
    open(f"{sys.argv[1]}/{os.getpid()}", "w")
    while len(os.listdir(sys.argv[1])) < size: time.sleep(0.01)
    BODY
except (InputError, OSError, KeyboardInterrupt) as error:
    launch.complain(error)
    sys.exit(launch.exit_code(error))
"""
WAIT = "time.sleep(60)"


def launched(monkeypatch, folder, body: str, count: int = 3) -> Fork:
    """A process that has launched workers, all of which have begun."""
    monkeypatch.setattr(workers, "PROGRAM", ("-c", WORKER.replace("BODY", body)))
    options = SimpleNamespace(run=RunOptions(output_dir=folder, device="cpu", devices=count))
    fork = Fork(lambda: launch.run(print, [str(folder)], options))
    while len(list(folder.iterdir())) < count and fork.process.is_alive():
        time.sleep(0.01)
    return fork


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("raise InputError('no such file')", (2, "error: no such file\n")),
        (f"if rank == 1: raise InputError('no such file')\n    {WAIT}",
         (2, "error: rank 1: no such file\n")),
        ("raise OSError(28, 'No space left', 'run/metrics.csv')",
         (2, "error: run/metrics.csv: No space left\n")),
        ("pass", (0, "")),
        ("sys.stderr.write(f'by {rank}\\n')", (0, "by 0\n")),
        (f"if rank == 2: os._exit(3)\n    {WAIT}",
         (1, "error: rank 2 has ended (exit code 3); continue from the last checkpoint with "
         "--resume-from\n")),
    ],
)  # fmt: skip
def test_what_ends_any_rank_ends_all_with_one_line(monkeypatch, tmp_path, body, expected):
    assert launched(monkeypatch, tmp_path, body).end() == expected


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_all_at_once_even_deaf_ones(monkeypatch, tmp_path, victim):
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    "
    body += f"if rank == {victim}: os.kill(os.getpid(), 9)\n    {WAIT}"
    fork = launched(monkeypatch, tmp_path, body)
    begun = time.monotonic()
    code, text = fork.end()
    assert time.monotonic() - begun < 10
    assert code == 1 and text.count("\n") == 1
    assert text.startswith(f"error: rank {victim} has ended (killed by SIGKILL); continue from")


FAIL = """from types import SimpleNamespace
    launch.BLAME_SECONDS = 0
    options = SimpleNamespace(run=SimpleNamespace(devices=2, data_parallel=False))
    launch.run(lambda _: 1 / 0 if rank else time.sleep(60), (), options)"""


def test_an_unexpected_error_is_shown_whole_and_named_in_the_last_line(monkeypatch, tmp_path):
    code, text = launched(monkeypatch, tmp_path, FAIL, count=2).end()
    *_, error, last = text.splitlines()
    assert code == 1 and text.startswith("Traceback") and error.startswith("ZeroDivisionError")
    assert last.startswith("error: rank 1 has ended (ZeroDivisionError: division by zero); cont")


SAVE = """signal.signal(NUMBER, lambda number, _: done.append(number))
    done = []
    while not done: time.sleep(0.01)
    time.sleep(1 if rank == 0 else 0.5)
    os._exit(128 + NUMBER)"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("body", [WAIT, SAVE], ids=["reads", "trains"])
def test_signals_reach_every_rank_and_say_how_the_run_ends(monkeypatch, tmp_path, number, body):
    fork = launched(monkeypatch, tmp_path, body.replace("NUMBER", f"{number:d}"))
    time.sleep(0.2)  # the handlers stand
    os.kill(fork.process.pid, number)
    assert fork.end() == (128 + number, "")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end workers")
def test_workers_do_not_outlive_their_launcher(monkeypatch, tmp_path):
    fork = launched(monkeypatch, tmp_path, WAIT)
    os.kill(fork.process.pid, signal.SIGKILL)
    fork.end()
    deadline = time.monotonic() + 10
    while any(map(alive, tmp_path.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, tmp_path.iterdir()))


def alive(path: Path) -> bool:
    try:
        with open(f"/proc/{path.name}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
