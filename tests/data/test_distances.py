"""Distance matrices in every format, their checks, and UniFrac of a table as a file."""

import re
import zipfile

import h5py
import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform

import aam.data.distances as distances
from aam.data.distances import compute_unifrac, read_distances, write_distances
from aam.data.phylogeny import UniFrac
from aam.data.simulate import simulate_community
from aam.data.table import read_table
from aam.errors import InputError

IDS = ["10.50", "2", "b", "a", "é"]


@pytest.fixture
def matrix():
    return squareform(pdist(np.random.default_rng(0).random((5, 3))))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return simulate_community(
        tmp_path_factory.mktemp("demo"), samples=12, asvs=40, asvs_per_sample=8, seed=1
    )


def save(path, matrix, ids=IDS):
    """Write a matrix in the format of the extension, however wrong it is."""
    if path.suffix == ".npy":
        np.save(path, matrix)
        path.with_suffix(".ids").write_text("\n".join(ids) + "\n")
        return {"ids_file": path.with_suffix(".ids")}
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["order"] = [one.encode() for one in ids]
            file["matrix"] = matrix
        return {}
    lines = ["\t" + "\t".join(ids)]
    lines += [
        name + "\t" + "\t".join(map(repr, map(float, row)))
        for name, row in zip(ids, matrix, strict=True)
    ]
    text = "\n".join(lines) + "\n"
    if path.suffix == ".qza":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("uuid/metadata.yaml", "uuid: uuid\ntype: DistanceMatrix\n")
            archive.writestr("uuid/data/distance-matrix.tsv", text)
    else:
        path.write_text(text)
    return {}


# ----------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("kind", [".h5", ".tsv", ".qza", ".npy"])
def test_every_format_gives_the_samples_asked_for_in_their_order(tmp_path, matrix, kind):
    path = tmp_path / f"matrix{kind}"
    options = save(path, matrix)
    whole = read_distances(path, **options)
    assert whole.sample_ids == tuple(IDS)
    np.testing.assert_array_equal(whole.all_pairs(), matrix)
    some = read_distances(path, sample_ids=["a", "10.50", "b"], **options)
    rows = [3, 0, 2]
    np.testing.assert_array_equal(some.all_pairs(), matrix[np.ix_(rows, rows)])
    np.testing.assert_array_equal(some.pairwise([2, 0]), matrix[np.ix_([2, 3], [2, 3])])
    np.testing.assert_array_equal(some.cross([1], [0, 2]), matrix[np.ix_([0], [3, 2])])
    assert some.pairwise([0, 1]).dtype == np.float64


def test_samples_missing_in_the_matrix_are_an_error_or_a_counted_fact(tmp_path, matrix):
    path = tmp_path / "matrix.h5"
    save(path, matrix)
    wanted = ["b", "x1", "2", "x2", "x3", "x4"]
    with pytest.raises(InputError) as caught:
        read_distances(path, sample_ids=wanted, table_source="t.biom")
    for fragment in ("4 of 6 samples of t.biom", "'x1', 'x2', 'x3', ...", "--allow-missing"):
        assert fragment in str(caught.value)
    kept = read_distances(path, sample_ids=wanted, allow_missing=True)
    assert kept.sample_ids == ("b", "2")
    assert kept.pairwise([0, 1])[0, 1] == matrix[2, 1]
    assert [fact.count for fact in kept.facts if fact.kind == "dropped"] == [4]
    with pytest.raises(InputError, match="none of the 1 samples"):
        read_distances(path, sample_ids=["x1"], allow_missing=True)


def test_a_npy_matrix_is_never_matched_by_position(tmp_path, matrix):
    path = tmp_path / "matrix.npy"
    np.save(path, matrix)
    with pytest.raises(InputError, match=r"holds no sample ids.*--unifrac-matrix-ids"):
        read_distances(path, sample_ids=IDS)
    (tmp_path / "ids").write_text("\n".join(reversed(IDS)))
    reversed_matrix = read_distances(path, sample_ids=IDS, ids_file=tmp_path / "ids")
    np.testing.assert_array_equal(reversed_matrix.all_pairs(), matrix[::-1, ::-1])
    (tmp_path / "ids").write_text("a\nb\n")
    with pytest.raises(InputError, match="2 sample ids for a matrix of 5 rows"):
        read_distances(path, ids_file=tmp_path / "ids")
    save(tmp_path / "matrix.tsv", matrix)
    with pytest.raises(InputError, match=r"ids are given apart only for \.npy"):
        read_distances(tmp_path / "matrix.tsv", ids_file=tmp_path / "ids")


