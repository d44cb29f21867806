"""Feature tables: four file formats read to the same counts, rarefaction, and bad files."""

import dataclasses
import gzip
import json
import time
import zipfile

import biom
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from aam.data.dataset import SampleDataset
from aam.data.table import FeatureTable, rarefy, read_table
from aam.errors import InputError

SAMPLES = ("2538.1000102", "10", "10.0")
FEATURES = ("ACGT", "TTGCA", "GGG", "CATCAT")
COUNTS = np.array([[5, 0, 1, 0], [0, 2, 0, 7], [3, 3, 0, 1]])  # (samples, features)
HASHED = ("aa1", "bb2", "cc3", "dd4")
KINDS = ["hdf5", "json", "dense", "gzip", "qza", "tsv"]


def as_json(samples, features, counts, dense=False):
    by_feature = np.asarray(counts).T
    sparse = [[int(r), int(c), by_feature[r, c].item()] for r, c in np.argwhere(by_feature)]
    return json.dumps(
        {
            "format": "Biological Observation Matrix 1.0.0",
            "matrix_type": "dense" if dense else "sparse",
            "shape": list(by_feature.shape),
            "rows": [{"id": one, "metadata": None} for one in features],
            "columns": [{"id": one, "metadata": None} for one in samples],
            "data": by_feature.tolist() if dense else sparse,
        }
    ).encode()


def write(folder, kind="hdf5", samples=SAMPLES, features=FEATURES, counts=COUNTS):
    """A table as a file of some kind."""
    path = folder / {"qza": "table.qza", "tsv": "table.tsv"}.get(kind, "table.biom")
    if kind == "hdf5":
        table = biom.Table(np.asarray(counts, dtype=float).T, list(features), list(samples))
        with h5py.File(path, "w") as file:
            table.to_hdf5(file, "test")
    elif kind == "qza":
        content = write(folder, "hdf5", samples, features, counts).read_bytes()
        write_qza(path, content)
    elif kind == "tsv":
        rows = ["\t".join(map(str, (name, *row))) for name, row in
                zip(features, np.asarray(counts).T, strict=True)]  # fmt: skip
        path.write_text("\n".join(["# from biom", "\t".join(["#OTU ID", *samples]), *rows, ""]))
    else:
        content = as_json(samples, features, counts, dense=kind == "dense")
        path.write_bytes(gzip.compress(content) if kind == "gzip" else content)
    return path


def write_qza(path, content, member="data/feature-table.biom", kind="FeatureTable[Frequency]"):
    root = "0d2b2cbd-8ba1-4b2c-8c7e-0a1b2c3d4e5f"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/metadata.yaml", f"uuid: {root}\ntype: {kind}\nformat: x\n")
        archive.writestr(f"{root}/{member}", content)


