"""What `aam pretrain` reaches on samples and ASVs that it has not seen, beside what costs nothing.

    python -m benchmarks.pretraining runs/ibd                        # six splits, wide path
    python -m benchmarks.pretraining runs/t --seeds 1 --encoder transformer --minutes 20

Of the 428 samples of `ibd` whole subjects are held out first (77 samples), then 60 of the others at
random; 291 are trained on, by the command line. Every number stands beside nearest-neighbour
placement on the same split. Options not listed here go to `aam pretrain`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aam.data.clades import places_by_tree
from aam.data.metadata import read_metadata
from aam.data.neighbours import Found
from aam.data.splits import split_samples
from aam.data.table import FeatureTable, read_table
from aam.data.texts import Texts
from aam.data.tree import Phylogeny, read_tree
from aam.data.unifrac import UniFrac
from aam.evaluation import metrics
from aam.evaluation.loaded import load
from aam.evaluation.placer import Placer, unifrac_by_model
from benchmarks import machine

DATA = Path(os.environ.get("AAM_DATA") or machine.ROOT.parent / "shared" / "data") / "ibd"
TABLE = "table-rarefied-5000.biom"
SUBJECT = "host_subject_id"
FAR = 6.0  # edits


def parts(folder: Path, seed: int = 1) -> dict[str, tuple[str, ...]]:
    """Ids of the samples to train on, and of the two held-out parts."""
    ids = read_table(folder / TABLE).sample_ids
    groups = read_metadata(folder / "metadata.tsv").select(ids).text(SUBJECT)
    by_subject = split_samples(ids, validation_fraction=0.18, seed=seed, groups=groups)
    rest = by_subject.train
    at_random = split_samples(rest, validation_fraction=60 / len(rest), seed=seed)
    return {
        "train": at_random.train,
        "random": at_random.validation,
        "new-subjects": by_subject.validation,
    }


# ------------------------------------------------------------------------- damaged sequences
def damaged(sequences: Sequence[str], generator: np.random.Generator) -> Iterator[tuple[str, list]]:
    """The sequences as other pipelines would have cut them, by what was done to them."""

    def bases(count: int) -> str:
        return "".join(generator.choice(list("ACGT"), count))

    def indels(one: str, count: int) -> str:
        letters = list(one)
        for place in generator.integers(5, len(one) - 5, count):
            if generator.random() < 0.5:
                del letters[place]
            else:
                letters.insert(place, bases(1))
        return "".join(letters)

    yield "trimmed to 80", [one[:80] for one in sequences]
    yield "first 5 lost", [one[5:] for one in sequences]
    yield "shifted by 5", [bases(5) + one[:-5] for one in sequences]
    for count in (1, 2, 3):
        yield f"{count} indels", [indels(one, count) for one in sequences]


# ------------------------------------------------------------------------------ measuring
@dataclass(frozen=True)
class Held:
    """A held-out part: its samples, and what the whole tree says of them."""

    table: FeatureTable
    truth: UniFrac
    rows: np.ndarray
    groups: list[str]
    tree: Phylogeny

    def distances(self, found: UniFrac) -> dict[str, float | None]:
        """How close distances and Faith PD come to those of the whole tree."""
        own = np.arange(len(self.rows))
        predicted, true = found.pairwise(own), self.truth.pairwise(self.rows)
        weighted = "weighted-normalized"
        return {
            "r": metrics.mantel_r(predicted, true),
            "r between": metrics.mantel_r(predicted, true, groups=self.groups),
            "MAE": error(predicted, true),
            "weighted MAE": error(
                found.pairwise(own, weighted), self.truth.pairwise(self.rows, weighted)
            ),
            "Faith R2": metrics.r2(found.faith_pd(own), self.truth.faith_pd(self.rows)),
        }


def error(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """Mean absolute error of distances."""
    return metrics.mean_absolute_error(metrics.condensed(predicted), metrics.condensed(true))


class NetworkAlone(Placer):
    """The network decides on the clades, without the neighbours' vote."""

    def logits(self, near: Found, clades: np.ndarray) -> np.ndarray:
        """The network's own."""
        return self.network_logits(near, clades)


