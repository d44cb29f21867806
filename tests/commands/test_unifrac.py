"""`aam unifrac` by a tree: files, what is dropped, and outputs that cannot be."""

import re

import numpy as np
import pytest

from aam.data.distances import read_distances
from aam.data.table import read_table
from aam.data.tree import read_tree
from aam.data.unifrac import UniFrac


@pytest.fixture
def unifrac(aam, community):
    """Run the command on the community; tree and further options may be given."""

    def run(output, *options, tree=community.tree):
        words = ("--table", community.table, "--tree", tree, "--output", output)
        return aam("unifrac", *words, *options, files=False)

    return run


@pytest.mark.real
@pytest.mark.parametrize("metric", ["unweighted", "weighted-normalized"])
def test_unifrac_of_ibd_equals_ssu(aam, tmp_path, real_data, metric, capsys):
    folder, output = real_data / "ibd", tmp_path / "d.h5"
    table, tree = folder / "table-rarefied-5000.biom", folder / "tree.nwk"
    words = ("--table", table, "--tree", tree, "--metric", metric, "--output", output)
    assert aam("unifrac", *words, files=False) == 0
    ours = read_distances(output)
    ssu = read_distances(folder / f"{metric}-unifrac.h5", sample_ids=ours.sample_ids)
    assert np.abs(ours.matrix - ssu.matrix).max() < 1e-6
    mean_and_sd = "mean 0.6188, sd 0.0921" if metric == "unweighted" else ""  # as published
    said = capsys.readouterr().err
    assert "4615 distinct ASVs" in said
    assert re.search(rf"{metric} of 428 samples: {mean_and_sd}.* \(.* s\)", said)


def test_faith_pd_is_one_value_a_sample(unifrac, community, tmp_path, capsys):
    output = tmp_path / "folder" / "pd.tsv"  # the folder is made
    assert unifrac(output, "--metric", "faith-pd") == 0
    table = read_table(community.table)
    expected = UniFrac(table, read_tree(community.tree)).faith_pd()
    header, *lines = (line.split("\t") for line in output.read_text().splitlines())
    assert header == ["sample-id", "faith_pd"]
    assert [name for name, _ in lines] == list(table.sample_ids)
    np.testing.assert_allclose([float(value) for _, value in lines], expected, rtol=1e-8)
    assert f"mean {expected.mean():.4f}, sd {expected.std():.4f}" in capsys.readouterr().err


def test_rarefaction_and_missing_tips_are_counted(unifrac, community, tmp_path, capsys):
    table, output, tree = read_table(community.table), tmp_path / "d.tsv", tmp_path / "tree.nwk"
    reads = np.asarray(table.counts.sum(axis=1))
    tree.write_text(community.tree.read_text().replace(table.feature_ids[0], "other"))
    options = ("--metric", "weighted", "--rarefy-depth", int(np.median(reads)))
    assert unifrac(output, *options, tree=tree) == 2
    assert "--drop-missing-tips" in capsys.readouterr().err and not output.exists()
    assert unifrac(output, *options, "--drop-missing-tips", tree=tree) == 0
    dropped = int((reads < int(np.median(reads))).sum())
    said = capsys.readouterr().err
    assert dropped and f"dropped: {dropped} samples with fewer than" in said
    assert "dropped: 1 features left out of UniFrac" in said
    assert len(read_distances(output).sample_ids) == 24 - dropped


def test_outputs_are_known_to_be_wrong_before_the_work(unifrac, tmp_path, capsys):
    there, no_tree = tmp_path / "there.h5", tmp_path / "tree.nwk"
    there.write_text("precious")
    no_tree.write_text("no tree")
    for name, metric, problem in (
        ("d.csv", "unweighted", "unknown extension '.csv' for unweighted; write to .h5 or .tsv"),
        ("d.h5", "faith-pd", "unknown extension '.h5' for faith-pd; write to .tsv"),
        ("there.h5", "unweighted", "already exists; choose another --output or use --overwrite"),
    ):
        assert unifrac(tmp_path / name, "--metric", metric, tree=no_tree) == 2
        assert problem in capsys.readouterr().err and there.read_text() == "precious"
    assert unifrac(there, "--overwrite") == 0
    assert len(read_distances(there).sample_ids) == 24
