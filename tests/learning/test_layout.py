"""Who started the processes of a run, and options that say something else."""

import pytest
import torch

from aam.config import RunOptions
from aam.errors import InputError
from aam.learning.launch import Layout, find_layout, own_ranks, start

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
    for name in (*TORCHRUN, *SRUN, "AAM_PARENT"):
        monkeypatch.delenv(name, raising=False)

    def log(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return log


@pytest.mark.parametrize(
    ("values", "devices", "expected"),
    [
        ({}, 1, Layout("aam", 1, 1, 0, 0)),
        ({}, 4, Layout("aam", 4, 1, 0, 0)),
        ({"AAM_PARENT": "1", "LOCAL_RANK": "3"}, 4, Layout("aam", 4, 1, 3, 3)),
        ({"LOCAL_RANK": "3"}, 4, Layout("aam", 4, 1, 0, 0)),  # of somebody else
        (TORCHRUN, 1, Layout("torchrun", 4, 2, 5, 1)),
        (TORCHRUN, 4, Layout("torchrun", 4, 2, 5, 1)),
        (SRUN, 1, Layout("slurm", 4, 2, 6, 2)),
        (BATCH_SCRIPT, 2, Layout("aam", 2, 1, 0, 0)),  # srun was not used
        ({**SRUN, "SLURM_NTASKS": "1"}, 2, Layout("aam", 2, 1, 0, 0)),
    ],
)
def test_the_starter_says_how_many_processes_there_are(said, values, devices, expected):
    said(values)
    assert find_layout(devices) == expected
    assert own_ranks() == (expected.rank, expected.local_rank)
    assert expected.size == expected.local * expected.nodes


@pytest.mark.parametrize(
    ("values", "devices", "expected"),
    [
        (TORCHRUN, 2, "--devices 2: torchrun started 4 processes here"),
        ({**TORCHRUN, "WORLD_SIZE": "7"}, 1, "every machine needs as many"),
        (SRUN, 8, "--devices 8: slurm started 4 processes here; leave the option out or use "
         "--ntasks-per-node=8"),
        ({**SRUN, "SLURM_NTASKS": "6"}, 1, "leave --ntasks out"),
    ],
)  # fmt: skip
def test_options_that_contradict_the_starter_are_refused(said, values, devices, expected):
    said(values)
    with pytest.raises(InputError, match=expected):
        find_layout(devices)


def test_srun_without_tasks_of_a_node_is_refused(said, monkeypatch):
    said(SRUN)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(InputError, match="8 tasks without --ntasks-per-node"):
        find_layout(1)


@pytest.mark.parametrize(
    ("gpus", "options", "expected"),
    [
        (0, {"data_parallel": True}, "a CPU is one device; --devices N shares it"),
        (0, {"device": "cuda", "devices": 2}, "--device cuda: torch sees 0 GPUs"),
        (2, {"devices": 4}, "--devices 4: torch sees 2 GPUs"),
        (2, {"devices": 3, "data_parallel": True}, "--devices 3 with --data-parallel, which means"),
        (2, {"devices": 2, "device": "cuda:1"}, "use --device cuda for several"),
        (2, {"data_parallel": True, "device": "cuda:1"}, "use --device cuda for several"),
        (0, {"devices": 2, "strategy": "fsdp", "compile_model": True}, "--compile-model"),
    ],
)
def test_devices_that_are_not_there_are_refused(
    said, monkeypatch, tmp_path, gpus, options, expected
):
    said({})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=expected):
        start(RunOptions(output_dir=tmp_path, **options))


def test_tasks_that_see_one_gpu_each_are_refused(said, monkeypatch, tmp_path):
    said(SRUN)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="srun: --gpus-per-node, not --gpus-per-task"):
        start(RunOptions(output_dir=tmp_path))


def test_a_command_that_does_not_train_runs_once(said, aam, tmp_path, capsys):
    said({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"})
    words = ("--tree", "tree.nwk", "--output", tmp_path / "distances.tsv")
    assert aam("unifrac", *words) == 2
    said_to_user = capsys.readouterr().err
    assert said_to_user == "error: unifrac runs in one process; torchrun started 8 of them\n"