def error_of(call, *arguments, **options):
    """The one line that the call refuses its input with."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


# ------------------------------------------------------------------------------------- formats
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_table(tmp_path, kind):
    table = read_table(write(tmp_path, kind))
    assert table.sample_ids == SAMPLES
    assert table.feature_ids == FEATURES
    assert table.counts.dtype == np.int64 and table.counts.has_sorted_indices
    assert (table.counts.data != 0).all()
    np.testing.assert_array_equal(table.counts.toarray(), COUNTS)


def test_json_by_biom_format_and_ids_that_are_numbers(tmp_path):
    path = tmp_path / "table.biom"
    path.write_text(biom.Table(COUNTS.T, FEATURES, SAMPLES).to_json("test"))
    np.testing.assert_array_equal(read_table(path).counts.toarray(), COUNTS)
    path.write_bytes(as_json(("2538.1000102", 10.5, "10.0"), FEATURES, COUNTS))
    assert read_table(path).sample_ids == ("2538.1000102", "10.5", "10.0")


def test_lower_case_ids_become_upper_case_and_absent_features_go(tmp_path):
    features = ("acgt", "ttgca", "gGg", "CATCAT")
    table = read_table(write(tmp_path, features=features, counts=COUNTS * [1, 1, 0, 1]))
    assert table.feature_ids == ("ACGT", "TTGCA", "CATCAT")
    np.testing.assert_array_equal(table.counts.toarray(), COUNTS[:, [0, 1, 3]])


def test_tsv_with_samples_as_rows_and_with_taxonomy(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("sample\tACGT\tTTGCA\n10\t5\t0\n10.0\t1\t2.0\n")
    table = read_table(path)
    assert table.sample_ids == ("10", "10.0")
    np.testing.assert_array_equal(table.counts.toarray(), [[5, 0], [1, 2]])
    path.write_text('#OTU ID\t10\ttaxonomy\nACGT\t3\t"k__Bacteria; p__"\nTT\t4\tk__Archaea\n')
    table = read_table(path)
    assert table.sample_ids == ("10",) and table.feature_ids == ("ACGT", "TT")
    np.testing.assert_array_equal(table.counts.toarray(), [[3, 4]])


# ----------------------------------------------------------------------------------- bad files
@pytest.mark.parametrize("kind", ["hdf5", "json", "tsv"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [(-2, "negative"), (0.25, "whole numbers"), (np.nan, "not numbers"), (np.inf, "not numbers")],
)
def test_counts_that_are_no_counts(tmp_path, kind, value, expected):
    counts = COUNTS.astype(float)
    counts[1, 1] = value
    message = error_of(read_table, write(tmp_path, kind, counts=counts))
    assert expected in message and "'10'" in message and "1 counts" in message


@pytest.mark.parametrize("kind", ["hdf5", "json", "tsv"])
@pytest.mark.parametrize(("rows", "columns"), [(3, 0), (0, 4), (3, 4)])
def test_empty_tables(tmp_path, kind, rows, columns):
    counts = np.zeros((rows, columns), dtype=int)
    path = write(tmp_path, kind, SAMPLES[:rows], FEATURES[:columns], counts)
    expected = f"empty ({rows} samples, {columns} features"
    if kind == "tsv" and not rows:
        expected = "no header with tabs"
    assert expected in error_of(read_table, path)


@pytest.mark.parametrize("kind", ["json", "tsv", "hdf5"])
@pytest.mark.parametrize("axis", ["sample", "feature"])
def test_duplicate_ids_are_named(tmp_path, kind, axis):
    path = write(tmp_path, kind, samples=("S1", "S2", "S3"))
    old, new = ("S3", "S1") if axis == "sample" else ("GGG", "ACGT")
    if kind == "hdf5":
        with h5py.File(path, "a") as file:
            file["sample/ids" if axis == "sample" else "observation/ids"][2] = new
    else:
        path.write_text(path.read_text().replace(old, new))
    message = error_of(read_table, path)
    assert f"1 {axis} ids stand more than once ('{new}')" in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.biom", b"", "file is empty"),
        ("t.biom", b"<!DOCTYPE html><html>404</html>", "web page"),
        ("t.biom", b"#OTU ID\tS1\nACGT\t5\n", "text is a .tsv"),
        ("t.biom", b'{"id": "x", "rows": [', "truncated"),
        ("t.biom", b'{"name": "not biom"}', "BIOM 1.0"),
        ("t.biom", b"\x1f\x8bgarbage", "gzip"),
        ("t.tsv", b"no tabs here\nACGT 5\n", "no header with tabs"),
        ("t.tsv", b"#OTU ID\tS1\tS2\nACGT\t1\n", "line 2 has 2 cells, the header has 3"),
        ("t.tsv", b"#OTU ID\tS1\tS2\nACGT\t1\t2\t3\n", "line 2 has 4 cells, the header has 3"),
        ("t.tsv", b"#OTU ID\tS1\tS2\nACGT\t1\tmany\n", "row 'ACGT', column 'S2': 'many'"),
        ("t.tsv", b"#OTU ID\tS1\tS2\nACGT\t1\t\n", "column 'S2': '' is no count"),
        ("t.tsv", b"#OTU ID\tS1\nACGT\t\xff\n", "is no readable text"),
        ("t.xlsx", b"PK", "unknown extension '.xlsx'"),
        ("t.qza", b"plain", "is no readable .qza"),
    ],
)
def test_files_that_are_no_tables(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    message = error_of(read_table, path)
    assert expected in message and message.startswith(str(path))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.99])
def test_truncated_hdf5(tmp_path, share):
    path = write(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "truncated" in error_of(read_table, path)


def test_files_that_are_missing_or_of_another_kind(tmp_path):
    path = tmp_path / "distances.biom"
    with h5py.File(path, "w") as file:
        file["matrix"], file["order"] = np.zeros((2, 2)), [b"a", b"b"]
    assert "holds 'matrix', 'order'" in error_of(read_table, path)
    assert "no such file" in error_of(read_table, tmp_path / "absent.biom")
    assert "is a folder" in error_of(read_table, tmp_path)


def test_qza_that_holds_no_table_or_is_cut(tmp_path):
    path = tmp_path / "table.qza"
    write_qza(path, ">a\nACGT\n", "data/dna-sequences.fasta", "FeatureData[Sequence]")
    message = error_of(read_table, path)
    assert "holds FeatureData[Sequence], expected FeatureTable[Frequency]" in message
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")
    assert "no QIIME 2 artifact" in error_of(read_table, path)
    content = write(tmp_path, "qza").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "is no readable .qza" in error_of(read_table, path)


# --------------------------------------------------------------------------- which are sequences
@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (("1d41d8cd98f0", "2d41d8cd98f0", "3d41d8cd98f0", "4d41d8cd98f0"),
         "4 of 4 feature ids are not DNA ('1d41d8cd98f0', '2d41d8cd98f0', '3d41d8cd98f0', ...)"),
        (("4479944", "ACGT", "GGG", "193"), "2 of 4 feature ids are not DNA ('4479944', '193')"),
        (("4479944", "ACGT", "GGG", "193"), "--sequences rep-seqs.fasta or .qza"),
        (("ACGTACGTACGN", "TTGCA", "GGG", "CATCAT"), "1 sequences hold 'N'"),
        (("ACGT", "acgt", "GGG", "CATCAT"), "1 features repeat another's sequence"),
        (("ACGT", "acgt", "GGG", "CATCAT"), "('acgt')"),
    ],
)  # fmt: skip
def test_ids_that_are_no_distinct_sequences(tmp_path, features, expected):
    assert expected in error_of(read_table, write(tmp_path, features=features))


@pytest.mark.parametrize("suffix", [".fasta", ".qza"])
def test_hashed_ids_get_their_sequences(tmp_path, suffix):
    fasta = "".join(
        f">{name} of the study\n{one[:2].lower()}\n{one[2:]}\n"
        for name, one in zip(HASHED[::-1], FEATURES[::-1], strict=True)
    )
    path = tmp_path / f"rep-seqs{suffix}"
    if suffix == ".qza":
        write_qza(path, fasta, "data/dna-sequences.fasta", "FeatureData[Sequence]")
    else:
        path.write_text(fasta)
    read = read_table(write(tmp_path, features=HASHED), sequences=path)
    assert read.feature_ids == FEATURES
    np.testing.assert_array_equal(read.counts.toarray(), COUNTS)


@pytest.mark.parametrize(
    ("fasta", "expected"),
    [
        (None, "no such file"),
        (b">aa1\nACGT\n>cc3\nGG\n", "no sequence for 2 of 4 features"),
        (b">aa1\nACGT\n>cc3\nGG\n", "('bb2', 'dd4')"),
        (b">aa1\nACGT\n>bb2\nACNT\n>cc3\nAAU\n>dd4\nA-C\n", "3 sequences hold '-', 'N', 'U'"),
        (b">aa1\nACGT\n>bb2\nacgt\n>cc3\nA\n>dd4\nC\n", "repeat another's sequence"),
        (b">aa1\nACGT\n>aa1\nC\n", "'aa1' stands twice"),
        (b"@fastq\nACGT\n", "line 1 is not FASTA"),
        (b"", "holds no sequences"),
        (b">\nACGT\n", "no id after '>'"),
        (b"\xff\xfe\x00", "cannot be read as FASTA"),
    ],
)
def test_fasta_that_does_not_serve(tmp_path, fasta, expected):
    path = tmp_path / "rep-seqs.fasta"
    if fasta is not None:
        path.write_bytes(fasta)
    table = write(tmp_path, features=HASHED)
    assert expected in error_of(read_table, table, sequences=path)


# --------------------------------------------------------------------- selection and rarefaction
def small_table(counts):
    counts = np.asarray(counts)
    bases = ["".join("ACGT"[n // 4**k % 4] for k in range(6)) for n in range(counts.shape[1])]
    names = tuple(f"s{n}" for n in range(len(counts)))
    return FeatureTable(names, tuple(bases), sp.csr_array(counts), "small")


def test_select_orders_samples_and_drops_absent_features():
    table = small_table([[1, 0, 2], [0, 4, 0], [5, 0, 0]])
    chosen = table.select(["s2", "s0"])
    assert chosen.sample_ids == ("s2", "s0")
    assert chosen.feature_ids == (table.feature_ids[0], table.feature_ids[2])
    np.testing.assert_array_equal(chosen.counts.toarray(), [[5, 0], [1, 2]])


def test_a_digest_stands_for_samples_sequences_and_counts_in_any_order_of_these():
    table = small_table([[1, 0, 2], [0, 4, 0]])
    turned = dataclasses.replace(
        table, feature_ids=table.feature_ids[::-1], counts=sp.csr_array([[2, 0, 1], [0, 4, 0]])
    )
    assert turned.digest() == table.digest()
    for name, value in (
        ("sample_ids", ("s0", "other")),
        ("feature_ids", ("AAAAAA", "CAAAAA", "GAAAAT")),
        ("feature_ids", ("A", "AAAAACAAAAA", "GAAAAA")),
        ("counts", sp.csr_array([[1, 0, 2], [0, 5, 0]])),
    ):
        assert dataclasses.replace(table, **{name: value}).digest() != table.digest()


def test_rarefied_counts_are_drawn_without_replacement():
    counts = np.random.default_rng(1).integers(0, 40, (6, 30))
    counts[4] = 0
    counts[4, 3] = 9
    table = small_table(counts)
    drawn, dropped = rarefy(table, 50, seed=3)
    assert dropped == ("s4",) and drawn.sample_ids == ("s0", "s1", "s2", "s3", "s5")
    assert (drawn.counts.sum(axis=1) == 50).all()
    column = [table.feature_ids.index(one) for one in drawn.feature_ids]
    assert (drawn.counts.toarray() <= counts[[0, 1, 2, 3, 5]][:, column]).all()
    assert (drawn.counts.data > 0).all() and drawn.counts.has_sorted_indices
    np.testing.assert_array_equal(table.counts.toarray(), counts)
    exact, _ = rarefy(small_table([[3, 4, 0]]), 7, seed=0)
    assert sorted(exact.counts.data) == [3, 4]
    message = error_of(rarefy, small_table([[3, 4], [9, 0]]), 10, seed=0)
    assert "every one of 2 samples" in message and "largest has 9" in message


def test_rarefaction_has_the_hypergeometric_mean_and_variance():
    table = small_table(np.tile([60, 30, 10], (4000, 1)))
    drawn = rarefy(table, 20, seed=0)[0]
    drawn = drawn.counts.toarray()[:, [drawn.feature_ids.index(one) for one in table.feature_ids]]
    share = np.array([0.6, 0.3, 0.1])
    np.testing.assert_allclose(drawn.mean(axis=0), 20 * share, atol=0.1)
    variance = 20 * share * (1 - share) * (100 - 20) / (100 - 1)
    np.testing.assert_allclose(drawn.var(axis=0), variance, rtol=0.08)


def test_rarefaction_depends_on_seed_not_on_order():
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 30, (8, 25))
    table = small_table(counts)
    first = rarefy(table, 60, seed=5)[0]
    rows, columns = generator.permutation(8), generator.permutation(25)
    shuffled = FeatureTable(
        tuple(table.sample_ids[row] for row in rows),
        tuple(table.feature_ids[column] for column in columns),
        sp.csr_array(counts[rows][:, columns]),
        "shuffled",
    )
    second = rarefy(shuffled, 60, seed=5)[0]
    assert second.select(first.sample_ids).digest() == first.digest()
    assert rarefy(table, 60, seed=6)[0].digest() != first.digest()


# ----------------------------------------------------------------------------------- real tables
@pytest.mark.real
def test_real_tables_have_their_known_sizes(real_data):
    table = read_table(real_data / "ibd" / "table.biom")
    assert table.counts.shape == (470, 10099) and table.counts.nnz == 82724
    assert "2538.1000102" in table.sample_ids
    rarefied, dropped = rarefy(table, 5000, seed=0)
    assert len(rarefied.sample_ids) == 428 and len(dropped) == 42
    assert (rarefied.counts.sum(axis=1) == 5000).all()
    theirs = read_table(real_data / "ibd" / "table-rarefied-5000.biom")
    assert set(theirs.sample_ids) == set(rarefied.sample_ids)
    # Two random draws of the same reads have nearly the same richness.
    assert abs(rarefied.counts.nnz / theirs.counts.nnz - 1) < 0.08


@pytest.mark.real
def test_reading_rarefying_and_tokenising_oral_takes_a_moment(real_data):
    path = real_data / "oral" / "table-rarefied-1000.biom"
    start = time.process_time()
    table, _ = rarefy(read_table(path), 900, seed=0)
    assert len(SampleDataset(table)) == 2537
    assert time.process_time() - start < 3.0
