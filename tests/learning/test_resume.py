"""Continuing a run: bit for bit the run that was never interrupted, or one line saying why not."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aam.learning.loop import Trainer

# In batches of 4: 20 training samples are 5 steps an epoch, the ASVs that a tree teaches 10.
FINETUNE = ("finetune", "--metadata-column", "age", "--epochs", 2)
RANDOM = ("--asv-sampling", "random", "--token-limit", 6)
VARIANTS = {  # the words, and the steps at which --max-steps and then a signal stop the run
    "tree": (("pretrain", "--epochs", 3), 7, 25),  # before the transformer joins, and after
    "wide": (("pretrain", "--epochs", 2, "--encoder", "wide", "--validate-every", 2), 10, 13),
    "pairs": (
        ("pretrain", "--epochs", 3, "--distance", "bray-curtis", *RANDOM, "--mask-strategy",
         "span", "--validate-every", 2),
        3, 7),
    "finetune": (
        (*FINETUNE, *RANDOM, "--categorical-columns", "site", "--nucleotide-penalty", 0.1,
         "--count-penalty", 0.1, "--count-embedding", "add"),
        5, 8),
    "finetune freeze": ((*FINETUNE, "--freeze-base", "--pretrained-encoder", "SHORT"), 2, 4),
}  # fmt: skip


def metrics(run: Path) -> dict[tuple[str, ...], str]:
    """All metrics but speed and memory, as they are written."""
    with open(run / "metrics.csv", newline="") as file:
        return {
            (row["step"], row["epoch"], row["part"], row["metric"]): row["value"]
            for row in csv.DictReader(file)
            if not row["metric"].endswith("_per_second") and not row["metric"].startswith("memory")
        }


def checkpoint(run: Path, name: str = "last.pt") -> dict:
    return torch.load(run / "checkpoints" / name, weights_only=True)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(run: Path, whole: Path) -> None:
    assert metrics(run) == metrics(whole)
    for name in ("last.pt", "best.pt"):
        one, other = checkpoint(run, name), checkpoint(whole, name)
        assert one["progress"] == other["progress"]
        torch.testing.assert_close(one["objective"], other["objective"], rtol=0, atol=0)
        states = one["optimizer"]["state"], other["optimizer"]["state"]
        torch.testing.assert_close(*states, rtol=0, atol=0)
    files = [load_file(folder / "model.safetensors") for folder in (run, whole)]
    torch.testing.assert_close(*files, rtol=0, atol=0)


@pytest.fixture(scope="module")
def short(aam, tmp_path_factory):
    """A run of one step."""
    run = tmp_path_factory.mktemp("short") / "run"
    assert aam("pretrain", "--max-steps", 1, "--output-dir", run) == 0
    return run


@pytest.fixture
def refused(aam, capsys):
    """Run a command that ends with one error line, and return that line."""

    def run(*words, **more):
        capsys.readouterr()
        assert aam(*words, **more) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ")
        return line

    return run


@pytest.fixture
def interrupt_at(monkeypatch):
    """Send this process a signal while it takes a step."""

    def start(step: int, number: int = signal.SIGINT) -> None:
        def step_and_stop(self, *batches):
            if self.progress.step == step - 1:
                monkeypatch.setattr(Trainer, "step", take)
                os.kill(os.getpid(), number)
            return take(self, *batches)

        take = Trainer.step
        monkeypatch.setattr(Trainer, "step", step_and_stop)

    return start


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_was_stopped_and_interrupted_is_the_whole_one(
    aam, short, tmp_path, interrupt_at, capsys, variant
):
    words, stop, interrupted = VARIANTS[variant]
    words = tuple(short if word == "SHORT" else word for word in words)
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert aam(*words, "--output-dir", whole) == 0
    assert aam(*words, "--output-dir", run, "--max-steps", stop) == 0
    assert (run / "summary.json").is_file() and (run / "model.safetensors").is_file()
    interrupt_at(interrupted)
    again = (words[0], "--resume-from", run, "--max-steps", 999)
    capsys.readouterr()
    assert aam(*again, files=False) == 130
    said = capsys.readouterr().err
    assert f"continuing at step {stop}\n" in said
    assert f"saved at step {interrupted}; continue with aam {words[0]} --resume-from {run}" in said
    assert aam(*again, files=False) == 0
    assert_same_run(run, whole)


def test_a_run_interrupted_in_its_last_step_is_finished_by_resuming(
    aam, tmp_path, interrupt_at, capsys
):
    words = ("pretrain", "--epochs", 1)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert aam(*words, "--output-dir", whole) == 0
    interrupt_at(checkpoint(whole)["progress"]["step"])
    assert aam(*words, "--output-dir", run) == 130
    assert not (run / "model.safetensors").exists()
    assert aam("pretrain", "--resume-from", run, files=False) == 0
    assert_same_run(run, whole)
    # Finished, it says so and writes its results again.
    before = metrics(run)
    for name in ("model.safetensors", "summary.json", "distances.tsv"):
        (run / name).unlink()
    capsys.readouterr()
    assert aam("pretrain", "--resume-from", run, files=False, complete=True) == 0
    assert "is reached already" in capsys.readouterr().err
    for name in ("model.safetensors", "summary.json", "distances.tsv", "report.html"):
        assert (run / name).is_file()
    assert metrics(run) == before


def test_a_run_continues_in_another_folder_with_its_best_checkpoint(aam, tmp_path, refused):
    folders = [tmp_path / name for name in ("whole", "moved", "a", "b")]
    whole, moved, a, b = folders
    assert aam("pretrain", "--epochs", 3, "--output-dir", whole) == 0
    assert aam("pretrain", "--epochs", 3, "--max-steps", 25, "--output-dir", moved) == 0
    moved.rename(a)
    before = contents(a)
    words = ("pretrain", "--resume-from", a, "--max-steps", 99, "--output-dir", b)
    assert aam(*words, files=False) == 0
    assert_same_run(b, whole)
    assert contents(a) == before and not moved.exists()
    # A folder that holds another run is not mixed with this one.
    assert "already holds a run" in refused(*words, files=False)
    # Without --output-dir it goes on where it is now.
    assert aam("pretrain", "--resume-from", a, "--max-steps", 26, files=False) == 0
    assert checkpoint(a)["progress"]["step"] == 26 and not moved.exists()


def test_without_the_best_checkpoint_the_best_is_chosen_anew(aam, tmp_path, capsys):
    run = tmp_path / "run"
    assert aam("pretrain", "--epochs", 2, "--max-steps", 12, "--output-dir", run) == 0
    for path in run.glob("checkpoints/best*"):
        path.unlink()
    assert aam("pretrain", "--resume-from", run, "--max-steps", 99, files=False) == 0
    assert "warning: the best checkpoint" in capsys.readouterr().err
    assert checkpoint(run, "best.pt")["progress"]["best_step"] > 12


def test_ctrl_c_of_a_real_process_saves_says_how_to_resume_and_exits_130(community, aam, tmp_path):
    run = tmp_path / "run"
    words = [
        sys.executable, "-m", "aam.train", "pretrain", "--table", str(community.table), "--tree",
        str(community.tree), "--output-dir", str(run), "--rarefy-depth", "0", "--num-layers", "1",
        "--embedding-dim", "32", "--num-heads", "2", "--epochs", "100000", "--batch-size", "4",
        "--validate-every", "100000",
    ]  # fmt: skip
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        said = ""
        for line in process.stderr:
            said += line
            if line.startswith("step "):
                process.send_signal(signal.SIGINT)
                break
        said += process.stderr.read()
    assert process.returncode == 130, said
    assert f"aam pretrain --resume-from {run}" in said and "Traceback" not in said
    step = checkpoint(run)["progress"]["step"]
    assert step >= 1
    assert aam("pretrain", "--resume-from", run, "--max-steps", step + 1, files=False) == 0


def test_another_configuration_is_refused(short, refused, tmp_path):
    before = contents(short)
    for change, expected in (
        (("--lr", 0.5), "was made with another --lr (None, now 0.5)"),
        (("--embedding-dim", 64), "was made with another --embedding-dim (32, now 64)"),
        (("--seed", 7), "was made with another --seed (0, now 7)"),
    ):
        assert expected in refused("pretrain", "--resume-from", short, *change, files=False)
    words = ("--metadata-column", "age", "--output-dir", tmp_path / "fine")
    assert refused("finetune", *words, "--resume-from", short / "checkpoints" / "last.pt")
    assert contents(short) == before and not (tmp_path / "fine").exists()


def test_other_data_under_the_same_options_are_refused(short, refused, community, tmp_path):
    import biom
    import h5py

    table = biom.load_table(str(community.table))
    with h5py.File(tmp_path / "table.biom", "w") as file:
        table.filter(table.ids()[:-1], inplace=False).to_hdf5(file, "test")
    before = contents(short)
    words = ("--resume-from", short, "--table", tmp_path / "table.biom")
    assert "was made from other data" in refused("pretrain", *words, files=False)
    assert contents(short) == before


@pytest.mark.parametrize("kept", [0, 10, 500, 0.5, 0.99, None])
def test_a_checkpoint_that_is_truncated_or_missing_gives_one_line(short, tmp_path, refused, kept):
    run = tmp_path / "run"
    broken = run / "checkpoints" / "last.pt"
    if kept is not None:
        broken.parent.mkdir(parents=True)
        whole = (short / "checkpoints" / "last.pt").read_bytes()
        broken.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else kept])
        shutil.copy(short / "config.toml", run)
    said = refused("pretrain", "--resume-from", run, files=False)
    expected = f"{run}: no such checkpoint; --resume-from needs"
    if kept is not None:
        expected = f"{broken}: truncated or not a checkpoint"
    assert said.startswith(f"error: {expected}")


def test_auto_starts_a_run_and_continues_it_when_called_again(aam, tmp_path, capsys):
    words = ("pretrain", "--epochs", 2, "--resume-from", "auto")
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert aam("pretrain", "--epochs", 2, "--output-dir", whole) == 0
    assert aam(*words, "--output-dir", run, "--max-steps", 3) == 0
    assert "continuing" not in capsys.readouterr().err
    for name in (".metrics.csv.a_1", "checkpoints/.last.pt.x7a"):  # killed while it wrote
        (run / name).write_bytes(b"half")
    assert aam(*words, f"--output-dir={run}", "--max-steps", 99) == 0
    assert "continuing at step 3" in capsys.readouterr().err
    assert not [path for path in run.rglob(".*") if path.is_file()]
    assert_same_run(run, whole)
    # Where the last checkpoint is damaged another one serves, with a warning.
    last = run / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    step = checkpoint(run, "best.pt")["progress"]["step"]
    assert aam(*words, "--output-dir", run, "--max-steps", 99) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {last}: truncated or not a checkpoint")
    assert f"continuing from best.pt, step {step}\n" in said
    assert f"continuing at step {step}\n" in said


def test_auto_replaces_only_a_run_without_a_checkpoint(aam, short, tmp_path, refused):
    words = ("pretrain", "--max-steps", 1, "--resume-from", "auto")
    assert refused(*words) == (
        "error: --resume-from auto: needs --output-dir, the folder of the run"
    )
    shutil.copytree(short, tmp_path / "broken")
    for path in (tmp_path / "broken" / "checkpoints").iterdir():
        path.write_bytes(b"")
    before = contents(tmp_path / "broken")
    said = refused(*words, "--output-dir", tmp_path / "broken")
    assert "none of its checkpoints can be read" in said
    assert contents(tmp_path / "broken") == before
    run = tmp_path / "begun"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(short / "config.toml", run)
    assert "already holds a run" in refused("pretrain", "--max-steps", 1, "--output-dir", run)
    assert aam(*words, "--output-dir", run) == 0


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGINT", 130)])
def test_every_signal_saves_and_has_its_own_exit_code(
    aam, tmp_path, monkeypatch, capsys, interrupt_at, name, code
):
    """Under SLURM, SIGUSR1 has the job queued again, once."""
    tool = tmp_path / "scontrol"
    tool.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    interrupt_at(2, getattr(signal, name))
    run = tmp_path / "run"
    assert aam("pretrain", "--epochs", 2, "--output-dir", run) == code
    assert checkpoint(run)["progress"]["step"] == 2
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == ("requeue 77\n" if name == "SIGUSR1" else "")
    assert ("job 77 is queued again" in capsys.readouterr().err) == bool(asked)


def test_a_checkpoint_is_written_as_often_as_asked(aam, tmp_path, monkeypatch):
    saved, save = [], Trainer.save

    def noted(self, *words):
        saved.append(self.progress.step)
        save(self, *words)

    monkeypatch.setattr(Trainer, "save", noted)
    for minutes, steps in (("1e-9", {1, 2, 3, 4}), ("10", {4})):
        saved.clear()
        words = ("--max-steps", 4, "--validate-every", 9, "--checkpoint-minutes", minutes)
        assert aam("pretrain", *words, "--output-dir", tmp_path / minutes) == 0
        assert set(saved) == steps
