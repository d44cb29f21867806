"""A small microbial community that is simulated: feature table, phylogeny and metadata.

What it shares with a real study, so that a run on it says something:

* the phylogeny has many close relatives and few deep lineages, and its rates differ between
  lineages; sequences evolve along it with conserved and variable positions;
* what an ASV prefers (its optimum on an environmental gradient, its response to each diagnosis,
  how common it is) evolves along the tree too, so relatives are found in similar samples;
* a core of ASVs is in most samples, most ASVs are in few, abundances are log-normal, sequencing
  depth varies, and what is too rare for the depth is not seen;
* subjects give several samples that resemble each other.

The metadata depend on the community as follows. ``age`` (years) is the position of the sample
on the gradient, shifted by ``site``: the same community means another age at another site, so a
model that is given the site predicts better. ``diagnosis`` acts on the ASVs that respond to it.
"""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse

from aam.data.newick import newick
from aam.errors import InputError
from aam.files import write_table

DIAGNOSES = ("healthy", "colitis", "crohn")
SITES = ("Boston", "Lima", "Nairobi", "Oslo")

_DIAGNOSIS_SHARE = (0.5, 0.28, 0.22)
_DIAGNOSIS_RICHNESS = (1.08, 1.0, 0.82)  # relative to the mean: disease goes with fewer ASVs
_SITE_YEARS = (-9.0, -3.0, 3.0, 9.0)  # that a site adds to the age that a community stands for
_CORE_SHARE = 0.025  # of the ASVs, which nearly every sample has

_BASES = np.frombuffer(b"ACGT", dtype=np.uint8)


class DemoFiles(NamedTuple):
    """The files of a simulated community: a BIOM 2.1 table, a Newick tree, QIIME 2 metadata."""

    table: Path
    tree: Path
    metadata: Path


# A binary tree; nodes 0 to tips - 1 are the tips, the last node is the root.
_Tree = namedtuple("_Tree", "parent length tips")

# What is true of each sample (n,) before its community is drawn.
_Samples = namedtuple("_Samples", "subject visit site diagnosis gradient age")


def simulate_community(
    folder: str | Path,  # made if it is not there
    *,
    samples: int = 240,
    asvs: int = 700,  # tips of the tree; the table has those that were seen in a sample
    asvs_per_sample: int = 60,  # that are there on average, before rare ones are missed
    sequence_length: int = 100,
    visits: int = 3,  # samples a subject
    seed: int = 0,
) -> DemoFiles:
    """Simulate a study and write ``table.biom``, ``tree.nwk`` and ``metadata.tsv``.

    The result is a function of the arguments. ``metadata.tsv`` has the columns ``subject``,
    ``site``, ``diagnosis`` and ``age`` (years).
    """
    import biom
    import h5py

    if samples < 2 or visits < 1 or sequence_length < 20 or not 2 <= 2 * asvs_per_sample <= asvs:
        raise InputError(
            "a simulated study needs samples >= 2, visits >= 1, a sequence length >= 20 and "
            f"asvs >= 2 x asvs-per-sample; got {samples}, {visits}, {sequence_length}, {asvs} and "
            f"{asvs_per_sample}"
        )
    generator = np.random.default_rng(seed)
    tree = _grow_tree(asvs, generator)
    sequences = _evolve_sequences(tree, sequence_length, generator)
    drawn = _draw_samples(samples, visits, generator)
    counts = _draw_counts(tree, drawn, asvs_per_sample, generator)
    rows = [
        [f"S{who:03d}.{visit}", f"P{who:03d}", SITES[site], DIAGNOSES[diagnosis], f"{age:.1f}"]
        for who, visit, site, diagnosis, _, age in zip(*drawn, strict=True)
    ]
    kinds = ["#q2:types", "categorical", "categorical", "categorical", "numeric"]
    header = ["sample-id", "subject", "site", "diagnosis", "age"]
    seen = np.flatnonzero(counts.sum(axis=0))
    reads, names = scipy.sparse.csr_matrix(counts[:, seen].T), [sequences[tip] for tip in seen]
    table = biom.Table(reads, names, [row[0] for row in rows])
    files = DemoFiles(*(Path(folder) / name for name in ("table.biom", "tree.nwk", "metadata.tsv")))
    try:
        files.tree.parent.mkdir(parents=True, exist_ok=True)
        files.tree.write_text(newick(tree.parent, tree.length, sequences, ".6g"), encoding="utf-8")
        write_table(files.metadata, header, [kinds, *rows])
        with h5py.File(files.table, "w") as file:
            table.to_hdf5(file, "aam demo")
    except OSError as error:
        raise InputError(f"{folder}: cannot write the simulated community ({error})") from error
    return files


def _grow_tree(tips: int, generator: np.random.Generator) -> _Tree:
    """A coalescent backwards in time whose lineages meet more evenly than in Kingman's.

    With k lineages the waiting time goes as k**-1.3 (Kingman: k**-2): relatives at every depth.
    Branch rates are gamma distributed (relaxed clock). The mean distance from root to tip is 0.8
    substitutions a variable site.
    """
    nodes = 2 * tips - 1
    parent = np.full(nodes, -1, dtype=np.int64)
    height = np.zeros(nodes)
    lineages = list(range(tips))
    time = 0.0
    for node in range(tips, nodes):
        time += generator.exponential(len(lineages) ** -1.3)
        first, second = generator.choice(len(lineages), 2, replace=False)
        parent[[lineages[first], lineages[second]]] = node
        height[node] = time
        lineages[first] = node
        lineages[second] = lineages[-1]
        lineages.pop()
    length = np.zeros(nodes)
    length[:-1] = (height[parent[:-1]] - height[:-1]) * generator.gamma(4.0, 0.25, nodes - 1)
    return _Tree(parent, length * (0.8 / height[-1]), tips)


