"""A small model that a tree taught places the ASVs of tables that training did not see."""

from dataclasses import dataclass
from pathlib import Path

import biom
import h5py
import numpy as np
import pytest
import torch

from aam.data.clades import Clades, places_by_tree
from aam.data.simulate import DemoFiles, simulate_community
from aam.data.table import FeatureTable, read_table
from aam.data.texts import Texts
from aam.data.tree import read_tree
from aam.data.unifrac import METRICS, UniFrac
from aam.errors import InputError
from aam.evaluation import placer as placing
from aam.evaluation.applicability import of_placed
from aam.evaluation.placer import Placer, grafted_tree, load_placer, unifrac_by_model
from aam.evaluation.tree_results import jaccards, nearest_neighbour_placement

COMPLEMENT = str.maketrans("ACGT", "TGCA")
DIM = 32


@dataclass(frozen=True)
class Study:
    """A simulated study, half of whose samples a model has learned from."""

    files: DemoFiles
    table: FeatureTable
    run: Path
    train: list[str]
    others: list[str]


@pytest.fixture(scope="module")
def study(aam, tmp_path_factory):
    folder = tmp_path_factory.mktemp("placing")
    files = simulate_community(
        folder, samples=60, asvs=400, asvs_per_sample=40, sequence_length=100, seed=1
    )
    table = read_table(files.table)
    train, others = list(table.sample_ids[:30]), list(table.sample_ids[30:])
    for name, ids in (("train", train), ("others", others)):
        (folder / name).write_text("\n".join(ids) + "\n")
    assert aam(
        "pretrain", "--table", files.table, "--tree", files.tree, "--encoder", "wide",
        "--wide-dim", 64, "--nucleotide-penalty", 0, "--epochs", 20, "--batch-size", 32,
        "--train-ids", folder / "train", "--validation-ids", folder / "others",
        "--output-dir", folder / "run", files=False, filling=True,
    ) == 0  # fmt: skip
    return Study(files, table, folder / "run", train, others)


@pytest.fixture(scope="module")
def placer(study) -> Placer:
    return load_placer(study.run, torch.device("cpu"))


@pytest.fixture(scope="module")
def new(study, placer):
    """Sequences that only other samples have, and where the tree says that they join."""
    known = set(placer.clades.sequences)
    names = [one for one in study.table.feature_ids if one not in known]
    truth = places_by_tree(read_tree(study.files.tree), placer.clades, Texts.of(names))
    assert len(names) > 30
    return names, truth


def write_table(path, table, names=None, rows=None, columns=None):
    counts = table.counts.toarray()
    rows = range(len(counts)) if rows is None else rows
    columns = range(counts.shape[1]) if columns is None else columns
    names = table.feature_ids if names is None else names
    content = biom.Table(
        counts[np.ix_(rows, columns)].T, [names[at] for at in columns],
        [table.sample_ids[at] for at in rows],
    )  # fmt: skip
    with h5py.File(path, "w") as file:
        content.to_hdf5(file, "test")
    return path


def read_distances(path):
    with h5py.File(path) as file:
        ids = [one.decode() for one in file["order"][:]]
        return ids, file["matrix"][:]


def condensed(matrix):
    return matrix[np.triu_indices(len(matrix), 1)]


# --------------------------------------------------------------------------------------- placing
def test_known_asvs_stand_at_their_own_tips(study, placer):
    sequences = list(placer.clades.sequences)
    counts = study.table.counts[: len(study.train)]
    seen = {study.table.feature_ids[at] for at in set(counts.indices)}
    assert set(sequences) == seen
    placed = placer.place(sequences[::-1])
    own = np.arange(len(sequences))[::-1]
    assert np.array_equal(placed.known, own) and np.array_equal(placed.nearest, own)
    assert np.array_equal(placed.grafts.node, placer.clades.tree.tip_nodes[own])
    assert np.array_equal(placed.clade, placer.clades.lowest[own])
    assert (placed.distance == 0).all() and (placed.support == 1).all() and placed.usable.all()
    assert (placed.grafts.own == 0).all()
    grown, _ = grafted_tree(placer.clades, placed, sequences[::-1])
    assert np.array_equal(grown.length, placer.clades.tree.length)


