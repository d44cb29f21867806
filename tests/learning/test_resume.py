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

# In batches of 4: 20 training samples are 5 steps an epoch, the ASVs that a tree teaches 10.
FINETUNE = ("--metadata-column", "age", "--epochs", 3)
VARIANTS = {
    "tree": ("pretrain", "--epochs", 3),
    "wide": ("pretrain", "--epochs", 2, "--encoder", "wide", "--validate-every", 2),
    "pairs": (
        "pretrain", "--epochs", 3, "--table", "TABLE", "--distance", "bray-curtis",
        "--asv-sampling", "random", "--token-limit", 6, "--mask-strategy", "span",
        "--validate-every", 2,
    ),
    "finetune": (
        "finetune", *FINETUNE, "--categorical-columns", "site", "--nucleotide-penalty", 0.1,
        "--count-penalty", 0.1, "--count-embedding", "add",
    ),
    "finetune freeze": ("finetune", *FINETUNE, "--freeze-base", "--pretrained-encoder", "PRE"),
    "finetune random": (
        "finetune", "--metadata-column", "diagnosis", "--epochs", 3,
        "--asv-sampling", "random", "--token-limit", 6,
    ),
}  # fmt: skip
STOPS = {"tree": (2, 10, 25)}  # before the transformer joins, at the end of an epoch, and after
INTERRUPTED = {"tree": (4, 25)}  # before and after


def metrics(run: Path) -> dict[tuple[str, ...], str]:
    """All metrics but speed and memory, as they are written."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (row["step"], row["epoch"], row["part"], row["metric"]): row["value"]
        for row in rows
        if not row["metric"].endswith("_per_second") and not row["metric"].startswith("memory")
    }


def checkpoint(run: Path, name: str = "last.pt") -> dict:
    return torch.load(run / "checkpoints" / name, weights_only=True)


def assert_same_run(run: Path, whole: Path) -> None:
    assert metrics(run) == metrics(whole)
    for name in ("last.pt", "best.pt"):
        one, other = checkpoint(run, name), checkpoint(whole, name)
        assert one["progress"] == other["progress"]
        assert one["objective"].keys() == other["objective"].keys()
        for key, value in other["objective"].items():
            assert torch.equal(one["objective"][key], value), key
        for group, expected in other["optimizer"]["state"].items():
            for key, value in expected.items():
                assert torch.equal(one["optimizer"]["state"][group][key], value), (group, key)
    mine, theirs = load_file(run / "model.safetensors"), load_file(whole / "model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def pretrained(aam, tmp_path_factory):
    run = tmp_path_factory.mktemp("pretrained") / "run"
    assert aam("pretrain", "--max-steps", 2, "--output-dir", run) == 0
    return run


@pytest.fixture(scope="module", params=VARIANTS)
def whole(request, aam, community, pretrained, tmp_path_factory):
    """An uninterrupted run, a function that starts it elsewhere, and the variant's name."""
    named = {"PRE": pretrained, "TABLE": community.table}
    words = [named.get(word, word) for word in VARIANTS[request.param]]

    def start(run, *more):
        return aam(*words, "--output-dir", run, *more, files="--table" not in words)

    run = tmp_path_factory.mktemp("whole") / "run"
    assert start(run) == 0
    return run, start, request.param


def test_a_run_ended_by_max_steps_continues_bit_for_bit(aam, whole, tmp_path):
    reference, start, variant = whole
    words = VARIANTS[variant]
    run = tmp_path / "run"
    for stop in STOPS.get(variant, (2, 3, 5)):  # within an epoch, and at the end of one
        again = ("--resume-from", run) if run.exists() else ()
        assert start(run, "--max-steps", stop, *again) == 0
        assert (run / "summary.json").is_file() and (run / "model.safetensors").is_file()
    assert aam(words[0], "--resume-from", run, "--max-steps", 999, files=False) == 0
    assert_same_run(run, reference)


