"""A loaded model on files, BIOM tables and frames, which `aam embed` and `aam unifrac` write."""

import sys
from types import SimpleNamespace

import biom
import h5py
import numpy as np
import pandas as pd
import pytest
from skbio import DistanceMatrix, TreeNode
from skbio.diversity import alpha_diversity, beta_diversity

from aam.data.distances import read_distances
from aam.data.table import read_table
from aam.data.tree import read_tree
from aam.data.unifrac import UniFrac
from aam.errors import InputError
from aam.evaluation.loaded import load
from aam.evaluation.metrics import condensed
from aam.evaluation.placer import unifrac_by_model
from aam.evaluation.unifrac import FUNCTIONS

COMPLEMENT = str.maketrans("ACGT", "TGCA")
DIM = 32


def frame_of(table, rename=str):
    names = [rename(one) for one in table.feature_ids]
    return pd.DataFrame(table.counts.toarray(), table.sample_ids, names)


def write_table(path, frame):
    with h5py.File(path, "w") as file:
        biom.Table(frame.T.to_numpy(), list(frame.columns), list(frame.index)).to_hdf5(file, "test")
    return path


def written(path):
    return pd.read_csv(path, sep="\t", index_col=0, dtype={0: str})


def test_files_biom_tables_and_frames_are_the_same(study, tmp_path):
    frame = frame_of(study.others)
    path = write_table(tmp_path / "table.biom", frame)
    expected = study.model.unifrac(path)
    assert list(expected.index) == list(expected.columns) == list(study.others.sample_ids)
    for table in (str(path), biom.load_table(str(path)), frame, study.others):
        pd.testing.assert_frame_equal(study.model.unifrac(table), expected)
    on_disk = {"on_disk": "always", "index_dir": tmp_path}
    pd.testing.assert_frame_equal(study.model.unifrac(path, **on_disk), expected, atol=1e-9)
    vectors, other = (study.model.embed(path, **one) for one in ({}, on_disk))
    pd.testing.assert_frame_equal(other, vectors, atol=1e-5)
    asvs, other = (study.model.embed(path, asvs=True, **one) for one in ({}, on_disk))
    pd.testing.assert_frame_equal(other.loc[asvs.index], asvs, atol=1e-5)
    with pytest.raises(InputError, match="the table: 1 sample ids stand more than once"):
        study.model.unifrac(pd.concat([frame, frame[:1]]))
    with pytest.raises(InputError, match="the table: holds other than numbers"):
        study.model.unifrac(frame.astype(str).replace("0", "none"))
    with pytest.raises(InputError, match=r"the table: .* counts are not whole numbers"):
        study.model.unifrac(frame / 2)


def test_neither_case_nor_order_changes_distances(study, capsys):
    generator, said, found = np.random.default_rng(0), [], []
    plain = frame_of(study.others)
    mixed = frame_of(study.others, str.lower).sample(frac=1, random_state=1)
    for frame in (plain, mixed[generator.permutation(mixed.columns)]):
        found.append(study.model.unifrac(frame))
        said.append(capsys.readouterr().err)
    order = found[0].index
    np.testing.assert_allclose(found[1].loc[order, order], found[0], atol=1e-5)
    assert said[0] == said[1] and "new ASVs" in said[0]


@pytest.mark.parametrize("metric", FUNCTIONS)
def test_unifrac_of_a_table_that_is_all_known_is_that_of_the_tree(aam, study, tmp_path, metric):
    path = write_table(tmp_path / "known.biom", frame_of(study.known))
    suffix = "tsv" if metric == "faith-pd" else "h5"
    model, tree = (tmp_path / f"{name}.{suffix}" for name in ("model", "tree"))
    words = ("unifrac", "--table", path, "--metric", metric)
    assert aam(*words, "--model", study.run, "--output", model, files=False) == 0
    assert aam(*words, "--tree", study.files.tree, "--output", tree, files=False) == 0
    expected = study.model.unifrac(study.known, metric)
    for output in (model, tree):
        if metric == "faith-pd":
            pd.testing.assert_frame_equal(written(output), expected, rtol=1e-6)
        else:
            distances = read_distances(output)
            assert list(distances.sample_ids) == list(expected.index)
            np.testing.assert_allclose(distances.matrix, expected, atol=1e-6)


def scikit_bio(metric):
    """What stands for the package: it reads the files that it is given."""

    def compute(table, tree, threads=None):
        table = biom.load_table(table)
        counts, names = table.matrix_data.T.toarray().astype(int), table.ids("observation")
        options = {"ids": table.ids(), "tree": TreeNode.read(tree), "taxa": names}
        if metric == "faith-pd":
            return alpha_diversity("faith_pd", counts, **options)
        assert threads >= 1
        kind = "unweighted_unifrac" if metric == "unweighted" else "weighted_unifrac"
        more = {} if metric == "unweighted" else {"normalized": metric == "weighted-normalized"}
        found = beta_diversity(kind, counts, **options, **more)
        return DistanceMatrix(found.data[::-1, ::-1].copy(), found.ids[::-1])  # any order

    return compute


