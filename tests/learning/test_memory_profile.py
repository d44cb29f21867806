"""`--memory-profile`: bytes worked out by hand, a table that adds up, a run left as it was."""

import csv
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from aam.data.dataset import SampleDataset
from aam.learning.cost_model import CostModel, StepContents
from aam.learning.loop import Trainer
from aam.learning.memory_profile import STEP, StepWatch, batch_rows
from aam.learning.step import StepTooLarge
from profiling import memory_curve

PAIRS = ("pretrain", "--distance", "bray-curtis", "--max-steps", 3)


class Peaks:
    """A device whose peaks are known."""

    def __init__(self, *peaks):
        self.peaks = list(peaks)

    def reset(self):
        pass

    def peak(self):
        return self.peaks.pop(0)


def test_peaks_and_kept_bytes_of_stages():
    """Kept: the input (8 wide), the output of the first layer (16), that of the second (4)."""
    model = nn.ModuleDict({"first": nn.Linear(8, 16), "second": nn.Linear(16, 4)})
    watch, step = StepWatch(model, Peaks(1, 2, 30, 50, 40, 35, 0)), SimpleNamespace()
    with watch.watching(step):
        for rows in (3, 5):
            step.on_stage("losses forward")
            loss = model["second"](model["first"](torch.ones(rows, 8))).square().sum()
            step.on_stage("losses backward")
            loss.backward()
        step.on_stage("")
    assert step.on_stage is None and not model["first"]._forward_hooks
    assert watch.before == 1
    assert watch.peaks == {"batch made": 2, "losses forward": 40, "losses backward": 50}
    kept = {"first": 4 * 8, "second": 4 * 16, STEP: 4 * 4}
    assert watch.kept["losses forward"] == {name: 5 * size for name, size in kept.items()}
    assert watch.kept["losses backward"] == {name: 3 * size for name, size in kept.items()}


def test_the_recommended_batch_fits_by_hand():
    """11 samples of 5 ASVs of 100 tokens, none shared; 1 byte a token, 1,000 before a step.

    In pairs the eleventh sample joins the last one, so their largest step has three.
    """
    contents = StepContents(np.arange(0, 56, 5), np.arange(55), np.full(55, 100))
    costs = CostModel(1000.0, (1.0, 0.0, 0.0, 0.0, 0.0), margin=0.0)
    batching = SimpleNamespace(contents=contents, costs=costs, seed=0, budget=1001.0 + 3 * 500)
    batching.dataset = SampleDataset
    rows = np.arange(11)
    assert [row[1:] for row in batch_rows(batching, rows, 6)] == [
        ("3 samples", "1 micro-batch", 2500, "recommended; of 0.0 MB"),
        ("6 samples", "2 micro-batches", 2500, "of 0.0 MB"),
    ]
    batching.budget = 1600.0
    assert [row[2:4] for row in batch_rows(batching, rows, 2)] == [("3 micro-batches", 1500)]


def profiled(aam, folder: Path, command: str, *words: object) -> list[dict[str, str]]:
    """The table of a run that equals to the bit the same one without a profile."""
    plain, other = folder / "plain", folder / "profiled"
    words = (command, *words)
    assert aam(*words, "--output-dir", plain) == 0 and not (plain / "memory.tsv").exists()
    assert aam(*words, "--output-dir", other, "--memory-profile") == 0
    assert_same(plain, other)
    return read(other)


