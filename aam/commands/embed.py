"""`aam embed`: one vector a sample, or an ASV, by a pretrained model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from aam.config import EmbedConfig
from aam.data.embedding import Embedding
from aam.data.neighbours import Found
from aam.data.samples import read_rarefied
from aam.data.table import FeatureTable
from aam.errors import InputError, log, log_facts
from aam.evaluation.applicability import of_placed
from aam.evaluation.placer import Placed, Placer, grafted_tree, load_placer, require_places
from aam.files import atomic_path
from aam.learning.device import pick_device
from aam.learning.model_file import read_model

KINDS = (".tsv", ".npz")


def embed(config: EmbedConfig) -> Path:
    """Run `aam embed`.

    Returns:
        The file that was written.
    """
    if config.output.suffix.lower() not in KINDS:
        raise InputError(f"{config.output}: write to {' or '.join(KINDS)}")
    if config.asvs and config.dimensions is not None:
        raise InputError(
            "--dimensions is for samples; with --asvs a vector is what the encoder has"
        )
    device = pick_device(config.device, config.attn_implementation)
    placer = load_placer(config.model, device, impl=config.attn_implementation)
    embedding = Embedding.from_arrays(read_model(config.model).arrays)
    dimensions = embedding.most if config.dimensions is None else config.dimensions
    if dimensions > embedding.most:
        raise InputError(
            f"--dimensions {dimensions}: pretraining fitted {embedding.most}; ask for no more"
        )
    table, facts = read_rarefied(config.table, config.sequences, config.rarefy_depth, config.seed)
    found = placer.find(table.feature_ids)
    placed = placer.place(table.feature_ids, found)
    known, warnings = of_placed(table, placed)
    log_facts(facts + known, warnings)
    require_places(table, placed)
    if config.asvs:
        write_asvs(config.output, placer, table, placed, found[1])
    else:
        grafted = grafted_tree(placer.clades, placed, table.feature_ids)
        blocks = embedding.rows(table, placer.clades, grafted, dimensions)
        write_samples(config.output, table, blocks, dimensions)
    return config.output


def write_samples(
    path: Path,
    table: FeatureTable,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    dimensions: int,
) -> None:
    """Write a row a sample: Faith PD and the vector."""
    if path.suffix.lower() == ".npz":
        vectors, faith = (np.concatenate(part) for part in zip(*blocks, strict=True))
        write_npz(path, ids=np.array(table.sample_ids), faith_pd=faith, vectors=vectors)
    else:
        header = ["sample-id", "faith_pd", *(f"e{i}" for i in range(dimensions))]
        numbers = (np.concatenate([part[:, None], block], axis=1) for block, part in blocks)
        write_rows(path, header, zip(table.sample_ids, _each(numbers), strict=True))
    log(f"{len(table.sample_ids)} samples, {dimensions} dimensions and Faith PD: {path}")


def write_asvs(
    path: Path, placer: Placer, table: FeatureTable, placed: Placed, near: Found
) -> None:
    """Write a row an ASV: nearest known one, its distance, support of the clades, the vector."""
    names = placer.clades.sequences
    nearest = [names[int(tip)] if tip >= 0 else "" for tip in placed.nearest]
    vectors = placer.vectors(table.feature_ids, placed.known, near)
    if path.suffix.lower() == ".npz":
        write_npz(
            path, sequences=np.array(list(table.feature_ids)), nearest=np.array(nearest),
            edits=placed.distance, support=placed.support, vectors=vectors,
        )  # fmt: skip
    else:
        header = ["sequence", "nearest", "edits", "support"]
        header += [f"e{i}" for i in range(vectors.shape[1])]
        numbers = np.column_stack([placed.distance, placed.support, vectors])
        ids = (f"{one}\t{near}" for one, near in zip(table.feature_ids, nearest, strict=True))
        write_rows(path, header, zip(ids, numbers, strict=True))
    log(f"{len(nearest)} ASVs, {vectors.shape[1]} dimensions: {path}")


def write_rows(path: Path, header: list[str], rows: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write a table row by row, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("\t".join(header) + "\n")
        for name, numbers in rows:
            file.write(name + "\t" + "\t".join(f"{one:.6g}" for one in numbers) + "\n")


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its other keywords are not arrays


def _each(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for block in blocks:
        yield from block
