"""Steps that fill a budget, that are cut to fit it, and that run out of memory all the same."""

import csv
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from aam.config import OptimizerOptions, PenaltyOptions
from aam.data.dataset import AsvDataset, SampleDataset
from aam.data.table import read_table
from aam.data.texts import Texts
from aam.errors import InputError
from aam.learning.batches import Batching, Filling, fixed_batches
from aam.learning.cost_model import CostModel, StepContents
from aam.learning.losses import DistanceLoss
from aam.learning.objective import PairObjective
from aam.learning.step import Step, StepTooLarge
from aam.model import AsvEncoder, EncoderShape, FreeClades

COSTS = CostModel(1e8, (2000.0, 8000.0, 1000.0, 0.0, 1e5), margin=0.1)
PAIRS = ("--distance", "bray-curtis")


def lists(batches):
    return [one.tolist() for one in batches]


# ------------------------------------------------------------------------------------ the order
@settings(max_examples=100, deadline=None)
@given(st.integers(2, 120), st.integers(2, 20), st.integers(0, 5), st.integers(0, 5))
def test_fixed_batches_hold_every_sample_once_and_none_alone(count, size, seed, epoch):
    rows = np.arange(count) * 3 + 1
    if size > count:
        with pytest.raises(InputError, match=f"--batch-size {size}: choose 2 to {count}"):
            fixed_batches(rows, size, seed)
        return
    batches = fixed_batches(rows, size, seed, epoch)
    assert sorted(np.concatenate(batches).tolist()) == rows.tolist()
    sizes = [len(one) for one in batches]
    assert min(sizes) >= 2 and max(sizes) <= size + 1 and set(sizes[:-1]) <= {size}
    assert lists(batches) == lists(fixed_batches(rows, size, seed, epoch))
    assert count < 10 or lists(batches) != lists(fixed_batches(rows, size, seed, epoch + 1))


SHAPES = {
    "equal": lambda n, rng: np.full(n, 50),
    "one giant": lambda n, rng: np.r_[np.full(n - 1, 5), 4000],
    "bimodal": lambda n, rng: rng.choice([1, 1000], n),
    "mostly giants": lambda n, rng: rng.choice([1, 1000], n, p=[0.1, 0.9]),
    "power law": lambda n, rng: np.minimum(1 + rng.pareto(1.0, n) * 3, 3000).astype(int),
    "ordinary": lambda n, rng: rng.integers(10, 120, n),
}
FILLED = CostModel(1000.0, (2.0, 8.0, 30.0, 0.0, 5.0), margin=0.02)


def make_filling(shape, n, times, seed=0, *, pool=5000, ranks=1):
    """A plan with room for so many times the largest sample; its budget and contents."""
    rng = np.random.default_rng(seed)
    samples = [np.unique(rng.integers(pool, size=count)) for count in SHAPES[shape](n, rng)]
    starts = np.concatenate([[0], np.cumsum([len(one) for one in samples])])
    contents = StepContents(starts, np.concatenate(samples), rng.integers(30, 400, pool))
    largest = Filling(contents, FILLED, 0).alone.max()
    budget = (FILLED.constant + times * largest) * (1 + FILLED.margin)
    contents = replace(contents, ranks=ranks)
    return Filling(contents, FILLED, budget), budget, contents


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)), st.sampled_from([2, 3, 4, 7, 31, 101, 211]),
    st.sampled_from([0.3, 1.01, 1.5, 3.0, 20.0]), st.integers(0, 3),
)  # fmt: skip
def test_filled_batches_hold_every_sample_once_and_no_more_than_fit(shape, n, times, seed):
    filling, budget, contents = make_filling(shape, n, times, seed)
    batches = filling.batches(np.random.default_rng(seed).permutation(n))
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    assert min(map(len, batches)) >= 2
    over = [one for one in batches if FILLED.bound(contents.size(one)) > budget * (1 + 1e-9)]
    assert all(len(one) <= 3 for one in over) and sum(len(one) == 3 for one in over) <= 1
    for one in over:
        assert FILLED.micro_batches(contents.size(one), budget) != 1