def test_training_samples_are_as_far_apart_as_on_the_tree(study, placer):
    table = study.table.select(study.train)
    found = unifrac_by_model(table, placer.clades, placer.place(table.feature_ids))
    truth = UniFrac(table, study.files.tree)
    for metric in METRICS:
        own, exact = found.by(metric).pairwise(), truth.by(metric).pairwise()
        np.testing.assert_allclose(own, exact, atol=1e-9)
    np.testing.assert_allclose(found.faith_pd(range(30)), truth.faith_pd(range(30)))


def test_other_samples_are_no_farther_off_than_by_nearest_neighbour_placement(study, placer):
    table = study.table.select(study.others)
    truth = UniFrac(table, study.files.tree)
    errors = {}
    for metric in METRICS:
        for one in (placer, nearest_neighbour_placement(placer)):
            found = unifrac_by_model(table, placer.clades, one.place(table.feature_ids))
            pairs = [condensed(u.by(metric).pairwise()) for u in (found, truth)]
            errors[one.model is None, metric] = np.abs(pairs[0] - pairs[1]).mean()
            assert np.corrcoef(*pairs)[0, 1] > 0.98
        assert errors[False, metric] < 1.1 * errors[True, metric] + 1e-4, errors
    assert 0 < errors[False, "unweighted"] < 0.02


def test_new_asvs_get_the_clades_of_the_tree(placer, new):
    names, truth = new
    placed = placer.place(names)
    found, copied = jaccards(placer.clades, placed, truth)
    assert found.mean() > 0.9 and found.mean() > copied.mean() - 0.02
    assert (placed.known == -1).all() and placed.usable.all()
    assert (placed.distance >= 1).all() and (placed.support > 0.5).mean() > 0.9
    assert (placed.support <= 1).all()
    baseline = nearest_neighbour_placement(placer).place(names)
    assert np.array_equal(baseline.nearest, placed.nearest)
    assert np.array_equal(baseline.clade, placer.clades.lowest[placed.nearest])


def test_the_network_alone_has_learned_the_known_clades(placer):
    """Known ASVs, looked at as new ones: by the network's logits, without a vote."""
    clades = placer.clades
    near = placer.neighbours.find(clades.sequences)
    logits = placer.network_logits(near)
    tips = np.arange(len(clades.sequences))[:, None]
    member = (clades.start <= tips) & (tips < clades.stop)
    right = ((logits > 0) == member) * clades.length
    always = np.maximum(member.mean(axis=0), 1 - member.mean(axis=0)) @ clades.length
    assert 1 - right.sum(axis=1).mean() / clades.length.sum() < 0.5 * (
        1 - always / clades.length.sum()
    )


def test_the_order_and_the_company_of_sequences_change_nothing(placer, new, monkeypatch):
    names, _ = new
    whole = placer.place(names)
    order = np.random.default_rng(0).permutation(len(names))
    monkeypatch.setattr(placing, "ASVS_AT_ONCE", 3)
    monkeypatch.setattr(placing, "LOGITS_AT_ONCE", 7 * len(placer.clades))
    mixed = [*placer.clades.sequences[:5], *(names[at] for at in order)]
    parts = placer.place(mixed)
    assert np.array_equal(parts.clade[5:], whole.clade[order])
    assert np.array_equal(parts.grafts.node[5:], whole.grafts.node[order])
    for name in ("shared", "own"):
        found, expected = (getattr(one.grafts, name) for one in (parts, whole))
        np.testing.assert_allclose(found[5:], expected[order], atol=1e-5)
    assert (parts.known[:5] == np.arange(5)).all() and (parts.known[5:] < 0).all()


def test_of_very_many_clades_those_of_candidates_are_enough(placer, new, monkeypatch):
    names, truth = new
    whole = placer.place(names)
    monkeypatch.setattr(placing, "MOST_DENSE", 20)
    monkeypatch.setattr(placing, "LOGITS_AT_ONCE", 40)  # two ASVs at once
    some = placer.place(names)
    assert (some.clade == whole.clade).mean() > 0.95
    found, expected = (jaccards(placer.clades, one, truth)[0] for one in (some, whole))
    assert found.mean() == pytest.approx(expected.mean(), abs=0.01)


