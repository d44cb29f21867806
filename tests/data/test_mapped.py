"""A table on disk equals the one in memory, to the bit, whatever happens while it is built."""

import fcntl
import json
import multiprocessing
import os
import resource
import time

import h5py
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from aam.commands.inputs import attach_distances
from aam.config import DistanceOptions, TableOptions
from aam.data import mapped
from aam.data.samples import read_samples
from aam.data.table import read_table
from aam.errors import InputError
from tests.data.test_dataset import random_table


def write_biom(path, table, counts=None, features=None):
    """Write BIOM 2.1 as far as it is read."""
    counts = table.counts if counts is None else counts
    with h5py.File(path, "w") as file:
        file["sample/ids"] = [one.encode() for one in table.sample_ids]
        file["observation/ids"] = [one.encode() for one in features or table.feature_ids]
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


def read(path, how="always", seed=0, **others):
    return read_samples(options_of(path, how, **others), seed)


def both(path, **others):
    """The samples of a table in memory and on disk."""
    return [read(path, how, **others) for how in ("never", "always")]


def folders(path):
    return sorted(one.name for one in path.with_name(f"{path.name}.index").iterdir())


def is_mapped(samples):
    return not samples.table.counts.data.flags.writeable


def equal_batches(one, other, number=10):
    for seed in range(number):
        rows = np.random.default_rng(seed).integers(0, len(one), 6)
        mine, theirs = (
            tree_leaves(vars(dataset.batch(rows, generator=torch.Generator().manual_seed(seed))))
            for dataset in (one, other)
        )
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.fixture
def in_small_blocks(monkeypatch):
    """Several blocks of everything, as in a large table."""
    monkeypatch.setattr(mapped, "_AT_ONCE", 7)
    monkeypatch.setattr("aam.data.texts._BLOCK_ENTRIES", 20)


# ------------------------------------------------------------------------------------ equality
@pytest.mark.usefixtures("in_small_blocks")
@pytest.mark.parametrize("asv_sampling", ["abundance", "first", "random"])
@pytest.mark.parametrize("depth", [0, 90])
def test_batches_facts_and_digests_equal_those_in_memory(biom, asv_sampling, depth):
    options = {"rarefy_depth": depth, "asv_sampling": asv_sampling, "token_limit": 9, "max_bp": 8}
    memory, disk = both(biom, **options)
    assert is_mapped(disk) and not is_mapped(memory)
    datasets = [one.dataset(options_of(biom, **options)) for one in (memory, disk)]
    assert memory.facts == disk.facts and len(memory.facts) > (4 if depth else 3)
    assert disk.ids == memory.ids and (depth == 0 or len(disk.ids) < 12)
    assert disk.table.digest() == memory.table.digest()
    assert datasets[0].sequences == datasets[1].sequences
    equal_batches(*datasets)
    for rows in (np.arange(3), np.array([], dtype=np.int64)):
        np.testing.assert_array_equal(datasets[0].asvs_of(rows), datasets[1].asvs_of(rows))


def test_chosen_samples_equal_those_in_memory(biom):
    memory, disk = both(biom)
    chosen = [*memory.ids[7:2:-2], memory.ids[0]]
    one, other = memory.table.select(chosen), disk.table.select(chosen)
    assert len(one.feature_ids) < len(memory.table.feature_ids) < 60
    assert other.sample_ids == tuple(chosen) and other.digest() == one.digest()


@pytest.mark.usefixtures("in_small_blocks")
@pytest.mark.real
def test_ibd_with_tree_and_metadata(real_data, tmp_path):
    folder = real_data / "ibd"
    parts = []
    for how in ("never", "always"):
        chosen = options_of(folder / "table.biom", how, rarefy_depth=3000, index_dir=tmp_path)
        samples = read_samples(chosen, 7, metadata=folder / "metadata.tsv")
        options = DistanceOptions(tree=folder / "tree.nwk", drop_missing_tips=True)
        distances = attach_distances(samples, options, None, chosen)
        parts.append((samples, distances, samples.dataset(chosen)))
    (memory, near, one), (disk, far, other) = parts
    assert memory.facts == disk.facts
    assert memory.metadata.ids == disk.metadata.ids
    equal_batches(one, other)
    rows = np.arange(0, len(one), 9)
    np.testing.assert_array_equal(near.pairwise(rows), far.pairwise(rows))
    np.testing.assert_array_equal(near.faith_pd(rows), far.faith_pd(rows))


