"""`--memory-profile`: bytes worked out by hand, a table that adds up, a run left as it was."""

import csv
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from aam.learning.cost_model import CostModel
from aam.learning.memory_profile import Fit, batch_rows, fitting_batches, kept_a_token, peak_rows
from aam.learning.memory_watch import OWN, Phase, StepWatch, group_of
from aam.learning.meter import Meter
from aam.learning.optimizer import make_optimizer
from aam.learning.planner import Contents
from profiling import memory_curve

COLUMNS = ["section", "name", "part", "bytes", "detail"]


def read(run: Path) -> list[dict[str, str]]:
    with open(run / "memory.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.mark.parametrize("dim, heads, hidden", [(128, 4, 512), (32, 2, 64)])
def test_a_layer_keeps_the_bytes_worked_out_by_hand(dim, heads, hidden):
    """Its input; or also query, key, value, attended, middle (6 D in all), hidden and lse."""
    for impl in ("cpu", "sdpa", "math"):
        assert kept_a_token(dim, heads, hidden, impl, True, "cpu", length=10) == 4 * dim
    all_kept = kept_a_token(dim, heads, hidden, "cpu", False, "cpu", length=10)
    assert all_kept == 4 * (6 * dim + hidden + heads)


class Chain(nn.Module):
    """Two linear layers, called by the name of a stage as objectives are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, stage: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.second(self.first(x)).square().sum()}


class Peaks(Meter):
    """A device whose peaks are known."""

    def __init__(self, *peaks: int) -> None:
        self.peaks = list(peaks)

    def reset(self) -> None:
        pass

    def peak(self) -> int:
        return self.peaks.pop(0)

    def now(self) -> int:
        raise AssertionError("only peaks are known")

    free = total = now


@pytest.mark.parametrize(
    "name, group",
    {
        "encoder.stack.layers.0.linear1": "ASV stack",
        "predictor.encoder.wide.project": "wide path",
        "encoder.site_embedding": "ASV embeddings",
        "encoder.nucleotide_head": "nucleotide head",
        "head": "clade head",
        "pairs.head": "free clades",
        "predictor.sample_encoder.stack": "sample stack",
        "predictor.head": "target head",
        "predictor.stack": "target stack",
        "predictor.count_stack.norm": "count stack",
        "encoder": OWN,
        "predictor.encoder": OWN,
        "": OWN,
    }.items(),
)
def test_modules_are_grouped_by_what_they_are(name, group):
    assert group_of(name) == group


def run(aam, folder: Path, command: str, *words: object) -> tuple[Path, Path]:
    """The same run without and with a profile."""
    plain, profiled = folder / "plain", folder / "profiled"
    assert aam(command, "--max-steps", 3, *words, "--output-dir", plain) == 0
    assert aam(command, "--max-steps", 3, *words, "--output-dir", profiled, "--memory-profile") == 0
    return plain, profiled


def assert_same(plain: Path, profiled: Path) -> None:
    """Weights, optimizer and progress are equal to the bit."""
    own, other = (load_file(folder / "model.safetensors") for folder in (plain, profiled))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    own, other = (
        torch.load(folder / "checkpoints" / "last.pt", weights_only=False)
        for folder in (plain, profiled)
    )
    assert own["progress"] == other["progress"]
    for number, state in own["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["optimizer"]["state"][number][name]), (number, name)


def test_a_profiled_run_is_the_run_it_would_have_been(aam, tmp_path):
    plain, profiled = run(aam, tmp_path, "pretrain", "--distance", "bray-curtis")
    assert_same(plain, profiled)
    rows = read(profiled)
    assert list(rows[0]) == COLUMNS
    assert not (plain / "memory.tsv").exists()

    of = {name: [row for row in rows if row["section"] == name] for name in
          ("stage", "peak", "module", "layer", "tensor", "batch")}  # fmt: skip
    assert all(of.values()), {name: len(found) for name, found in of.items()}
    stages = [(row["name"], row["part"]) for row in of["stage"]]
    assert stages == [
        ("batch", "making"), ("asv_losses", "forward"), ("asv_losses", "backward"),
        ("encode_asvs", "forward"), ("encode_samples", "forward"), ("losses", "forward"),
        ("losses", "backward"), ("encode_samples", "backward"), ("encode_asvs", "backward"),
        ("optimizer", "step"),
    ]  # fmt: skip
    *parts, measured = (int(row["bytes"]) for row in of["peak"])
    assert sum(parts) == measured
    saved = load_file(profiled / "model.safetensors")
    weights = sum(int(row["bytes"]) for row in of["module"] if row["part"] == "weights")
    assert weights == sum(
        value.nbytes
        for name, value in saved.items()
        if not name.startswith("data.") and name != "pairs.unit"
    )
    layers = {(row["name"], row["part"]): int(row["bytes"]) for row in of["layer"]}
    assert layers["cpu", "recompute"] == 4 * 32
    assert layers["cpu", "all kept"] == 4 * (10 * 32 + 2)
    assert len(of["tensor"]) == 10
    first = next(row for row in of["tensor"] if "encoder.stack, number 1" in row["name"])
    tokens = int(first["bytes"]) // (4 * 32)
    assert first["detail"] == f"float32 ({tokens}, 32)"
    kept = next(
        row
        for row in of["module"]
        if (row["name"], row["part"]) == ("ASV stack", "kept for backward")
    )
    # Inputs of its layer and of its norm, the norm's mean and deviation, and the offsets.
    offsets = int(kept["bytes"]) - tokens * (2 * 4 * 32 + 2 * 4)
    assert offsets == 4 * (tokens // 31 + 1), "of sequences of 30 bases and a start"
    sizes = [int(row["bytes"]) for row in of["tensor"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(row["detail"].startswith("recommended") for row in of["batch"]) == 1
    ElementTree.parse(profiled / "memory.svg")


def test_pieces_resume_and_a_frozen_base_are_profiled_too(aam, tmp_path):
    words = ("--distance", "bray-curtis", "--effective-batch-size", 8)
    plain, profiled = run(aam, tmp_path / "p", "pretrain", *words)
    again = tmp_path / "again"
    for folder, words in ((plain, ()), (profiled, ("--memory-profile",))):
        assert aam("pretrain", "--resume-from", folder, "--max-steps", 5, "--output-dir",
                   again / folder.name, *words, files=False) == 0  # fmt: skip
    assert_same(again / plain.name, again / profiled.name)
    ways = {row["part"] for row in read(again / profiled.name) if row["name"] == "encode_asvs"}
    assert ways >= {"forward without graph", "forward again", "backward"}

    words = ("--metadata-column", "age", "--freeze-base", "--pretrained-encoder", plain)
    frozen = run(aam, tmp_path / "f", "finetune", *words)
    assert_same(*frozen)
    rows = read(frozen[1])
    vectors = [row["bytes"] for row in rows if row["part"] == "frozen ASV vectors"]
    assert vectors == [str(44 * 32 * 4)]
    stages = {row["name"] for row in rows if row["section"] == "stage"}
    assert stages == {"batch", "encode_samples", "losses", "optimizer"}


def test_the_curve_measures_every_case_in_a_process_of_its_own(tmp_path, capsys):
    memory_curve.main(
        [
            "--batch-sizes", "2", "12", "--pieces", "1", "--implementations", "cpu", "nope",
            "--recompute", "on", "--asvs", "20", "--length", "60", "--embedding-dim", "32",
            "--num-heads", "2", "--num-layers", "1", "--output", str(tmp_path / "curve.tsv"),
        ]
    )  # fmt: skip
    printed = capsys.readouterr().out
    with open(tmp_path / "curve.tsv", newline="") as file:
        small, large, *failed = csv.DictReader(file, delimiter="\t")
    assert [*small] == [*memory_curve.COLUMNS, "failure"]
    assert (small["samples"], large["samples"]) == ("2", "12")
    assert small["kept_b_token_layer"] == large["kept_b_token_layer"] == str(4 * 32)
    assert int(large["tokens"]) == 61 * int(large["ASVs"])
    for name in ("tokens", "slots", "kept_mb", "step_mb"):
        assert float(large[name]) > float(small[name]), name
    assert float(large["step_mb"]) == pytest.approx(
        float(large["peak_mb"]) - float(large["before_mb"])
    )
    assert [row["failure"].partition(":")[0] for row in failed] == ["ValueError"] * 2
    assert printed.count("got 'nope'") == 2 and "| cpu | on | 12 | 1 |" in printed


def test_the_recommended_batch_fits_by_hand():
    """11 samples of 5 ASVs of 100 tokens, none shared; 1 byte a token, 1,000 before a step.

    In pairs the eleventh sample joins the last one, so their largest step has three.
    """
    contents = Contents(
        np.arange(0, 56, 5), np.arange(55), np.full(55, 100), masked_share=0.0, squares=False,
    )  # fmt: skip
    batching = SimpleNamespace(
        rows=np.arange(11), seed=0, budget=1000.0 + 3 * 500 + 1, size=contents.size
    )
    model = CostModel(1000.0, (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    assert fitting_batches(model, batching, 2) == [
        Fit(2, 1, 2500.0), Fit(3, 1, 2500.0), Fit(6, 2, 2500.0), Fit(11, 4, 2375.0),
    ]  # fmt: skip
    rows = batch_rows(model, batching, 2)
    assert [row.detail.partition(";")[0] for row in rows] == [
        "of 0.0 MB", "recommended", "of 0.0 MB", "all training samples",
    ]  # fmt: skip
    batching.budget = 1000.0 + 600
    assert fitting_batches(model, batching, 2)[0] == Fit(2, 3, 1500.0)


def test_the_peak_is_taken_apart_by_hand():
    chain = Chain()
    optimizer = make_optimizer(chain, 1e-3, 0.0)
    chain.frozen_asvs = torch.zeros(10, 4)
    watch = StepWatch(chain, Peaks())
    watch.phases = [
        Phase("small", "forward", 15_000),
        Phase("large", "backward", 20_000, kept={"a": 2_000, "b": 1_000}, gradients={"a": 848}),
    ]
    trainer = SimpleNamespace(objective=chain, optimizer=optimizer)
    rows = peak_rows(trainer, watch, before=10_000)
    assert {row.name for row in rows} == {"large, backward"}
    weights, state = 4 * (8 * 16 + 16 + 16 * 4 + 4), 2 * 848 + 4 * 4  # a count for each weight
    assert {row.part: row.bytes for row in rows} == {
        "program and data": 10_000 - weights - state - 160,
        "frozen ASV vectors": 160,
        "weights": 848,
        "optimizer state": state,
        "gradients": 848,
        "kept for backward": 3_000,
        "working memory and unexplained": 20_000 - 10_000 - 848 - 3_000,
        "measured": 20_000,
    }