@pytest.mark.parametrize(
    ("shape", "times"), [("equal", 12), ("bimodal", 4), ("power law", 2), ("ordinary", 6)]
)
def test_budget_is_used(shape, times):
    filling, budget, contents = make_filling(shape, 1000, times, 1, pool=60_000)
    batches = filling.batches(np.arange(1000))
    used = np.array([FILLED.bound(contents.size(one)) for one in batches]) / budget
    assert len(used) > 3 and used.max() <= 1 + 1e-9
    assert used[:-1].min() > 0.8 and used[:-1].mean() > 0.9
    shared = make_filling(shape, 1000, times, 1, pool=60_000, ranks=4)[0].batches(np.arange(1000))
    assert len(shared) < 0.5 * len(batches)


# ------------------------------------------------------------------------------------ one step
@pytest.fixture(scope="module")
def batching(community):
    """Make the batching of the community's samples, and a pretrained objective for it."""
    encoder = AsvEncoder(EncoderShape(embedding_dim=32, num_heads=2, num_layers=1))
    pairs = FreeClades(32, 8, abundance=False)
    objective = PairObjective(encoder, pairs, PenaltyOptions(), DistanceLoss(None))
    table = read_table(community.table)

    def make(dataset=None, **options):
        dataset = dataset or SampleDataset(table)
        rows = np.arange(len(dataset))
        return Batching(
            rows, dataset, objective, OptimizerOptions(**options), torch.device("cpu"), 0
        )

    return make


def test_the_options_say_what_a_step_holds(batching):
    def sizes(**options):
        return [len(rows) for rows in batching(**options).batches(0)]

    assert sizes() == [8, 8, 8] and sizes(batch_size=5) == [5, 5, 5, 5, 4]
    cut = batching(batch_size=4, effective_batch_size=12)
    assert [len(rows) for rows in cut.batches(0)] == [12, 12]
    assert cut.micro_batches(cut.contents.size(np.arange(12))) == 3
    assert sizes(max_memory_gb=1.0, batch_size=12) == [12, 12]
    assert batching(max_memory_gb=1.0).batch_size is None
    with pytest.raises(InputError, match="--effective-batch-size 25: choose 2 to 24, the number"):
        batching(effective_batch_size=25)
    with pytest.raises(InputError, match="1 training samples: at least 2 are needed"):
        batching(AsvDataset(Texts.of(["ACGT"]), 150))


def test_a_step_of_asvs_has_one_size_whatever_the_memory(batching):
    asvs = AsvDataset(Texts.of(["ACGT" * length for length in (5, 10, 15)] * 500), 150)
    one = batching(asvs, max_memory_gb=1.0)
    sizes = [len(rows) for rows in one.batches(0)]
    assert sizes == [400, 400, 400, 300] and sizes[0] * 41 == pytest.approx(16_384, rel=0.01)
    one.costs, size = COSTS, one.contents.size(np.arange(400))
    assert (size.asvs, size.slots) == (400, 400)
    one.budget = COSTS.bound(size.split(3)) + 1
    assert one.micro_batches(size) == 3
    one.budget = 0.9e8
    with pytest.raises(InputError, match=r"does not fit into 0\.09 GB in micro-batches of any"):
        one.micro_batches(size)


class Device:
    """A device on which steps take what a cost model says, in the place of a meter."""

    def __init__(self, batching, costs, most=np.inf):
        self.batching, self.costs, self.most = batching, costs, most
        self.steps = []
        batching.meter = self

    def compute(self, rows, count):
        size = self.batching.contents.size(rows).split(count)
        self.highest = self.costs.predict(size)
        self.steps.append((rows.tolist(), count, self.highest))
        if self.highest > self.most:
            raise StepTooLarge
        return {"loss": 1.0}

    def budget(self, gigabytes, fraction):
        return gigabytes * 1e9

    def reset(self):
        self.highest = self.costs.base

    def peak(self):
        return int(self.highest)

    now = peak


