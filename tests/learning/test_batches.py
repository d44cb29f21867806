"""Steps that fill a budget, that are cut to fit it, and that run out of memory all the same."""

import csv
import re
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aam.config import OptimizerOptions, PenaltyOptions
from aam.data.dataset import AsvDataset, SampleDataset
from aam.data.table import read_table
from aam.data.texts import Texts
from aam.errors import InputError
from aam.learning.batches import Batching
from aam.learning.calibration import Calibration
from aam.learning.cost_model import CostModel, StepSize
from aam.learning.losses import DistanceLoss
from aam.learning.objective import PairObjective
from aam.learning.step import Step, StepTooLarge
from aam.model import AsvEncoder, EncoderShape, FreeClades

MODEL = CostModel(1e8, (2000.0, 3000.0, 1000.0, 8000.0, 2e5, 0.0, 0.0), margin=0.1)


PAIRS = ("--distance", "bray-curtis")


def measured(run, part="train"):
    """Metrics of a run by (step, name)."""
    with open(run / "metrics.csv", newline="") as file:
        return {
            (int(row["step"]), row["metric"]): float(row["value"])
            for row in csv.DictReader(file)
            if row["part"] == part
        }


def assert_same_training(run, other, tolerance=1e-4):
    """Losses of every step and the last weights agree to rounding."""
    one, two = measured(run), measured(other)
    names = [key for key in one if key[1].endswith("loss") or key[1] == "gradient_norm"]
    assert names
    for key in names:
        assert two[key] == pytest.approx(one[key], rel=tolerance), key
    weights = load_file(run / "model.safetensors")
    for name, value in load_file(other / "model.safetensors").items():
        if not name.endswith("bias") and not name.startswith(
            "data."
        ):  # some have no gradient but rounding, which Adam scales up
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-4, msg=name)


@pytest.fixture
def fixed_costs(monkeypatch):
    """A known cost model instead of measurements, which never repeat to the byte."""

    def prepare(self, compute):
        if self.calibration.model is None:
            self.budget = self.options.max_memory_gb * 1e9
            self.calibration.model = MODEL

    monkeypatch.setattr(Batching, "prepare", prepare)
    monkeypatch.setattr(Calibration, "check", lambda *_: False)


@pytest.fixture
def batching(community):
    """Make the batching of the community's samples, and a pretrained objective for it."""
    samples = SampleDataset(read_table(community.table))
    encoder = AsvEncoder(EncoderShape(embedding_dim=32, num_heads=2, num_layers=1))
    pairs = FreeClades(32, 8, abundance=False)
    objective = PairObjective(encoder, pairs, PenaltyOptions(), DistanceLoss(None))

    def make(dataset=samples, **options):
        rows = np.arange(len(dataset))
        return Batching(
            rows, dataset, objective, OptimizerOptions(**options), torch.device("cpu"), 0
        )

    return make


def test_the_options_say_what_a_step_holds(batching):
    sizes = [len(rows) for rows in batching().batches(0)]
    assert sizes == [8, 8, 8]
    assert [len(rows) for rows in batching(batch_size=5).batches(0)] == [5, 5, 5, 5, 4]
    cut = batching(batch_size=4, effective_batch_size=12)
    assert [len(rows) for rows in cut.batches(0)] == [12, 12]
    assert cut.pieces(cut.size(np.arange(12))) == 3
    assert batching(batch_size=12).pieces(cut.size(np.arange(12))) == 1
    assert batching(max_memory_gb=1.0).fixed is None
    assert batching(max_memory_gb=1.0, batch_size=4).fixed is not None
    with pytest.raises(InputError, match="--effective-batch-size 25 is larger than the 24"):
        batching(effective_batch_size=25)


