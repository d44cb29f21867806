"""What `aam pretrain` takes to learn a reference tree alone, without a table.

    python -m benchmarks.reference FOLDER --tips 100000 --options="--epochs 1 --max-memory-gb 4"

Simulates a tree and the sequences of its tips in FOLDER (kept there for the next time), times what
is made of the tree, then runs `aam pretrain --sequences --tree` in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aam.data.clades import Clades, levels_of
from aam.data.neighbours import Neighbours
from aam.data.placement import Law
from aam.data.sequences import read_fasta
from aam.data.tree import read_tree
from benchmarks import machine

LENGTH = 120
BASES = np.frombuffer(b"ACGT", dtype=np.uint8)


def simulate(folder: Path, tips: int, seed: int = 0) -> tuple[Path, Path]:
    """Write FASTA and Newick of a random tree, unless they are there."""
    fasta, newick = folder / f"{tips}.fasta", folder / f"{tips}.nwk"
    if newick.exists():
        return fasta, newick
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    nodes = 2 * tips - 1
    parent = np.full(nodes, -1)
    growing = [0]
    for first in range(1, nodes, 2):  # a lineage drawn at random splits in two
        place = int(generator.integers(len(growing)))
        parent[first : first + 2] = growing[place]
        growing[place] = first
        growing.append(first + 1)
    length = generator.gamma(0.5, 0.05, nodes)
    rates = generator.gamma(0.6, 1 / 0.6, LENGTH)
    bases = np.zeros((nodes, LENGTH), dtype=np.uint8)
    bases[0] = generator.integers(0, 4, LENGTH)
    for node in range(1, nodes):
        changed = generator.random(LENGTH) < -np.expm1(-rates * length[node])
        other = generator.integers(0, 4, LENGTH)
        bases[node] = np.where(changed, other, bases[parent[node]])
    is_tip = np.ones(nodes, dtype=bool)
    is_tip[parent[1:]] = False
    text = [""] * nodes
    with fasta.open("w") as file:
        for node in np.flatnonzero(is_tip):
            text[node] = f"r{node}"
            file.write(f">r{node}\n{BASES[bases[node]].tobytes().decode()}\n")
    children: list[list[str]] = [[] for _ in range(nodes)]
    for node in range(nodes - 1, 0, -1):
        inner = text[node] or f"({','.join(children[node])})"
        children[node] = []
        children[parent[node]].append(f"{inner}:{length[node]:.6g}")
    newick.write_text(f"({','.join(children[0])});\n")
    return fasta, newick


def time_tree(fasta: Path, newick: Path) -> None:
    """Times and memory of what is made of a tree before anything is trained."""
    clock = [time.perf_counter()]

    def told(what: str) -> None:
        clock.append(time.perf_counter())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{what}: {clock[-1] - clock[-2]:.1f} s, peak {peak:.2f} GB")

    tree = read_tree(newick).rename(read_fasta(fasta))
    told(f"{len(tree.tip_names)} tips read")
    clades = Clades(tree)
    found = (
        len(clades),
        len(levels_of(clades.parent)),
        float(clades.weight.sum()),
        clades.near(np.arange(200)),
    )
    told(f"{found[0]} clades in {found[1]} levels")
    neighbours = Neighbours(clades.sequences)
    told("neighbours indexed")
    Law.fit(clades, neighbours)
    told("law of lengths learned")


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, time the tree, pretrain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tips", type=int, default=100_000)
    parser.add_argument("--options", default="--epochs 1", help="of `aam pretrain`")
    options = parser.parse_args(arguments)
    for name, value in machine.facts().items():
        print(f"{name}: {value}")
    fasta, newick = simulate(options.folder, options.tips)
    time_tree(fasta, newick)
    run = options.folder / "run"
    words = ["pretrain", "--sequences", fasta, "--tree", newick, "--output-dir", run]
    command = [sys.executable, "-m", "aam.train", *map(str, words), "--overwrite"]
    start = time.perf_counter()
    subprocess.run([*command, *options.options.split()], check=True)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"pretrained in {time.perf_counter() - start:.0f} s, {usage.ru_utime:.0f} CPU s, "
        f"peak {usage.ru_maxrss / 1e6:.2f} GB"
    )


if __name__ == "__main__":
    main()