@pytest.mark.parametrize("options", [{}, {"batch_size": 6}, {"effective_batch_size": 20}])
@pytest.mark.parametrize("budget", [0.1115, 0.115, 0.13])
def test_steps_are_measured_within_the_budget_and_near_it(batching, options, budget):
    one = batching(max_memory_gb=budget, **options)
    device = Device(one, COSTS)
    one.prepare(device.compute)
    assert len(device.steps) <= 12 and max(peak for *_, peak in device.steps) <= budget * 1e9
    assert one.costs.constant == pytest.approx(COSTS.constant, rel=0.01)
    for rows in one.batches(0):
        size = one.contents.size(rows)
        count = one.micro_batches(size)
        assert one.costs.predict(size.split(count)) == pytest.approx(
            COSTS.predict(size.split(count)), rel=0.02
        )
        _, found = one.run(rows, device.compute)
        assert found["memory_gb"] <= budget and found["micro_batches"] == count
        assert found["memory_predicted_gb"] == pytest.approx(found["memory_gb"], rel=0.02)
    known = len(device.steps)
    one.prepare(device.compute)
    assert len(device.steps) == known, "measured once"


def test_memory_that_runs_out_halves_the_micro_batches_of_the_same_samples(batching, capsys):
    one = batching(batch_size=8)
    rows, size = np.arange(8), one.contents.size(np.arange(8))
    device = Device(one, COSTS, most=COSTS.predict(size.split(4)) + 1)
    _, found = one.run(rows, device.compute)
    assert [step[:2] for step in device.steps] == [(list(range(8)), count) for count in (1, 2, 4)]
    assert found["micro_batches"] == 4 and found["out_of_memory"] == 2
    assert "out of memory: the same step again in 4 micro-batches" in capsys.readouterr().err
    one.run(rows, device.compute)
    assert len(device.steps) == 4, "what did not fit once is not tried again"
    device.most = 0
    with pytest.raises(InputError, match="does not fit even one sequence at a time"):
        one.run(rows, device.compute)


def test_the_rest_of_an_epoch_is_planned_again_and_continued_as_it_was(batching, tmp_path):
    one = batching(max_memory_gb=0.1135)
    one.budget, one.costs = 0.1135e9, replace(COSTS)
    first = lists(one.batches(0))
    assert len(first) > 2 and lists(one.batches(0, 1)) == first
    device = Device(one, replace(COSTS, rates=tuple(5 * r for r in COSTS.rates)))
    one.run(one.batches(0)[0], device.compute)
    torch.save(one.state(), tmp_path / "state")
    again = lists(one.batches(0, 1))
    assert again[:1] == first[:1] and len(again) > len(first)
    assert sorted(row for batch in again for row in batch) == list(range(24))
    other = batching(max_memory_gb=0.1135)
    other.load_state(torch.load(tmp_path / "state", weights_only=True))
    assert lists(other.batches(0, 1)) == again and other.costs == one.costs
    assert lists(other.batches(1)) == lists(one.batches(1))
    one.stale, planned = True, lists(one.planned)
    assert lists(one.batches(1, len(planned))) == planned, "nothing is left"