def test_a_step_of_asvs_has_one_size_whatever_the_memory(batching):
    sequences = Texts.of(["ACGT" * length for length in (5, 10, 15)] * 500)
    asvs = AsvDataset(sequences, 150)
    one = batching(asvs, max_memory_gb=1.0)
    sizes = [len(rows) for rows in one.batches(0)]
    assert sizes == [400, 400, 400, 300] and sizes[0] * 41 == pytest.approx(16_384, rel=0.01)
    one.calibration.model = MODEL
    size = one.size(np.arange(400))
    assert (size.asvs, size.samples, size.slots) == (400, 400, 400)
    one.budget = MODEL.bound(size.split(3)) + 1
    assert one.pieces(size) == 3
    assert [len(rows) for rows in batching(asvs, batch_size=700).batches(0)] == [700, 700, 100]


def test_a_step_is_cut_into_the_fewest_pieces_that_fit(batching):
    one = batching(effective_batch_size=24, max_memory_gb=1.0)
    one.calibration.model = MODEL
    size = one.size(np.arange(24))
    for pieces in (1, 2, 5):
        one.budget = MODEL.bound(size.split(pieces)) + 1
        assert one.pieces(size) == pieces
    one.budget = 0.9e8
    with pytest.raises(InputError, match=r"does not fit into 0\.09 GB in pieces of any size"):
        one.pieces(size)


def test_memory_that_runs_out_halves_the_pieces_of_the_same_samples(batching, capsys):
    one, calls = batching(), []

    def compute(rows, pieces):
        calls.append((rows.tolist(), pieces))
        if pieces < 4:
            raise StepTooLarge
        return {"loss": 1.0}

    _, found = one.run(np.arange(8), compute)
    assert calls == [(list(range(8)), pieces) for pieces in (1, 2, 4)]
    assert found["pieces"] == 4 and found["out_of_memory"] == 2
    assert "out of memory: the same step again in 4 pieces" in capsys.readouterr().err
    calls.clear()
    one.run(np.arange(8), compute)  # what did not fit once is not tried again
    assert [pieces for _, pieces in calls] == [4]

    def never(rows, pieces):
        raise StepTooLarge

    with pytest.raises(InputError, match="does not fit even one sequence at a time"):
        one.run(np.arange(8), never)


def test_a_step_after_one_that_failed_is_cut_no_finer_than_its_samples(batching):
    """With a frozen base a step has no tokens, and no piece is smaller than its largest sample."""
    one = batching()
    size = StepSize(tokens=0, masked=0, asvs=5, slots=100, samples=8, longest=30)
    one._note_failure(size, 4)
    assert one.pieces(size) == 8


def test_a_run_that_ran_out_of_memory_ends_as_one_that_did_not(aam, tmp_path, monkeypatch):
    words = ("pretrain", *PAIRS, "--epochs", 2, "--lr", 1e-3)
    assert aam(*words, "--output-dir", tmp_path / "whole") == 0
    compute, calls = Step._asv_losses, []

    def fail_thrice(self, work, seed, pieces, scale, sums):
        compute(self, work, seed, pieces, scale, sums)  # its gradients must not be counted twice
        calls.append(pieces)
        if len(calls) in (2, 6, 7):
            raise MemoryError

    monkeypatch.setattr(Step, "_asv_losses", fail_thrice)
    assert aam(*words, "--output-dir", tmp_path / "cut") == 0
    assert len(calls) == 10 + 3 and max(calls) > 1
    found = measured(tmp_path / "cut")
    assert found[10, "out_of_memory"] == 3 and len({step for step, _ in found}) == 10
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


def test_an_effective_batch_in_pieces_trains_as_the_whole_one(aam, tmp_path):
    words = ("--epochs", 3, "--lr", 1e-3)
    for command, more in (
        ("pretrain", PAIRS),
        ("pretrain", ("--best-metric", "loss")),
        ("finetune", ("--metadata-column", "diagnosis", "--categorical-columns", "site")),
    ):
        folder = tmp_path / f"{command}{len(more)}{more[0]}"
        whole, cut = folder / "whole", folder / "cut"
        size = ("--batch-size", 12)
        assert aam(command, *more, *words, *size, "--output-dir", whole) == 0
        size = ("--batch-size", 4, "--effective-batch-size", 12)
        assert aam(command, *more, *words, *size, "--output-dir", cut) == 0
        assert measured(cut)[1, "pieces"] == 3
        assert_same_training(whole, cut)