def _evolve_sequences(tree: _Tree, length: int, generator: np.random.Generator) -> list[str]:
    """Distinct sequences (tips): gamma site rates, a quarter of the positions nearly constant."""
    rates = generator.gamma(0.6, 1.0 / 0.6, length)
    rates[generator.random(length) < 0.25] *= 0.02
    transition = np.array([2, 3, 0, 1])  # A<->G, C<->T
    bases = np.zeros((len(tree.parent), length), dtype=np.uint8)
    bases[-1] = generator.choice(4, length, p=(0.25, 0.22, 0.31, 0.22))
    for node in range(len(tree.parent) - 2, -1, -1):
        inherited = bases[tree.parent[node]]
        changes = generator.random(length) < -np.expm1(-rates * tree.length[node])
        is_transition = generator.random(length) < 0.6
        anything = generator.integers(0, 4, length)
        bases[node] = np.where(
            changes, np.where(is_transition, transition[inherited], anything), inherited
        )
    seen: set[bytes] = set()
    for row in bases[: tree.tips]:
        while row.tobytes() in seen:  # equal tips get further substitutions
            position = generator.choice(length, p=rates / rates.sum())
            row[position] = (row[position] + generator.integers(1, 4)) % 4
        seen.add(row.tobytes())
    return [_BASES[row].tobytes().decode() for row in bases[: tree.tips]]


def _evolve_trait(tree: _Tree, generator: np.random.Generator, heritability: float) -> np.ndarray:
    """A trait (tips,) of mean 0 and variance 1 by Brownian motion, plus what is not inherited."""
    trait = np.zeros(len(tree.parent))
    steps = generator.standard_normal(len(tree.parent)) * np.sqrt(tree.length)
    for node in range(len(tree.parent) - 2, -1, -1):
        trait[node] = trait[tree.parent[node]] + steps[node]
    values = trait[: tree.tips]
    inherited = (values - values.mean()) / max(float(values.std()), 1e-12)
    own = generator.standard_normal(tree.tips)
    return np.sqrt(heritability) * inherited + np.sqrt(1.0 - heritability) * own


def _draw_samples(samples: int, visits: int, generator: np.random.Generator) -> _Samples:
    """Subjects with a site, a diagnosis and a place on the gradient; visits differ a little."""
    subjects = -(-samples // visits)
    subject = np.repeat(np.arange(subjects), visits)[:samples]
    visit = np.tile(np.arange(visits), subjects)[:samples]
    site = generator.permutation(np.arange(subjects) % len(SITES))[subject]
    # Fixed shares, so that a small study has every class.
    share = (np.arange(subjects) + 0.5) / subjects
    diagnosis = generator.permutation(np.searchsorted(np.cumsum(_DIAGNOSIS_SHARE)[:-1], share))
    gradient = generator.uniform(-1.7, 1.7, subjects)[subject]
    gradient = gradient + 0.15 * generator.standard_normal(samples)
    age = 47.0 + 11.0 * gradient + np.array(_SITE_YEARS)[site]
    age = np.maximum(age + 2.0 * generator.standard_normal(samples), 1.0)
    return _Samples(subject, visit, site, diagnosis[subject], gradient, age)


def _draw_counts(
    tree: _Tree, drawn: _Samples, asvs_per_sample: int, generator: np.random.Generator
) -> scipy.sparse.csr_array:
    """Reads (samples, tips) int64: suitability decides presence, abundance follows it."""
    samples, tips = len(drawn.subject), tree.tips
    commonness = _evolve_trait(tree, generator, 0.3)
    core = commonness > np.quantile(commonness, 1.0 - _CORE_SHARE)
    suitability = np.tile(commonness + 2.5 * core, (samples, 1))
    optimum = 1.6 * _evolve_trait(tree, generator, 0.9)
    suitability -= 0.55 * (drawn.gradient[:, None] - optimum) ** 2
    responses = [_evolve_trait(tree, generator, 0.85) for _ in DIAGNOSES[1:]]
    response = np.stack([np.zeros(tips), *responses])
    suitability += 0.65 * response[drawn.diagnosis]
    subjects = int(drawn.subject[-1]) + 1
    suitability += 1.2 * generator.standard_normal((subjects, tips))[drawn.subject]
    suitability += 0.9 * generator.standard_normal((samples, tips))
    richness = asvs_per_sample * np.array(_DIAGNOSIS_RICHNESS)[drawn.diagnosis]
    richness = richness * np.exp(0.45 * generator.standard_normal(samples))
    richness = np.clip(richness, 2, tips - 1).astype(np.int64)
    depth = (8000 * np.exp(0.5 * generator.standard_normal(samples))).astype(np.int64)
    rows = []
    for row in range(samples):
        threshold = np.partition(suitability[row], tips - richness[row])[tips - richness[row]]
        above = suitability[row] - threshold
        weight = np.where(above >= 0, np.exp(0.9 * above + generator.standard_normal(tips)), 0.0)
        rows.append(generator.multinomial(depth[row], weight / weight.sum()))
    return scipy.sparse.csr_array(np.stack(rows).astype(np.int64))
