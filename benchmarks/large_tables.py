"""Large tables: how long the index takes, how soon training starts, what memory it needs.

    python -m benchmarks.large_tables FOLDER --samples 10000 --features 100000
    python -m benchmarks.large_tables FOLDER --samples 100000 --features 1000000 --only always

Makes a table and a tree in FOLDER (kept there for the next time; a million features take 1 GB),
then runs `aam pretrain --tree` on the wide path alone, each way in a process of its own: table in
memory (`never`), while the index is built (`build`), and from the index (`always`).
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp

ASVS_PER_SAMPLE = 100
CORE = 50  # the most frequent features make half of the entries: 1 feature in so many
CLADE = 500  # neighbouring tips with a common ancestor sequence
VALIDATION = 400
SMALL_MODEL = ["--encoder", "wide", "--no-tensorboard", "--epochs", "1"]


# ---------------------------------------------------------------------------------- simulation
def simulate(folder: Path, samples: int, features: int, seed: int = 0) -> tuple[Path, Path]:
    """Write a table and its tree, unless they are there.

    Returns:
        Paths of the BIOM 2.1 table and of the Newick tree.
    """
    table, tree = (folder / f"{samples}x{features}.{kind}" for kind in ("biom", "nwk"))
    if not tree.exists():
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(seed)
        names = sequences(generator, features)
        write_table(table, names, random_counts(generator, samples, features))
        write_tree(tree, names, generator)
    return table, tree


def sequences(generator: np.random.Generator, number: int) -> list[bytes]:
    """Distinct DNA of 100 to 150 bases; clades share an ancestor, and all share their start."""
    bases = np.frombuffer(b"ACGT", dtype=np.uint8)
    root = generator.integers(0, 4, 150)
    found: dict[bytes, None] = {}
    while len(found) < number:
        length = int(generator.integers(100, 151))
        ancestor = np.where(generator.random(150) < 0.25, generator.integers(0, 4, 150), root)
        ancestor[:12] = root[:12]
        block = np.repeat(ancestor[None, :length], CLADE, axis=0)
        changed = generator.random(block.shape) < 0.06
        block[changed] = generator.integers(0, 4, int(changed.sum()))
        found.update(dict.fromkeys(row.tobytes() for row in bases[block]))
    return list(found)[:number]


def random_counts(generator: np.random.Generator, samples: int, features: int) -> sp.csr_array:
    """Log-normal reads; every feature is in some sample, a core of them in many."""
    number = generator.poisson(ASVS_PER_SAMPLE, samples)
    rows = np.repeat(np.arange(samples), number)
    columns = generator.integers(0, features, len(rows))
    columns[: min(features, len(rows))] = generator.permutation(features)[: len(rows)]
    columns = columns[generator.permutation(len(rows))]
    core = generator.permutation(features)[: max(1, features // CORE)]
    often = generator.random(len(rows)) < 0.5
    often &= np.bincount(columns, minlength=features)[columns] > 1
    columns[often] = core[(generator.random(int(often.sum())) ** 3 * len(core)).astype(np.int64)]
    reads = np.ceil(generator.lognormal(3.2, 1.4, len(rows)))
    counts = sp.coo_array((reads, (rows, columns)), (samples, features)).tocsr()
    counts.sum_duplicates()
    return counts


def write_table(path: Path, names: list[bytes], counts: sp.csr_array) -> None:
    """Write BIOM 2.1: both orders, compressed, as biom-format does."""
    partial = path.with_suffix(".partial")
    with h5py.File(partial, "w") as file:
        file.attrs.update(
            {
                "id": "simulated",
                "type": "OTU table",
                "format-version": (2, 1),
                "format-url": "http://biom-format.org",
                "generated-by": "aam benchmarks",
                "creation-date": "2026-01-01T00:00:00",
                "shape": counts.shape[::-1],
                "nnz": counts.nnz,
            }
        )
        ids = {"sample": [b"s%06d" % row for row in range(counts.shape[0])], "observation": names}
        for kind, matrix in (("sample", counts), ("observation", counts.T.tocsr())):
            group = file.create_group(kind)
            group.create_dataset("ids", data=ids[kind], dtype=h5py.string_dtype())
            for name in ("data", "indices", "indptr"):
                group.create_dataset(
                    f"matrix/{name}", data=getattr(matrix, name), compression="gzip"
                )
            group.create_group("metadata")
            group.create_group("group-metadata")
    partial.rename(path)


def write_tree(path: Path, names: list[bytes], generator: np.random.Generator) -> None:
    """Write a random binary tree; neighbours in ``names`` are relatives.

    Every gap between two neighbours is a node, and the older one of two gaps holds the other.
    """
    number = len(names)
    age = generator.random(number - 1) + 50 * (np.arange(1, number) % CLADE == 0)
    opens = np.zeros(number, dtype=np.int64)
    closes = np.zeros(number, dtype=np.int64)
    stack: list[tuple[float, int]] = []  # gaps still open, oldest first, with their first tip
    for gap, own in enumerate(age.tolist()):
        first = gap
        while stack and stack[-1][0] < own:
            closes[gap] += 1
            first = stack.pop()[1]
        opens[first] += 1
        stack.append((own, first))
    closes[-1] += len(stack)
    lengths = generator.exponential(0.02, 2 * number).round(8).astype(str).tolist()
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        for tip, name in enumerate(names):
            comma = "," if tip else ""
            ends = "".join(f"):{lengths[number + (tip + n) % number]}" for n in range(closes[tip]))
            file.write(f"{comma}{'(' * opens[tip]}{name.decode()}:{lengths[tip]}{ends}")
        file.write(";\n")
    partial.rename(path)


# --------------------------------------------------------------------------------- measurement
def train(arguments: list[str]) -> None:
    """Run `aam` and print, as JSON, when training began and what memory it took."""
    started = time.time()
    from aam.learning import loop
    from aam.train import main

    seen: dict[str, float] = {}
    fit = loop.Trainer.fit

    def watched(self: loop.Trainer) -> None:
        seen.update({f"{name}_at_start": value for name, value in memory().items()})
        seen["start_s"] = time.time() - started
        fit(self)
        seen.update({f"{name}_trained": value for name, value in memory().items()})

    loop.Trainer.fit = watched  # type: ignore[method-assign]
    code = main(arguments)
    seen.update({f"{name}_at_end": value for name, value in memory().items()})
    seen["total_s"] = time.time() - started
    print("measured " + json.dumps({"code": code, **seen}))


def memory() -> dict[str, float]:
    """Highest resident memory so far, and that of now that is no file's, in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "peak_mb": int(lines["VmHWM"].split()[0]) / 1000,
        "own_mb": int(lines["RssAnon"].split()[0]) / 1000,
    }


