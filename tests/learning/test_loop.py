"""The loop: learning rate, groups of weights, accumulation, the best checkpoint, early stopping."""

import csv
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from aam.commands.pretrain_tree import STACK_JOINS
from aam.learning.loop import step_seed
from aam.learning.optimizer import (
    SCALE_LR_FACTOR,
    make_optimizer,
    set_learning_rate,
    warmup_cosine,
)
from aam.learning.step import Step
from aam.model import AsvEncoder, EncoderShape, Predictor, PretrainedModel
from aam.model.predictor import PredictorShape


def test_warmup_then_cosine():
    rates = [warmup_cosine(step, 1, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    expected = [0.5 * (1 + math.cos(math.pi * k / 90)) for k in range(90)]
    assert rates[10:] == pytest.approx(expected)
    assert warmup_cosine(100, 1, 100, 0.1) == pytest.approx(0)
    assert warmup_cosine(0, 1, 1, 0.05) == 1.0  # the shortest run still learns
    assert warmup_cosine(0, 8, 100, 0.0) == 1.0


def test_the_rate_follows_the_samples_seen_whatever_the_sizes_of_the_steps():
    sizes, seen, total = [3, 17, 2, 40, 38], 0, 100
    for size in sizes:
        expected = (seen + size) / 30 if seen + size <= 30 else None
        rate = warmup_cosine(seen, size, total, 0.3)
        if expected is None:
            done = max(0, seen - 30) / 70
            expected = 0.5 * (1 + math.cos(math.pi * done))
        assert rate == pytest.approx(expected)
        seen += size


def test_state_is_there_before_the_first_step_and_changes_nothing():
    torch.manual_seed(0)
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    other.load_state_dict(model.state_dict())
    optimizers = {make_optimizer(model, 1e-2, 0.1): model}
    assert all(len(one) == 3 for one in next(iter(optimizers)).state.values())
    assert torch.equal(model.weight, other.weight) and model.weight.grad is None
    groups = [{"params": [other.weight], "weight_decay": 0.1}, {"params": [other.bias]}]
    optimizers[torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)] = other
    for _ in range(3):
        for optimizer, one in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            optimizer.zero_grad()
            one(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


def test_only_weight_matrices_decay_and_the_scale_is_faster():
    encoder = AsvEncoder(EncoderShape(embedding_dim=32, num_heads=2, num_layers=1))
    model = nn.ModuleDict({
        "pretrained": PretrainedModel(encoder, clades=4, free_clades=5, abundance=True),
        "predictor": Predictor(encoder, PredictorShape(category_sizes=(3,))),
    })  # fmt: skip
    optimizer = make_optimizer(model, 1e-3, 0.05)
    set_learning_rate(optimizer, 1e-4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        (group["weight_decay"], round(group["lr"] / 1e-4)): {
            names[id(one)] for one in group["params"]
        }
        for group in optimizer.param_groups
    }
    assert groups.keys() == {(0.05, 1), (0.0, 1), (0.0, SCALE_LR_FACTOR)}
    assert groups[(0.0, 10)] == {"pretrained.pairs.log_scale"}
    assert sum(len(one) for one in groups.values()) == len(list(model.parameters()))
    modules = dict(model.named_modules())
    for name in groups[(0.05, 1)]:
        owner = modules[name.rpartition(".")[0]]
        assert name.endswith(("weight", "wide.sites", "site_head")), name
        assert not isinstance(owner, (nn.LayerNorm, nn.Embedding)), name
    assert groups[(0.0, 1)] >= {
        "pretrained.encoder.position_embedding.weight", "pretrained.encoder.site_bias",
        "pretrained.encoder.gate", "pretrained.clades.bias", "pretrained.pairs.norm.weight",
        "predictor.categories.columns.0.weight",
    }  # fmt: skip


def test_step_seeds_differ():
    seeds = {step_seed(s, t) for s in range(5) for t in range(200)}
    assert len(seeds) == 1000 and all(0 <= one < 2**63 for one in seeds)


def read(run, part, name):
    with open(run / "metrics.csv", newline="") as file:
        return {
            int(row["step"]): float(row["value"])
            for row in csv.DictReader(file)
            if (row["part"], row["metric"]) == (part, name)
        }


PAIRS = ("--distance", "bray-curtis")


def test_the_stack_joins_for_the_last_part_of_a_run(aam, tmp_path, monkeypatch):
    compute, seen = Step.__call__, []

    def noted(self, batch, pieces=1, scale=1.0):
        gate = self.objective.encoder.gate.abs().max().item()
        seen.append((self.objective.progress, len(batch), gate))
        return compute(self, batch, pieces, scale)

    monkeypatch.setattr(Step, "__call__", noted)
    run = tmp_path / "run"
    assert aam("pretrain", "--epochs", 3, "--batch-size", 8, "--output-dir", run) == 0
    sizes = [size for _, size, _ in seen]
    done = np.cumsum([0, *sizes[:-1]]) / sum(sizes)
    assert [progress for progress, *_ in seen] == pytest.approx(done)
    for progress, _, gate in seen:
        assert gate == 0 or progress > STACK_JOINS
    assert seen[-1][2] > 0
    assert read(run, "train", "asvs_per_second").keys() == set(range(1, len(seen) + 1))


def test_the_logged_rate_is_the_schedule_and_lasts_the_run(aam, tmp_path):
    run = tmp_path / "run"
    words = ("--epochs", 2, "--lr", 1e-3, "--warmup-fraction", 0.3, "--max-steps", 6)
    assert aam("pretrain", *PAIRS, *words, "--output-dir", run) == 0
    rates = read(run, "train", "learning_rate")
    sizes = [4, 4, 4, 4, 3, 4]
    seen = np.cumsum([0, *sizes])
    expected = {
        step + 1: 1e-3 * warmup_cosine(seen[step], sizes[step], 38, 0.3) for step in range(6)
    }
    assert rates == pytest.approx(expected)


def test_the_model_holds_the_best_checkpoint(aam, tmp_path):
    run = tmp_path / "run"
    words = ("--epochs", 4, "--lr", 0.03, "--best-metric", "distance_mae")
    assert aam("pretrain", *PAIRS, *words, "--output-dir", run) == 0
    measured = read(run, "validation", "distance_mae")
    best_step = min(measured, key=measured.get)
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    assert best["progress"]["step"] == best["progress"]["best_step"] == best_step
    assert best["progress"]["best"] == measured[best_step]
    weights = load_file(run / "model.safetensors")
    for name, value in weights.items():
        if not name.startswith("data."):
            assert torch.equal(best["objective"][name], value)
    last = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert last["progress"]["step"] == 20


def test_early_stopping_ends_after_validations_without_a_better_one(aam, tmp_path):
    run = tmp_path / "run"
    words = ("--epochs", 30, "--lr", 0.05, "--early-stopping", 2)
    assert aam("pretrain", *PAIRS, *words, "--output-dir", run) == 0
    measured = list(read(run, "validation", "mantel_r").values())
    assert len(measured) < 30
    assert measured.index(max(measured)) == len(measured) - 3


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(aam, tmp_path, capsys):
    words = ("--epochs", 20, "--lr", 1e30, "--clip", 1e30, "--output-dir", tmp_path / "run")
    assert aam("pretrain", *words) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: step ") and "not finite" in said[-1]
    assert sum(line.startswith("error") for line in said) == 1


def test_a_metric_that_is_not_measured_cannot_choose_the_best(aam, tmp_path, capsys):
    run = tmp_path / "run"
    words = ("--metadata-column", "age", "--max-steps", 1, "--best-metric", "auc")
    assert aam("finetune", *words, "--output-dir", run) == 2
    assert "--best-metric auc: not measured here; choose loss, target_loss, r2, mae" in (
        capsys.readouterr().err
    )