@pytest.mark.parametrize("kind", [".h5", ".tsv", ".npy"])
@pytest.mark.parametrize(
    ("cells", "value", "problem"),
    [
        ([(1, 2), (2, 1)], np.nan, "2 distances are not a number (NaN): '2' to 'b'"),
        ([(1, 2), (2, 1)], np.inf, "2 distances are infinite: '2' to 'b'"),
        ([(1, 2), (2, 1)], -0.1, "2 distances are negative: '2' to 'b' is -0.1"),
        ([(3, 3)], 1.0, "1 distances are a distance of a sample to itself: 'a' to 'a' is 1"),
        ([(4, 1)], 9.0, "2 distances are not equal in the two directions: '2' to 'é'"),
    ],
)
def test_bad_values_name_the_samples(tmp_path, matrix, kind, cells, value, problem):
    path = tmp_path / f"matrix{kind}"
    for cell in cells:
        matrix[cell] = value
    options = save(path, matrix)
    with pytest.raises(InputError, match=re.escape(problem)) as caught:
        read_distances(path, **options)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    # Samples that are not used are not held against the file.
    if problem.startswith("2"):
        assert len(read_distances(path, sample_ids=["10.50", "b", "a"], **options)) == 3


def test_problems_are_found_beyond_the_first_block(tmp_path, matrix, monkeypatch):
    monkeypatch.setattr(distances, "_CHECKED_ROWS", 2)
    save(tmp_path / "m.h5", matrix)
    np.testing.assert_array_equal(read_distances(tmp_path / "m.h5").all_pairs(), matrix)
    matrix[4, 3] += 0.01
    save(tmp_path / "m.h5", matrix)
    with pytest.raises(InputError, match=r"2 distances are not equal.*'a' to 'é'"):
        read_distances(tmp_path / "m.h5")


