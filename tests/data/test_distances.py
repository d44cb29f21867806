"""Distances of tables against SciPy and scikit-bio; matrices in files of every format."""

import re
import zipfile

import h5py
import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist, pdist, squareform
from skbio.stats.composition import clr

import aam.data.distances as distances
from aam.data.distances import read_distances, write_distances
from aam.data.table_distances import TableDistances, bray_curtis, jaccard
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
    found = TableDistances(make_table(counts, "ACGT"), metric).pairwise(range(4))
    wide = make_table(np.pad(counts, ((0, 0), (0, 4))), "ACGTacgt")
    wider = TableDistances(wide, metric).pairwise(range(4))
    assert found[0, 1] == pytest.approx(0, abs=1e-6) and (np.diag(found) == 0).all()
    if metric == "aitchison":  # of reads + 1: depth and features that no sample has are seen
        assert found[0, 3] > 1 and wider[0, 2] != pytest.approx(found[0, 2])
    else:
        assert found[0, 2] == 1 and found[0, 3] == pytest.approx(0)
        np.testing.assert_array_equal(wider, found)


@pytest.mark.parametrize("metric", [jaccard, bray_curtis])
def test_empty_samples_are_alike_and_stored_zeros_are_no_features(metric):
    counts = csr_array(np.array([[1, 1, 1], [1, 1, 1], [1, 2, 1]]))
    counts.data[:] = [0, 0, 0, 0, 0, 0, 1, 0, 1]
    np.testing.assert_allclose(metric(counts), [[0, 0, 1], [0, 0, 1], [1, 1, 0]])
    np.testing.assert_allclose(metric(counts, counts[:2]), [[0, 0], [0, 0], [1, 1]])
    assert counts.nnz == 9  # the caller's table is left as it was


# ------------------------------------------------------------------------------ read from files
@pytest.fixture
def matrix():
    return squareform(pdist(np.random.default_rng(0).random((5, 3))))


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
    rows = [[name, *map(repr, map(float, row))] for name, row in zip(ids, matrix, strict=True)]
    text = "\n".join("\t".join(row) for row in [["", *ids], *rows]) + "\n"
    if path.suffix == ".qza":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("uuid/metadata.yaml", "uuid: uuid\ntype: DistanceMatrix\n")
            archive.writestr("uuid/data/distance-matrix.tsv", text)
    else:
        path.write_text(text)
    return {}


@pytest.mark.parametrize("kind", [".h5", ".tsv", ".qza", ".npy"])
def test_every_format_gives_the_samples_asked_for_in_their_order(tmp_path, matrix, kind):
    path = tmp_path / f"matrix{kind}"
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
    with pytest.raises(InputError, match=r"holds no sample ids.*--unifrac-matrix-ids"):
        read_distances(path, sample_ids=IDS)
    ids.write_text("\n".join(reversed(IDS)))
    found = read_distances(path, sample_ids=IDS, ids_file=ids)
    np.testing.assert_array_equal(found.matrix, matrix[::-1, ::-1])
    ids.write_text("a\nb\n")
    with pytest.raises(InputError, match="2 sample ids for a matrix of 5 rows"):
        read_distances(path, ids_file=ids)
    save(tmp_path / "matrix.tsv", matrix)
    with pytest.raises(InputError, match=r"ids are given apart only for \.npy"):
        read_distances(tmp_path / "matrix.tsv", ids_file=ids)


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
    monkeypatch.setattr(distances, "_CHECKED_ROWS", rows)
    path = tmp_path / "matrix.h5"
    save(path, matrix)
    np.testing.assert_array_equal(read_distances(path).matrix, matrix)
    for cell in cells:
        matrix[cell] = value
    save(path, matrix)
    with pytest.raises(InputError, match=re.escape(f"{path}: {problem}")) as caught:
        read_distances(path)
    assert "\n" not in str(caught.value)
    # Samples that are not used are not held against the file.
    if len(cells) == 2:
        assert len(read_distances(path, sample_ids=["10.50", "b", "a"]).sample_ids) == 3


def test_rounding_in_a_file_is_no_asymmetry(tmp_path, matrix):
    matrix[1, 0] += 4e-6
    matrix[2, 2] = 4e-6
    save(tmp_path / "m.tsv", matrix)
    assert len(read_distances(tmp_path / "m.tsv").sample_ids) == 5


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
        ("m.h5", "text", "cannot be read (Unable"),
        ("m.npy", "text", "cannot be read ("),
        ("m.csv", "", "unknown extension '.csv'"),
        ("none.h5", None, "no such file"),
    ],
)
def test_files_that_are_no_matrix(tmp_path, name, content, problem):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=re.escape(problem)):
        read_distances(path, ids_file=path if name == "m.npy" else None)


def test_hdf5_without_the_datasets_and_arrays_that_are_not_square(tmp_path, matrix):
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["distances"] = matrix
    with pytest.raises(InputError, match=r"no dataset 'order' and 'matrix'.*'distances'"):
        read_distances(tmp_path / "m.h5")
    for values, ids, problem in (
        (matrix[:4], IDS, r"shape \(4, 5\)"),
        (np.array([["a", "b"], ["c", "d"]]), ["a", "b"], "expected numbers"),
    ):
        options = save(tmp_path / "m.npy", values, ids)
        with pytest.raises(InputError, match=problem):
            read_distances(tmp_path / "m.npy", **options)


def test_rows_of_a_tsv_in_another_order_than_its_columns(tmp_path):
    (tmp_path / "m.tsv").write_text("\ta\tb\tc\nc\t2\t3\t0\na\t0\t1\t2\nb\t1\t0\t3\n")
    read = read_distances(tmp_path / "m.tsv")
    assert read.matrix.tolist() == [[0, 1, 2], [1, 0, 3], [2, 3, 0]]


# ------------------------------------------------------------------------------ written to files
@pytest.mark.parametrize(("kind", "tolerance"), [(".h5", 1e-7), (".tsv", 1e-8)])
def test_written_matrices_are_read_back_by_us_and_scikit_bio(tmp_path, matrix, kind, tolerance):
    from skbio import DistanceMatrix

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
