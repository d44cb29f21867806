"""What `aam pretrain` reaches on `ibd` within some minutes, on samples it has not seen.

    python -m benchmarks.pretraining runs/ibd-20-minutes --minutes 20

Of 428 samples whole subjects are held out first (77 samples), then 60 of the others at random; 291
are trained on. Seconds a step are measured first, and the learning rate's schedule is laid out for
as many epochs as fit the minutes. Options not listed here go to `aam pretrain`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from aam.data import read_table
from aam.data.metadata import read_metadata
from aam.data.splits import split_samples
from benchmarks import machine
from benchmarks.steps import TABLES, trainer_step

DATA = Path(os.environ.get("AAM_DATA") or machine.ROOT.parent / "shared" / "data") / "ibd"
SUBJECT = "host_subject_id"
SEED = 1  # of the split
RESERVED = 0.05  # of the minutes: reading, validations, the report
VALIDATIONS = 10


def parts(folder: Path) -> dict[str, tuple[str, ...]]:
    """Ids of the samples to train on, and of the two held-out parts."""
    ids = read_table(folder / TABLES["ibd"]).sample_ids
    groups = read_metadata(folder / "metadata.tsv").select(ids).text(SUBJECT)
    by_subject = split_samples(ids, validation_fraction=0.18, seed=SEED, groups=groups)
    rest = by_subject.train
    at_random = split_samples(rest, validation_fraction=60 / len(rest), seed=SEED)
    return {
        "train": at_random.train,
        "random": at_random.validation,
        "new-subjects": by_subject.validation,
    }


def seconds_a_step(folder: Path, batch_size: int, steps: int = 8) -> float:
    """Mean wall time of some steps."""
    step = trainer_step(str(folder), 1024, batch_size=batch_size)
    for _ in range(2):
        step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def epochs_within(minutes: float, step: float, samples: int, batch_size: int) -> int:
    """How many epochs fit, one at the least."""
    steps = -(-samples // batch_size)
    return max(1, int(60 * minutes * (1 - RESERVED) / (steps * step)))


def aam(*arguments: str | Path) -> None:
    """Run a command of `aam`, shown first as it would be typed."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ python -m aam.train {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "aam.train", *words], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Split, measure a step, pretrain, evaluate on both held-out parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of ibd")
    parser.add_argument("--batch-size", type=int, default=16)
    options, more = parser.parse_known_args(arguments)
    files = {}
    for name, ids in parts(options.data).items():
        files[name] = options.output.with_name(f"{options.output.name}-{name}.txt")
        files[name].parent.mkdir(parents=True, exist_ok=True)
        files[name].write_text("\n".join(ids) + "\n")
        print(f"{name}: {len(ids)} samples")
    for name, value in machine.facts().items():
        print(f"{name}: {value}")
    step = seconds_a_step(options.data, options.batch_size)
    count = len(files["train"].read_text().split())
    epochs = epochs_within(options.minutes, step, count, options.batch_size)
    print(f"{step:.2f} s a step: {epochs} epochs in {options.minutes:g} minutes")
    table = "--table", options.data / TABLES["ibd"], "--tree", options.data / "tree.nwk"
    start = time.monotonic()
    aam(
        "pretrain", *table, "--train-ids", files["train"], "--validation-ids", files["random"],
        "--batch-size", str(options.batch_size), "--lr", "1e-3", "--epochs", epochs,
        "--validate-every", max(1, epochs // VALIDATIONS), "--output-dir", options.output,
        *more,
    )  # fmt: skip
    minutes = (time.monotonic() - start) / 60
    print(f"\ntrained in {minutes:.1f} minutes")
    for name in ("random", "new-subjects"):
        metadata = "--metadata", options.data / "metadata.tsv", "--group-column", SUBJECT
        aam(
            "evaluate", "--model", options.output, *table, *metadata, "--ids", files[name],
            "--output", options.output / f"{name}.json", "--overwrite",
        )  # fmt: skip


if __name__ == "__main__":
    main()
