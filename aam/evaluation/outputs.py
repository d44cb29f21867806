"""What a model says about samples, in evaluation mode: vectors, distances, nucleotides, targets.

With an `RankGroup` the ranks share the work, chunk by chunk, and each gets all of the result;
without one, this process does it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aam.config import NucleotideOptions
from aam.data.dataset import AsvDataset, Batch, SampleDataset
from aam.data.sequences import A
from aam.evaluation import metrics
from aam.learning.distributed import RankGroup, cut
from aam.learning.masking import mask_tokens
from aam.model import AsvEncoder, Predictor, PretrainedModel
from aam_kernels import Ragged

T = TypeVar("T")
ASV_CHUNK = 512  # sequences encoded at a time: bounds memory, not the result
SAMPLE_CHUNK = 64  # samples encoded at a time


@dataclass(frozen=True)
class NucleotideCheck:
    """Masked nucleotides of some sequences: where they were, and what the model said."""

    rows: np.ndarray  # (masked,) which of the sequences
    positions: np.ndarray  # (masked,) position in the sequence, 0 = first base
    bases: np.ndarray  # (masked,) true token
    loss: float
    accuracy: float


@torch.no_grad()
def encode_asvs(
    encoder: AsvEncoder,
    dataset: SampleDataset,
    asv_ids: np.ndarray,
    exchange: RankGroup | None = None,
) -> Tensor:
    """Vectors of some of the dataset's sequences, (len(asv_ids), dim), without dropout."""
    device = next(encoder.parameters()).device
    encoder.eval()
    if not len(asv_ids):
        return torch.empty(0, encoder.shape.embedding_dim, device=device)
    return _shared(
        _chunks(asv_ids, ASV_CHUNK),
        len,
        lambda chunk: encoder(dataset.gather_tokens(chunk).to(device)).vectors,
        exchange,
    )


