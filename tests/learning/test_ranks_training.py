"""Runs that several processes share: as exact as one, and ended, saved and continued together."""

import csv
import os
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TINY, TINY_MODEL
from tests.processes import start_command

STEPS = 5
COMMANDS = {
    # The transformer joins the wide path at the fourth of its steps.
    "pretrain": [
        "pretrain", *TINY_MODEL, "--batch-size", 8, "--epochs", 1, "--best-metric", "loss",
        "--lr", 6e-4,
    ],
    "pairs": ["pretrain", *TINY, "--distance", "bray-curtis"],
    "finetune": [
        "finetune", *TINY, "--metadata-column", "age", "--count-penalty", 1,
        "--nucleotide-penalty", 1,
    ],
}  # fmt: skip
# Their gradients are 0 but for rounding, which Adam makes as large as any other: softmax does not
# see a term that all keys (or all counts of a sample) share.
WITHOUT_GRADIENT = ("in_proj_bias", "count_stack.norm.bias", "count_head.bias")
NOT_EXACT = ("samples_per_second", "asvs_per_second", "memory_gb", "memory_predicted_gb")


@pytest.fixture(scope="module")
def words(community):
    """The words of a command on the simulated community."""

    def make(command: str, *more: object) -> list[str]:
        files = ["--table", community.table]
        files += {
            "pretrain": ["--tree", community.tree],
            "finetune": ["--metadata", community.metadata],
        }.get(command, [])
        return [str(one) for one in (*COMMANDS[command], *files, *more)]

    return make


def run(words: list[str]) -> None:
    process = start_command(words)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert said.count("24 samples used") == 1  # one rank speaks


def alone(words: list[str]) -> None:
    from aam.train import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aam.report.write_report", lambda folder: folder / "report.html")
        patch.setattr("aam.evaluation.baselines.target_baselines", lambda *_, **__: {})
        patch.setattr("aam.evaluation.baselines.distance_baselines", lambda *_, **__: {})
        assert main(words) == 0


def measured(folder) -> dict[tuple[str, str, str], float]:
    with open(folder / "metrics.csv", newline="") as file:
        return {
            (row["step"], row["part"], row["metric"]): float(row["value"])
            for row in csv.DictReader(file)
            if row["metric"] not in NOT_EXACT
        }


def assert_same_run(folder, reference) -> None:
    """Losses, norms of the gradients and weights are equal to rounding."""
    found, expected = measured(folder), measured(reference)
    assert found.keys() == expected.keys() and len({step for step, *_ in found}) == STEPS
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=2e-5, abs=2e-6), key
    ours, theirs = (load_file(one / "model.safetensors") for one in (folder, reference))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if not name.endswith(WITHOUT_GRADIENT):
            off = (ours[name].double() - value.double()).abs()
            # Adam scales up the rounding of single gradients that nearly cancel.
            assert off.sum() <= 1e-6 * off.numel() and (off < 3e-5).all(), (name, off.max())


@pytest.mark.parametrize(("command", "count"), [("pretrain", 2), ("pairs", 2), ("finetune", 2)])
def test_five_steps_of_several_ranks_equal_those_of_one(words, tmp_path, command, count):
    alone(words(command, "--max-steps", STEPS, "--output-dir", tmp_path / "one"))
    several = ("--max-steps", STEPS, "--devices", count, "--output-dir", tmp_path / "several")
    run(words(command, *several))
    assert_same_run(tmp_path / "several", tmp_path / "one")


def test_sharded_weights_continue_a_run_and_are_continued_by_one_process(words, tmp_path):
    alone(words("pretrain", "--max-steps", STEPS, "--output-dir", tmp_path / "one"))
    folder = tmp_path / "sharded"
    alone(words("pretrain", "--max-steps", 2, "--output-dir", folder))
    sharded = ("--devices", 2, "--strategy", "fsdp", "--max-steps", 4)
    run(["pretrain", *map(str, ("--resume-from", folder, *sharded))])
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["best.pt", "last.pt"]
    whole = ("--devices", 1, "--strategy", "ddp", "--max-steps", STEPS)
    alone(["pretrain", *map(str, ("--resume-from", folder, *whole))])
    for name in ("one", "sharded"):  # a run that ends validates, one that goes on does not
        path = tmp_path / name / "metrics.csv"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(one for one in lines if ",validation," not in one))
    assert_same_run(folder, tmp_path / "one")


def long_run(words, folder) -> tuple[subprocess.Popen, int]:
    """A run of two processes in its first steps, and the process id of rank 1."""
    more = ("--devices", 2, "--epochs", 100000, "--validate-every", 100000)
    process = start_command(words("pretrain", *more, "--output-dir", folder))
    for line in process.stderr:
        if line.startswith("step "):
            break
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    with open(children) as file:
        return process, int(file.read().split()[0])


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")


@needs_proc
def test_a_signal_to_one_rank_stops_and_saves_all(words, tmp_path):
    process, other = long_run(words, tmp_path / "run")
    os.kill(other, signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert said.startswith("saved at step ") and said.count("\n") == 1
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert state["progress"]["step"] >= 1


@needs_proc
def test_a_rank_that_is_killed_ends_the_run_with_one_line(words, tmp_path):
    process, other = long_run(words, tmp_path / "run")
    os.kill(other, signal.SIGKILL)
    started = time.monotonic()
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - started < 60
    assert process.returncode == 1
    expected = "error: rank 1 has ended (killed by SIGKILL); continue from the last checkpoint"
    assert said.startswith(expected) and said.count("\n") == 1
