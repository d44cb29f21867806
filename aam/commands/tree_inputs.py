"""What a tree teaches: the ASVs that are known, and those that are left out to be placed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from aam.commands.inputs import attach_tree, evaluation_rows, split
from aam.config import PretrainConfig
from aam.data.clades import MOST_CLADES, TreeSplit, split_tree
from aam.data.samples import Samples, read_samples
from aam.data.sequences import is_dna, read_fasta
from aam.data.splits import Split
from aam.data.texts import Texts, match_names
from aam.data.tree import read_tree
from aam.errors import DataFact, InputError, name_some
from aam.evaluation.results import CHECK_SEED, EvaluationSubset

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
    """ASVs of a table's training samples are known, those of validation samples alone left out.

    Raises:
        InputError: the files cannot be used, or too few ASVs are on the tree.
    """
    data, path = config.data, config.distances.tree
    assert data.table is not None and path is not None
    samples = read_samples(data, config.run.seed, metadata=config.metadata.metadata)
    tree = read_tree(path, sequences=data.sequences)
    truth = attach_tree(samples, tree, config.distances.drop_missing_tips)
    parts = split(samples, config.metadata, config.run.seed)
    train_rows = samples.rows(parts.train)
    names = samples.table.feature_ids
    seen = np.zeros(len(names), dtype=bool)
    seen[samples.table.counts[train_rows].indices] = True
    columns = np.flatnonzero(truth.tip_of_column >= 0)
    columns = columns[np.argsort(truth.tip_of_column[columns])]  # of each tip
    require_tips(truth.tree.source, int(seen[columns].sum()), "training ASVs")
    by_sequence = replace(truth.tree, tip_names=Texts.of(names).take(columns))
    known = split_tree(by_sequence, seen[columns])
    rows = placed_rows(samples, evaluation_rows(samples, parts), seen)
    samples.facts += clade_facts(known, config.data.max_bp)
    group_column = config.metadata.group_column
    subset = EvaluationSubset(samples, truth, rows, train_rows, group_column)
    return TreeInputs(known, parts, subset, samples.facts, samples.warnings)


def placed_rows(samples: Samples, rows: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Validation samples whose new ASVs are placed in the end; what is left out is a fact.

    Args:
        samples: of the table.
        rows: (n,) rows of the validation samples.
        seen: (features,) bool, ASVs of the training samples.
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
    """A tree and the sequences of its tips, without a table; some tips are left out.

    Raises:
        InputError: files cannot be used, or sequences are not tips.
    """
    path, fasta = config.distances.tree, config.data.sequences
    assert path is not None and fasta is not None
    sequences, facts = distinct_sequences(read_fasta(fasta), str(fasta))
    tree = read_tree(path)
    ids = Texts.of(list(sequences))
    tips = match_names(ids, tree.tip_names)
    missing = np.flatnonzero(tips < 0)
    if len(missing):
        named = name_some([ids[int(one)] for one in missing[:3]])
        if not config.distances.drop_missing_tips:
            raise InputError(
                f"{path}: {len(missing)} of {len(ids)} sequences of {fasta} are not tips of the "
                f"tree ({named}); leave them out with --drop-missing-tips"
            )
        facts.append(DataFact("sequences that are not in the tree", len(missing), named, "dropped"))
    on_tree = np.zeros(len(tree.tip_names), dtype=bool)
    on_tree[tips[tips >= 0]] = True
    require_tips(str(path), int(on_tree.sum()), f"sequences of {fasta}")
    tree = tree.shear(on_tree)
    names = np.array(list(tree.tip_names), dtype=object)
    count = min(round(config.metadata.validation_fraction * len(names)), LEFT_OUT)
    is_known = np.ones(len(names), dtype=bool)
    is_known[np.random.default_rng(config.run.seed).permutation(len(names))[:count]] = False
    facts.append(DataFact("sequences on the tree", len(names), str(fasta)))
    known = split_tree(tree.rename(sequences), is_known)
    facts += clade_facts(known, config.data.max_bp)
    parts = Split(tuple(names[is_known]), tuple(names[~is_known]))
    return TreeInputs(known, parts, None, facts)


def distinct_sequences(
    sequences: dict[str, str], source: str
) -> tuple[dict[str, str], list[DataFact]]:
    """Sequences of A, C, G and T, each once; what is left out is counted."""
    dna = {name: one for name, one in sequences.items() if is_dna(one)}
    first_with = {one: name for name, one in reversed(dna.items())}
    left_out = {
        "sequences with other letters than A, C, G and T": [n for n in sequences if n not in dna],
        "sequences that repeat another": [n for n, one in dna.items() if first_with[one] != n],
    }
    facts = [
        DataFact(f"{what} ({source})", len(names), name_some(names), "dropped")
        for what, names in left_out.items()
        if names
    ]
    return {name: one for name, one in dna.items() if first_with[one] == name}, facts


def require_tips(source: str, count: int, what: str) -> None:
    """Refuse a tree that has next to nothing of what is to be learned."""
    if count < LEAST_TIPS:
        raise InputError(
            f"{source}: {count} {what} are tips of the tree; at least {LEAST_TIPS} are needed: "
            "use the tree that was made for these sequences"
        )


def clade_facts(known: TreeSplit, max_bp: int) -> list[DataFact]:
    """What is cut, and what is too much to be learned or to be looked at in every validation.

    Raises:
        InputError: the tree has no clade.
    """
    clades, tree = known.clades, known.clades.tree
    if not len(clades):
        raise InputError(
            f"{tree.source}: has no inner branch with a length: there is no clade to learn"
        )
    lengths = clades.sequences.lengths
    cut, longest = int((lengths > max_bp).sum()), int(lengths.max())
    branches = int((tree.tip_stop - tree.tip_start > 1).sum())
    lost = max(0, branches - MOST_CLADES) if len(clades) == MOST_CLADES else 0
    unplaced = max(0, len(known.unseen) - LEFT_OUT)
    found = (
        (f"sequences cut at {max_bp} bases", cut, f"longest {longest}"),
        (
            f"branches that are no clade: {MOST_CLADES:,} with most members are learned", lost,
            "nearest known ASVs decide",
        ),
        (f"new ASVs whose clades are not measured: {LEFT_OUT:,} are", unplaced, "drawn at random"),
    )  # fmt: skip
    return [DataFact(what, count, detail, "cut") for what, count, detail in found if count]
