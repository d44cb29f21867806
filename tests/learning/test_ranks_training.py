"""Runs that several processes share: as exact as one, and ended, saved and continued together."""

import csv
import functools
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from safetensors.torch import load_file

from aam.cli import main
from aam.errors import log
from tests.conftest import TINY, TINY_MODEL
from tests.processes import MAIN, Fork, fork_ranks, leave_out_reports

STEPS = 5
COMMANDS = {
    # The transformer joins the wide path at the fourth of its steps.
    "pretrain": [
        "pretrain", *TINY_MODEL, "--batch-size", 8, "--epochs", 1, "--best-metric", "loss",
        "--lr", 6e-4,
    ],
    "pairs": ["pretrain", *TINY, "--distance", "bray-curtis", "--clip", 0.05],
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


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    """A run of one process, by command."""

    @functools.cache
    def run(command: str) -> Path:
        folder = tmp_path_factory.mktemp(command) / "run"
        assert main(words(command, "--max-steps", STEPS, "--output-dir", folder)) == 0
        return folder

    with pytest.MonkeyPatch.context() as patch:
        leave_out_reports(patch)
        yield run


def run_ranks(count: int, words: list[str]) -> None:
    """Run a command on several ranks, of which one speaks."""
    (code, said), *others = [one.end(120) for one in fork_ranks(count, lambda: main(words))]
    assert code == 0 and said.count("24 samples used") == 1, said
    assert others == [(0, "")] * (count - 1)


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


@pytest.mark.parametrize(
    ("command", "count"), [("pretrain", 2), ("pairs", 2), ("finetune", 2), ("pretrain", 4)]
)
def test_five_steps_of_several_ranks_equal_those_of_one(words, alone, tmp_path, command, count):
    reference = alone(command)
    run_ranks(count, words(command, "--max-steps", STEPS, "--output-dir", tmp_path))
    assert_same_run(tmp_path, reference)


def test_sharded_weights_continue_a_run_and_are_continued_by_one_process(words, alone, tmp_path):
    reference, folder = alone("pairs"), tmp_path / "run"
    assert main(words("pairs", "--max-steps", 2, "--output-dir", folder)) == 0
    resume = ["pretrain", "--resume-from", str(folder)]
    run_ranks(2, [*resume, "--strategy", "fsdp", "--max-steps", "4"])
    assert main([*resume, "--strategy", "ddp", "--max-steps", str(STEPS)]) == 0
    shutil.copytree(reference, tmp_path / "one")
    for path in (folder, tmp_path / "one"):  # a run that ends validates, one that goes on does not
        lines = (path / "metrics.csv").read_text().splitlines(keepends=True)
        kept = "".join(one for one in lines if ",validation," not in one)
        (path / "metrics.csv").write_text(kept)
    assert_same_run(folder, tmp_path / "one")


def long_run(words, folder: Path, *more: object) -> list[str]:
    return words(
        "pretrain", "--epochs", 99999, "--validate-every", 99999, "--output-dir", folder, *more
    )


def test_a_signal_to_one_rank_saves_and_ends_all_once_rank_0_is_done(words, tmp_path, monkeypatch):
    argv = long_run(words, tmp_path)
    monkeypatch.setattr("aam.learning.launch.requeue", lambda _: time.sleep(1) or log("queued"))
    ranks = fork_ranks(2, lambda: main(argv))
    ranks[0].wait_for("step ")
    os.kill(ranks[1].process.pid, signal.SIGTERM)
    ranks[1].process.join(60)
    assert "queued" in Path(ranks[0].said.name).read_text()
    (code, said), other = [one.end() for one in ranks]
    assert code == 128 + signal.SIGTERM and other == (code, "")
    assert "\nsaved at step " in said
    state = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    assert f"saved at step {state['progress']['step']};" in said


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the workers in /proc")
def test_a_killed_rank_ends_all_with_one_line(words, tmp_path):
    argv = long_run(words, tmp_path, "--devices", 2)
    launcher = Fork(lambda: main(argv))
    launcher.wait_for("step ")
    process = launcher.process.pid
    with open(f"/proc/{process}/task/{process}/children") as file:
        os.kill(int(file.read().split()[1]), signal.SIGKILL)
    code, said = launcher.end()
    assert code == 1 and said.splitlines()[-1] == (
        "error: rank 1 has ended (killed by SIGKILL); continue from the last checkpoint with "
        "--resume-from"
    )
    assert "Traceback" not in said and said.count("error") == 1


def test_torchrun_starts_a_run_too(words, alone, tmp_path):
    reference = alone("pretrain")
    argv = words("pretrain", "--max-steps", STEPS, "--output-dir", tmp_path)
    torchrun = ["--nproc-per-node", "2", "--standalone", "--no-python", sys.executable, "-c", MAIN]
    code, said = Fork(lambda: torch.distributed.run.main([*torchrun, *argv])).end(120)
    assert code == 0 and said.count("24 samples used") == 1, said
    assert_same_run(tmp_path, reference)