def test_memory_that_no_piece_saves_ends_the_run_with_a_line(aam, tmp_path, monkeypatch, capsys):
    """Samples of a step are gathered whole."""
    gather, calls = SampleDataset.batch, []

    def batch(self, rows, **more):
        calls.append(rows)
        if len(calls) > 2 and threading.current_thread().name.startswith("next batch"):
            raise MemoryError
        return gather(self, rows, **more)

    monkeypatch.setattr(SampleDataset, "batch", batch)
    words = ("--batch-size", 12, "--epochs", 5, "--output-dir", tmp_path / "run")
    assert aam("pretrain", *PAIRS, *words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"(aam: )?error: out of memory before a step of \d+ samples could be cut", said)


def fill(aam, output, *more):
    words = ("pretrain", *PAIRS, "--epochs", 4, "--max-memory-gb", 0.112, *more)
    words = (*words, "--output-dir", output)
    return aam(*words, filling=True)


@pytest.fixture(params=["fixed", "rising"])
def costs(request, fixed_costs, monkeypatch):
    """Fixed costs; or ones that turn out higher in the first and the second epoch."""

    def check(self, size, peak):
        self.refits += 1
        if self.refits in (2, 7):
            self.model = replace(self.model, rates=tuple(1.3 * one for one in self.model.rates))
        return False

    if request.param == "rising":
        monkeypatch.setattr(Calibration, "check", check)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_filling_run_stopped_in_an_epoch_continues_to_the_bit(aam, tmp_path, costs, after):
    assert fill(aam, tmp_path / "whole") == 0
    steps = {step for step, _ in measured(tmp_path / "whole")}
    assert len(steps) > 8  # several an epoch
    assert fill(aam, tmp_path / "part", "--max-steps", after) == 0
    words = ("--resume-from", tmp_path / "part", "--max-steps", 1000)
    assert aam("pretrain", *words, files=False) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    again = measured(tmp_path / "part")
    for key, value in measured(tmp_path / "whole").items():
        if not key[1].startswith(("samples", "memory")):
            assert again[key] == value, key


def test_the_rest_of_an_epoch_is_planned_again_with_higher_costs(batching):
    one = batching(max_memory_gb=0.1135)
    one.budget, one.calibration.model = 0.1135e9, MODEL
    first = one.batches(0)
    assert len(first) > 2 and one.batches(0, 1) is first
    one.calibration.model = replace(MODEL, rates=tuple(1.15 * one for one in MODEL.rates))
    again = one.batches(0, 1)
    assert [rows.tolist() for rows in again[:1]] == [rows.tolist() for rows in first[:1]]
    assert len(again) > len(first)
    assert all(one.pieces(one.size(rows)) == 1 for rows in again[1:])
    assert not all(one.pieces(one.size(rows)) == 1 for rows in first[1:])
    assert sorted(np.concatenate(again).tolist()) == list(range(24))
    one.calibration.model = MODEL
    assert one.batches(0, len(again)) is again, "nothing is left to plan"

    other = batching(max_memory_gb=0.1135)
    other.load_state(one.state())
    assert [rows.tolist() for rows in other.batches(0, len(again))] == [
        rows.tolist() for rows in again
    ]
    assert [rows.tolist() for rows in other.batches(1)] == [
        rows.tolist() for rows in one.batches(1)
    ]