def test_hashed_features_find_their_sequences(tmp_path):
    table, names = random_table(6, 20), [f"hash{n}" for n in range(20)]
    fasta = tmp_path / "rep.fasta"
    fasta.write_text(
        "".join(f">{a}\n{b.lower()}\n" for a, b in zip(names, table.feature_ids, strict=True))
    )
    hashed = write_biom(tmp_path / "t.biom", table, features=names)
    memory, disk = both(hashed, sequences=fasta)
    assert disk.table.digest() == memory.table.digest()
    with pytest.raises(InputError, match="give their sequences with --sequences"):
        read(hashed)
    with pytest.raises(InputError, match="no such file"):
        read(hashed, sequences=tmp_path / "none.fasta")


def test_counts_of_64_bits_and_a_sample_without_reads(tmp_path):
    table = random_table(5, 12)
    counts = table.counts.astype(np.float64).tolil()
    counts[2] = 0
    counts[1, 1] = 5_000_000_000
    memory, disk = both(write_biom(tmp_path / "t.biom", table, counts.tocsr()))
    assert disk.table.digest() == memory.table.digest()
    for samples in (memory, disk):
        with pytest.raises(InputError, match=r"1 samples have no reads \('s2'\)"):
            samples.dataset(options_of(tmp_path))


def damaged(path, damage):
    with h5py.File(path, "a") as file:
        matrix, ids = file["sample/matrix"], file["observation/ids"]
        if damage in ("negative", "half", "nan", "many"):
            values = matrix["data"][()].astype(float)
            values[3] = {"negative": -1, "half": 0.5, "nan": np.nan, "many": 2e9}[damage]
            del matrix["data"]
            matrix["data"] = values
        elif damage == "empty":
            matrix["data"][...] = 0
        elif damage == "letters":
            ids[4] = b"ACGTNNNNNNNN"
        elif damage == "twice":
            ids[4] = ids[3].lower()
        elif damage in ("range", "below"):
            matrix["indices"][2] = 99 if damage == "range" else -1
        elif damage == "cut":
            del matrix["indptr"]


DAMAGES = "negative", "half", "nan", "many", "empty", "letters", "twice", "range", "below", "cut"


@pytest.mark.parametrize(
    ("damage", "depth"),
    [(None, 10_000), *((damage, depth) for damage in DAMAGES for depth in (5, 10_000))],
)
def test_what_cannot_be_used_is_said_as_in_memory(tmp_path, damage, depth):
    path = write_biom(tmp_path / "t.biom", random_table(5, 12))
    damaged(path, damage)
    messages = []
    for how in ("never", "always"):
        with pytest.raises(InputError) as caught:
            read(path, how, rarefy_depth=depth)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]
    assert folders(path) == []


# ---------------------------------------------------------------------------- when it is built
def test_it_is_built_once_and_again_when_the_table_changes(biom, capsys):
    read(biom)
    assert "building the index" in capsys.readouterr().err and folders(biom) == ["all-reads"]
    read(biom, seed=5)  # the seed means nothing without rarefaction
    assert capsys.readouterr().err == ""
    read(biom, rarefy_depth=20)
    assert folders(biom) == ["all-reads", "depth-20-seed-0"]
    before = os.stat(biom).st_mtime_ns
    write_biom(biom, random_table(12, 60, seed=4))
    os.utime(biom, ns=(before + 1, before + 1))
    capsys.readouterr()
    memory, disk = both(biom)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "the table has changed" in lines[0]
    assert disk.table.digest() == memory.table.digest()
    assert folders(biom) == ["all-reads", "depth-20-seed-0"]


