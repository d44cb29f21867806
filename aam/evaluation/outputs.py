"""What a model makes of samples in evaluation mode: vectors, distances, nucleotides, targets.

With a `RankGroup` the ranks share the work, chunk by chunk, and each gets all of the result;
without one this process does it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aam.config import NucleotideOptions
from aam.data.dataset import AsvDataset, Batch, SampleDataset
from aam.data.sequences import A
from aam.learning.distributed import RankGroup, cut
from aam.learning.masking import mask_tokens
from aam.learning.targets import TargetInfo
from aam.model import AsvEncoder, Predictor, PretrainedModel

T = TypeVar("T")
ASV_CHUNK = 512  # sequences encoded at a time: bounds memory, not the result
SAMPLE_CHUNK = 64  # samples encoded at a time
ROW_CHUNK = 128  # rows of a distance matrix


@dataclass(frozen=True)
class NucleotideCheck:
    """Masked nucleotides of some sequences: where they were, and how well they were found."""

    rows: np.ndarray  # (masked,) which of the sequences
    positions: np.ndarray  # (masked,) position in the sequence, 0 = first base
    bases: np.ndarray  # (masked,) true token
    loss: float
    accuracy: float


@torch.no_grad()
def encode_asvs(
    encoder: AsvEncoder, dataset: SampleDataset, asv_ids: np.ndarray, ranks: RankGroup | None = None
) -> Tensor:
    """Vectors of some of the dataset's sequences, (len(asv_ids), dim), without dropout."""
    device = next(encoder.parameters()).device
    encoder.eval()
    if not len(asv_ids):
        return torch.empty(0, encoder.shape.embedding_dim, device=device)

    def encode(chunk: np.ndarray) -> Tensor:
        return encoder(dataset.gather_tokens(chunk).to(device)).vectors

    return _shared(in_chunks(asv_ids, ASV_CHUNK), len, encode, ranks)


@torch.no_grad()
def encode_batches(
    encoder: AsvEncoder,
    dataset: SampleDataset,
    rows: np.ndarray,
    compute: Callable[[Batch, Tensor], Tensor],
    *,
    frozen_asvs: Tensor | None = None,
    chunk: int = SAMPLE_CHUNK,
    ranks: RankGroup | None = None,
) -> Tensor:
    """What a function makes of samples, (len(rows), ...); every distinct ASV is encoded once.

    `compute` makes one row for each sample of a batch and the vectors of its ASVs. `frozen_asvs`
    are the vectors of all the dataset's ASVs, where they are known already.
    """
    device = next(encoder.parameters()).device
    generator = torch.Generator().manual_seed(0)  # of the ASVs that stand for a large sample
    batches = [dataset.batch(part, generator=generator) for part in in_chunks(rows, chunk)]
    vectors, place = frozen_asvs, np.arange(len(dataset.sequences))
    if vectors is None:
        asv_ids = np.unique(np.concatenate([batch.asv_ids.cpu().numpy() for batch in batches]))
        vectors = encode_asvs(encoder, dataset, asv_ids, ranks)
        place[asv_ids] = np.arange(len(asv_ids))

    def one(batch: Batch) -> Tensor:
        own = torch.from_numpy(place[batch.asv_ids.cpu().numpy()])
        return compute(batch.to(device), vectors[own.to(device)])

    return _shared(batches, lambda batch: len(batch.slots), one, ranks)


@torch.no_grad()
def predicted_distances(
    model: PretrainedModel, dataset: SampleDataset, rows: np.ndarray, ranks: RankGroup | None = None
) -> np.ndarray:
    """Distances between samples by free clades, (len(rows), len(rows)) float64."""
    pairs = model.pairs
    assert pairs is not None
    profiles = encode_batches(
        model.encoder, dataset, rows,
        lambda batch, vectors: pairs.profiles(vectors, batch.slots, batch.counts), ranks=ranks,
    )  # fmt: skip
    blocks = [pairs.distances(part, profiles).cpu() for part in profiles.split(ROW_CHUNK)]
    matrix = torch.cat(blocks).double().numpy()
    matrix = np.maximum((matrix + matrix.T) / 2, 0.0)  # rounding is neither symmetric nor positive
    np.fill_diagonal(matrix, 0.0)
    return matrix