def test_trimmed_sequences_are_placed_near_their_whole_ones(placer, new):
    names, truth = new
    trimmed = placer.place([one[3:-4] for one in names])
    assert trimmed.usable.all()
    found = jaccards(placer.clades, trimmed, truth)[0]
    assert found.mean() > jaccards(placer.clades, placer.place(names), truth)[0].mean() - 0.05
    # A known ASV that was trimmed is new, at no edit from itself.
    known = list(placer.clades.sequences)
    again = placer.place([one[2:] for one in known])
    assert (again.known == -1).all() and (again.distance < 1).all()
    assert (again.nearest == np.arange(len(known))).mean() > 0.9


def test_nothing_to_place(placer):
    none = placer.place([])
    assert len(none.grafts) == len(none.clade) == len(none.usable) == 0


def test_sequences_near_nothing_have_no_place_and_facts_say_so(study, placer, new):
    generator = np.random.default_rng(0)
    foreign = ["".join(generator.choice(list("ACGT"), 100)) for _ in range(5)]
    reverse = [one.translate(COMPLEMENT)[::-1] for one in placer.clades.sequences[:4]]
    known, names = list(placer.clades.sequences[10:30]), new[0][:7]
    features = [*foreign, *known, *reverse, *names]
    counts = np.eye(len(features), dtype=int) + 1
    table = FeatureTable(
        tuple(f"s{at}" for at in range(len(features))), features,
        type(study.table.counts)(counts), "odd.biom",
    )  # fmt: skip
    placed = placer.place(features)
    assert placed.foreign.tolist() == [True] * 5 + [False] * 31
    assert placed.reverse.tolist() == [False] * 25 + [True] * 4 + [False] * 7
    facts, warnings = of_placed(table, placed)
    assert [fact.count for fact in facts] == [20, 7, 4, 5]
    assert sum(fact.count for fact in facts) == len(features)
    assert [fact.kind == "dropped" for fact in facts] == [False, False, True, True]
    assert len(warnings) == 2 and "11% of the reads are reverse" in warnings[0]
    unifrac = unifrac_by_model(table, placer.clades, placed)
    assert np.isfinite(unifrac.pairwise()).all()
    with pytest.raises(InputError, match="reverse complements: turn"):
        part = FeatureTable(("s",), reverse, table.counts[:1, 25:29], "turned.biom")
        unifrac_by_model(part, placer.clades, placer.place(reverse))
    with pytest.raises(InputError, match="another region"):
        part = FeatureTable(("s",), foreign, table.counts[:1, :5], "other.biom")
        unifrac_by_model(part, placer.clades, placer.place(foreign))


# --------------------------------------------------------------------------------- aam unifrac
@pytest.mark.parametrize("metric", ["unweighted", "weighted", "weighted-normalized", "faith-pd"])
def test_unifrac_of_a_table_that_is_all_known_is_that_of_the_tree(aam, study, tmp_path, metric):
    table = study.table.select(study.train)
    path = write_table(tmp_path / "known.biom", table)
    suffix = "tsv" if metric == "faith-pd" else "h5"
    outputs = [tmp_path / f"{name}.{suffix}" for name in ("model", "tree")]
    words = ("unifrac", "--table", path, "--metric", metric)
    assert aam(*words, "--model", study.run, "--output", outputs[0], files=False) == 0
    assert aam(*words, "--tree", study.files.tree, "--output", outputs[1], files=False) == 0
    if metric == "faith-pd":
        found, expected = (
            [line.split("\t") for line in one.read_text().splitlines()[1:]] for one in outputs
        )
        assert [row[0] for row in found] == [row[0] for row in expected] == study.train
        values = (np.array([float(row[1]) for row in rows]) for rows in (found, expected))
        np.testing.assert_allclose(*values, rtol=1e-6)
    else:
        (ids, found), (others, expected) = map(read_distances, outputs)
        assert ids == others == study.train
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_neither_case_nor_order_changes_distances(aam, study, tmp_path, capsys):
    table = study.table.select(study.others)
    generator = np.random.default_rng(0)
    rows, columns = (generator.permutation(size) for size in table.counts.shape)
    lower = [one.lower() for one in table.feature_ids]
    paths = [
        write_table(tmp_path / "plain.biom", table),
        write_table(tmp_path / "mixed.biom", table, lower, rows, columns),
    ]
    found, said = [], []
    for path in paths:
        output = path.with_suffix(".h5")
        words = ("--table", path, "--model", study.run, "--output", output)
        capsys.readouterr()
        assert aam("unifrac", *words, files=False) == 0
        found.append(read_distances(output))
        said.append([line for line in capsys.readouterr().err.splitlines() if " s)" not in line])
    place = [found[1][0].index(name) for name in found[0][0]]
    np.testing.assert_allclose(found[1][1][np.ix_(place, place)], found[0][1], atol=1e-5)
    assert said[0] == said[1] and any("new ASVs" in line for line in said[0])