@pytest.mark.parametrize("choice", ["error", "chunk", "subsample"])
def test_a_sample_over_the_budget_is_what_the_option_says(choice, batching, capsys):
    """A budget that holds a pair of the smallest samples, and none of the largest."""
    whole = batching(max_memory_gb=1.0, oversize=choice)
    alone = Filling(whole.contents, COSTS, 0).alone
    limit = 1.05e-9 * (COSTS.constant + 0.8 * (alone.max() + alone.min()))
    one = batching(max_memory_gb=limit, oversize=choice)
    device = Device(one, COSTS)
    if choice == "error":
        with pytest.raises(InputError, match=r"do not fit into 0\.11 GB .* --oversize chunk"):
            one.prepare(device.compute)
        return
    one.prepare(device.compute)
    said = capsys.readouterr().err
    assert "do not fit into 0.11 GB in one micro-batch (largest: " in said
    counts = [one.micro_batches(one.contents.size(rows)) for rows in one.batches(0)]
    assert max(counts) > 1 or choice == "subsample"
    assert ("of their ASVs are left out" in said) == bool(one.asv_limits) == (choice == "subsample")
    kept = one.contents.counts.tolist()
    other = batching(max_memory_gb=limit, oversize=choice)
    other.load_state(one.state())
    assert other.contents.counts.tolist() == kept
    assert choice == "chunk" or kept != batching().contents.counts.tolist()


# ------------------------------------------------------------------------------------ whole runs
def measured(run):
    """Metrics of a run by (step, name)."""
    with open(run / "metrics.csv", newline="") as file:
        return {
            (int(row["step"]), row["metric"]): float(row["value"])
            for row in csv.DictReader(file)
            if row["part"] == "train"
        }


def assert_same_training(run, other, tolerance=1e-4):
    """Losses of every step and the last weights agree to rounding."""
    one, two = measured(run), measured(other)
    names = [key for key in one if key[1].endswith("loss") or key[1] == "gradient_norm"]
    assert names and two.keys() >= set(names)
    for key in names:
        assert two[key] == pytest.approx(one[key], rel=tolerance), key
    weights = load_file(run / "model.safetensors")
    for name, value in load_file(other / "model.safetensors").items():
        # Some biases have no gradient but rounding, which Adam scales up.
        if not name.endswith("bias") and not name.startswith("data."):
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-4, msg=name)


def test_a_run_that_ran_out_of_memory_ends_as_one_that_did_not(aam, tmp_path, monkeypatch):
    words = ("pretrain", *PAIRS, "--epochs", 2, "--lr", 1e-3)
    assert aam(*words, "--output-dir", tmp_path / "whole") == 0
    compute, calls = Step._asv_losses, []

    def fail_twice(self, work, seed, count, *more):
        compute(self, work, seed, count, *more)  # its gradients must not be counted twice
        calls.append(count)
        if len(calls) in (2, 6):
            raise MemoryError

    monkeypatch.setattr(Step, "_asv_losses", fail_twice)
    assert aam(*words, "--output-dir", tmp_path / "cut") == 0
    assert len(calls) == 10 + 2 and max(calls) == 4
    found = measured(tmp_path / "cut")
    assert found[10, "out_of_memory"] == 2 and len({step for step, _ in found}) == 10
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    "words",
    [
        ("pretrain", *PAIRS),
        ("pretrain", "--best-metric", "loss"),
        ("finetune", "--metadata-column", "diagnosis", "--categorical-columns", "site"),
    ],
    ids=["pairs", "tree", "finetune"],
)
def test_an_effective_batch_in_micro_batches_trains_as_the_whole_one(aam, tmp_path, words):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = (*words, "--epochs", 2, "--lr", 1e-3)
    assert aam(*words, "--batch-size", 12, "--output-dir", whole) == 0
    size = ("--batch-size", 4, "--effective-batch-size", 12)
    assert aam(*words, *size, "--output-dir", cut) == 0
    assert measured(cut)[1, "micro_batches"] == 3
    assert_same_training(whole, cut)


def test_memory_that_no_micro_batch_saves_ends_the_run_with_a_line(
    aam, tmp_path, monkeypatch, capsys
):
    """Samples of a step are gathered whole."""

    def batch(self, rows, **more):
        raise MemoryError

    monkeypatch.setattr(SampleDataset, "batch", batch)
    assert aam("pretrain", *PAIRS, "--batch-size", 12, "--output-dir", tmp_path / "run") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"(aam: )?error: out of memory before a step of \d+ samples could be cut", said)