@pytest.mark.parametrize("left", [0, -1])
@pytest.mark.parametrize("file", ["indices", "data", "indptr", "bases", "reads", "made_from"])
def test_what_is_damaged_or_of_another_format_is_built_again(biom, file, left):
    expected = read(biom).table.digest()
    folder = biom.parent / "table.biom.index" / "all-reads"
    path = folder / (f"{file}.npy" if file != "made_from" else "made_from.json")
    path.write_bytes(path.read_bytes()[:left])
    assert read(biom).table.digest() == expected
    known = json.loads((folder / "made_from.json").read_text())
    (folder / "made_from.json").write_text(json.dumps({**known, "format": 0}))
    (folder / "data.npy").write_bytes(b"")
    assert read(biom).table.digest() == expected
    assert folders(biom) == ["all-reads"]


class Apart:
    """A build in a copy of this process, which stops for some seconds in the middle."""

    def __init__(self, path, seconds, locks=True):
        context = multiprocessing.get_context("fork")
        self.heard, self.said = context.Pipe(duplex=False)
        self.process = context.Process(target=self.build, args=(path, seconds, locks))
        self.process.start()

    def build(self, path, seconds, locks):
        write = mapped._write_counts

        def slow(*arguments):
            self.said.send("writing")
            time.sleep(seconds)
            return write(*arguments)

        def no_locks(*_):
            raise OSError(38, "Function not implemented")

        mapped._write_counts, mapped.log = slow, self.said.send
        if not locks:
            fcntl.flock = no_locks
        self.said.send(read(path).table.digest())

    def lines(self):
        self.process.join(60)
        assert self.process.exitcode == 0
        found = []
        while self.heard.poll():
            found.append(self.heard.recv())
        return found


def test_a_killed_build_leaves_nothing_that_is_taken_for_a_table(biom):
    apart = Apart(biom, 60)
    while apart.heard.recv() != "writing":
        pass
    apart.process.kill()
    apart.process.join()
    (left,) = folders(biom)
    assert left.startswith(".partial-")
    memory, disk = both(biom)
    assert disk.table.digest() == memory.table.digest() and folders(biom) == ["all-reads"]


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_that_build_at_once(biom, locks):
    """The one waits for the other; without locks both build, and the last one stays."""
    told = [one.lines() for one in [Apart(biom, seconds, locks) for seconds in (0.5, 1)]]
    assert [one[-1] for one in told] == [read_table(biom).digest()] * 2
    assert sum("writing" in one for one in told) == (1 if locks else 2)
    assert sum("waiting for it" in line for one in told for line in one) == (1 if locks else 0)
    assert folders(biom) == ["all-reads"]


# ------------------------------------------------------------------------ where and when it is used
def test_where_it_cannot_lie(biom, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*--index-dir.*--on-disk never"):
        read(biom, index_dir=tmp_path / "file")
    monkeypatch.setattr("aam.data.samples.LARGE_TABLE", 1000)
    capsys.readouterr()
    assert not is_mapped(read(biom, "auto", index_dir=tmp_path / "file"))
    assert "is read into memory" in capsys.readouterr().err


def test_a_full_disk_is_said_in_one_line(biom):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limit[1]))
    try:
        with pytest.raises(InputError, match=r"\(File too large\).*--index-dir") as caught:
            read(biom)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(caught.value) and folders(biom) == []


def test_only_large_tables_are_put_on_disk_unasked(biom, monkeypatch):
    assert not is_mapped(read(biom, "auto"))
    monkeypatch.setattr("aam.data.samples.LARGE_TABLE", 1000)
    assert is_mapped(read(biom, "auto"))


def test_a_table_of_another_format_cannot_be_on_disk(tmp_path):
    (tmp_path / "t.tsv").write_text("#OTU ID\ts1\nACGT\t3\n")
    with pytest.raises(InputError, match="is no BIOM 2"):
        read(tmp_path / "t.tsv")
    assert read(tmp_path / "t.tsv", "auto").ids == ("s1",)
