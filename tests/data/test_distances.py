"""Distances of tables against SciPy and scikit-bio; matrices in files of every format."""

import re
import zipfile

import h5py
import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist, squareform
from skbio import DistanceMatrix
from skbio.stats.composition import clr

from aam.data.distances import read_distances, write_distances
from aam.data.table_distances import TableDistances
from aam.errors import InputError
from tests.data.trees import make_table, random_table

IDS = ["10.50", "2", "b", "a", "é"]
METRICS = ("jaccard", "bray-curtis", "aitchison")


# ----------------------------------------------------------------------------------- of tables
def reference(counts, metric):
    if metric == "jaccard":
        return cdist(counts > 0, counts > 0, "jaccard")
    if metric == "bray-curtis":
        shares = counts / counts.sum(axis=1, keepdims=True)
        return cdist(shares, shares, "braycurtis")
    logs = clr(counts + 1.0)
    return cdist(logs, logs)


@pytest.mark.parametrize("metric", METRICS)
def test_distances_are_those_of_scipy_and_skbio(metric):
    table = random_table(np.random.default_rng(0), 150, [f"f{i}" for i in range(80)])
    table.counts.data[::7] *= 1000  # depths and abundances of very different size
    expected = reference(table.counts.toarray().astype(float), metric)
    found = TableDistances(table, metric)
    np.testing.assert_allclose(found.pairwise(np.arange(150)), expected, atol=1e-9)
    a, b = np.array([3, 3, 129, 0]), np.array([129, 5, 3])
    np.testing.assert_allclose(found.cross(a, b), expected[np.ix_(a, b)], atol=1e-9)
    assert found.cross(a, b)[2, 0] == 0 and found.cross(a, []).shape == (4, 0)


@pytest.mark.parametrize("metric", METRICS)
def test_identical_and_unlike_samples_and_features_of_none(metric):
    counts = np.array([[3, 5, 0, 0], [3, 5, 0, 0], [0, 0, 1, 9], [30, 50, 0, 0]])
    tables = make_table(counts, "ACGT"), make_table(np.pad(counts, ((0, 0), (0, 4))), "ACGTacgt")
    found, wider = (TableDistances(table, metric).pairwise(range(4)) for table in tables)
    assert found[0, 1] == pytest.approx(0, abs=1e-6) and (np.diag(found) == 0).all()
    if metric == "aitchison":  # of reads + 1: depth and features that no sample has are seen
        assert found[0, 3] > 1 and wider[0, 2] != pytest.approx(found[0, 2])
    else:
        assert found[0, 2] == 1 and found[0, 3] == pytest.approx(0)
        np.testing.assert_array_equal(wider, found)


# ------------------------------------------------------------------------------ read from files
@pytest.fixture
def matrix():
    return squareform(pdist(np.random.default_rng(0).random((5, 3))))


def save(path, matrix, ids=IDS):
    """Write a matrix in the format of the extension, however wrong it is."""
    rows = [[name, *map(str, row)] for name, row in zip(ids, matrix.tolist(), strict=False)]
    text = "\n".join("\t".join(row) for row in [["", *ids], *rows]) + "\n"
    if path.suffix == ".npy":
        np.save(path, matrix)
        path.with_suffix(".ids").write_text("\n".join(ids) + "\n")
        return {"ids_file": path.with_suffix(".ids")}
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["order"], file["matrix"] = [one.encode() for one in ids], matrix
    elif path.suffix == ".qza":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("uuid/metadata.yaml", "uuid: uuid\ntype: DistanceMatrix\n")
            archive.writestr("uuid/data/distance-matrix.tsv", text)
    else:
        path.write_text(text)
    return {}


@pytest.mark.parametrize("kind", [".h5", ".tsv", ".qza", ".npy"])
def test_every_format_gives_the_samples_asked_for_in_their_order(tmp_path, matrix, kind):
    path = tmp_path / f"matrix{kind}"
    matrix[1, 0] += 4e-6  # rounding is no asymmetry
    matrix[2, 2] = 4e-6
    options = save(path, matrix)
    whole = read_distances(path, **options)
    assert whole.sample_ids == tuple(IDS)
    np.testing.assert_array_equal(whole.matrix, matrix)
    some = read_distances(path, sample_ids=["a", "10.50", "b"], **options)
    np.testing.assert_array_equal(some.pairwise([2, 0]), matrix[np.ix_([2, 3], [2, 3])])
    np.testing.assert_array_equal(some.cross([1], [0, 2]), matrix[np.ix_([0], [3, 2])])
    assert some.pairwise([0, 1]).dtype == np.float64


def test_samples_missing_in_the_matrix_are_an_error_or_a_counted_fact(tmp_path, matrix):
    path, wanted = tmp_path / "matrix.h5", ["b", "x1", "2", "x2", "x3", "x4"]
    save(path, matrix)
    expected = "4 of 6 samples of t.biom.*'x1', 'x2', 'x3', ....*--allow-missing"
    with pytest.raises(InputError, match=expected):
        read_distances(path, sample_ids=wanted, table_source="t.biom")
    kept = read_distances(path, sample_ids=wanted, allow_missing=True)
    assert kept.sample_ids == ("b", "2") and kept.pairwise([0, 1])[0, 1] == matrix[2, 1]
    assert [fact.count for fact in kept.facts if fact.kind == "dropped"] == [4]
    with pytest.raises(InputError, match="none of the 1 samples"):
        read_distances(path, sample_ids=["x1"], allow_missing=True)