def test_a_filling_run_stopped_in_an_epoch_continues_to_the_bit(aam, tmp_path, monkeypatch):
    """With known costs, which measurements never are to the byte, that rise twice on the way."""

    def prepare(self, compute):
        if self.costs is None:
            self.budget, self.costs = self.options.max_memory_gb * 1e9, replace(COSTS)

    def check(self, size, peak):
        self.excess = [*self.excess, 0.0]  # as many as steps: it is kept with the run
        rises = len(self.excess) in (2, 7)
        if rises:
            self.rates = tuple(1.3 * one for one in self.rates)
        return rises

    def fill(folder, *more):
        words = ("pretrain", *PAIRS, "--epochs", 3, "--max-memory-gb", 0.112, *more)
        assert aam(*words, "--output-dir", tmp_path / folder, filling=True) == 0

    monkeypatch.setattr(Batching, "prepare", prepare)
    monkeypatch.setattr(CostModel, "check", check)
    fill("whole")
    whole, expected = (
        load_file(tmp_path / "whole" / "model.safetensors"),
        measured(tmp_path / "whole"),
    )
    assert max(step for step, _ in expected) > 8  # several an epoch
    for after in (1, 5):
        fill(f"{after}", "--max-steps", after)
        words = ("--resume-from", tmp_path / f"{after}", "--max-steps", 1000)
        assert aam("pretrain", *words, files=False) == 0
        found = measured(tmp_path / f"{after}")
        again = load_file(tmp_path / f"{after}" / "model.safetensors")
        assert all(torch.equal(value, again[name]) for name, value in whole.items())
        for key, value in expected.items():
            assert key[1].startswith(("samples", "memory")) or found[key] == value, key


LIMITED = """
import resource, sys
import numpy as np, torch
from aam.config import OptimizerOptions, PenaltyOptions
from aam.data.dataset import SampleDataset
from aam.data.table import read_table
from aam.data.table_distances import TableDistances
from aam.learning.batches import Batching
from aam.learning.distributed import RankGroup
from aam.learning.losses import DistanceLoss
from aam.learning.objective import PairObjective
from aam.learning.step import Step
from aam.model import AsvEncoder, EncoderShape, FreeClades

torch.manual_seed(0)
table = read_table(sys.argv[1])
dataset = SampleDataset(table)
encoder = AsvEncoder(EncoderShape(num_layers=2), recompute=False)
loss = DistanceLoss(TableDistances(table, "jaccard"))
pairs = FreeClades(128, 64, abundance=False)
objective = PairObjective(encoder, pairs, PenaltyOptions(), loss).train()
step, rows = Step(objective, RankGroup()), np.arange(40)
options = OptimizerOptions(batch_size=40)
batching = Batching(rows, dataset, objective, options, torch.device("cpu"), 0)

def compute(rows, count):
    torch.manual_seed(1)
    return step(dataset.batch(rows), count)

def take(rows):
    for one in step.parameters:
        one.grad = None
    terms, found = batching.run(rows, compute)
    grads = [one.grad.flatten() for one in step.parameters if one.grad is not None]
    return terms, found, torch.cat(grads)

take(rows[:2])
whole, free, expected = take(rows)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
need = 1e9 * free["memory_gb"] - batching.meter.now()
resource.setrlimit(resource.RLIMIT_AS, (int(taken + 0.6 * need), resource.RLIM_INFINITY))
terms, found, gradient = take(rows)
assert found["micro_batches"] > 1 and found["out_of_memory"] >= 1, found
assert abs(terms["loss"] - whole["loss"]) < 1e-5 * whole["loss"], (terms, whole)
assert (gradient - expected).norm() < 1e-4 * expected.norm()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_a_process_with_too_little_address_space_computes_the_step_in_micro_batches(tmp_path):
    from aam.data.simulate import simulate_community

    files = simulate_community(
        tmp_path, samples=40, asvs=400, asvs_per_sample=60, sequence_length=100, seed=0
    )
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, files.table],
        capture_output=True, text=True, check=False, env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
