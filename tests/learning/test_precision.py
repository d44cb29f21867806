"""Half precision: products alone are rounded, losses are scaled, overflows are skipped."""

import csv

import pytest
import torch

from tests.learning.test_step import make_step, terms_and_gradients

TASKS = {
    "tree": ("pretrain", "--epochs", 2),
    "pairs": ("pretrain", "--distance", "bray-curtis", "--epochs", 2),
    "target": ("finetune", "--metadata-column", "age", "--epochs", 2, "--nucleotide-penalty", 1,
               "--count-penalty", 1, "--count-embedding", "add", "--categorical-columns", "site"),
}  # fmt: skip


@pytest.fixture
def half_on_a_cpu(monkeypatch):
    """A CPU's kernels compute in float32 whatever they are given: refused, but it runs."""
    monkeypatch.setattr("aam.learning.device.check_precision", lambda *_: None)


def measured(run, name):
    with open(run / "metrics.csv", newline="") as file:
        return [
            float(row["value"])
            for row in csv.DictReader(file)
            if (row["part"], row["metric"]) == ("train", name)
        ]


@pytest.mark.parametrize("kind", ["clades", "pairs", "finetune"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_half_precision_step_is_near_and_its_gradients_are_whole(kind, half, community):
    step, dataset = make_step(kind, community.table, community.tree)
    terms, gradients = terms_and_gradients(step, dataset, 1)
    step.autocast = half
    for micro_batches in (1, 3):
        own, found = terms_and_gradients(step, dataset, micro_batches)
        assert own["loss"] == pytest.approx(terms["loss"], rel=0.02)
        assert found.keys() == gradients.keys()
        assert all(one.dtype == torch.float32 for one in found.values())
        total = [torch.cat([one.flatten() for one in each.values()]) for each in (found, gradients)]
        assert torch.cosine_similarity(*total, dim=0) > 0.99


def test_a_scaled_step_has_scaled_gradients_and_the_same_terms(community):
    step, dataset = make_step("finetune", community.table, community.tree)
    terms, gradients = terms_and_gradients(step, dataset, 2)
    torch.manual_seed(7)
    for parameter in step.parameters:
        parameter.grad = None
    assert step(dataset.batch(list(range(11))), 2, 1024.0) == terms
    for name, one in step.objective.named_parameters():
        if one.grad is not None:
            torch.testing.assert_close(one.grad / 1024, gradients[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_training_in_half_precision_follows_that_in_float32(
    aam, tmp_path, half_on_a_cpu, task, precision
):
    for name in ("32", precision):
        words = (*TASKS[task], "--precision", name, "--output-dir", tmp_path / name)
        assert aam(*words) == 0
    whole, half = (measured(tmp_path / name, "loss") for name in ("32", precision))
    skipped = measured(tmp_path / precision, "skipped") or [0.0]
    same = skipped.index(1.0) + 1 if 1.0 in skipped else len(whole)  # float16 overflows once
    assert half[:same] == pytest.approx(whole[:same], rel=0.05) and half != whole
    assert half[-1] < half[0] and sum(skipped) < 3


def test_an_overflow_is_skipped_and_the_scale_falls_and_resuming_keeps_it(
    aam, tmp_path, half_on_a_cpu, monkeypatch
):
    unscale, calls = torch.amp.GradScaler.unscale_, []

    def overflow_once(self, optimizer):
        calls.append(1)
        if len(calls) == 2:
            optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
        unscale(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", overflow_once)
    words = ("pretrain", "--epochs", 1, "--precision", "16-mixed", "--output-dir")
    assert aam(*words, tmp_path / "whole") == 0
    scales = measured(tmp_path / "whole", "loss_scale")
    assert measured(tmp_path / "whole", "skipped")[:3] == [0, 1, 0]
    assert scales[0] == 2 * scales[1] == 2 * scales[-1]
    calls.clear()
    assert aam(*words, tmp_path / "cut", "--max-steps", 3) == 0
    assert aam("pretrain", "--resume-from", tmp_path / "cut", "--max-steps", 99, files=False) == 0
    for name in ("loss_scale", "skipped", "loss", "gradient_norm"):
        assert str(measured(tmp_path / "cut", name)) == str(measured(tmp_path / "whole", name))


def test_overflows_without_end_end_the_run_in_one_line(
    aam, tmp_path, half_on_a_cpu, monkeypatch, capsys
):
    monkeypatch.setattr("aam.learning.loop.MOST_SKIPPED", 2)
    monkeypatch.setattr("aam.learning.loop.clip_gradients", lambda *_: float("inf"))
    words = ("--epochs", 2, "--precision", "16-mixed", "--output-dir", tmp_path / "run")
    assert aam("pretrain", *words) == 2
    assert "error: step 3: loss " in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--precision", "bf16-mixed"), ("--tf32",)])
def test_a_cpu_refuses_what_it_would_ignore(aam, tmp_path, capsys, words):
    assert aam("pretrain", *words, "--output-dir", tmp_path / "run") == 2
    assert f"error: {' '.join(words)}: needs a GPU" in capsys.readouterr().err