def test_a_npy_matrix_is_never_matched_by_position(tmp_path, matrix):
    path, ids = tmp_path / "matrix.npy", tmp_path / "ids"
    np.save(path, matrix)
    ids.write_text("\n".join(reversed(IDS)))
    found = read_distances(path, sample_ids=IDS, ids_file=ids)
    np.testing.assert_array_equal(found.matrix, matrix[::-1, ::-1])
    with pytest.raises(InputError, match=r"holds no sample ids.*--unifrac-matrix-ids"):
        read_distances(path, sample_ids=IDS)
    save(tmp_path / "matrix.tsv", matrix)
    with pytest.raises(InputError, match=r"ids are given apart only for \.npy"):
        read_distances(tmp_path / "matrix.tsv", ids_file=ids)
    with pytest.raises(InputError, match=r"none: cannot be read .*No such file"):
        read_distances(path, ids_file=tmp_path / "none")


@pytest.mark.parametrize("rows", [2, 512])
@pytest.mark.parametrize(
    ("cells", "value", "problem"),
    [
        ([(1, 2), (2, 1)], np.nan, "2 distances are not a number (NaN): '2' to 'b'"),
        ([(1, 2), (2, 1)], np.inf, "2 distances are infinite: '2' to 'b'"),
        ([(4, 1)], np.inf, "1 distances are infinite: 'é' to '2'"),
        ([(1, 2), (2, 1)], -0.1, "2 distances are negative: '2' to 'b' is -0.1"),
        ([(3, 3)], 1.0, "1 distances are a distance of a sample to itself: 'a' to 'a' is 1"),
        ([(4, 1)], 9.0, "2 distances are not equal in the two directions: '2' to 'é'"),
    ],
)
def test_bad_values_name_the_samples(tmp_path, matrix, monkeypatch, rows, cells, value, problem):
    monkeypatch.setattr("aam.data.distances._CHECKED_ROWS", rows)
    path = tmp_path / "matrix.h5"
    for cell in cells:
        matrix[cell] = value
    save(path, matrix)
    with pytest.raises(InputError, match=re.escape(f"{path}: {problem}")) as caught:
        read_distances(path)
    assert "\n" not in str(caught.value)
    # Samples that are not used are not held against the file.
    if len(cells) == 2:
        assert len(read_distances(path, sample_ids=["10.50", "b", "a"]).sample_ids) == 3


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
        ("m.tsv", b"\xff\xfe", "cannot be read ("),
        ("m.h5", "text", "cannot be read ("),
        ("m.npy", "text", "cannot be read ("),
        ("m.npy", (np.zeros((4, 5)), IDS), "shape (4, 5)"),
        ("m.npy", (np.zeros((5, 5)), "ab"), "2 sample ids for a matrix of 5 rows"),
        ("m.npy", (np.array([["a", "b"], ["c", "d"]]), "ab"), "expected numbers"),
        ("m.csv", "", "unknown extension '.csv'"),
        ("none.h5", None, "no such file"),
    ],
)
def test_files_that_are_no_matrix(tmp_path, name, content, problem):
    path, options = tmp_path / name, {}
    if isinstance(content, tuple):
        options = save(path, *content)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        options = {"ids_file": path} if name == "m.npy" else {}
    with pytest.raises(InputError, match=re.escape(problem)):
        read_distances(path, **options)


def test_hdf5_without_the_datasets_and_a_tsv_whose_rows_stand_otherwise(tmp_path, matrix):
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["distances"] = matrix
    with pytest.raises(InputError, match=r"no dataset 'order' and 'matrix'.*'distances'"):
        read_distances(tmp_path / "m.h5")
    (tmp_path / "m.tsv").write_text("\ta\tb\tc\nc\t2\t3\t0\na\t0\t1\t2\nb\t1\t0\t3\n")
    read = read_distances(tmp_path / "m.tsv")
    assert read.matrix.tolist() == [[0, 1, 2], [1, 0, 3], [2, 3, 0]]


# ------------------------------------------------------------------------------ written to files
@pytest.mark.parametrize(("kind", "tolerance"), [(".h5", 1e-7), (".tsv", 1e-8)])
def test_written_matrices_are_read_back_by_us_and_scikit_bio(tmp_path, matrix, kind, tolerance):
    path = tmp_path / f"m{kind}"
    write_distances(path, IDS, matrix)
    read = read_distances(path)
    assert read.sample_ids == tuple(IDS)
    np.testing.assert_allclose(read.matrix, matrix, atol=tolerance)
    if kind == ".tsv":
        theirs = DistanceMatrix.read(path)
        assert list(theirs.ids) == IDS
        np.testing.assert_allclose(theirs.data, matrix, atol=tolerance)
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):  # a failed write leaves the previous file
        write_distances(path, IDS, np.array([[object()]]))
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.real
def test_the_hdf5_layout_is_that_of_ssu(tmp_path, matrix, real_data):
    write_distances(tmp_path / "m.h5", list("abcde"), matrix)
    theirs = real_data / "ibd" / "unweighted-unifrac.h5"
    with h5py.File(tmp_path / "m.h5") as ours, h5py.File(theirs) as theirs:
        for name in ("order", "matrix", "format", "version"):
            assert ours[name].dtype == theirs[name].dtype and ours[name].ndim == theirs[name].ndim
        assert ours["format"][0] == theirs["format"][0]
        assert [one.decode("ascii") for one in ours["order"]] == list("abcde")