def test_rounding_in_a_file_is_no_asymmetry(tmp_path, matrix):
    matrix[1, 0] += 4e-6
    matrix[2, 2] = 4e-6
    save(tmp_path / "m.tsv", matrix)
    assert len(read_distances(tmp_path / "m.tsv")) == 5


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("m.tsv", "\ta\tb\na\t0\t1\nb\t1\n", "row 'b' has 1 values, expected 2"),
        ("m.tsv", "\ta\tb\na\t0\tx\nb\t1\t0\n", "row 'a', column 'b': 'x' is not a number"),
        ("m.tsv", "\ta\tb\na\t0\t\nb\t1\t0\n", "row 'a', column 'b': '' is not a number"),
        ("m.tsv", "\ta\tb\na\t0\t1\nc\t1\t0\n", "not those of the first line"),
        ("m.tsv", "\ta\tb\na\t0\t1\n", "not those of the first line (1 and 2; differing: 'b')"),
        ("m.tsv", "\ta\ta\na\t0\t1\na\t1\t0\n", "1 sample ids stand more than once ('a')"),
        ("m.tsv", "", "the file is empty"),
        ("m.h5", "text", "not a readable HDF5 file"),
        ("m.npy", "text", "not a readable .npy matrix"),
        ("m.csv", "", "unknown extension '.csv'"),
    ],
)
def test_files_that_are_no_matrix(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_text(content)
    ids_file = path if name == "m.npy" else None
    with pytest.raises(InputError, match=re.escape(problem)):
        read_distances(path, ids_file=ids_file)
    with pytest.raises(InputError, match="no such file"):
        read_distances(tmp_path / "none.h5")


def test_hdf5_without_the_datasets_and_arrays_that_are_not_square(tmp_path, matrix):
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["distances"] = matrix
    with pytest.raises(InputError, match=r"no dataset 'order' and 'matrix'.*'distances'"):
        read_distances(tmp_path / "m.h5")
    options = save(tmp_path / "m.npy", matrix[:4])
    with pytest.raises(InputError, match=r"shape \(4, 5\)"):
        read_distances(tmp_path / "m.npy", **options)
    options = save(tmp_path / "m.npy", np.array([["a", "b"], ["c", "d"]]), ["a", "b"])
    with pytest.raises(InputError, match="expected numbers"):
        read_distances(tmp_path / "m.npy", **options)


def test_rows_of_a_tsv_in_another_order_than_its_columns(tmp_path):
    (tmp_path / "m.tsv").write_text("\ta\tb\tc\nc\t2\t3\t0\na\t0\t1\t2\nb\t1\t0\t3\n")
    read = read_distances(tmp_path / "m.tsv")
    assert read.all_pairs().tolist() == [[0, 1, 2], [1, 0, 3], [2, 3, 0]]


# ----------------------------------------------------------------------------------- writing
@pytest.mark.parametrize(("kind", "tolerance"), [(".h5", 1e-7), (".tsv", 1e-8)])
def test_written_matrices_are_read_back(tmp_path, matrix, kind, tolerance):
    path = tmp_path / f"m{kind}"
    write_distances(path, IDS, matrix)
    read = read_distances(path)
    assert read.sample_ids == tuple(IDS)
    np.testing.assert_allclose(read.all_pairs(), matrix, atol=tolerance)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_scikit_bio_reads_the_tsv(tmp_path, matrix):
    from skbio import DistanceMatrix

    write_distances(tmp_path / "m.tsv", IDS, matrix)
    read = DistanceMatrix.read(tmp_path / "m.tsv")
    assert list(read.ids) == IDS
    np.testing.assert_allclose(read.data, matrix, atol=1e-8)


@pytest.mark.real
def test_the_hdf5_layout_is_that_of_ssu(tmp_path, matrix, real_data):
    write_distances(tmp_path / "m.h5", ["a", "b", "c", "d", "e"], matrix)
    with (
        h5py.File(tmp_path / "m.h5") as ours,
        h5py.File(real_data / "ibd" / "unweighted-unifrac.h5") as theirs,
    ):
        for name in ("order", "matrix", "format", "version"):
            assert ours[name].dtype == theirs[name].dtype
            assert ours[name].ndim == theirs[name].ndim
        assert ours["format"][0] == theirs["format"][0]
        assert [one.decode("ascii") for one in ours["order"]] == ["a", "b", "c", "d", "e"]


def test_a_failed_write_leaves_the_previous_file(tmp_path, matrix, monkeypatch):
    path = tmp_path / "m.h5"
    write_distances(path, IDS, matrix)
    before = path.read_bytes()

    def full(partial, *_):
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(distances, "_write_hdf5", full)
    with pytest.raises(InputError, match=r"cannot be written.*No space left"):
        write_distances(path, IDS, matrix * 2)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["m.h5"]


# ------------------------------------------------------------------------------- whole tables
@pytest.mark.real
@pytest.mark.parametrize("metric", ["unweighted", "weighted-normalized"])
def test_unifrac_of_ibd_equals_ssu(tmp_path, real_data, metric):
    folder = real_data / "ibd"
    output = tmp_path / "d.h5"
    summary = compute_unifrac(
        folder / "table-rarefied-5000.biom", folder / "tree.nwk", metric, output
    )
    ours = read_distances(output)
    ssu = read_distances(folder / f"{metric}-unifrac.h5", sample_ids=ours.sample_ids)
    assert np.abs(ours.all_pairs() - ssu.all_pairs()).max() < 1e-6
    assert (summary.samples, summary.features, summary.facts) == (428, 4615, [])
    if metric == "unweighted":  # as published with the data
        assert summary.mean == pytest.approx(0.619, abs=5e-4)
        assert summary.standard_deviation == pytest.approx(0.092, abs=5e-4)
    assert set(summary.seconds) == {"table", "tree", "distances", "write"}


def test_faith_pd_is_one_value_a_sample(tmp_path, demo):
    output = tmp_path / "pd.tsv"
    summary = compute_unifrac(demo.table, demo.tree, "faith-pd", output)
    table = read_table(demo.table)
    expected = UniFrac(table, demo.tree).faith_pd(range(12))
    header, *lines = output.read_text().splitlines()
    assert header == "sample-id\tfaith_pd"
    assert [line.split("\t")[0] for line in lines] == list(table.sample_ids)
    values = [float(line.split("\t")[1]) for line in lines]
    np.testing.assert_allclose(values, expected, rtol=1e-8)
    assert summary.mean == pytest.approx(expected.mean())


def test_rarefaction_and_missing_tips_are_counted(tmp_path, demo):
    table = read_table(demo.table)
    depth = int(np.median(np.asarray(table.counts.sum(axis=1))))
    lost = table.feature_ids[0]
    tree = tmp_path / "tree.nwk"
    tree.write_text(demo.tree.read_text().replace(lost, "other"))
    options = {"rarefy_depth": depth, "drop_missing_tips": True}
    summary = compute_unifrac(demo.table, tree, "weighted", tmp_path / "d.tsv", **options)
    dropped = int((np.asarray(table.counts.sum(axis=1)) < depth).sum())
    assert dropped > 0
    assert [fact.count for fact in summary.facts] == [dropped, 1]
    assert len(read_distances(tmp_path / "d.tsv")) == summary.samples == 12 - dropped
    with pytest.raises(InputError, match="--drop-missing-tips"):
        compute_unifrac(demo.table, tree, "weighted", tmp_path / "e.tsv")
    assert not (tmp_path / "e.tsv").exists()


@pytest.mark.parametrize(
    ("name", "metric", "problem"),
    [
        ("d.csv", "unweighted", "unknown extension '.csv' for unweighted; write to .h5 or .tsv"),
        ("d.h5", "faith-pd", "unknown extension '.h5' for faith-pd; write to .tsv"),
        ("d.h5", "bray", "unknown metric 'bray'"),
        ("none/d.h5", "unweighted", "make it first"),
        ("there.h5", "unweighted", "already there; choose another name or add --overwrite"),
    ],
)
def test_outputs_that_cannot_be_are_known_before_the_work(tmp_path, name, metric, problem):
    (tmp_path / "there.h5").write_text("precious")
    with pytest.raises(InputError, match=re.escape(problem)):
        compute_unifrac("no-table", "no-tree", metric, tmp_path / name)
    assert (tmp_path / "there.h5").read_text() == "precious"


def test_overwrite_replaces_the_output(tmp_path, demo):
    (tmp_path / "d.h5").write_text("old")
    compute_unifrac(demo.table, demo.tree, "unweighted", tmp_path / "d.h5", overwrite=True)
    assert len(read_distances(tmp_path / "d.h5")) == 12