@torch.no_grad()
def check_nucleotides(
    encoder: AsvEncoder,
    dataset: SampleDataset | AsvDataset,
    asv_ids: np.ndarray,
    options: NucleotideOptions,
    *,
    seed: int = 0,
    ranks: RankGroup | None = None,
) -> NucleotideCheck:
    """Mask nucleotides of sequences with a fixed seed, and ask the model for them.

    The global random state is left as it was.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    chunks, rows, positions, bases = [], [], [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, chunk in enumerate(in_chunks(asv_ids, ASV_CHUNK)):
            tokens = dataset.gather_tokens(chunk).to("cpu")  # the same draw on every device
            masked, places = mask_tokens(tokens, options.mask_probability, options.mask_strategy)
            if not len(places):
                continue
            row = torch.searchsorted(tokens.offsets[1:].long(), places, right=True)
            rows.append(row.numpy() + number * ASV_CHUNK)
            positions.append((places - tokens.offsets[row] - 1).numpy())  # START stands at 0
            bases.append(tokens.values[places].long())
            chunks.append((masked, places))
    if not chunks:
        none = np.empty(0, dtype=np.int64)
        return NucleotideCheck(none, none, none, float("nan"), float("nan"))

    def logits(chunk: Any) -> Tensor:
        masked, places = chunk[0].to(device), chunk[1].to(device)
        return encoder.nucleotide_logits(encoder(masked), masked, places)

    found = _shared(chunks, lambda chunk: len(chunk[1]), logits, ranks).cpu()
    true = torch.cat(bases)
    loss = float(F.cross_entropy(found, true - A))
    accuracy = float((found.argmax(-1) == true - A).double().mean())
    where = np.concatenate(rows), np.concatenate(positions)
    return NucleotideCheck(*where, true.numpy(), loss, accuracy)


@torch.no_grad()
def predict_outputs(
    predictor: Predictor,
    dataset: SampleDataset,
    rows: np.ndarray,
    *,
    frozen_asvs: Tensor | None = None,
    chunk: int = SAMPLE_CHUNK,
    ranks: RankGroup | None = None,
) -> Tensor:
    """The predictor's outputs for samples, (len(rows), outputs), on the CPU."""
    predictor.eval()

    def predict(batch: Batch, vectors: Tensor) -> Tensor:
        samples = predictor.sample_encoder(vectors, batch.slots, batch.counts)
        return predictor(samples, batch.categories)

    return encode_batches(
        predictor.encoder, dataset, rows, predict, frozen_asvs=frozen_asvs, chunk=chunk, ranks=ranks
    ).cpu()


def in_units(outputs: Tensor, target: TargetInfo, keys: np.ndarray | None) -> np.ndarray:
    """Outputs as numbers in the user's units (n,), or probabilities (n, classes)."""
    if target.classes:
        return outputs.softmax(-1).double().numpy()
    return target.transform.invert(outputs[:, 0].double().numpy(), keys)


def prediction_frame(predicted: np.ndarray, target: TargetInfo, ids: Sequence[str]) -> Any:
    """What `in_units` gave as a pandas frame, one row a sample; of classes their names, too."""
    import pandas as pd

    index = pd.Index(ids, name="sample-id")
    if not target.classes:
        return pd.DataFrame({"predicted": predicted}, index)
    frame = pd.DataFrame(predicted, index, [f"probability_{name}" for name in target.classes])
    frame.insert(0, "predicted", [target.classes[code] for code in predicted.argmax(axis=1)])
    return frame


def prediction_cells(frame: Any) -> list[list[str]]:
    """How tables write predictions: id, number or class, and probabilities with six decimals."""
    return [
        [name, str(first), *(f"{one:.6f}" for one in rest)]
        for name, first, *rest in frame.itertuples(name=None)
    ]


def _shared(
    parts: Sequence[T],
    size: Callable[[T], int],
    compute: Callable[[T], Tensor],
    ranks: RankGroup | None,
) -> Tensor:
    """The rows that all parts (one at least) give, in order; each rank computes some of the parts.

    `size` says how many rows a part gives, and `compute` gives them.
    """
    if ranks is None or ranks.size == 1:
        return torch.cat([compute(one) for one in parts])
    bounds = np.cumsum([0, *map(size, parts)])
    cuts = cut(bounds, ranks.size)
    low, high = cuts[ranks.rank], cuts[ranks.rank + 1]
    own = [compute(one) for one in parts[low:high]] or [compute(parts[0])[:0]]
    return ranks.gather(torch.cat(own), np.diff(bounds[cuts]).tolist())


def in_chunks(values: np.ndarray, size: int) -> list[np.ndarray]:
    """The values (n,) in parts of a size."""
    return [values[start : start + size] for start in range(0, len(values), size)]