@pytest.mark.parametrize("metric", FUNCTIONS)
def test_the_unifrac_package_gets_what_the_builtin_computation_has(study, monkeypatch, metric):
    package = SimpleNamespace(**{name: scikit_bio(own) for own, name in FUNCTIONS.items()})
    monkeypatch.setitem(sys.modules, "unifrac", package)
    builtin, other = (
        study.model.unifrac(study.others, metric, engine=one) for one in ("builtin", "unifrac")
    )
    pd.testing.assert_frame_equal(other, builtin, atol=1e-6)


@pytest.mark.parametrize("metric", FUNCTIONS)
def test_the_unifrac_package_agrees_where_it_is_installed(study, metric):
    pytest.importorskip("unifrac", reason="the unifrac package is not installed")
    builtin, other = (
        study.model.unifrac(study.others, metric, engine=one) for one in ("builtin", "unifrac")
    )
    np.testing.assert_allclose(other, builtin, atol=1e-5)


def test_the_engine_must_be_installed_and_features_left_out_are_not_handed_over(
    aam, community, monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(sys.modules, "unifrac", None)
    table = read_table(community.table)
    fewer = tmp_path / "fewer.nwk"
    fewer.write_text(community.tree.read_text().replace(table.feature_ids[0], "other"))
    words = ("unifrac", "--tree", fewer, "--drop-missing-tips", "--engine", "unifrac")
    assert aam(*words, "--output", tmp_path / "out.tsv") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--engine unifrac: the package is not installed" in said and "conda install" in said
    package = SimpleNamespace(unweighted=scikit_bio("unweighted"))
    monkeypatch.setitem(sys.modules, "unifrac", package)
    assert aam(*words, "--output", tmp_path / "out.tsv") == 0
    expected = UniFrac(table, read_tree(fewer), drop_missing=True).pairwise()
    np.testing.assert_allclose(read_distances(tmp_path / "out.tsv").matrix, expected, atol=1e-6)


def test_tables_and_options_that_mean_nothing_are_refused(aam, study, tmp_path, capsys):
    turned = frame_of(study.others, lambda one: one.translate(COMPLEMENT)[::-1])
    path = write_table(tmp_path / "turned.biom", turned)
    table = ("--table", study.files.table)
    for words, message in (
        (("unifrac", "--table", path, "--model", study.run), "turn the sequences round"),
        (("embed", "--table", path, "--model", study.run), "turn the sequences round"),
        (("unifrac", *table), "give either --tree or --model"),
        (("unifrac", *table, "--model", study.run, "--tree", path), "either --tree or --model"),
        (("embed", *table, "--model", study.run, "--dimensions", 10**5), "pretraining fitted"),
        (("embed", *table, "--model", study.run, "--asvs", "--dimensions", 8), "is for samples"),
    ):
        assert aam(*words, "--output", tmp_path / "out.tsv", files=False) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out.tsv").exists()
    for name, message in (("out.txt", ".tsv or .npz"), ("turned.biom", "already exists")):
        words = ("embed", *table, "--model", study.run, "--output", tmp_path / name)
        assert aam(*words, files=False) == 2 and message in capsys.readouterr().err
    with pytest.raises(InputError, match="unknown metric 'bray'"):
        study.model.unifrac(study.others, "bray")
    with pytest.raises(InputError, match="rarefy_depth = -5: expected a whole number, at least 0"):
        study.model.embed(study.others, rarefy_depth=-5)
    with pytest.raises(InputError, match="holds a pretrained encoder; predict needs a run of fine"):
        study.model.predict(study.others)


def test_embedded_samples(aam, study, tmp_path):
    frame = study.model.embed(study.table)
    assert list(frame.index) == list(study.table.sample_ids) and frame.index.name == "sample-id"
    faith, vectors = frame["faith_pd"].to_numpy(), frame.loc[:, "e0":].to_numpy()
    assert list(frame.columns[1:]) == [f"e{i}" for i in range(vectors.shape[1])]
    words = ("embed", "--model", study.run, "--table", study.files.table)
    for output in ("all.npz", "all.tsv"):
        assert aam(*words, "--output", tmp_path / output, files=False) == 0
    pd.testing.assert_frame_equal(
        written(tmp_path / "all.tsv"), frame, check_dtype=False, rtol=1e-4, atol=1e-5
    )
    with np.load(tmp_path / "all.npz") as arrays:
        assert arrays["ids"].tolist() == list(frame.index) and arrays["vectors"].dtype == "float32"
        np.testing.assert_array_equal(arrays["faith_pd"], faith)
        np.testing.assert_array_equal(arrays["vectors"], vectors)
    # Faith PD is UniFrac's; the products keep the distances of the other samples, too.
    placer = study.model.placer
    unifrac = unifrac_by_model(study.table, placer.clades, placer.place(study.table.feature_ids))
    np.testing.assert_allclose(faith, unifrac.faith_pd(), rtol=1e-6)
    product = vectors @ vectors.T
    found = 1 - product / (faith[:, None] + faith - product)
    assert np.corrcoef(condensed(found), condensed(unifrac.pairwise()))[0, 1] > 0.95
    for size in (1, 9):
        assert study.model.embed(study.others, dimensions=size).shape == (30, 1 + size)
    rarefied = study.model.embed(study.table, rarefy_depth=500)
    assert len(rarefied) == 60 and rarefied["faith_pd"].mean() < 0.95 * faith.mean()


@pytest.mark.parametrize("part", ["known", "others"])
def test_embedded_asvs(aam, study, tmp_path, part):
    """All known, and known and new ones."""
    table, placer = getattr(study, part), study.model.placer
    frame, placed = study.model.embed(table, asvs=True), placer.place(table.feature_ids)
    assert list(frame.columns[:3]) == ["nearest", "edits", "support"]
    assert list(frame.index) == list(table.feature_ids) and frame.shape[1] == 3 + DIM
    assert list(frame["nearest"]) == [placer.clades.sequences[int(at)] for at in placed.nearest]
    assert (frame["edits"] == 0).all() == (part == "known")
    np.testing.assert_allclose(frame["edits"], placed.distance)
    np.testing.assert_allclose(frame["support"], placed.support, atol=1e-5)
    assert len(frame.loc[:, "e0":].round(5).drop_duplicates()) > 0.9 * len(frame)
    path = write_table(tmp_path / "table.biom", frame_of(table))
    words = ("embed", "--asvs", "--model", study.run, "--table", path)
    for output in ("asvs.npz", "asvs.tsv"):
        assert aam(*words, "--output", tmp_path / output, files=False) == 0
    pd.testing.assert_frame_equal(
        written(tmp_path / "asvs.tsv"), frame, check_dtype=False, rtol=1e-4, atol=1e-5
    )
    with np.load(tmp_path / "asvs.npz") as arrays:
        assert arrays["sequences"].tolist() == list(frame.index)
        assert arrays["nearest"].tolist() == list(frame["nearest"])
        np.testing.assert_array_equal(arrays["edits"], frame["edits"])
        np.testing.assert_array_equal(arrays["vectors"], frame.loc[:, "e0":])


@pytest.mark.parametrize("shape", ["star", "three tips", "one clade"])
def test_trees_with_few_clades_teach_and_place_and_one_without_is_refused(
    aam, tmp_path, capsys, shape
):
    generator = np.random.default_rng(0)
    names = ["".join(generator.choice(list("ACGT"), 40)) for _ in range(6)]
    text = {
        "star": f"({':1,'.join(names)}:1);",
        "three tips": f"(({names[0]}:1,{names[1]}:1):1,{names[2]}:1);",
        "one clade": f"(({names[0]}:1,{names[1]}:1):1,{':1,'.join(names[2:])}:1);",
    }[shape]
    names = names[: text.count(":1") - (shape != "star")]
    (tmp_path / "tree.nwk").write_text(text)
    counts = generator.integers(1, 9, (8, len(names)))
    table = pd.DataFrame(counts, [f"s{at}" for at in range(8)], names)
    path = write_table(tmp_path / "table.biom", table)
    words = ("--table", path, "--tree", tmp_path / "tree.nwk", "--encoder", "wide")
    more = ("--epochs", 1, "--batch-size", 3, "--output-dir", tmp_path / "run")
    code = aam("pretrain", *words, *more, files=False, filling=True)
    if shape == "star":
        assert code == 2 and "no clade to learn" in capsys.readouterr().err
        return
    assert code == 0
    changed = [one[:20] + ("A" if one[20] != "A" else "C") + one[21:] for one in names]
    model = load(tmp_path / "run")
    found = model.unifrac(table.set_axis(changed, axis=1)).to_numpy()
    assert np.isfinite(found).all() and (found[0] < 0.9).all()
    assert len(model.embed(table.set_axis(changed, axis=1))) == 8
    placed = model.placer.place(changed)
    assert placed.usable.all()
    assert [model.placer.clades.sequences[int(at)] for at in placed.nearest] == names
