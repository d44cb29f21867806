"""A table on disk equals the one in memory, to the bit, whatever happens while it is built."""

import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

from aam.commands.inputs import attach_distances
from aam.config import DistanceOptions, TableOptions
from aam.data import index as on_disk
from aam.data import index_build
from aam.data.samples import make_dataset, read_samples
from aam.data.table import FeatureTable, read_table
from aam.data.unifrac import METRICS, UniFrac
from aam.errors import InputError
from tests.data.test_dataset import random_table


def write_biom(path, table, counts=None):
    """Write BIOM 2.1 as far as it is read."""
    counts = table.counts if counts is None else counts
    with h5py.File(path, "w") as file:
        file["sample/ids"] = [one.encode() for one in table.sample_ids]
        file["observation/ids"] = [one.encode() for one in table.feature_ids]
        for name in ("data", "indices", "indptr"):
            file[f"sample/matrix/{name}"] = getattr(counts, name)
    return path


@pytest.fixture
def biom(tmp_path):
    """12 samples and 60 sequences: two without a read, two with one, and small samples between."""
    table = random_table(12, 60, seed=3)
    counts = table.counts.tolil()
    counts[:, [5, 6, 7, 8]] = 0
    counts[4, 7] = counts[9, 8] = 1
    counts[[0, 3, 4, 8], 20:] = 0
    counts = counts.tocsr()
    counts.eliminate_zeros()
    return write_biom(tmp_path / "table.biom", table, counts)


def options_of(path, how="always", **others):
    return TableOptions(table=path, on_disk=how, **{"rarefy_depth": 0, **others})


def both(path, **others):
    """The samples of a table in memory and on disk."""
    return [read_samples(options_of(path, how, **others), 0) for how in ("never", "always")]


def content(samples):
    """The digest of what a table holds now, not of what it held when it was built."""
    return FeatureTable.digest(samples.table)


def equal_batches(one, other, number=10):
    for seed in range(number):
        rows = np.random.default_rng(seed).integers(0, len(one), 6)
        a, b = (
            dataset.batch(rows, generator=torch.Generator().manual_seed(seed))
            for dataset in (one, other)
        )
        for name in ("rows", "asv_ids", "counts"):
            torch.testing.assert_close(getattr(b, name), getattr(a, name), rtol=0, atol=0)
        for name in ("tokens", "slots"):
            mine, theirs = getattr(a, name), getattr(b, name)
            torch.testing.assert_close(theirs.values, mine.values, rtol=0, atol=0)
            torch.testing.assert_close(theirs.offsets, mine.offsets, rtol=0, atol=0)
            assert theirs.max_length == mine.max_length


@pytest.fixture
def in_small_blocks(monkeypatch):
    """Several blocks of everything, as in a large table."""
    monkeypatch.setattr(index_build, "_NAMES_AT_ONCE", 7)
    monkeypatch.setattr(index_build, "_ENTRIES_AT_ONCE", 11)
    monkeypatch.setattr("aam.data.texts._BLOCK_ENTRIES", 100)


# ------------------------------------------------------------------------------------ equality
@pytest.mark.usefixtures("in_small_blocks")
@pytest.mark.parametrize("asv_sampling", ["abundance", "first", "random"])
@pytest.mark.parametrize("depth", [0, 90])
def test_batches_facts_and_digests_equal_those_in_memory(biom, asv_sampling, depth):
    options = {"rarefy_depth": depth, "asv_sampling": asv_sampling, "token_limit": 9, "max_bp": 8}
    memory, disk = both(biom, **options)
    datasets = [make_dataset(one, options_of(biom, **options)) for one in (memory, disk)]
    assert memory.facts == disk.facts and len(memory.facts) > (4 if depth else 3)
    assert disk.ids == memory.ids and (depth == 0 or len(disk.ids) < 12)
    assert disk.table.digest() == memory.table.digest()  # the one that was kept
    assert datasets[0].sequences == tuple(datasets[1].sequences)
    assert content(disk) == content(memory)
    equal_batches(*datasets)
    for rows in (np.arange(3), np.array([], dtype=np.int64)):
        np.testing.assert_array_equal(datasets[0].asvs_of(rows), datasets[1].asvs_of(rows))


