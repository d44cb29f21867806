"""`aam evaluate`: the run's own masks and samples, and one table of results everywhere."""

import json

import pytest

from aam.errors import InputError
from aam.evaluation import results
from aam.evaluation.loaded import load


def test_masks_are_those_of_the_runs_options(aam, tmp_path, monkeypatch):
    asked, check = [], results.check_nucleotides
    words = ("--distance", "jaccard", "--mask-strategy", "span", "--mask-probability", 0.4)
    assert aam("pretrain", *words, "--max-steps", 1, "--output-dir", tmp_path / "run") == 0
    monkeypatch.setattr(
        results, "check_nucleotides",
        lambda *known, **more: asked.append(known[3]) or check(*known, **more),
    )  # fmt: skip
    assert aam("evaluate", "--model", tmp_path / "run") == 0
    assert {(one.mask_strategy, one.mask_probability) for one in asked} == {("span", 0.4)}


def test_results_have_the_same_names_and_values_as_those_of_the_run(
    aam, community, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    run, output = tmp_path / "run", tmp_path / "out.json"
    metadata = ("--metadata", community.metadata)
    words = ("--metadata-column", "age", "--max-steps", 2, "--output-dir", run)
    assert aam("finetune", *words, complete=True) == 0
    capsys.readouterr()
    words = ("--model", run, *metadata, "--output", output)
    assert aam("evaluate", *words, complete=True) == 0
    said = capsys.readouterr()
    expected = json.loads((run / "summary.json").read_text())["results"]
    found = json.loads(output.read_text())["results"]
    assert [one["name"] for one in found] == ["age R2", "age MAE"]
    for one, other in zip(found, expected, strict=True):
        assert one["name"] == other["name"] and one["baselines"] == other["baselines"]
        assert set(one["baselines"]) == {"random forest", "mean"}
        assert one["value"] == pytest.approx(other["value"], rel=1e-4)
    assert max(map(len, said.out.splitlines())) <= 80
    assert f"{found[1]['value']:.3f}" in said.out and "warning" not in said.err
    assert aam("evaluate", *words, "--overwrite", "--all-samples") == 0
    assert "were trained on: their numbers are too good" in capsys.readouterr().err
    with pytest.raises(
        InputError, match="is a run of finetune; give the folder of one of pretrain"
    ):
        load(run).embed(community.table)


def test_results_fit_a_narrow_terminal_with_the_best_baseline_first(monkeypatch, capsys):
    simple = {"constant": None, "richness difference": 0.41, "Jaccard": 0.9, "Bray-Curtis": 0.68}
    methods = {name: {"mantel_r": value, "distance_mae": value} for name, value in simple.items()}
    measured = {"unifrac_loss": 1.0, "mantel_r": 0.98765, "distance_mae": 0.00123}
    compared = results.compare(measured, methods)
    assert [one["name"] for one in compared] == ["Mantel r", "distance MAE"]
    for width in ("80", "36"):
        monkeypatch.setenv("COLUMNS", width)
        results.print_results(compared)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= int(width)
        text = " ".join("\n".join(lines).replace("│", " ").split())
        assert "0.988" in text and "0.0012" in text and "constant" not in text
        assert text.index("Jaccard") < text.index("richness") < text.rindex("Jaccard")
