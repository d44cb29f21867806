"""Feature tables: four file formats read to the same counts, rarefaction, and bad files."""

import gzip
import json
import time
import zipfile

import biom
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from aam.data.table import FeatureTable, rarefy, read_table
from aam.errors import InputError

SAMPLES = ("2538.1000102", "10", "10.0")
FEATURES = ("ACGT", "TTGCA", "GGG", "CATCAT")
COUNTS = np.array([[5, 0, 1, 0], [0, 2, 0, 7], [3, 3, 0, 1]])  # (samples, features)


def as_biom(samples=SAMPLES, features=FEATURES, counts=COUNTS):
    return biom.Table(np.asarray(counts, dtype=float).T, list(features), list(samples))


def write_hdf5(path, **parts):
    with h5py.File(path, "w") as file:
        as_biom(**parts).to_hdf5(file, "test")
    return path


def write_json(path, samples=SAMPLES, features=FEATURES, counts=COUNTS, dense=False):
    by_feature = np.asarray(counts).T
    places = zip(*np.nonzero(by_feature), strict=True)
    sparse = [[int(row), int(column), by_feature[row, column].item()] for row, column in places]
    document = {
        "format": "Biological Observation Matrix 1.0.0",
        "type": "OTU table",
        "matrix_type": "dense" if dense else "sparse",
        "matrix_element_type": "int",
        "shape": list(by_feature.shape),
        "rows": [{"id": one, "metadata": None} for one in features],
        "columns": [{"id": one, "metadata": None} for one in samples],
        "data": by_feature.tolist() if dense else sparse,
    }
    path.write_text(json.dumps(document))
    return path


