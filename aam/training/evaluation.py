"""What a model says about samples, in evaluation mode: vectors, distances, nucleotides, targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aam.config import PenaltyOptions
from aam.data.dataset import Batch, SampleDataset
from aam.model import CommunityEncoder, Predictor
from aam.training import metrics
from aam.training.masking import mask_tokens, nucleotide_logits

ASV_CHUNK = 512  # sequences encoded at a time: bounds memory, not the result
SAMPLE_CHUNK = 64  # samples encoded at a time


@dataclass(frozen=True)
class NucleotideCheck:
    """Masked nucleotides of some sequences: where they were, and what the model said."""

    positions: np.ndarray  # (masked,) position in the sequence, 0 = first base
    bases: np.ndarray  # (masked,) true token
    loss: float
    accuracy: float


@torch.no_grad()
def encode_asvs(encoder: CommunityEncoder, dataset: SampleDataset, asv_ids: np.ndarray) -> Tensor:
    """Vectors of some of the dataset's sequences, (len(asv_ids), dim), without dropout."""
    device = next(encoder.parameters()).device
    encoder.eval()
    parts = [
        encoder.encode_asvs(dataset.gather_tokens(chunk).to(device))
        for chunk in _chunks(asv_ids, ASV_CHUNK)
    ]
    dim = encoder.shape.embedding_dim
    return torch.cat(parts) if parts else torch.empty(0, dim, device=device)


@torch.no_grad()
def encoded_batches(
    encoder: CommunityEncoder,
    dataset: SampleDataset,
    rows: np.ndarray,
    *,
    seed: int = 0,
    chunk: int = SAMPLE_CHUNK,
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of samples with their ASVs' vectors; every distinct ASV is encoded once.

    Yields:
        A batch, and the vectors (all distinct ASVs of `rows`, dim) with the batch's `slots`
        pointing into them.
    """
    device = next(encoder.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    batches = [dataset.batch(part, generator=generator) for part in _chunks(rows, chunk)]
    asv_ids = np.unique(np.concatenate([batch.asv_ids.cpu().numpy() for batch in batches]))
    vectors = encode_asvs(encoder, dataset, asv_ids)
    for batch in batches:
        place = torch.from_numpy(np.searchsorted(asv_ids, batch.asv_ids.cpu().numpy())).to(device)
        yield batch.to(device), vectors[place]


@torch.no_grad()
def sample_embeddings(
    encoder: CommunityEncoder, dataset: SampleDataset, rows: np.ndarray
) -> Tensor:
    """UniFrac embeddings z of samples, (len(rows), width)."""
    encoder.eval()
    return torch.cat(
        [
            encoder.embed(vectors, batch.slots, batch.counts)
            for batch, vectors in encoded_batches(encoder, dataset, rows)
        ]
    )


@torch.no_grad()
def predicted_distances(encoder: CommunityEncoder, z: Tensor) -> np.ndarray:
    """Predicted distances of all pairs, (n, n) float64."""
    head = encoder.unifrac_encoder
    blocks = [head.distances(z[part], z).cpu() for part in torch.arange(len(z)).split(128)]
    matrix = torch.cat(blocks).double().numpy()
    np.fill_diagonal(matrix, 0.0)
    return matrix


@torch.no_grad()
def check_nucleotides(
    encoder: CommunityEncoder,
    dataset: SampleDataset,
    asv_ids: np.ndarray,
    penalties: PenaltyOptions,
    *,
    seed: int = 0,
) -> NucleotideCheck:
    """Mask nucleotides of sequences with a fixed seed, and ask the model for them.

    The global random state is left as it was.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    positions, bases, predicted, losses = [], [], [], 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for chunk in _chunks(asv_ids, ASV_CHUNK):
            tokens = dataset.gather_tokens(chunk).to("cpu")  # the same draw on every device
            masked, hit = mask_tokens(tokens, penalties.mask_probability, penalties.mask_strategy)
            if not len(hit):
                continue
            row = torch.searchsorted(tokens.offsets[1:].long(), hit, right=True)
            positions.append((hit - tokens.offsets[row] - 1).numpy())  # START stands at 0
            true = tokens.values[hit].long()
            logits = nucleotide_logits(encoder, masked.to(device), hit.to(device)).cpu()
            losses += float(F.cross_entropy(logits, true, reduction="sum"))
            bases.append(true.numpy())
            predicted.append(logits.argmax(-1).numpy())
    all_bases = np.concatenate(bases) if bases else np.empty(0, dtype=np.int64)
    all_predicted = np.concatenate(predicted) if predicted else np.empty(0, dtype=np.int64)
    count = max(1, len(all_bases))
    return NucleotideCheck(
        np.concatenate(positions) if positions else np.empty(0, dtype=np.int64),
        all_bases,
        losses / count if len(all_bases) else float("nan"),
        float((all_bases == all_predicted).mean()) if len(all_bases) else float("nan"),
    )


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
) -> Tensor:
    """The predictor's outputs for samples, (len(rows), outputs), on the CPU.

    Args:
        predictor: the model.
        dataset: the samples.
        rows: which of them.
        frozen_asvs: vectors of all the dataset's ASVs, where they are known already.
        chunk: samples encoded at a time.
    """
    predictor.eval()
    device = next(predictor.parameters()).device
    if frozen_asvs is None:
        pairs = encoded_batches(predictor.encoder, dataset, rows, chunk=chunk)
    else:
        generator = torch.Generator().manual_seed(0)
        pairs = (
            (batch, frozen_asvs[batch.asv_ids])
            for batch in (
                dataset.batch(part, generator=generator).to(device) for part in _chunks(rows, chunk)
            )
        )
    outputs = []
    for batch, vectors in pairs:
        encoded = predictor.encoder.encode_samples(vectors, batch.slots, batch.counts)
        outputs.append(predictor(encoded, batch.categories).cpu())
    return torch.cat(outputs)


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


def _chunks(values: np.ndarray, size: int) -> list[np.ndarray]:
    return [values[start : start + size] for start in range(0, len(values), size)]
