"""What users of other trainers met, and must not meet here: one test a pitfall.

Those that other tests hold already are named in ELSEWHERE.
"""

import csv
import json
import re
from pathlib import Path

import biom
import h5py
import numpy as np
import pytest
import torch

from aam.config import PenaltyOptions
from aam.data.dataset import SampleDataset
from aam.data.sequences import MASK, A
from aam.data.table import read_table
from aam.evaluation.outputs import check_nucleotides

ROOT = Path(__file__).parent
ELSEWHERE = {
    "predict could not load what train wrote": (
        "commands/test_options_end_to_end.py", "test_finetune_and_predict"),
    "a count option crashed at first validation": (
        "commands/test_options_end_to_end.py", "test_no_option_is_left_out"),
    "recomputation failed outside its backend": (
        "commands/test_options_end_to_end.py",
        "test_interchangeable_settings_give_the_same_losses"),
    "permuting the table's rows changed predictions": (
        "commands/test_predict.py",
        "test_the_order_of_the_tables_rows_and_columns_changes_no_prediction"),
    "warm-up that small studies never leave": (
        "learning/test_loop.py", "test_the_logged_rate_is_the_schedule_and_lasts_the_run"),
    "a matrix by position": ("test_bad_input.py", 'MATRIX + "NPY": "--unifrac-matrix-ids"'),
    "NaN target": ("test_bad_input.py", 'FINE + "BLANK --metadata-column x"'),
    "duplicate metadata rows": ("test_bad_input.py", 'FINE + "DUPLICATE --metadata-column age"'),
    "hashed ids": ("test_bad_input.py", 'TREE + "MD5"'),
    "batch larger than the set": ("test_bad_input.py", 'PAIRS + "--batch-size 64"'),
    "plain text as BIOM": ("test_bad_input.py", 'TREE + "PLAIN"'),
    "bf16 on a CPU was ignored": ("learning/test_precision.py", '("--precision", "bf16-mixed")'),
    "the header of QIIME was rejected": ("data/test_metadata.py", '"#SampleID"'),
    "sequences were cut silently": (
        "commands/test_options_end_to_end.py", 'facts["sequences cut at 20 bases"]'),
    "random splits leaked subjects, on real data": (
        "data/test_splits.py", 'assert "host_subject_id" in found'),
    "checkpoints written in place": (
        "learning/test_checkpoint.py", "test_a_failed_write_keeps_the_previous_file"),
    "resume that is not exact": (
        "learning/test_resume.py", "test_a_run_that_was_stopped_and_interrupted_is_the_whole_one"),
}  # fmt: skip


@pytest.mark.parametrize("pitfall", ELSEWHERE)
def test_pitfall_is_tested_elsewhere(pitfall):
    file, name = ELSEWHERE[pitfall]
    assert name in (ROOT / file).read_text()


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def facts_of(run: Path) -> dict[str, dict]:
    return {fact["what"]: fact for fact in summary_of(run)["data"]}


def renamed(community, folder: Path, names) -> tuple[Path, Path]:
    """The community with other sample ids."""
    table = biom.load_table(str(community.table))
    new = dict(zip(table.ids(), names, strict=True))
    text = community.metadata.read_text()
    table.update_ids(new)
    with h5py.File(folder / "table.biom", "w") as file:
        table.to_hdf5(file, "test")
    for old, name in new.items():
        text = re.sub(rf"^{re.escape(old)}\t", f"{name}\t", text, flags=re.M)
    (folder / "metadata.tsv").write_text(text)
    return folder / "table.biom", folder / "metadata.tsv"


def test_pitfall_numeric_ids_were_read_as_numbers(aam, community, tmp_path, capsys):
    names = [f"2538.{1000100 + 10 * n}" for n in range(24)]
    table, metadata = renamed(community, tmp_path, names)
    files = ("--table", table, "--metadata", metadata, "--metadata-column", "age")
    words = ("--max-steps", 1, "--output-dir", tmp_path / "run")
    assert aam("finetune", *files, *words, files=False) == 0
    assert f"24 samples of {table} in {metadata}" in capsys.readouterr().err
    ids = (tmp_path / "run" / "train_ids.txt").read_text().split()
    assert set(ids) < set(names)
    # As a spreadsheet would have rewritten them: nothing matches, and nothing is trained.
    text = re.sub(r"^(2538\.\d+?)0+\t", r"\1\t", metadata.read_text(), flags=re.M)
    metadata.write_text(text)
    words = ("--max-steps", 1, "--output-dir", tmp_path / "second")
    assert aam("finetune", *files, *words, files=False) == 2
    said = capsys.readouterr().err
    assert "equal as numbers" in said and said.count("\n") == 1
    assert not (tmp_path / "second").exists()