@pytest.mark.usefixtures("in_small_blocks")
def test_chosen_samples_equal_those_in_memory(biom):
    memory, disk = both(biom)
    chosen = [*memory.ids[7:2:-2], memory.ids[0]]
    one, other = memory.table.select(chosen), disk.table.select(chosen)
    assert len(one.feature_ids) < len(memory.table.feature_ids) < 60
    assert other.sample_ids == tuple(chosen) and other.digest() == one.digest()
    assert other.select(chosen) is other
    with pytest.raises(InputError, match="'none'"):
        other.select(["none"])


@pytest.mark.usefixtures("in_small_blocks")
@pytest.mark.real
def test_ibd_with_tree_and_metadata(real_data, tmp_path):
    folder = real_data / "ibd"
    options = {"rarefy_depth": 3000, "index_dir": tmp_path}
    parts = []
    for how in ("never", "always"):
        chosen = options_of(folder / "table.biom", how, **options)
        samples = read_samples(chosen, 7, metadata=folder / "metadata.tsv")
        distances = attach_distances(
            samples, chosen, DistanceOptions(tree=folder / "tree.nwk", drop_missing_tips=True)
        )
        parts.append((samples, distances, make_dataset(samples, chosen)))
    (memory, near, one), (disk, far, other) = parts
    # Which features are named as examples follows the table's order, in the file or by sequence.
    facts = [[(one.what, one.count, one.kind) for one in part.facts] for part in (memory, disk)]
    assert facts[0] == facts[1] and any("not in the tree" in what for what, _, _ in facts[0])
    assert memory.metadata.ids == disk.metadata.ids
    equal_batches(one, other)
    rows = np.arange(0, len(one), 9)
    np.testing.assert_array_equal(near.pairwise(rows), far.pairwise(rows))
    np.testing.assert_array_equal(near.faith_pd(rows), far.faith_pd(rows))


@pytest.mark.parametrize("metric", METRICS)
def test_distances_equal_those_in_memory(community, tmp_path, metric):
    chosen = options_of(community.table, index_dir=tmp_path)
    disk = read_samples(chosen, 0).table
    one = UniFrac(read_table(community.table), community.tree, metric)
    other = UniFrac(disk, community.tree, metric)
    np.testing.assert_array_equal(other.pairwise(), one.pairwise())


def test_hashed_features_find_their_sequences(tmp_path):
    table = random_table(6, 20)
    names = [f"hash{n}" for n in range(20)]
    lines = [
        f">{name}\n{dna.lower()}\n" for name, dna in zip(names, table.feature_ids, strict=True)
    ]
    (tmp_path / "rep.fasta").write_text("".join(lines))
    hashed = write_biom(tmp_path / "t.biom", table)
    with h5py.File(hashed, "a") as file:
        del file["observation/ids"]
        file["observation/ids"] = [one.encode() for one in names]
    memory, disk = both(hashed, sequences=tmp_path / "rep.fasta")
    assert content(disk) == content(memory)
    with pytest.raises(InputError, match="give their sequences with --sequences"):
        both(hashed)[1]


def test_counts_of_64_bits_and_a_sample_without_reads(tmp_path):
    table = random_table(5, 12)
    counts = table.counts.astype(np.float64).tolil()
    counts[2] = 0
    counts[1, 1] = 5_000_000_000
    memory, disk = both(write_biom(tmp_path / "t.biom", table, counts.tocsr()))
    assert disk.table.counts.data.dtype == np.int64
    assert content(disk) == content(memory)
    for samples in (memory, disk):
        with pytest.raises(InputError, match=r"1 samples have no reads \('s2'\)"):
            make_dataset(samples, options_of(tmp_path))


