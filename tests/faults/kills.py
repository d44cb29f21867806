"""Runs that are killed at random moments, and continue as if nothing had happened.

Minutes long, so `make test` does not collect this file: `make faults`. AAM_KILLS sets how often
runs are killed, AAM_FAULT_SEED when.
"""

import csv
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from aam.data.simulate import simulate_community
from tests.processes import start_command

KILLS = int(os.environ.get("AAM_KILLS", "50"))
EPOCHS = 80
STEPS = EPOCHS * 10  # the ASVs that the tree teaches, in batches of 4
CHECKPOINT_SECONDS = 0.3
LONGEST_SECONDS = 4.0  # from the first step of a process to its end


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """A small pretraining run that takes some seconds, with four validations."""
    folder = tmp_path_factory.mktemp("community")
    files = simulate_community(
        folder, samples=24, asvs=60, asvs_per_sample=10, sequence_length=30, seed=0
    )
    return [
        "pretrain", "--table", str(files.table), "--tree", str(files.tree), "--num-layers", "1",
        "--embedding-dim", "32", "--num-heads", "2", "--rarefy-depth", "0", "--batch-size", "4",
        "--epochs", str(EPOCHS), "--validate-every", "20", "--no-tensorboard",
        "--checkpoint-minutes", str(CHECKPOINT_SECONDS / 60),
    ]  # fmt: skip


def finish(words: list[str]) -> str:
    process = start_command(words)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    return said


def last_state(run) -> dict:
    """The last checkpoint, which must be readable whenever the run was killed."""
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)


def metrics(run) -> dict[tuple[str, str, str], str]:
    with open(run / "metrics.csv", newline="") as file:
        return {
            (row["step"], row["part"], row["metric"]): row["value"]
            for row in csv.DictReader(file)
            if not (row["metric"].endswith("_per_second") or row["metric"].startswith("memory"))
        }


def assert_same_run(run, reference) -> None:
    ours, theirs = (load_file(one / "model.safetensors") for one in (run, reference))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert metrics(run) == metrics(reference)


def test_a_run_killed_at_random_moments_loses_nothing_but_the_last_interval(words, tmp_path):
    seed = int(os.environ.get("AAM_FAULT_SEED", time.time_ns() % 10**6))
    print(f"AAM_FAULT_SEED={seed}")
    finish([*words, "--output-dir", str(tmp_path / "whole")])
    chance = random.Random(seed)
    kills, finished, lost = 0, 0, []
    while kills < KILLS:
        run = tmp_path / f"run{finished}"
        resume = [*words, "--output-dir", str(run), "--resume-from", "auto"]
        killed, saved = kill_at_random(resume, chance, run)
        if killed:
            kills += 1
            lost.append(saved)
        if not killed or kills == KILLS:
            said = finish(resume)
            assert "error" not in said
            assert_same_run(run, tmp_path / "whole")
            finished += 1
    print(
        f"{kills} kills, {finished} runs finished; seconds since the last checkpoint: "
        f"{sorted(round(one, 2) for one in lost)}"
    )
    assert max(lost) < CHECKPOINT_SECONDS + 3  # an interval, a step, perhaps a validation


def test_two_processes_end_when_either_is_killed_and_continue_exactly(words, tmp_path):
    seed = int(os.environ.get("AAM_FAULT_SEED", time.time_ns() % 10**6))
    print(f"AAM_FAULT_SEED={seed}")
    words = [*words, "--max-steps", "200", "--devices", "2"]
    finish([*words, "--output-dir", str(tmp_path / "whole")])
    chance = random.Random(seed)
    resume = [*words, "--output-dir", str(tmp_path / "run"), "--resume-from", "auto"]
    for victim in (1, 0, "launcher", chance.choice([0, 1])):
        process = start_command(resume)
        for line in process.stderr:
            if line.startswith("step "):
                break
        time.sleep(1 + chance.random())  # after a checkpoint
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            ranks = [int(one) for one in file.read().split()]
        os.kill(process.pid if victim == "launcher" else ranks[victim], signal.SIGKILL)
        begun = time.monotonic()
        said = process.communicate(timeout=60)[1].splitlines()  # all have ended: none holds it
        print(f"{victim} killed: all ended after {time.monotonic() - begun:.1f} s")
        if victim != "launcher":
            assert f"rank {victim} has ended (killed by SIGKILL)" in said[-1]
            assert "continue from the last checkpoint" in said[-1]
        last_state(tmp_path / "run")
    finish(resume)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def kill_at_random(words: list[str], chance: random.Random, run) -> tuple[bool, float]:
    """Start a run and kill it at a random moment, from its first second to its last.

    Returns:
        Whether it was killed before it ended, and the seconds of training it lost.
    """
    process = start_command(words)
    before = chance.random() < 0.2  # while it reads its files
    begun = time.time()
    if before:
        time.sleep(chance.random() * 3)
    else:
        for line in process.stderr:
            if line.startswith("step "):
                begun = time.time()
                break
        time.sleep(chance.random() * LONGEST_SECONDS)
    process.kill()
    ended = time.time()
    said = process.communicate()[1]
    if process.returncode != -signal.SIGKILL:
        assert process.returncode == 0, said
        return False, 0.0
    path = run / "checkpoints" / "last.pt"
    if not path.is_file():
        return True, 0.0 if before else ended - begun
    trained = last_state(run)["progress"]["step"] == STEPS  # what follows is done again
    return True, 0.0 if before or trained else ended - max(begun, path.stat().st_mtime)