def test_pitfall_partial_matches_are_an_error_unless_allowed_and_counted(
    aam, community, tmp_path, capsys
):
    lines = community.metadata.read_text().splitlines()
    fewer = tmp_path / "fewer.tsv"
    fewer.write_text("\n".join([*lines[:2], *lines[4:]]) + "\n")
    words = ("--table", community.table, "--metadata", fewer, "--metadata-column", "age")
    for command, more in (("finetune", ("--output-dir", tmp_path / "run")), ("inspect", ())):
        assert aam(command, *words, *more, files=False) == 2
        assert "2 of 24 samples" in capsys.readouterr().err
    more = ("--allow-missing", "--max-steps", 1, "--output-dir", tmp_path / "run")
    assert aam("finetune", *words, *more, files=False) == 0
    dropped = [fact for fact in facts_of(tmp_path / "run").values() if fact["kind"] == "dropped"]
    assert [fact["count"] for fact in dropped] == [2]
    assert aam("inspect", *words, "--allow-missing", "--rarefy-depth", 0, files=False) == 0
    assert "dropped: 2 samples" in capsys.readouterr().err


def test_pitfall_string_labels_crashed(aam, community, tmp_path):
    run = tmp_path / "run"
    words = ("--metadata-column", "diagnosis", "--max-steps", 1, "--output-dir", run)
    assert aam("finetune", *words) == 0
    target = summary_of(run)["target"]
    assert target["classes"] == ["colitis", "crohn", "healthy"]
    with open(run / "predictions.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    for part in ("train", "validation"):  # stratified: every class in both parts
        assert {r["true"] for r in rows if r["part"] == part} == set(target["classes"])
    assert {f"probability_{one}" for one in target["classes"]} <= rows[0].keys()


def test_pitfall_the_count_loss_swamped_the_total(aam, tmp_path):
    run = tmp_path / "run"
    words = ("--metadata-column", "age", "--target-transform", "none", "--count-penalty", 1)
    assert aam("finetune", *words, "--max-steps", 1, "--output-dir", run) == 0
    with open(run / "metrics.csv", newline="") as file:
        rows = [one for one in csv.DictReader(file) if (one["step"], one["part"]) == ("1", "train")]
    values = {one["metric"]: float(one["value"]) for one in rows}
    assert 0 < values["count_loss"] < 5  # nats, whatever the target's transform and the depth
    assert {"count_loss", "target_loss", "loss"} <= values.keys()


def test_pitfall_most_of_the_work_was_padding(community):
    dataset = SampleDataset(read_table(community.table), token_limit=1024)
    batch = dataset.batch(range(24))
    distinct = set()
    for row in range(24):
        distinct |= set(batch.asv_ids[batch.slots[row]].tolist())
    assert len(batch.tokens.values) == sum(len(dataset.sequences[one]) + 1 for one in distinct)
    assert len(batch.slots.values) == dataset.asv_count.sum()


def test_pitfall_the_token_limit_cost_and_changed_what_was_learned(aam, community, tmp_path):
    for limit in (64, 4096):
        words = ("--token-limit", limit, "--max-steps", 2, "--output-dir", tmp_path / str(limit))
        files = ("--table", community.table, "--distance", "jaccard")
        assert aam("pretrain", *files, *words, files=False) == 0
    one, other = (
        [line for line in (tmp_path / name / "metrics.csv").read_text().splitlines()
         if "_per_second" not in line and "memory" not in line]
        for name in ("64", "4096")
    )  # fmt: skip
    assert one == other


def test_pitfall_validation_accuracy_measured_copying(community):
    """A model that repeats its input finds no masked nucleotide; the masks are always the same."""

    class Copier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.seen = []

        def forward(self, tokens, first_row=0):
            self.seen.append(tokens.values.clone())

        def nucleotide_logits(self, encoded, tokens, places):
            one_hot = torch.nn.functional.one_hot(tokens.values[places].long(), 7)
            return one_hot[:, A : A + 4].float()

    dataset = SampleDataset(read_table(community.table))
    model, asvs = Copier(), np.arange(len(dataset.sequences))
    torch.manual_seed(1)
    first = check_nucleotides(model, dataset, asvs, PenaltyOptions(), seed=3)
    second = check_nucleotides(model, dataset, asvs, PenaltyOptions(), seed=3)
    # Where nothing is copied the first base, A, is said.
    assert first.accuracy == (first.bases == A).mean() and len(first.bases) > 50
    assert torch.equal(model.seen[0], model.seen[1]) and (model.seen[0] == MASK).any()
    assert np.array_equal(first.positions, second.positions)
    bases = ["PACGT"[one] for one in first.bases]
    counted = {dataset.sequences[n][p] for n in range(3) for p in range(30)}
    assert set(bases) <= counted == set("ACGT")


def test_pitfall_a_missing_target_crashed_later(aam, community, tmp_path, capsys):
    lines = community.metadata.read_text().splitlines()
    lines[2] = "\t".join([*lines[2].split("\t")[:-1], "not applicable"])
    (tmp_path / "m.tsv").write_text("\n".join(line for n, line in enumerate(lines) if n != 1))
    run = tmp_path / "run"
    words = ("--table", community.table, "--metadata", tmp_path / "m.tsv")
    more = ("--metadata-column", "age", "--max-steps", 1, "--output-dir", run)
    assert aam("finetune", *words, *more, files=False) == 2
    said = capsys.readouterr().err
    assert "m.tsv: column 'age' has no value for 1 of " in said and "--allow-missing" in said
    assert not run.exists()
    assert aam("finetune", *words, *more, "--allow-missing", files=False) == 0
    fact = facts_of(run)["samples without a value of 'age'"]
    assert (fact["count"], fact["kind"]) == (1, "dropped")


def test_pitfall_samples_missing_from_the_distance_matrix(aam, community, tmp_path, capsys):
    from tests.data.trees import write_unifrac

    whole, fewer = tmp_path / "whole.tsv", tmp_path / "fewer.tsv"
    write_unifrac(community.table, community.tree, whole)
    rows = [line.split("\t") for line in whole.read_text().splitlines()]
    keep = [n for n in range(len(rows)) if n not in (3, 9)]
    fewer.write_text("\n".join("\t".join(rows[i][j] for j in keep) for i in keep) + "\n")
    words = ("--table", community.table, "--unifrac-matrix", fewer, "--max-steps", 1)
    run = tmp_path / "run"
    assert aam("pretrain", *words, "--output-dir", run, files=False) == 2
    said = capsys.readouterr().err
    assert rows[3][0] in said and "--allow-missing" in said and not run.exists()
    assert aam("pretrain", *words, "--allow-missing", "--output-dir", run, files=False) == 0
    summary = summary_of(run)
    assert summary["samples_train"] + summary["samples_validation"] == 22
    assert [f["count"] for f in summary["data"] if f["kind"] == "dropped"] == [2]


def test_pitfall_random_splits_leaked_subjects(aam, community, tmp_path, capsys):
    words = ("--metadata-column", "diagnosis", "--max-steps", 1)
    assert aam("finetune", *words, "--output-dir", tmp_path / "leaking") == 0
    assert "use --group-column subject" in capsys.readouterr().err
    assert any("--group-column subject" in w for w in summary_of(tmp_path / "leaking")["warnings"])
    more = ("--group-column", "subject", "--output-dir", tmp_path / "grouped")
    assert aam("finetune", *words, *more) == 0
    assert summary_of(tmp_path / "grouped")["warnings"] == []
    rows = [line.split("\t") for line in community.metadata.read_text().splitlines()[2:]]
    subject = {row[0]: row[1] for row in rows}
    parts = [
        {subject[one] for one in (tmp_path / "grouped" / f"{part}_ids.txt").read_text().split()}
        for part in ("train", "validation")
    ]
    assert parts[0] and parts[1] and not parts[0] & parts[1]