def write_tsv(path, samples=SAMPLES, features=FEATURES, counts=COUNTS):
    lines = ["# Constructed from biom file", "\t".join(["#OTU ID", *samples])]
    lines += [
        "\t".join([name, *map(str, row)])
        for name, row in zip(features, np.asarray(counts).T, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_qza(path, content, member="data/feature-table.biom", kind="FeatureTable[Frequency]"):
    root = "0d2b2cbd-8ba1-4b2c-8c7e-0a1b2c3d4e5f"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/metadata.yaml", f"uuid: {root}\ntype: {kind}\nformat: x\n")
        archive.writestr(f"{root}/{member}", content)
    return path


def write_any(folder, kind, **parts):
    if kind == "hdf5":
        return write_hdf5(folder / "table.biom", **parts)
    if kind == "json":
        return write_json(folder / "table.biom", **parts)
    if kind == "qza":
        content = write_hdf5(folder / "inner.biom", **parts).read_bytes()
        return write_qza(folder / "table.qza", content)
    return write_tsv(folder / "table.tsv", **parts)


def error_of(call, *arguments, **options):
    """Return the one line that the call refuses its input with."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


FORMATS = pytest.mark.parametrize("kind", ["hdf5", "json", "qza", "tsv"])


@FORMATS
def test_every_format_gives_the_same_table(tmp_path, kind):
    table = read_table(write_any(tmp_path, kind))
    assert table.sample_ids == SAMPLES
    assert table.feature_ids == FEATURES
    assert table.counts.dtype == np.int64 and table.counts.has_sorted_indices
    assert (table.counts.data != 0).all()
    np.testing.assert_array_equal(table.counts.toarray(), COUNTS)


def test_json_by_biom_format_and_dense_json(tmp_path):
    path = tmp_path / "table.biom"
    path.write_text(as_biom().to_json("test"))
    np.testing.assert_array_equal(read_table(path).counts.toarray(), COUNTS)
    np.testing.assert_array_equal(read_table(write_json(path, dense=True)).counts.toarray(), COUNTS)


def test_gzipped_json_is_read(tmp_path):
    path = write_json(tmp_path / "table.biom")
    path.write_bytes(gzip.compress(path.read_bytes()))
    np.testing.assert_array_equal(read_table(path).counts.toarray(), COUNTS)


def test_lower_case_ids_become_upper_case_and_absent_features_go(tmp_path):
    features = ("acgt", "ttgca", "gGg", "CATCAT")
    counts = COUNTS * [1, 1, 0, 1]
    table = read_table(write_hdf5(tmp_path / "t.biom", features=features, counts=counts))
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


@FORMATS
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (-2, "negative"),
        (0.25, "whole numbers"),
        (float("nan"), "not numbers"),
        (float("inf"), "not numbers"),
    ],
)
def test_counts_that_are_no_counts(tmp_path, kind, value, expected):
    counts = COUNTS.astype(float)
    counts[1, 1] = value
    message = error_of(read_table, write_any(tmp_path, kind, counts=counts))
    assert expected in message and "'10'" in message and "1 counts" in message


@FORMATS
@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (3, 4)])
def test_empty_tables(tmp_path, kind, shape):
    samples, features = SAMPLES[: shape[0]], FEATURES[: shape[1]]
    path = write_any(
        tmp_path, kind, samples=samples, features=features, counts=np.zeros(shape, dtype=int)
    )
    expected = f"empty ({shape[0]} samples, {shape[1]} features"
    if kind == "tsv" and not samples:
        expected = "no header with tabs"
    assert expected in error_of(read_table, path)


@pytest.mark.parametrize("kind", ["json", "tsv", "hdf5"])
@pytest.mark.parametrize("axis", ["sample", "feature"])
def test_duplicate_ids_are_named(tmp_path, kind, axis):
    names = ("S1", "S2", "S3"), ("ACGT", "TTGCA", "GGG", "CATCAT")
    path = write_any(tmp_path, kind, samples=names[0], features=names[1])
    old, new = ("S3", "S1") if axis == "sample" else ("GGG", "ACGT")
    if kind == "hdf5":
        with h5py.File(path, "a") as file:
            ids = file["sample/ids" if axis == "sample" else "observation/ids"]
            ids[2] = new
    else:
        path.write_text(path.read_text().replace(old, new))
    message = error_of(read_table, path)
    assert f"1 {axis} ids stand more than once ('{new}')" in message


def test_ids_equal_but_for_case(tmp_path):
    features = ("ACGT", "acgt", "GGG", "CATCAT")
    message = error_of(read_table, write_hdf5(tmp_path / "t.biom", features=features))
    assert "1 features repeat" in message and "'acgt'" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "file is empty"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"#OTU ID\tS1\nACGT\t5\n", "text is a .tsv"),
        (b'{"id": "x", "rows": [', "truncated"),
        (b'{"name": "not biom"}', "BIOM 1.0"),
        (b"\x1f\x8bgarbage", "gzip"),
    ],
)
def test_files_that_are_no_biom(tmp_path, content, expected):
    path = tmp_path / "table.biom"
    path.write_bytes(content)
    message = error_of(read_table, path)
    assert expected in message and message.startswith(str(path))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.99])
def test_truncated_hdf5(tmp_path, share):
    path = write_hdf5(tmp_path / "table.biom")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "truncated" in error_of(read_table, path)


def test_hdf5_of_another_kind(tmp_path):
    path = tmp_path / "distances.biom"
    with h5py.File(path, "w") as file:
        file["matrix"], file["order"] = np.zeros((2, 2)), [b"a", b"b"]
    assert "holds 'matrix', 'order'" in error_of(read_table, path)


def test_files_that_are_missing_or_of_unknown_kind(tmp_path):
    assert "no such file" in error_of(read_table, tmp_path / "absent.biom")
    assert "is a folder" in error_of(read_table, tmp_path)
    (tmp_path / "table.xlsx").write_bytes(b"PK")
    assert "unknown extension '.xlsx'" in error_of(read_table, tmp_path / "table.xlsx")


def test_qza_that_is_no_zip_or_holds_no_table(tmp_path):
    path = tmp_path / "table.qza"
    path.write_text("plain")
    assert "is no readable .qza" in error_of(read_table, path)
    write_qza(path, ">a\nACGT\n", "data/dna-sequences.fasta", "FeatureData[Sequence]")
    message = error_of(read_table, path)
    assert "FeatureData[Sequence]" in message and "FeatureTable[Frequency]" in message
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")
    assert "no QIIME 2 artifact" in error_of(read_table, path)
    write_any(tmp_path, "qza")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "is no readable .qza" in error_of(read_table, path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no tabs here\nACGT 5\n", "no header with tabs"),
        ("", "no header with tabs"),
        ("#OTU ID\tS1\tS2\nACGT\t1\n", "line 2 has 2 cells, the header has 3"),
        ("#OTU ID\tS1\tS2\nACGT\t1\t2\t3\n", "line 2 has 4 cells, the header has 3"),
        ("#OTU ID\tS1\tS2\nACGT\t1\tmany\n", "row 'ACGT', column 'S2': 'many'"),
        ("#OTU ID\tS1\tS2\nACGT\t1\t\n", "column 'S2': '' is no count"),
    ],
)
def test_malformed_tsv(tmp_path, text, expected):
    path = tmp_path / "table.tsv"
    path.write_text(text)
    assert expected in error_of(read_table, path)


def test_ids_that_are_not_dna_are_named_with_the_remedy(tmp_path):
    hashed = tuple(f"{n}d41d8cd98f00b204e9800998ecf8427" for n in range(4))
    message = error_of(read_table, write_hdf5(tmp_path / "t.biom", features=hashed))
    assert "4 of 4 feature ids are not DNA" in message
    assert "--sequences rep-seqs.fasta or .qza" in message
    assert message.count("d41d8cd") == 3
    numbers = ("4479944", "ACGT", "GGG", "193")
    message = error_of(read_table, write_hdf5(tmp_path / "t.biom", features=numbers))
    assert "2 of 4 feature ids are not DNA ('4479944', '193')" in message


@pytest.mark.parametrize("suffix", [".fasta", ".qza"])
def test_hashed_ids_get_their_sequences(tmp_path, suffix):
    hashed = ("aa1", "bb2", "cc3", "dd4")
    table = write_hdf5(tmp_path / "t.biom", features=hashed)
    fasta = "".join(
        f">{name} of the study\n{one[:2].lower()}\n{one[2:]}\n"
        for name, one in zip(hashed[::-1], FEATURES[::-1], strict=True)
    )
    path = tmp_path / f"rep-seqs{suffix}"
    if suffix == ".qza":
        write_qza(path, fasta, "data/dna-sequences.fasta", "FeatureData[Sequence]")
    else:
        path.write_text(fasta)
    read = read_table(table, sequences=path)
    assert read.feature_ids == FEATURES
    np.testing.assert_array_equal(read.counts.toarray(), COUNTS)


def test_fasta_that_does_not_serve(tmp_path):
    table = write_hdf5(tmp_path / "t.biom", features=("aa1", "bb2", "cc3", "dd4"))
    fasta = tmp_path / "rep-seqs.fasta"
    assert "no such file" in error_of(read_table, table, sequences=fasta)
    fasta.write_text(">aa1\nACGT\n>cc3\nGG\n")
    message = error_of(read_table, table, sequences=fasta)
    assert "no sequence for 2 of 4 features" in message and "('bb2', 'dd4')" in message
    fasta.write_text(">aa1\nACGT\n>bb2\nACNT\n>cc3\nAAU\n>dd4\nA-C\n")
    message = error_of(read_table, table, sequences=fasta)
    assert "3 sequences hold '-', 'N', 'U'" in message and "'bb2'" in message
    fasta.write_text(">aa1\nACGT\n>bb2\nacgt\n>cc3\nA\n>dd4\nC\n")
    assert "repeat another's sequence" in error_of(read_table, table, sequences=fasta)
    fasta.write_text(">aa1\nACGT\n>aa1\nC\n")
    assert "'aa1' stands twice" in error_of(read_table, table, sequences=fasta)
    fasta.write_text("@fastq\nACGT\n")
    assert "line 1 is not FASTA" in error_of(read_table, table, sequences=fasta)
    fasta.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as FASTA" in error_of(read_table, table, sequences=fasta)


def test_ambiguous_bases_are_named(tmp_path):
    features = ("ACGTACGTACGN", "TTGCA", "GGG", "CATCAT")
    message = error_of(read_table, write_hdf5(tmp_path / "t.biom", features=features))
    assert "1 sequences hold 'N'" in message and "remove these features" in message


def small_table(counts, samples=None):
    counts = np.asarray(counts)
    names = samples or tuple(f"s{n}" for n in range(len(counts)))
    bases = ["".join("ACGT"[n // 4**k % 4] for k in range(6)) for n in range(counts.shape[1])]
    return FeatureTable(tuple(names), tuple(bases), sp.csr_array(counts), "small")


def test_select_orders_samples_and_drops_absent_features():
    table = small_table([[1, 0, 2], [0, 4, 0], [5, 0, 0]])
    chosen = table.select(["s2", "s0"])
    assert chosen.sample_ids == ("s2", "s0")
    assert chosen.feature_ids == (table.feature_ids[0], table.feature_ids[2])
    np.testing.assert_array_equal(chosen.counts.toarray(), [[5, 0], [1, 2]])
    message = error_of(table.select, ["s0", "t1", "t2", "t3", "t4"])
    assert "4 samples" in message and "'t1', 't2', 't3', ..." in message


def test_rarefied_counts_are_drawn_without_replacement():
    counts = np.random.default_rng(1).integers(0, 40, (6, 30))
    counts[4] = 0
    counts[4, 3] = 9
    table = small_table(counts)
    rarefied, dropped = rarefy(table, 50, seed=3)
    assert dropped == ("s4",)
    assert rarefied.sample_ids == ("s0", "s1", "s2", "s3", "s5")
    assert (rarefied.counts.sum(axis=1) == 50).all()
    column = [table.feature_ids.index(one) for one in rarefied.feature_ids]
    assert (rarefied.counts.toarray() <= counts[[0, 1, 2, 3, 5]][:, column]).all()
    assert (rarefied.counts.data > 0).all() and rarefied.counts.has_sorted_indices
    exact, _ = rarefy(small_table([[3, 4, 0]]), 7, seed=0)
    np.testing.assert_array_equal(exact.counts.toarray(), [[3, 4]])


def test_rarefaction_has_the_hypergeometric_mean_and_variance():
    table = small_table(np.tile([60, 30, 10], (4000, 1)))
    drawn = rarefy(table, 20, seed=0)[0].counts.toarray()
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
    back = [second.sample_ids.index(one) for one in first.sample_ids]
    across = [second.feature_ids.index(one) for one in first.feature_ids]
    np.testing.assert_array_equal(first.counts.toarray(), second.counts.toarray()[back][:, across])
    assert (rarefy(table, 60, seed=6)[0].counts != first.counts).nnz > 0
    np.testing.assert_array_equal(table.counts.toarray(), counts)


def test_rarefaction_that_drops_every_sample():
    message = error_of(rarefy, small_table([[3, 4], [9, 0]]), 10, seed=0)
    assert "every one of 2 samples" in message and "largest has 9" in message
    assert "depth >= 1" in error_of(rarefy, small_table([[3]]), 0, seed=0)


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
    from aam.data.dataset import SampleDataset

    path = real_data / "oral" / "table-rarefied-1000.biom"
    start = time.process_time()
    table, _ = rarefy(read_table(path), 900, seed=0)
    dataset = SampleDataset(table)
    assert time.process_time() - start < 3.0
    assert len(dataset) == 2537


def test_json_ids_that_are_numbers_become_text(tmp_path):
    path = write_json(tmp_path / "table.biom", samples=("2538.1000102", 10.5, "10.0"))
    assert read_table(path).sample_ids == ("2538.1000102", "10.5", "10.0")
