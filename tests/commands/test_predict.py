"""Predictions: in the user's units, of every sample, with or without metadata."""

import csv
import re

import biom
import h5py
import numpy as np
import pytest

COMPLEMENT = str.maketrans("ACGT", "TGCA")


def table_of(path) -> dict[str, list[str]]:
    """Rows of a TSV by their first cell; no quotes are interpreted."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return {row[0]: row[1:] for row in rows}


def numbers(path) -> dict[str, np.ndarray]:
    skip = 1 if "probability" in path.read_text().splitlines()[0] else 0
    rows = table_of(path)
    del rows["sample-id"]
    return {name: np.array(row[skip:], dtype=float) for name, row in rows.items()}


@pytest.fixture(scope="module")
def age(aam, tmp_path_factory):
    run = tmp_path_factory.mktemp("age") / "run"
    words = ("--metadata-column", "age", "--categorical-columns", "site", "diagnosis")
    more = ("--target-transform", "zscore-category", "--rarefy-depth", 1000, "--allow-missing")
    assert aam("finetune", *words, *more, "--epochs", 4, "--lr", 3e-3, "--output-dir", run) == 0
    return run


@pytest.fixture(scope="module")
def diagnosis(aam, tmp_path_factory):
    run = tmp_path_factory.mktemp("diagnosis") / "run"
    words = ("--metadata-column", "diagnosis", "--epochs", 2, "--output-dir", run)
    assert aam("finetune", *words) == 0
    return run


@pytest.fixture
def predict(aam, tmp_path):
    def run(model, *words, code=0, **options):
        output = tmp_path / "out.tsv"
        output.unlink(missing_ok=True)
        assert aam("predict", "--model", model, "--output", output, *words, **options) == code
        return output

    return run


def test_predictions_are_those_of_the_run_in_the_columns_units(age, community, predict, capsys):
    """Same rarefaction, categories, transform and its inverse as in training."""
    found = numbers(predict(age, "--metadata", community.metadata))
    own = table_of(age / "predictions.tsv")
    assert own.pop("sample-id") == ["part", "true", "predicted"]
    assert own.keys() == found.keys()
    for name, (part, _, predicted) in own.items():
        assert part in ("train", "validation")
        assert found[name] == pytest.approx(float(predicted), abs=1e-3)
    true = np.array([float(row[1]) for row in own.values()])
    values = np.concatenate(list(found.values()))
    assert abs(values.mean() - true.mean()) < 15 and values.std() > 1  # years, not z-scores
    assert "24 predictions of 'age'" in capsys.readouterr().err


def test_without_metadata_every_column_is_unknown_and_a_warning_says_so(
    age, community, predict, capsys, tmp_path
):
    found = numbers(predict(age))
    said = capsys.readouterr().err
    assert len(found) == 24
    assert "warning: the model was trained with 'site', 'diagnosis': without --metadata" in said
    assert "24 samples whose 'site' is missing" in said
    blank = tmp_path / "blank.tsv"
    blank.write_text("sample-id\tsite\tdiagnosis\n" + "".join(f"{one}\t\t\n" for one in found))
    expected = numbers(predict(age, "--metadata", blank))
    assert "warning" not in capsys.readouterr().err
    assert all(found[name] == expected[name] for name in found)
    known = numbers(predict(age, "--metadata", community.metadata))
    assert sum(abs(found[name] - known[name]) > 0.1 for name in found) > 12


def test_samples_without_metadata_are_an_error_or_unknown_never_dropped(
    age, community, predict, capsys, tmp_path
):
    lines = community.metadata.read_text().splitlines()
    fewer = tmp_path / "fewer.tsv"
    fewer.write_text("\n".join([*lines[:2], *lines[5:]]) + "\n")
    absent = [line.split("\t")[0] for line in lines[2:5]]
    output = predict(age, "--metadata", fewer, code=2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and absent[0] in said and "--allow-missing" in said
    assert not output.exists()
    found = numbers(predict(age, "--metadata", fewer, "--allow-missing"))
    assert "3 samples of" in capsys.readouterr().err
    unknown, known = numbers(predict(age)), numbers(predict(age, "--metadata", community.metadata))
    assert len(found) == 24
    for name, value in found.items():
        expected = (unknown if name in absent else known)[name]
        assert value == pytest.approx(expected, rel=1e-5)


def test_a_value_that_training_did_not_have_is_unknown(age, community, predict, capsys, tmp_path):
    other = tmp_path / "other.tsv"
    other.write_text(community.metadata.read_text().replace("Lima", "Quito"))
    predict(age, "--metadata", other)
    assert "samples whose 'site' is missing or was not in training" in capsys.readouterr().err


def test_metadata_that_the_model_has_no_use_for_is_named(diagnosis, community, predict, capsys):
    predict(diagnosis, "--metadata", community.metadata)
    assert "not used, the model has no categorical columns" in capsys.readouterr().err


def test_class_names_with_their_probabilities(diagnosis, predict):
    rows = table_of(predict(diagnosis))
    header = rows.pop("sample-id")
    assert header == ["predicted", *(f"probability_{n}" for n in ("colitis", "crohn", "healthy"))]
    for name, *probabilities in rows.values():
        values = np.array(probabilities, dtype=float)
        assert values.sum() == pytest.approx(1, abs=1e-5)
        assert header[1 + int(values.argmax())] == f"probability_{name}"


def test_the_order_of_the_tables_rows_and_columns_changes_no_prediction(
    diagnosis, community, predict, tmp_path
):
    expected = numbers(predict(diagnosis))
    table = biom.load_table(str(community.table))
    generator = np.random.default_rng(0)
    shuffled = table.sort_order(generator.permutation(table.ids()))
    shuffled = shuffled.sort_order(generator.permutation(table.ids("observation")), "observation")
    with h5py.File(tmp_path / "shuffled.biom", "w") as file:
        shuffled.to_hdf5(file, "test")
    words = ("--table", tmp_path / "shuffled.biom")
    found = numbers(predict(diagnosis, *words, "--batch-size", 5, files=False))
    assert list(found) != list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)


def test_how_much_of_the_table_the_model_knows_is_said(
    diagnosis, community, predict, capsys, tmp_path
):
    predict(diagnosis)
    said = capsys.readouterr().err
    assert "43 ASVs that the model knows" in said and "1 new ASVs (edits to the nearest" in said
    assert "warning" not in said
    table = biom.load_table(str(community.table))
    turned = {one: one.translate(COMPLEMENT)[::-1] for one in table.ids("observation")}
    table.update_ids(turned, "observation")
    with h5py.File(tmp_path / "turned.biom", "w") as file:
        table.to_hdf5(file, "test")
    predict(diagnosis, "--table", tmp_path / "turned.biom", files=False)
    said = capsys.readouterr().err
    assert "\n0 ASVs that the model knows" in said
    assert re.search("warning: .*% of the reads are reverse complements of what the model", said)


def test_labels_and_ids_stand_as_they_are_written(aam, community, tmp_path, predict):
    """Numbers as ids, quotes, commas and blanks in labels: letter by letter, never quoted."""
    table = biom.load_table(str(community.table))
    ids = [f"2538.{1000100 + 10 * n}" for n in range(20)] + ["1e5", "007", 'a"b', "x y"]
    table.update_ids(dict(zip(table.ids(), ids, strict=True)))
    with h5py.File(tmp_path / "t.biom", "w") as file:
        table.to_hdf5(file, "test")
    labels = ["Crohn's, ileal", 'ulcer 5\' "left"']
    rows = [f"{one}\t{labels[n % 2]}" for n, one in enumerate(ids)]
    # In the file a cell with quotes is quoted, by QIIME 2's rules.
    rows = ["\t".join('"' + c.replace('"', '""') + '"' if '"' in c else c for c in row.split("\t"))
            for row in rows]  # fmt: skip
    (tmp_path / "m.tsv").write_text("\n".join(["sample-id\tstate", *rows]) + "\n")
    run = tmp_path / "run"
    files = ("--table", tmp_path / "t.biom", "--metadata", tmp_path / "m.tsv")
    words = ("--metadata-column", "state", "--max-steps", 1, "--output-dir", run)
    assert aam("finetune", *files, *words, files=False) == 0
    rows = table_of(predict(run, "--table", tmp_path / "t.biom", files=False))
    assert rows.pop("sample-id")[1:] == [f"probability_{one}" for one in sorted(labels)]
    assert list(rows) == ids
    assert {row[1] for row in table_of(run / "predictions.tsv").values()} == {"true", *labels}


def test_predict_refuses_an_encoder_and_an_output_that_is_there(
    aam, age, predict, tmp_path, capsys
):
    assert aam("pretrain", "--max-steps", 1, "--output-dir", tmp_path / "pre") == 0
    capsys.readouterr()
    predict(tmp_path / "pre", code=2)
    assert "holds a pretrained encoder; predict needs a run of finetune" in capsys.readouterr().err
    output = predict(age)
    capsys.readouterr()
    assert aam("predict", "--model", age, "--output", output) == 2
    assert "already exists" in capsys.readouterr().err
    assert aam("predict", "--model", age, "--output", output, "--overwrite") == 0