def test_a_checkpoint_keeps_what_did_not_fit_and_what_was_left_out(batching):
    one = batching(max_memory_gb=0.112, oversize="subsample")
    one.budget, one.calibration.model = 0.1117e9, MODEL
    one.batches(0)
    assert one.limits
    one.largest = StepSize(1000, 250, 10, 400, 16)
    counts = one.contents.counts.tolist()
    other = batching(max_memory_gb=0.112, oversize="subsample")
    assert (other.contents.counts[list(one.limits)] >= list(one.limits.values())).all()
    other.load_state(one.state())
    assert other.contents.counts.tolist() == counts
    assert other.largest == one.largest and other.limits == one.limits


@pytest.mark.parametrize("choice", ["error", "chunk", "subsample"])
def test_a_sample_over_the_budget_is_what_the_option_says(
    choice, aam, tmp_path, fixed_costs, capsys
):
    run = tmp_path / "run"
    words = ("--max-memory-gb", 0.1117, "--oversize", choice, "--epochs", 3)
    code = aam("pretrain", *PAIRS, *words, "--output-dir", run, filling=True)
    said = capsys.readouterr().err
    assert "do not fit into 0.11 GB in one piece (largest: " in said
    assert code == (2 if choice == "error" else 0)
    if choice == "error":
        assert "--oversize chunk" in said
    else:
        pieces = [value for (_, name), value in measured(run).items() if name == "pieces"]
        assert max(pieces) > 1 or choice == "subsample"
        assert ("of their ASVs are left out" in said) == (choice == "subsample")
    assert said.count("do not fit into") == 1, "said once, not every epoch"


LIMITED = """
import resource, sys
import numpy as np, torch
from aam.config import OptimizerOptions, PenaltyOptions
from aam.data.dataset import AsvDataset
from aam.data.dataset import SampleDataset
from aam.data.unifrac import UniFrac
from aam.data.table import read_table
from aam.model import AsvEncoder, EncoderShape, FreeClades
from aam.learning.distributed import RankGroup
from aam.learning.losses import DistanceLoss
from aam.learning.batches import Batching
from aam.learning.objective import PairObjective
from aam.learning.step import Step

table, tree = sys.argv[1:]
torch.manual_seed(0)
dataset = SampleDataset(read_table(table))
encoder = AsvEncoder(EncoderShape(num_layers=2), recompute=False, impl=IMPL)
pairs = FreeClades(128, 64, abundance=False)
loss = DistanceLoss(UniFrac(read_table(table), tree))
objective = PairObjective(encoder, pairs, PenaltyOptions(), loss).train()
step, rows = Step(objective, RankGroup()), np.arange(40)
options = OptimizerOptions(batch_size=40)
batching = Batching(rows, dataset, objective, options, torch.device("cpu"), 0)

def compute(rows, pieces):
    torch.manual_seed(1)
    return step(dataset.batch(rows), pieces)

def take(rows):
    for one in step.parameters:
        one.grad = None
    terms, found = batching.run(rows, compute)
    return terms, found, torch.cat(
        [one.grad.flatten() for one in step.parameters if one.grad is not None]
    )

take(rows[:2])
whole, free, expected = take(rows)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
need = 1e9 * free["memory_gb"] - batching.meter.now()
resource.setrlimit(resource.RLIMIT_AS, (int(taken + 0.6 * need), resource.RLIM_INFINITY))
terms, found, gradient = take(rows)
assert found["pieces"] > 1 and found["out_of_memory"] >= 1, found
assert abs(terms["loss"] - whole["loss"]) < 1e-5 * whole["loss"], (terms, whole)
assert (gradient - expected).norm() < 1e-4 * expected.norm()
print("pieces", found["pieces"])
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="limits address space by RLIMIT_AS"
)
@pytest.mark.parametrize("impl", ["auto"])
def test_a_process_with_too_little_address_space_computes_the_step_in_pieces(impl, tmp_path):
    from aam.data.simulate import simulate_community

    files = simulate_community(
        tmp_path, samples=40, asvs=400, asvs_per_sample=60, sequence_length=100, seed=0
    )
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.replace("IMPL", repr(impl)), files.table, files.tree],
        capture_output=True, text=True, check=False, env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pieces" in done.stdout
