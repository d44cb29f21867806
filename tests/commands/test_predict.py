"""Predictions: in the user's units, of every sample, with or without metadata."""

import re

import biom
import h5py
import numpy as np
import pandas as pd
import pytest

from aam.data.table import read_table
from aam.errors import InputError
from aam.evaluation.loaded import load

COMPLEMENT = str.maketrans("ACGT", "TGCA")


def read(path) -> pd.DataFrame:
    """A TSV as text, by its first column; no quotes are interpreted."""
    return pd.read_csv(path, sep="\t", dtype=str, quoting=3, keep_default_na=False, index_col=0)


@pytest.fixture(scope="module")
def table(community) -> pd.DataFrame:
    found = read_table(community.table)
    return pd.DataFrame(found.counts.toarray(), found.sample_ids, found.feature_ids)


@pytest.fixture(scope="module")
def metadata(community) -> pd.DataFrame:
    return read(community.metadata).drop("#q2:types").replace("", None)


@pytest.fixture(scope="module")
def age(aam, tmp_path_factory):
    run = tmp_path_factory.mktemp("age") / "run"
    words = ("--metadata-column", "age", "--categorical-columns", "site", "diagnosis")
    more = ("--target-transform", "zscore-category", "--rarefy-depth", 1000, "--allow-missing")
    assert aam("finetune", *words, *more, "--epochs", 4, "--lr", 3e-3, "--output-dir", run) == 0
    return load(run)


@pytest.fixture(scope="module")
def diagnosis(aam, tmp_path_factory):
    run = tmp_path_factory.mktemp("diagnosis") / "run"
    words = ("--metadata-column", "diagnosis", "--epochs", 2, "--output-dir", run)
    assert aam("finetune", *words) == 0
    return load(run)


def test_predictions_are_those_of_the_run_in_the_columns_units(
    age, aam, community, table, metadata, tmp_path, capsys
):
    """Same rarefaction, categories, transform and its inverse as in training."""
    output = tmp_path / "out.tsv"
    words = ("--model", age.run, "--metadata", community.metadata, "--output", output)
    assert aam("predict", *words) == 0
    assert "24 predictions of 'age'" in capsys.readouterr().err
    found, own = read(output).astype(float), read(age.run / "predictions.tsv")
    assert list(own.columns) == ["part", "true", "predicted"]
    assert set(own["part"]) == {"train", "validation"}
    assert list(found.columns) == ["predicted"] and set(found.index) == set(own.index)
    np.testing.assert_allclose(found["predicted"].loc[own.index], own["predicted"].astype(float))
    years = own["true"].astype(float)
    assert abs(found["predicted"].mean() - years.mean()) < 15
    assert found["predicted"].std() > 1  # years, not z-scores
    pd.testing.assert_frame_equal(age.predict(table, metadata), found, rtol=1e-5)
    assert aam("predict", *words) == 2 and "already exists" in capsys.readouterr().err
    assert aam("predict", *words, "--overwrite") == 0


def test_what_is_not_known_of_samples_is_unknown_and_said(age, table, metadata, capsys):
    found = age.predict(table)
    said = capsys.readouterr().err
    assert len(found) == 24
    assert "warning: the model was trained with 'site', 'diagnosis': without --metadata" in said
    assert "24 samples whose 'site' is missing" in said
    blank = pd.DataFrame(None, metadata.index, ["site", "diagnosis"])
    pd.testing.assert_frame_equal(age.predict(table, blank), found)
    assert "warning" not in capsys.readouterr().err
    known = age.predict(table, metadata)
    assert ((found - known).abs() > 0.1).sum().item() > 12
    age.predict(table, metadata.replace("Lima", "Quito"))
    assert "samples whose 'site' is missing or was not in training" in capsys.readouterr().err
    # Samples without a row are an error or unknown, never dropped.
    absent, fewer = metadata.index[:3], metadata[3:]
    with pytest.raises(InputError, match=f"3 of 24 .*{absent[0]}.*--allow-missing"):
        age.predict(table, fewer)
    capsys.readouterr()
    some = age.predict(table, fewer, allow_missing=True)
    assert "3 samples of the table not in the metadata (kept as unknown" in capsys.readouterr().err
    assert len(some) == 24
    np.testing.assert_allclose(some.loc[absent], found.loc[absent], rtol=1e-5)
    np.testing.assert_allclose(some.loc[fewer.index], known.loc[fewer.index], rtol=1e-5)
    with pytest.raises(InputError, match=r"the metadata: ids stand more than once"):
        age.predict(table, pd.concat([metadata, metadata[:1]]))


def test_class_names_with_their_probabilities(diagnosis, table, metadata, capsys):
    found = diagnosis.predict(table, metadata)
    assert "the metadata: not used, the model has no categorical columns" in capsys.readouterr().err
    names = ["colitis", "crohn", "healthy"]
    assert list(found.columns) == ["predicted", *(f"probability_{one}" for one in names)]
    shares = found.iloc[:, 1:]
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-5)
    assert list(shares.idxmax(axis=1)) == [f"probability_{one}" for one in found["predicted"]]


def test_the_order_of_the_tables_rows_and_columns_changes_no_prediction(age, table, metadata):
    mixed = table.sample(frac=1, random_state=0).sample(frac=1, axis=1, random_state=0)
    found, expected = age.predict(mixed, metadata, batch_size=5), age.predict(table, metadata)
    assert list(found.index) == list(mixed.index) != list(expected.index)
    pd.testing.assert_frame_equal(found.loc[expected.index], expected, rtol=1e-4)


def test_how_much_of_the_table_the_model_knows_is_said(diagnosis, table, capsys):
    diagnosis.predict(table)
    said = capsys.readouterr().err
    assert "43 ASVs that the model knows" in said and "1 new ASVs (edits to the nearest" in said
    assert "warning" not in said
    diagnosis.predict(table.rename(columns=lambda one: one.translate(COMPLEMENT)[::-1]))
    said = capsys.readouterr().err
    assert "\n0 ASVs that the model knows" in said
    assert re.search("warning: .*% of the reads are reverse complements of what the model", said)


def test_labels_and_ids_stand_as_they_are_written(aam, table, tmp_path):
    """Numbers as ids, quotes, commas and blanks in labels: letter by letter, never quoted."""
    ids = [f"2538.{1000100 + 10 * n}" for n in range(20)] + ["1e5", "007", 'a"b', "x y"]
    with h5py.File(tmp_path / "t.biom", "w") as file:
        biom.Table(table.T.to_numpy(), list(table.columns), ids).to_hdf5(file, "test")
    labels = ["Crohn's, ileal", 'ulcer 5\' "left"']
    cells = pd.DataFrame({"state": labels * 12}, pd.Index(ids, name="sample-id"))
    cells.to_csv(tmp_path / "m.tsv", sep="\t")  # cells with quotes are quoted, as QIIME 2 has it
    run, output = tmp_path / "run", tmp_path / "out.tsv"
    files = ("--table", tmp_path / "t.biom", "--metadata", tmp_path / "m.tsv")
    words = ("--metadata-column", "state", "--max-steps", 1, "--output-dir", run)
    assert aam("finetune", *files, *words, files=False) == 0
    words = ("--model", run, "--table", tmp_path / "t.biom", "--output", output)
    assert aam("predict", *words, files=False) == 0
    found = read(output)
    assert list(found.columns[1:]) == [f"probability_{one}" for one in sorted(labels)]
    assert list(found.index) == ids and set(found["predicted"]) <= set(labels)
    assert set(read(run / "predictions.tsv")["true"]) == set(labels)