@pytest.mark.parametrize("depth", [0, 5])
@pytest.mark.parametrize("damage", ["negative", "half", "nan", "letters", "twice", "range", "cut"])
def test_what_cannot_be_used_is_said_as_in_memory(tmp_path, damage, depth):
    table = random_table(5, 12)
    path = write_biom(tmp_path / "t.biom", table)
    with h5py.File(path, "a") as file:
        data, ids = file["sample/matrix/data"], file["observation/ids"]
        if damage in ("negative", "half", "nan"):
            values = data[()].astype(float)
            values[3] = {"negative": -1, "half": 0.5, "nan": np.nan}[damage]
            del file["sample/matrix/data"]
            file["sample/matrix/data"] = values
        elif damage == "letters":
            ids[4] = b"ACGTNNNNNNNN"
        elif damage == "twice":
            ids[4] = ids[3].lower()
        elif damage == "range":
            file["sample/matrix/indices"][2] = 99
        else:
            del file["sample/matrix/indptr"]
    messages = []
    for how in ("never", "always"):
        with pytest.raises(InputError) as caught:
            read_samples(options_of(path, how, rarefy_depth=depth), 0)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert not list((tmp_path / "t.biom.index").iterdir())


def test_a_depth_that_drops_every_sample_is_said_as_in_memory(biom):
    messages = []
    for how in ("never", "always"):
        with pytest.raises(InputError) as caught:
            read_samples(options_of(biom, how, rarefy_depth=10_000), 0)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "lower --rarefy-depth" in messages[0]


# ---------------------------------------------------------------------------- when it is built
def indexes(path):
    return sorted(one.name for one in path.with_name(f"{path.name}.index").iterdir())


def test_an_index_is_built_once_and_again_when_the_table_changes(biom, capsys):
    read_samples(options_of(biom), 0)
    assert "building the index" in capsys.readouterr().err and len(indexes(biom)) == 1
    first = indexes(biom)
    read_samples(options_of(biom), 5)  # the seed means nothing without rarefaction
    assert capsys.readouterr().err == "" and indexes(biom) == first
    read_samples(options_of(biom, rarefy_depth=20), 0)
    assert len(indexes(biom)) == 2
    write_biom(biom, random_table(12, 60, seed=4))
    capsys.readouterr()
    memory, disk = both(biom)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "the table has changed" in lines[0]
    assert content(disk) == content(memory)
    assert len(indexes(biom)) == 2 and not set(first) & set(indexes(biom))


def test_a_file_is_another_one_when_its_time_or_either_end_differs(tmp_path):
    path, time = tmp_path / "file", (10**18, 10**18)
    seen = set()
    for content, ns in ((b"abc", time), (b"abd", time), (b"bbc", time), (b"abc", (0, 1))):
        path.write_bytes(content[:1] + bytes(2**21) + content[1:])
        os.utime(path, ns=ns)
        seen.add(json.dumps(on_disk.fingerprint_file(path)))
    assert len(seen) == 4


@pytest.mark.parametrize("file", ["columns", "counts", "sequences.txt", "index.json", "reads"])
def test_a_damaged_index_is_built_again(biom, file):
    expected = content(read_samples(options_of(biom), 0))
    (folder,) = (biom.parent / "table.biom.index").iterdir()
    (folder / file).write_bytes((folder / file).read_bytes()[:-1])
    assert content(read_samples(options_of(biom), 0)) == expected
    assert len(indexes(biom)) == 1


def test_an_index_of_another_format_is_not_read(biom):
    read_samples(options_of(biom), 0)
    (folder,) = (biom.parent / "table.biom.index").iterdir()
    known = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**known, "format": 0}))
    (folder / "counts").write_bytes(bytes((folder / "counts").stat().st_size))
    memory, disk = both(biom)
    assert content(disk) == content(memory)