def test_a_table_of_reverse_complements_is_refused(aam, study, tmp_path, capsys):
    table = study.table.select(study.others)
    turned = [one.translate(COMPLEMENT)[::-1] for one in table.feature_ids]
    path = write_table(tmp_path / "turned.biom", table, turned)
    for command, output in (("unifrac", "out.h5"), ("embed", "out.tsv")):
        words = ("--table", path, "--model", study.run, "--output", tmp_path / output)
        assert aam(command, *words, files=False) == 2
        assert "reverse complements: turn the sequences round" in capsys.readouterr().err
        assert not (tmp_path / output).exists()


def test_unifrac_wants_a_tree_or_a_model(aam, study, tmp_path, capsys):
    words = ("unifrac", "--table", study.files.table, "--output", tmp_path / "out.h5")
    assert aam(*words, files=False) == 2
    both = ("--model", study.run, "--tree", study.files.tree)
    assert aam(*words, *both, files=False) == 2
    assert capsys.readouterr().err.count("give either --tree or --model") == 2


# ------------------------------------------------------------------------------------ aam embed
def read_rows(path):
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return lines[0], {row[0]: row[1:] for row in lines[1:]}


def test_embedded_samples(aam, study, placer, tmp_path):
    words = ("embed", "--model", study.run, "--table", study.files.table)
    for output in ("all.npz", "all.tsv"):
        assert aam(*words, "--output", tmp_path / output, files=False) == 0
    with np.load(tmp_path / "all.npz") as arrays:
        ids, faith, vectors = arrays["ids"], arrays["faith_pd"], arrays["vectors"]
    assert ids.tolist() == list(study.table.sample_ids)
    header, rows = read_rows(tmp_path / "all.tsv")
    width = vectors.shape[1]
    assert header == ["sample-id", "faith_pd", *(f"e{i}" for i in range(width))]
    numbers = np.array([rows[name] for name in ids], dtype=float)
    np.testing.assert_allclose(numbers[:, 0], faith, rtol=1e-5)
    np.testing.assert_allclose(numbers[:, 1:], vectors, rtol=1e-4, atol=1e-5)
    # Faith PD is UniFrac's; the products keep the distances of the other samples, too.
    unifrac = unifrac_by_model(study.table, placer.clades, placer.place(study.table.feature_ids))
    np.testing.assert_allclose(faith, unifrac.faith_pd(range(60)), rtol=1e-6)
    product = vectors @ vectors.T
    found = 1 - product / (faith[:, None] + faith - product)
    assert np.corrcoef(condensed(found), condensed(unifrac.pairwise()))[0, 1] > 0.95


def test_embedding_fewer_dimensions(aam, study, tmp_path, capsys):
    words = ("embed", "--model", study.run, "--table", study.files.table)
    for size in (1, 9):
        output = tmp_path / f"{size}.tsv"
        assert aam(*words, "--dimensions", size, "--output", output, files=False) == 0
        header, rows = read_rows(output)
        assert len(header) == 2 + size and all(len(row) == 1 + size for row in rows.values())
    for more, message in (
        (("--dimensions", 100_000), "pretraining fitted"),
        (("--dimensions", 8, "--asvs"), "--dimensions is for samples"),
    ):
        assert aam(*words, *more, "--output", tmp_path / "no.tsv", files=False) == 2
        assert message in capsys.readouterr().err
    assert aam(*words, "--output", tmp_path / "no.txt", files=False) == 2
    assert aam(*words, "--output", tmp_path / "1.tsv", files=False) == 2  # is there already


