"""The memory plan of `aam inspect`: measured on real steps, printed beside the budget."""

import re


def printed(output, row):
    return next(line for line in output.splitlines() if row in line).split("│")[2].strip()


def test_memory_plan_is_measured_and_fills_the_budget(aam, community, capsys):
    words = ("--tree", community.tree, "--rarefy-depth", 0, "--max-memory-gb", 3)
    assert aam("inspect", *words) == 0
    output = capsys.readouterr().out
    assert re.match(r"3\.00 GB, of which \d\.\d\d GB before a step", printed(output, "to fill"))
    mean, most = re.findall(r"\((\d+)%\)", printed(output, "predicted peak"))
    assert 5 < int(mean) <= int(most) <= 100
    assert "measured steps" in printed(output, "error of the prediction")
    assert printed(output, "samples a step") == "19 to 19, mean 19.0"  # all there are fit
    assert printed(output, "steps an epoch") == "1"


def test_fixed_steps_are_cut_into_pieces_that_fit(aam, community, capsys):
    words = ("--tree", community.tree, "--rarefy-depth", 0, "--batch-size", 4)
    assert aam("inspect", *words, "--max-memory-fraction", 0.5) == 0
    output = capsys.readouterr().out
    assert printed(output, "steps an epoch") == "5"
    assert "steps in micro-batches" not in output
    assert "to fill" in output


def test_nothing_is_measured_without_a_memory_option(aam, community, capsys):
    assert aam("inspect", "--rarefy-depth", 0) == 0
    output = capsys.readouterr().out
    assert "to fill" not in output and printed(output, "steps an epoch") == "3"


def test_a_budget_below_what_is_taken_is_refused(aam, community, capsys):
    assert aam("inspect", "--rarefy-depth", 0, "--max-memory-gb", 0.01) == 2
    assert "--max-memory-gb 0.01: program, data and weights already take" in capsys.readouterr().err
