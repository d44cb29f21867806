"""Memory of a training step over batch sizes, implementations, recomputation and micro-batches.

    python -m profiling.memory_curve                              simulated samples, on this machine
    python -m profiling.memory_curve --device cuda --batch-sizes 8 32 128 512
    python -m profiling.memory_curve --table TABLE --output curve.md

A step of `aam pretrain --distance jaccard`: distance and nucleotide loss, all pairs, AdamW. Every
line is measured in a process of its own: on a CPU the peak is that of the process, on a GPU the
allocator's. Memory does not depend on what else the machine does. What the columns mean stands in
README.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.worker import Worker

MB = 1e6
SEQUENCES = 8  # through the layer whose kept bytes are counted
COLUMNS = {
    "implementation": "{}",
    "recompute": "{}",
    "samples": "{:,}",
    "micro_batches": "{:,}",
    "ASVs": "{:,}",  # distinct ones of the step
    "tokens": "{:,}",  # of the distinct ASVs
    "slots": "{:,}",  # (sample, ASV) pairs
    "before_mb": "{:,.0f}",
    "peak_mb": "{:,.0f}",
    "step_mb": "{:,.1f}",
    "kept_mb": "{:,.1f}",
    "kept_b_token_layer": "{:,}",
}
Case = dict[str, Any]


def main(words: Sequence[str] | None = None) -> None:
    """Measure every case and write the table."""
    options = parse(words)
    with tempfile.TemporaryDirectory() as folder:
        table = options.table or simulated(Path(folder), options)
        rows = []
        for case in cases(options):
            row = measure({**case, "table": str(table)})
            rows.append(row)
            told = row.get("failure") or f"{row['step_mb']:,.1f} MB"
            sys.stderr.write(f"{told}: {case}\n")
    text = markdown(rows, options)
    if options.output is not None:
        options.output.write_text(tsv(rows) if options.output.suffix == ".tsv" else text)
    sys.stdout.write(text)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m profiling.memory_curve")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--implementations", nargs="+", help="all that the device has")
    parser.add_argument("--recompute", choices=("on", "off", "both"), default="both")
    parser.add_argument("--asvs", type=int, default=50, help="mean ASVs of a simulated sample")
    parser.add_argument("--length", type=int, default=100, help="bases of a simulated ASV")
    parser.add_argument("--table", type=Path, help="real samples instead of simulated ones")
    parser.add_argument("--token-limit", type=int, default=1024)
    parser.add_argument("--max-bp", type=int, default=150)
    parser.add_argument("--embedding-dim", type=int, default=128)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--output", type=Path, help=".tsv, or anything else for Markdown")
    return parser.parse_args(words)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """One for each line of the table."""
    from aam_kernels import available_impls

    found = options.implementations or available_impls(options.device)["encoder_layer"]
    recompute = {"on": [True], "off": [False], "both": [True, False]}[options.recompute]
    for impl, again, samples, count in itertools.product(
        found, recompute, options.batch_sizes, options.micro_batches
    ):
        yield {
            "impl": impl,
            "recompute": again,
            "samples": samples,
            "micro_batches": count,
            "device": options.device,
            "token_limit": options.token_limit,
            "max_bp": options.max_bp,
            "model": [options.embedding_dim, options.num_heads, options.num_layers],
        }


def simulated(folder: Path, options: argparse.Namespace) -> Path:
    """Table of a simulated community that is large enough."""
    from aam.data.simulate import simulate_community

    return simulate_community(
        folder,
        samples=max(*options.batch_sizes, 2),
        asvs=12 * options.asvs,
        asvs_per_sample=options.asvs,
        sequence_length=options.length,
    ).table


def measure(case: Case) -> dict[str, Any]:
    """A line of the table, from a process of its own; with `failure` where there is none."""
    row = {
        "implementation": case["impl"],
        "recompute": "on" if case["recompute"] else "off",
        "samples": case["samples"],
        "micro_batches": case["micro_batches"],
    }
    worker = Worker("profiling.memory_curve:step", **case)
    try:
        return {**row, **worker()}
    except MemoryError:
        return {**row, "failure": "does not fit"}
    except RuntimeError as error:
        return {**row, "failure": str(error).strip().splitlines()[-1]}
    finally:
        worker.close()


def step(samples: int, micro_batches: int, **setting: Any) -> Callable[[], dict[str, float]]:
    """In the process that is measured: a step of the first samples of a table, ready to run."""
    import numpy as np
    import torch

    from aam.learning.distributed import RankGroup
    from aam.learning.memory_profile import StepWatch
    from aam.learning.meter import Meter
    from aam.learning.optimizer import make_optimizer
    from aam.learning.step import Step

    torch.manual_seed(0)
    device = setting["device"]
    dataset, objective = prepare(**setting)
    optimizer = make_optimizer(objective, 1e-4, 0.01)
    compute, meter = Step(objective, RankGroup()), Meter(torch.device(device))

    def change(rows: np.ndarray) -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        compute(dataset.batch(rows).to(device), micro_batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    rows = np.arange(samples)
    change(rows[:2])  # the first step of a process takes more than later ones
    batch = dataset.batch(rows)
    stack = objective.encoder.stack
    dim, hidden = stack.layers[0].linear1.in_features, stack.layers[0].linear1.out_features

    def work() -> dict[str, float]:
        meter.reset()
        before = meter.peak()
        change(rows)
        peak = meter.peak()
        watch = StepWatch(objective, meter)
        with watch.watching(compute):
            change(rows)
            watch.begin("")
        return {
            "ASVs": len(batch.tokens),
            "tokens": len(batch.tokens.values),
            "slots": len(batch.slots.values),
            "before_mb": before / MB,
            "peak_mb": peak / MB,
            "step_mb": (peak - before) / MB,
            "kept_mb": max(kept.total() for kept in watch.kept.values()) / MB,
            "kept_b_token_layer": kept_a_token(
                dim, stack.num_heads, hidden, stack.impl, stack.recompute, device
            ),
        }

    return work


def kept_a_token(
    dim: int,
    num_heads: int,
    hidden: int,
    impl: str,
    recompute: bool,
    device: str,
    *,
    length: int = 150,
) -> int:
    """Bytes that a float32 encoder layer keeps for its backward pass, for each token.

    Args:
        dim: width.
        num_heads: divides it.
        hidden: width of the feed-forward part.
        impl: implementation, as in `aam_kernels`.
        recompute: keep the layer's input only.
        device: where it runs.
        length: tokens a sequence.
    """
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    from aam_kernels import Ragged
    from aam_kernels.modules import TransformerEncoder

    total = SEQUENCES * length
    stack = TransformerEncoder(dim, num_heads, 1, hidden, 0.0, recompute, impl).to(device)
    stack.norm = torch.nn.Identity()  # type: ignore[assignment]  # the stack's, not a layer's
    offsets = torch.arange(0, total + 1, length, dtype=torch.int32, device=device)
    x = torch.zeros(total, dim, device=device, requires_grad=True)
    known = {one.untyped_storage().data_ptr() for one in (*stack.parameters(), offsets)}
    kept: dict[int, torch.Tensor] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        own = tensor.detach()
        if own.untyped_storage().data_ptr() not in known:
            kept.setdefault(own.untyped_storage().data_ptr(), own)
        return own

    with saved_tensors_hooks(save, lambda tensor: tensor):
        stack(Ragged(x, offsets, length))
    return math.ceil(sum(one.untyped_storage().nbytes() for one in kept.values()) / total)


def prepare(
    table: str,
    impl: str,
    recompute: bool,
    device: str,
    token_limit: int,
    max_bp: int,
    model: Sequence[int],
) -> tuple[Any, Any]:
    """Samples, and the objective of `aam pretrain --distance jaccard`, on the device."""
    from aam.data.dataset import SampleDataset
    from aam.data.table import read_table
    from aam.data.table_distances import TableDistances
    from aam.model import AsvEncoder, EncoderShape
    from benchmarks.steps import pair_objective

    read = read_table(Path(table))
    dataset = SampleDataset(read, max_bp=max_bp, token_limit=token_limit)
    dim, heads, layers = model
    shape = EncoderShape(embedding_dim=dim, num_heads=heads, num_layers=layers, max_bp=max_bp)
    encoder = AsvEncoder(shape, impl=impl, recompute=recompute)
    objective = pair_objective(encoder, TableDistances(read, "jaccard"))
    return dataset, objective.to(device).train()


def tsv(rows: Sequence[dict[str, Any]]) -> str:
    """Tab-separated, numbers as they are."""
    names = [*COLUMNS, "failure"]
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    return "".join("\t".join(map(str, line)) + "\n" for line in lines)


def markdown(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """A table to read, with what it was measured on."""
    import torch

    source = (
        options.table.name
        if options.table
        else (f"simulated samples of {options.asvs} ASVs of {options.length} bases")
    )
    lines = [
        f"A step on {options.device} (torch {torch.__version__}), {options.num_layers} x "
        f"{options.embedding_dim} wide, {options.num_heads} heads; {source}. MB are 1e6 bytes.",
        "",
        "| " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |",
        "|---|---|" + "---:|" * (len(COLUMNS) - 2),
    ]
    for row in rows:
        cells = [form.format(row[name]) if name in row else "" for name, form in COLUMNS.items()]
        if "failure" in row:
            cells[4] = row["failure"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