@pytest.mark.parametrize("which", ["train", "others"])
def test_embedded_asvs(aam, study, placer, tmp_path, which):
    """All known, and known and new ones."""
    table = study.table.select(getattr(study, which))
    path = write_table(tmp_path / "table.biom", table)
    words = ("embed", "--asvs", "--model", study.run, "--table", path)
    for output in ("asvs.npz", "asvs.tsv"):
        assert aam(*words, "--output", tmp_path / output, files=False) == 0
    with np.load(tmp_path / "asvs.npz") as arrays:
        asvs = dict(arrays)
    placed = placer.place(table.feature_ids)
    assert asvs["sequences"].tolist() == list(table.feature_ids)
    assert asvs["vectors"].shape == (len(table.feature_ids), DIM)
    assert asvs["nearest"].tolist() == [placer.clades.sequences[int(at)] for at in placed.nearest]
    assert (asvs["edits"] == 0).all() == (which == "train")
    np.testing.assert_allclose(asvs["edits"], placed.distance)
    np.testing.assert_allclose(asvs["support"], placed.support, atol=1e-5)
    assert len(np.unique(asvs["vectors"].round(5), axis=0)) > 0.9 * len(table.feature_ids)
    header, rows = read_rows(tmp_path / "asvs.tsv")
    assert header[:4] == ["sequence", "nearest", "edits", "support"]
    assert list(rows) == list(table.feature_ids)
    for at, row in enumerate(rows.values()):
        assert row[0] == asvs["nearest"][at]
        expected = [asvs["edits"][at], asvs["support"][at], *asvs["vectors"][at]]
        np.testing.assert_allclose(np.array(row[1:], dtype=float), expected, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------- odd trees
@pytest.mark.parametrize("shape", ["star", "three tips", "one clade"])
def test_trees_with_few_clades_teach_and_place_and_one_without_is_refused(
    aam, study, tmp_path, capsys, shape
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
    table = FeatureTable(
        tuple(f"s{at}" for at in range(8)), names, type(study.table.counts)(counts), "table"
    )
    path = write_table(tmp_path / "table.biom", table)
    run, output = tmp_path / "run", tmp_path / "out.h5"
    words = ("--table", path, "--tree", tmp_path / "tree.nwk", "--encoder", "wide")
    more = ("--epochs", 1, "--batch-size", 3, "--output-dir", run)
    code = aam("pretrain", *words, *more, files=False, filling=True)
    if shape == "star":
        assert code == 2 and "no clade to learn" in capsys.readouterr().err
        return
    assert code == 0
    changed = [one[:20] + ("A" if one[20] != "A" else "C") + one[21:] for one in names]
    path = write_table(tmp_path / "changed.biom", table, changed)
    assert aam("unifrac", "--table", path, "--model", run, "--output", output, files=False) == 0
    found = read_distances(output)[1]
    assert np.isfinite(found).all() and (found[0] < 0.9).all()
    output = tmp_path / "out.npz"
    assert aam("embed", "--table", path, "--model", run, "--output", output, files=False) == 0
    placer = load_placer(run, torch.device("cpu"))
    placed = placer.place(changed)
    assert placed.usable.all()
    assert [placer.clades.sequences[int(at)] for at in placed.nearest] == names


def test_the_saved_tree_is_that_of_the_training_asvs(study, placer):
    table = study.table.select(study.train)
    expected = Clades(UniFrac(table, study.files.tree).tree)
    for name in ("parent", "length", "tip_start", "tip_stop"):
        np.testing.assert_allclose(
            getattr(placer.clades.tree, name), getattr(expected.tree, name), atol=1e-12
        )
    assert len(placer.clades) == len(expected) > 100