def measure(
    folder: Path, table: Path, tree: Path, how: str, steps: int, options: list[str]
) -> None:
    """Train once in a process of its own and print what it took."""
    run = folder / f"run-{how}"
    if how == "build":
        shutil.rmtree(table.with_name(f"{table.name}.index"), ignore_errors=True)
    samples = int(table.stem.split("x")[0])
    ids = folder / f"{table.stem}.validation.txt"
    ids.write_text(
        "".join(f"s{row:06d}\n" for row in range(0, samples, max(5, samples // VALIDATION)))
    )
    command = [
        sys.executable, "-m", "benchmarks.large_tables", "--train", "--",
        "pretrain", "--table", table, "--tree", tree, "--output-dir", run, "--overwrite",
        "--rarefy-depth", "1000", "--allow-missing", "--validation-ids", ids,
        "--max-steps", steps, "--on-disk", "never" if how == "never" else "always",
        *SMALL_MODEL, *options,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("measured ")]
    measured = json.loads(found[0].removeprefix("measured ")) if found else {"code": 1}
    if measured["code"]:
        sys.exit(done.stdout + done.stderr)
    measured["asvs_per_second"] = float(np.median(training_rates(run / "metrics.csv")[1:]))
    print(how, json.dumps({name: round(value, 2) for name, value in measured.items()}))


def training_rates(path: Path) -> list[float]:
    """ASVs a second of every step."""
    with path.open() as file:
        rows = csv.DictReader(file)
        return [float(row["value"]) for row in rows if row["metric"] == "asvs_per_second"]


def main() -> None:
    """Simulate, then train in every way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="*", default=["never", "build", "always"])
    parser.add_argument("--options", default="", help="more options of `aam pretrain`")
    chosen = parser.parse_args()
    started = time.time()
    table, tree = simulate(chosen.folder, chosen.samples, chosen.features)
    print(f"files: {time.time() - started:.0f} s", flush=True)
    for how in chosen.only:
        measure(chosen.folder, table, tree, how, chosen.steps, chosen.options.split())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[3:])
    else:
        main()
