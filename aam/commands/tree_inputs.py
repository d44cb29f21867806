"""What a tree teaches: the ASVs that are known, and those that are left out to be placed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from aam.commands.inputs import attach_distances, evaluation_rows, split
from aam.config import PretrainConfig
from aam.data.clades import MOST_CLADES, TreeSplit, split_tree
from aam.data.samples import Samples, read_samples
from aam.data.sequences import is_dna, read_fasta
from aam.data.splits import Split
from aam.data.texts import Texts, match_names
from aam.data.tree import Phylogeny, read_tree
from aam.data.unifrac import UniFrac
from aam.errors import DataFact, InputError, dropped, name_some
from aam.evaluation.baselines import CHECK_SEED, EvaluationSubset

LEAST_TIPS = 3
LEFT_OUT = 2000  # most tips of a reference that are left out, and most ASVs that validation places
MOST_PLACED = 5000  # new ASVs of validation samples that are placed in the end


@dataclass(frozen=True)
class TreeInputs:
    """What is learned of a tree."""

    known: TreeSplit  # the ASVs that train, and where the others join them
    parts: Split  # names of the samples, or of the sequences of a reference
    subset: EvaluationSubset | None  # samples whose distances are compared; of a table
    facts: list[DataFact]
    warnings: list[str] = field(default_factory=list)


def read_table_and_tree(config: PretrainConfig) -> TreeInputs:
    """ASVs of a table's training samples are known, those of validation samples alone left out."""
    data, metadata, seed = config.data, config.metadata, config.run.seed
    samples = read_samples(data, seed, metadata=metadata.metadata)
    truth = attach_distances(samples, config.distances, None, data)
    assert isinstance(truth, UniFrac)
    parts = split(samples, metadata, seed)
    train_rows, table = samples.rows(parts.train), samples.table
    seen = np.zeros(len(table.feature_ids), dtype=bool)
    seen[table.counts[train_rows].indices] = True
    columns = np.flatnonzero(truth.tip_of_column >= 0)
    columns = columns[np.argsort(truth.tip_of_column[columns])]  # of each tip
    by_sequence = replace(truth.tree, tip_names=Texts.of(table.feature_ids).take(columns))
    known, facts = split_known(by_sequence, seen[columns], "training ASVs", data.max_bp)
    rows = placed_rows(samples, evaluation_rows(samples, parts), seen)
    subset = EvaluationSubset(samples, truth, rows, train_rows, metadata.group_column)
    return TreeInputs(known, parts, subset, samples.facts + facts, samples.warnings)


def placed_rows(samples: Samples, rows: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Validation samples, of rows (n,), whose new ASVs are placed in the end.

    `seen` (features,) are the ASVs of training samples. What is left out is a fact.
    """
    order = np.random.default_rng(CHECK_SEED).permutation(rows)
    counts = samples.table.counts[order][:, ~seen]
    first = np.unique(counts.indices, return_index=True)[1]  # where each new ASV comes first
    new = np.histogram(first, counts.indptr)[0]
    kept = order[: max(2, (np.cumsum(new) <= MOST_PLACED).sum())]
    if len(kept) < len(rows):
        what = f"validation samples not looked at: {MOST_PLACED:,} new ASVs are placed"
        samples.facts.append(DataFact(what, len(rows) - len(kept), "drawn at random", "cut"))
    return np.sort(kept)


def read_reference(config: PretrainConfig) -> TreeInputs:
    """A tree and the sequences of its tips, without a table; some tips are left out."""
    path, fasta = config.distances.tree, config.data.sequences
    assert path is not None and fasta is not None
    sequences, facts = distinct_sequences(read_fasta(fasta), str(fasta))
    ids, tree = list(sequences), read_tree(path)
    tips = match_names(ids, tree.tip_names)
    missing = [ids[place] for place in np.flatnonzero(tips < 0)]
    if missing and not config.distances.drop_missing_tips:
        raise InputError(
            f"{path}: {len(missing)} of {len(ids)} sequences of {fasta} are not tips of the tree "
            f"({name_some(missing)}); leave them out with --drop-missing-tips"
        )
    facts += dropped("sequences that are not in the tree", missing)
    on_tree = np.zeros(len(tree.tip_names), dtype=bool)
    on_tree[tips[tips >= 0]] = True
    tree = tree.shear(on_tree)
    names = np.array(list(tree.tip_names), dtype=object)
    facts.append(DataFact("sequences on the tree", len(names), str(fasta)))
    count = min(round(config.metadata.validation_fraction * len(names)), LEFT_OUT)
    is_known = np.ones(len(names), dtype=bool)
    is_known[np.random.default_rng(config.run.seed).permutation(len(names))[:count]] = False
    what = f"training sequences of {fasta}"
    known, more = split_known(tree.rename(sequences), is_known, what, config.data.max_bp)
    parts = Split(tuple(names[is_known]), tuple(names[~is_known]))
    return TreeInputs(known, parts, None, facts + more)


def distinct_sequences(
    sequences: dict[str, str], source: str
) -> tuple[dict[str, str], list[DataFact]]:
    """Sequences of A, C, G and T, each once; what is left out is counted."""
    dna = {name: one for name, one in sequences.items() if is_dna(one)}
    first_with = {one: name for name, one in reversed(dna.items())}
    kept = {name: one for name, one in dna.items() if first_with[one] == name}
    others, repeats = [n for n in sequences if n not in dna], [n for n in dna if n not in kept]
    facts = dropped(f"sequences with other letters than A, C, G and T ({source})", others)
    return kept, facts + dropped(f"sequences that repeat another ({source})", repeats)


def split_known(
    tree: Phylogeny, is_known: np.ndarray, what: str, max_bp: int
) -> tuple[TreeSplit, list[DataFact]]:
    """The clades of a tree's known tips, where the others join, and facts of what is too much.

    Args:
        tree: its tips are named by their sequences.
        is_known: (tips,) bool.
        what: what the known tips are, for messages.
        max_bp: bases that are kept of a sequence.
    """
    count = int(is_known.sum())
    if count < LEAST_TIPS:
        raise InputError(
            f"{tree.source}: {count} {what} are tips of the tree; at least {LEAST_TIPS} are "
            "needed: use the tree that was made for these sequences"
        )
    known = split_tree(tree, is_known)
    clades, lengths = known.clades, known.clades.sequences.lengths
    if not len(clades):
        raise InputError(
            f"{tree.source}: has no inner branch with a length: there is no clade to learn"
        )
    branches = int((clades.tree.tip_stop - clades.tree.tip_start > 1).sum())
    found = (
        (f"sequences cut at {max_bp} bases", (lengths > max_bp).sum(), f"longest {lengths.max()}"),
        (
            f"branches that are no clade: {MOST_CLADES:,} with most members are learned",
            branches - MOST_CLADES if len(clades) == MOST_CLADES else 0,
            "nearest known ASVs decide",
        ),
        (
            f"new ASVs whose clades are not measured: {LEFT_OUT:,} are",
            len(known.unseen) - LEFT_OUT,
            "drawn at random",
        ),
    )
    return known, [DataFact(one, int(n), detail, "cut") for one, n, detail in found if n > 0]