def read(run: Path) -> list[dict[str, str]]:
    ElementTree.parse(run / "memory.svg")
    with open(run / "memory.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def assert_same(plain: Path, other: Path) -> None:
    """Weights, optimizer and progress are equal to the bit."""
    own, theirs = (load_file(folder / "model.safetensors") for folder in (plain, other))
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    own, theirs = (torch.load(folder / "checkpoints" / "last.pt") for folder in (plain, other))
    assert own["progress"] == theirs["progress"]
    for number, state in own["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, theirs["optimizer"]["state"][number][name]), (number, name)


def stages(rows: list[dict[str, str]]) -> list[str]:
    return [f"{row['name']} {row['part']}" for row in rows if row["section"] == "stage"]


def test_a_profiled_run_is_the_run_it_would_have_been(aam, tmp_path, capsys):
    rows = profiled(aam, tmp_path, *PAIRS)
    said = capsys.readouterr().err
    assert "memory profile of a step of 4 samples in 1 micro-batch: peak" in said
    assert stages(rows) == [
        "batch made", "asv_losses forward", "asv_losses backward", "encode_asvs forward",
        "encode_samples forward", "losses forward", "losses backward", "encode_samples backward",
        "encode_asvs backward", "optimizer step",
    ]  # fmt: skip
    *parts, peak = (int(row["bytes"]) for row in rows if row["section"] == "peak")
    assert sum(parts) == peak > 1e8
    modules = {(row["name"], row["part"]): int(row["bytes"]) for row in rows}
    saved = load_file(tmp_path / "profiled" / "model.safetensors")
    weights = {name: one.nbytes for name, one in saved.items() if not name.startswith("data.")}
    stack = sum(size for name, size in weights.items() if name.startswith("encoder.stack."))
    assert modules["encoder.stack", "weights"] == modules["encoder.stack", "gradients"] == stack
    assert modules["encoder.stack", "optimizer state"] > 2 * stack
    # Inputs of its layer and of its norm, the norm's mean and deviation, the offsets; 31 tokens an
    # ASV, of which each keeps 4 bytes for its offset.
    kept = modules["encoder.stack", "kept for backward"] - 4
    assert kept % (31 * (2 * 4 * 32 + 2 * 4) + 4) == 0
    assert sum(row["detail"].startswith("recommended") for row in rows) == 1


def test_micro_batches_resume_and_a_frozen_base_are_profiled_too(aam, tmp_path):
    words = (*PAIRS, "--effective-batch-size", 8)
    rows = profiled(aam, tmp_path / "pairs", *words)
    assert {"encode_asvs without graph", "encode_asvs again", "encode_asvs backward"} <= {
        *stages(rows)
    }
    again, plain = tmp_path / "again", tmp_path / "pairs" / "plain"
    for name, more in (("plain", ()), ("profiled", ("--memory-profile",))):
        words = ("--resume-from", tmp_path / "pairs" / name, "--max-steps", 5, *more)
        assert aam("pretrain", *words, "--output-dir", again / name, files=False) == 0
    assert_same(again / "plain", again / "profiled")
    words = ("--metadata-column", "age", "--freeze-base", "--pretrained-encoder", plain)
    rows = profiled(aam, tmp_path / "frozen", "finetune", *words, "--max-steps", 3)
    assert {one.split()[0] for one in stages(rows)} == {
        "batch", "encode_samples", "losses", "optimizer"
    }  # fmt: skip


def test_a_profile_that_runs_out_of_memory_takes_more_micro_batches(aam, tmp_path, monkeypatch):
    compute, tried = Trainer.compute, []

    def small(self, rows, count, progress=None):
        if len(rows) == 4 and count < 4 and self.batching.failures == 0 and progress == 1.0:
            tried.append(count)
            if self._step.on_stage is not None:  # the step that is watched
                raise StepTooLarge
        return compute(self, rows, count, progress)

    monkeypatch.setattr(Trainer, "compute", small)
    assert aam(*PAIRS, "--memory-profile", "--output-dir", tmp_path) == 0
    assert {1, 2} <= set(tried)
    assert "encode_asvs again" in stages(read(tmp_path))


def test_a_layer_keeps_the_bytes_worked_out_by_hand():
    """Its input; or also query, key, value, attended, middle (6 D in all), hidden and lse."""
    kept, (dim, heads, hidden) = memory_curve.kept_a_token, (32, 2, 64)
    for impl in ("cpu", "sdpa", "math"):
        assert kept(dim, heads, hidden, impl, True, "cpu", length=10) == 4 * dim
    all_kept = kept(dim, heads, hidden, "cpu", False, "cpu", length=10)
    assert all_kept == 4 * (6 * dim + hidden + heads)


def test_the_curve_measures_a_case_in_a_process_of_its_own(tmp_path):
    words = (
        "--batch-sizes 12 --micro-batches 2 --implementations cpu --recompute on --asvs 20 "
        f"--length 60 --embedding-dim 32 --num-heads 2 --num-layers 1 --output {tmp_path}/curve.tsv"
    )
    memory_curve.main(words.split())
    with open(tmp_path / "curve.tsv", newline="") as file:
        (row,) = csv.DictReader(file, delimiter="\t")
    assert (row["samples"], row["micro_batches"], row["failure"]) == ("12", "2", "")
    assert row["kept_b_token_layer"] == str(4 * 32) and float(row["kept_mb"]) > 0
    assert int(row["tokens"]) == 61 * int(row["ASVs"])