def interrupt_at(monkeypatch, step: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal while it takes a step."""
    from aam.learning.loop import Trainer

    take = Trainer.step

    def step_and_stop(self, *batches):
        if self.progress.step == step - 1:
            os.kill(os.getpid(), number)
        return take(self, *batches)

    monkeypatch.setattr(Trainer, "step", step_and_stop)


def test_an_interrupted_run_continues_by_its_folder_alone(
    aam, whole, tmp_path, monkeypatch, capsys
):
    reference, start, variant = whole
    command = VARIANTS[variant][0]
    for step in INTERRUPTED.get(variant, (4,)):
        run = tmp_path / f"run{step}"
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            assert start(run) == 130
        said = capsys.readouterr().err
        assert f"saved at step {step}; continue with aam {command} --resume-from {run}" in said
        assert not (run / "model.safetensors").exists()
        assert aam(command, "--resume-from", run, files=False) == 0
        assert f"continuing at step {step}" in capsys.readouterr().err
        assert_same_run(run, reference)


def test_a_run_interrupted_in_its_last_step_is_finished_by_resuming(
    aam, tmp_path, monkeypatch, capsys
):
    words = ("pretrain", "--epochs", 1)
    assert aam(*words, "--output-dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, checkpoint(tmp_path / "whole")["progress"]["step"])
        assert aam(*words, "--output-dir", tmp_path / "run") == 130
    assert aam("pretrain", "--resume-from", tmp_path / "run", files=False) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_says_so_and_writes_its_results_again(aam, tmp_path, capsys):
    run = tmp_path / "run"
    assert aam("pretrain", "--max-steps", 3, "--output-dir", run) == 0
    before = metrics(run)
    for name in ("model.safetensors", "summary.json", "distances.tsv"):
        (run / name).unlink()
    capsys.readouterr()
    assert aam("pretrain", "--resume-from", run, files=False, complete=True) == 0
    assert "step 3 of 3 is reached already" in capsys.readouterr().err
    for name in ("model.safetensors", "summary.json", "distances.tsv", "report.html"):
        assert (run / name).is_file()
    assert metrics(run) == before


def test_a_run_continues_in_another_folder_with_its_best_checkpoint(aam, tmp_path, capsys):
    assert aam("pretrain", "--epochs", 3, "--output-dir", tmp_path / "whole") == 0
    assert aam("pretrain", "--epochs", 3, "--max-steps", 25, "--output-dir", tmp_path / "a") == 0
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    words = ("--resume-from", tmp_path / "a", "--max-steps", 99)
    assert aam("pretrain", *words, "--output-dir", tmp_path / "b", files=False) == 0
    assert_same_run(tmp_path / "b", tmp_path / "whole")
    assert {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == before
    # A folder that holds another run is not mixed with this one.
    assert aam("pretrain", *words, "--output-dir", tmp_path / "b", files=False) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_without_the_best_checkpoint_the_best_is_chosen_anew(aam, tmp_path, capsys):
    run = tmp_path / "run"
    assert aam("pretrain", "--epochs", 2, "--max-steps", 12, "--output-dir", run) == 0
    for path in run.glob("checkpoints/best*"):
        path.unlink()
    assert aam("pretrain", "--resume-from", run, "--max-steps", 99, files=False) == 0
    assert "warning: the best checkpoint" in capsys.readouterr().err
    assert checkpoint(run, "best.pt")["progress"]["best_step"] > 12


def test_a_moved_run_continues_where_it_is_now(aam, tmp_path):
    assert aam("pretrain", "--epochs", 2, "--max-steps", 5, "--output-dir", tmp_path / "old") == 0
    (tmp_path / "old").rename(tmp_path / "new")
    words = ("--resume-from", tmp_path / "new", "--max-steps", 6)
    assert aam("pretrain", *words, files=False) == 0
    assert not (tmp_path / "old").exists()
    assert checkpoint(tmp_path / "new")["progress"]["step"] == 6


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


@pytest.fixture(scope="module")
def short(aam, tmp_path_factory):
    run = tmp_path_factory.mktemp("short") / "run"
    assert aam("pretrain", "--max-steps", 1, "--output-dir", run) == 0
    return run


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("--lr", 0.5), "was made with another --lr (None, now 0.5)"),
        (("--embedding-dim", 64), "was made with another --embedding-dim (32, now 64)"),
        (("--seed", 7), "was made with another --seed (0, now 7)"),
    ],
)
def test_a_checkpoint_from_another_configuration_is_refused(aam, short, capsys, change, expected):
    before = (short / "config.toml").read_bytes()
    capsys.readouterr()
    assert aam("pretrain", "--resume-from", short, *change, files=False) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert (short / "config.toml").read_bytes() == before


def test_a_checkpoint_of_another_command_is_refused(aam, short, tmp_path, capsys):
    words = ("--metadata-column", "age", "--output-dir", tmp_path / "fine")
    assert aam("finetune", *words, "--resume-from", short / "checkpoints" / "last.pt") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "fine").exists()


def test_other_data_under_the_same_options_are_refused(aam, short, community, tmp_path, capsys):
    import biom
    import h5py

    table = biom.load_table(str(community.table))
    ids = table.ids()
    changed = tmp_path / "table.biom"
    with h5py.File(changed, "w") as file:
        table.filter(ids[:-1], inplace=False).to_hdf5(file, "test")
    before = {path: path.read_bytes() for path in short.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert aam("pretrain", "--resume-from", short, "--table", changed, files=False) == 2
    said = capsys.readouterr().err
    assert "was made from other data" in said.splitlines()[-1]
    assert {path: path.read_bytes() for path in short.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("kept", [0, 10, 500, 0.5, 0.99])
def test_a_truncated_checkpoint_gives_one_line(aam, short, tmp_path, capsys, kept):
    whole = (short / "checkpoints" / "last.pt").read_bytes()
    broken = tmp_path / "run" / "checkpoints" / "last.pt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else kept])
    (tmp_path / "run" / "config.toml").write_bytes((short / "config.toml").read_bytes())
    capsys.readouterr()
    assert aam("pretrain", "--resume-from", tmp_path / "run", files=False) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {broken}: truncated or not a checkpoint")
    assert said.count("\n") == 1


def test_a_missing_checkpoint_gives_one_line(aam, tmp_path, capsys):
    assert aam("pretrain", "--resume-from", tmp_path / "none", files=False) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"error: {tmp_path / 'none'}: no such checkpoint; --resume-from needs")


def test_auto_starts_a_run_and_continues_it_when_called_again(aam, tmp_path, capsys):
    words = ("pretrain", "--epochs", 2, "--resume-from", "auto")
    assert aam("pretrain", "--epochs", 2, "--output-dir", tmp_path / "whole") == 0
    run = tmp_path / "run"
    assert aam(*words, "--output-dir", run, "--max-steps", 3) == 0
    assert "continuing" not in capsys.readouterr().err
    for name in (".metrics.csv.a_1", "checkpoints/.last.pt.x7a"):  # killed while it wrote
        (run / name).write_bytes(b"half")
    assert aam(*words, f"--output-dir={run}", "--max-steps", 99) == 0
    assert "continuing at step 3" in capsys.readouterr().err
    assert not [path for path in run.rglob(".*") if path.is_file()]
    assert_same_run(run, tmp_path / "whole")


def test_auto_replaces_a_run_that_ended_before_its_first_checkpoint(aam, short, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.toml").write_bytes((short / "config.toml").read_bytes())
    words = ("--max-steps", 1, "--output-dir", run)
    assert aam("pretrain", *words) == 2
    assert aam("pretrain", *words, "--resume-from", "auto") == 0


def test_auto_falls_back_to_another_checkpoint_with_a_warning(aam, tmp_path, capsys):
    words = ("pretrain", "--epochs", 2, "--output-dir", tmp_path / "run")
    assert aam(*words) == 0
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    step = checkpoint(tmp_path / "run", "best.pt")["progress"]["step"]
    capsys.readouterr()
    assert aam(*words, "--resume-from", "auto") == 0
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {last}: truncated or not a checkpoint")
    assert f"continuing from best.pt, step {step}\n" in said
    assert f"continuing at step {step}\n" in said


def test_auto_does_not_replace_a_run_whose_checkpoints_are_all_broken(aam, short, tmp_path, capsys):
    shutil.copytree(short, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"")
    before = sorted((tmp_path / "run").rglob("*"))
    capsys.readouterr()
    words = ("--output-dir", tmp_path / "run", "--resume-from", "auto", "--max-steps", 1)
    assert aam("pretrain", *words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "none of its checkpoints can be read" in said
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_auto_needs_the_folder(aam, capsys):
    assert aam("pretrain", "--resume-from", "auto", "--max-steps", 1) == 2
    assert capsys.readouterr().err == (
        "error: --resume-from auto: needs --output-dir, the folder of the run\n"
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)]
)
def test_every_signal_saves_and_has_its_own_exit_code(
    aam, tmp_path, monkeypatch, capsys, number, code
):
    """Under SLURM, SIGUSR1 has the job queued again, once."""
    tool = tmp_path / "scontrol"
    tool.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    interrupt_at(monkeypatch, 2, number)
    run = tmp_path / "run"
    assert aam("pretrain", "--epochs", 2, "--output-dir", run) == code
    assert checkpoint(run)["progress"]["step"] == 2
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == ("requeue 77\n" if number == signal.SIGUSR1 else "")
    said = capsys.readouterr().err
    assert ("job 77 is queued again" in said) == bool(asked)


def test_a_checkpoint_is_written_as_often_as_asked(aam, tmp_path, monkeypatch):
    from aam.learning.loop import Trainer

    saved = []
    save = Trainer.save
    monkeypatch.setattr(
        Trainer, "save", lambda *words: (saved.append(words[0].progress.step), save(*words))
    )
    words = ("--max-steps", 4, "--validate-every", 9)
    assert (
        aam("pretrain", *words, "--output-dir", tmp_path / "often", "--checkpoint-minutes", 1e-9)
        == 0
    )
    assert set(saved) == {1, 2, 3, 4}
    saved.clear()
    assert aam("pretrain", *words, "--output-dir", tmp_path / "rarely") == 0
    assert set(saved) == {4}