BUILD = """
import sys, time
from pathlib import Path
from aam.data import index
from aam.data import index_build
from aam.config import TableOptions
from aam.data.table import FeatureTable
from aam.data.samples import read_samples
write = index_build._Build._write_counts
def slow(*arguments):
    print("building", flush=True)
    time.sleep(float(sys.argv[2]))
    return write(*arguments)
index_build._Build._write_counts = slow
options = TableOptions(table=Path(sys.argv[1]), on_disk="always", rarefy_depth=0)
print(FeatureTable.digest(read_samples(options, 0).table))
"""


def build_apart(path, seconds):
    """Build in another process, which stops for a while in the middle."""
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(path), str(seconds)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_killed_build_leaves_nothing_that_is_taken_for_an_index(biom):
    process = build_apart(biom, 60)
    assert process.stdout.readline() == "building\n"
    process.kill()
    process.communicate()
    (left,) = indexes(biom)
    assert left.startswith(".partial-")
    memory, disk = both(biom)
    assert content(disk) == content(memory)
    (only,) = indexes(biom)
    assert only.startswith("samples-")


def test_two_processes_that_build_at_once(biom):
    processes = [build_apart(biom, 2) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    digest = read_table(biom).digest()
    assert [out.splitlines()[-1] for out, _ in outputs] == [digest, digest]
    assert sum("building\n" in out for out, _ in outputs) == 1  # the other one waited
    assert sum("waiting for it" in err for _, err in outputs) == 1
    assert len(indexes(biom)) == 1


def test_two_that_build_at_once_without_locks(biom, monkeypatch):
    """The second to end takes the index of the first."""
    whole = index_build.build

    def while_another_builds(*arguments):
        monkeypatch.setattr(index_build, "build", whole)
        read_samples(options_of(biom), 0)
        return whole(*arguments)

    monkeypatch.setattr(index_build, "build", while_another_builds)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert content(read_samples(options_of(biom), 0)) == read_table(biom).digest()
    assert len(indexes(biom)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(biom):
    biom.parent.chmod(0o555)
    try:
        with pytest.raises(InputError, match="--index-dir"):
            read_samples(options_of(biom), 0)
    finally:
        biom.parent.chmod(0o755)


def test_where_the_index_cannot_lie(biom, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*--index-dir.*--on-disk never"):
        read_samples(options_of(biom, index_dir=tmp_path / "file"), 0)
    monkeypatch.setattr("aam.data.samples.LARGE_TABLE", 1000)
    capsys.readouterr()
    samples = read_samples(options_of(biom, "auto", index_dir=tmp_path / "file"), 0)
    assert isinstance(samples.table.feature_ids, tuple)
    assert "is read into memory" in capsys.readouterr().err


def test_a_full_disk_is_said_in_one_line(biom, monkeypatch):
    def full(self, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(on_disk.Scratch, "append", full)
    with pytest.raises(InputError, match=r"No space left on device.*--index-dir") as caught:
        read_samples(options_of(biom), 0)
    assert "\n" not in str(caught.value)
    assert indexes(biom) == []


# --------------------------------------------------------------------------------- when it is used
def test_only_large_tables_are_put_on_disk_unasked(biom, monkeypatch, tmp_path):
    read_samples(options_of(biom, "auto"), 0)
    assert not (tmp_path / "table.biom.index").exists()
    monkeypatch.setattr("aam.data.samples.LARGE_TABLE", 1000)
    read_samples(options_of(biom, "auto"), 0)
    assert len(indexes(biom)) == 1


def test_a_table_of_another_format_cannot_be_on_disk(tmp_path):
    (tmp_path / "t.tsv").write_text("#OTU ID\ts1\nACGT\t3\n")
    with pytest.raises(InputError, match="is no BIOM 2"):
        read_samples(options_of(tmp_path / "t.tsv"), 0)
    assert read_samples(options_of(tmp_path / "t.tsv", "auto"), 0).ids == ("s1",)