def measure(placer: Placer, held: Held, *, damage: bool) -> dict[str, dict[str, float | None]]:
    """All measurements of a held-out part, by who places."""
    table, clades = held.table, placer.clades
    names = Texts.of(table.feature_ids)
    nearest = placer.nearest_neighbour()
    network = NetworkAlone(placer.model, placer.placement, placer.neighbours)
    found = placer.find(names)
    new = found[0] < 0
    truth = places_by_tree(held.tree, clades, names.take(new))
    assert truth is not None
    results: dict[str, dict[str, float | None]] = {}
    for name, who in (("placement", nearest), ("model", placer), ("network", network)):
        placed = who.place(names, found)
        jaccard = clades.jaccard(clades.ends(placed.clade[new]), truth)
        results[name] = held.distances(unifrac_by_model(table, clades, placed))
        far = placed.distance[new] > FAR
        results[name] |= {"Jaccard": float(jaccard.mean()), "far": float(jaccard[far].mean())}
    # The network alone places known ASVs too.
    everything = placer.neighbours.find(names)
    unknown = np.full(len(names), -1), everything
    placed = network.place(names, unknown)
    results["network, known ASVs too"] = held.distances(unifrac_by_model(table, clades, placed))
    if damage:
        generator = np.random.default_rng(0)
        for what, sequences in damaged(list(names), generator):
            # Two that became equal stay two: a letter of their own would change them.
            placed = placer.place(sequences)
            jaccard = clades.jaccard(clades.ends(placed.clade[new]), truth)
            other = FeatureTable(table.sample_ids, names, table.counts, table.source)
            results[what] = held.distances(unifrac_by_model(other, clades, placed))
            results[what]["Jaccard"] = float(jaccard.mean())
    return results


# ------------------------------------------------------------------------------- running
def aam(*arguments: str | Path) -> float:
    """Run a command of `aam`, shown first as it would be typed; seconds it took."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ python -m aam.train {' '.join(words)}", flush=True)
    start = time.monotonic()
    log = subprocess.run(
        [sys.executable, "-m", "aam.train", *words], check=True, capture_output=True, text=True
    )
    print("\n".join([*log.stderr.splitlines()[-3:], log.stdout]), flush=True)
    return time.monotonic() - start


def pretrained(
    output: Path, folder: Path, seed: int, train: int | None, more: Sequence[str]
) -> tuple[Path, float]:
    """Pretrain on a split, on some of its training samples if a number is given."""
    ids = parts(folder, seed)
    if train is not None:
        order = np.random.default_rng(seed).permutation(len(ids["train"]))[:train]
        ids["train"] = tuple(ids["train"][row] for row in np.sort(order))
    output.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, own in ids.items():
        files[name] = output / f"{seed}-{name}.txt"
        files[name].write_text("\n".join(own) + "\n")
    run = output / (f"seed-{seed}" if train is None else f"seed-{seed}-of-{train}")
    seconds = aam(
        "pretrain", "--table", folder / TABLE, "--tree", folder / "tree.nwk",
        "--train-ids", files["train"], "--validation-ids", files["random"],
        "--output-dir", run, "--overwrite", *more,
    )  # fmt: skip
    return run, seconds


def held_out(folder: Path, seed: int) -> Iterator[tuple[str, Held]]:
    """The two held-out parts of a split."""
    table, tree = read_table(folder / TABLE), read_tree(folder / "tree.nwk")
    truth = UniFrac(table, tree)
    metadata = read_metadata(folder / "metadata.tsv")
    for name, ids in parts(folder, seed).items():
        if name != "train":
            groups = [str(one) for one in metadata.select(ids).text(SUBJECT)]
            yield name, Held(table.select(ids), truth, table.rows_of(ids), groups, tree)


def print_table(results: dict[str, dict[str, float | None]]) -> None:
    """One line for each of who was measured."""
    for name, found in results.items():
        shown = "  ".join(
            f"{key} {'-' if value is None else f'{value:.4f}'}" for key, value in found.items()
        )
        print(f"  {name:24}{shown}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Split, pretrain, and measure both held-out parts, for some seeds of the split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the runs")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of ibd")
    parser.add_argument("--seeds", default="1,2,3,4,5,6", help="of the split")
    parser.add_argument("--train", type=int, help="train on so many samples only")
    parser.add_argument("--damage", action="store_true", help="place cut and shifted sequences too")
    options, more = parser.parse_known_args(arguments)
    for name, value in machine.facts().items():
        print(f"{name}: {value}")
    gathered: dict[str, list[dict[str, dict[str, float | None]]]] = {}
    for seed in map(int, options.seeds.split(",")):
        run, seconds = pretrained(options.output, options.data, seed, options.train, more)
        print(f"seed {seed}: {seconds:.0f} s from the command to the report")
        placer = load(run, "cpu").placer
        for name, held in held_out(options.data, seed):
            results = measure(placer, held, damage=options.damage)
            print(f"seed {seed}, {name}:")
            print_table(results)
            gathered.setdefault(name, []).append(results)
    for name, each in gathered.items():
        print(f"\nmean of {len(each)} splits, {name}:")
        print_table(mean_of(each))
    (options.output / "results.json").write_text(json.dumps(gathered, indent=1))


def mean_of(each: Sequence[dict[str, dict[str, float | None]]]) -> dict[str, dict]:
    """Means over splits of numbers that are there in all of them."""

    def average(values: list) -> float | None:
        return None if None in values else float(np.mean(values))

    return {
        name: {key: average([one[name][key] for one in each]) for key in found}
        for name, found in each[0].items()
    }


if __name__ == "__main__":
    main()