@torch.no_grad()
def encode_batches(
    encoder: AsvEncoder,
    dataset: SampleDataset,
    rows: np.ndarray,
    compute: Callable[[Batch, Tensor], Tensor],
    *,
    frozen_asvs: Tensor | None = None,
    seed: int = 0,
    chunk: int = SAMPLE_CHUNK,
    exchange: RankGroup | None = None,
) -> Tensor:
    """What a function makes of samples, (len(rows), ...); every distinct ASV is encoded once.

    Args:
        encoder: the base of the model.
        dataset: the samples.
        rows: which of them.
        compute: makes one row for each sample of a batch and the vectors of its ASVs.
        frozen_asvs: vectors of all the dataset's ASVs, where they are known already.
        seed: of the ASVs that represent a sample with more than the token limit.
        chunk: samples encoded at a time.
        exchange: the ranks that share the work.
    """
    device = next(encoder.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    batches = [dataset.batch(part, generator=generator) for part in _chunks(rows, chunk)]
    vectors = frozen_asvs
    if vectors is None:
        asv_ids = np.unique(np.concatenate([batch.asv_ids.cpu().numpy() for batch in batches]))
        vectors = encode_asvs(encoder, dataset, asv_ids, exchange)

    def one(batch: Batch) -> Tensor:
        place = batch.asv_ids
        if frozen_asvs is None:
            place = torch.from_numpy(np.searchsorted(asv_ids, place.cpu().numpy()))
        return compute(batch.to(device), vectors[place.to(device)])

    return _shared(batches, lambda batch: len(batch.slots), one, exchange)


@torch.no_grad()
def predicted_distances(
    model: PretrainedModel,
    dataset: SampleDataset,
    rows: np.ndarray,
    exchange: RankGroup | None = None,
) -> np.ndarray:
    """Distances between samples by free clades, (len(rows), len(rows)) float64."""
    pairs = model.pairs
    assert pairs is not None
    profiles = encode_batches(
        model.encoder,
        dataset,
        rows,
        lambda batch, vectors: pairs.profiles(vectors, batch.slots, batch.counts),
        exchange=exchange,
    )
    blocks = [pairs.distances(profiles[part], profiles).cpu() for part in _blocks(len(rows))]
    matrix = torch.cat(blocks).double().numpy()
    matrix = np.maximum((matrix + matrix.T) / 2, 0.0)  # rounding is neither symmetric nor positive
    np.fill_diagonal(matrix, 0.0)
    return matrix


def _blocks(count: int) -> tuple[Tensor, ...]:
    return torch.arange(count).split(128)


@torch.no_grad()
def check_nucleotides(
    encoder: AsvEncoder,
    dataset: SampleDataset | AsvDataset,
    asv_ids: np.ndarray,
    penalties: NucleotideOptions,
    *,
    seed: int = 0,
    exchange: RankGroup | None = None,
) -> NucleotideCheck:
    """Mask nucleotides of sequences with a fixed seed, and ask the model for them.

    The global random state is left as it was.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    chunks, rows, positions, bases = [], [], [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, chunk in enumerate(_chunks(asv_ids, ASV_CHUNK)):
            tokens = dataset.gather_tokens(chunk).to("cpu")  # the same draw on every device
            masked, hit = mask_tokens(tokens, penalties.mask_probability, penalties.mask_strategy)
            if not len(hit):
                continue
            row = torch.searchsorted(tokens.offsets[1:].long(), hit, right=True)
            rows.append(row.numpy() + number * ASV_CHUNK)
            positions.append((hit - tokens.offsets[row] - 1).numpy())  # START stands at 0
            bases.append(tokens.values[hit].long())
            chunks.append((masked, hit))
    if not chunks:
        none = np.empty(0, dtype=np.int64)
        return NucleotideCheck(none, none, none, float("nan"), float("nan"))
    logits = _shared(
        chunks,
        lambda chunk: len(chunk[1]),
        lambda chunk: _masked_logits(encoder, chunk[0].to(device), chunk[1].to(device)),
        exchange,
    ).cpu()
    true = torch.cat(bases)
    return NucleotideCheck(
        np.concatenate(rows),
        np.concatenate(positions),
        true.numpy(),
        float(F.cross_entropy(logits, true - A)),
        float((logits.argmax(-1) == true - A).double().mean()),
    )


def _masked_logits(encoder: AsvEncoder, tokens: Ragged, places: Tensor) -> Tensor:
    return encoder.nucleotide_logits(encoder(tokens), tokens, places)


def distance_metrics(predicted: np.ndarray, true: np.ndarray) -> dict[str, float | None]:
    """Loss, Mantel r and mean absolute error of a predicted distance matrix."""
    error = metrics.condensed(predicted) - metrics.condensed(true)
    return {
        "unifrac_loss": float((error**2).mean()),
        "mantel_r": metrics.mantel_r(predicted, true),
        "distance_mae": metrics.mean_absolute_error(
            metrics.condensed(predicted), metrics.condensed(true)
        ),
    }


@torch.no_grad()
def predict_outputs(
    predictor: Predictor,
    dataset: SampleDataset,
    rows: np.ndarray,
    *,
    frozen_asvs: Tensor | None = None,
    chunk: int = SAMPLE_CHUNK,
    exchange: RankGroup | None = None,
) -> Tensor:
    """The predictor's outputs for samples, (len(rows), outputs), on the CPU.

    Args:
        predictor: the model.
        dataset: the samples.
        rows: which of them.
        frozen_asvs: vectors of all the dataset's ASVs, where they are known already.
        chunk: samples encoded at a time.
        exchange: the ranks that share the work.
    """
    predictor.eval()
    encoder = predictor.encoder
    return encode_batches(
        encoder,
        dataset,
        rows,
        lambda batch, vectors: predictor(
            predictor.sample_encoder(vectors, batch.slots, batch.counts), batch.categories
        ),
        frozen_asvs=frozen_asvs,
        chunk=chunk,
        exchange=exchange,
    ).cpu()


def target_metrics(outputs: np.ndarray, true: np.ndarray, classes: int) -> dict[str, float | None]:
    """Metrics of predictions.

    Args:
        outputs: (n,) numbers in the user's units, or (n, classes) probabilities.
        true: (n,) numbers or class codes.
        classes: how many; 0 for a number.
    """
    if not classes:
        return {
            "r2": metrics.r2(outputs, true),
            "mae": metrics.mean_absolute_error(outputs, true),
        }
    chosen = outputs.argmax(1)
    return {
        "accuracy": metrics.accuracy(chosen, true),
        "balanced_accuracy": metrics.balanced_accuracy(chosen, true),
        "auc": metrics.auc(outputs, true),
    }


def _shared(
    parts: Sequence[T],
    rows: Callable[[T], int],
    compute: Callable[[T], Tensor],
    exchange: RankGroup | None,
) -> Tensor:
    """The rows that all parts give, in order; each rank computes some of the parts.

    Args:
        parts: at least one.
        rows: how many a part gives.
        compute: gives them.
        exchange: the ranks; None: this process alone.
    """
    if exchange is None or exchange.size == 1:
        return torch.cat([compute(one) for one in parts])
    bounds = np.cumsum([0, *map(rows, parts)])
    cuts = cut(bounds, exchange.size)
    low, high = cuts[exchange.rank], cuts[exchange.rank + 1]
    own = [compute(one) for one in parts[low:high]] or [compute(parts[0])[:0]]
    return exchange.gather(torch.cat(own), np.diff(bounds[cuts]).tolist())


def _chunks(values: np.ndarray, size: int) -> list[np.ndarray]:
    return [values[start : start + size] for start in range(0, len(values), size)]
