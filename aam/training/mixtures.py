"""Mixtures of two samples: communities whose distances a tree knows, from ASVs encoded anyway."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aam.data.dataset import Batch
from aam.training.masking import take_rows
from aam_kernels import Ragged


def add_mixtures(batch: Batch, for_each: float) -> Batch:
    """The batch with mixtures of its samples after the real ones.

    Args:
        batch: real samples.
        for_each: mixtures for each of them; a batch of one sample gets none.
    """
    number = round(for_each * len(batch))
    if not number or len(batch) < 2:
        return batch
    slots, counts = mix_samples(batch.slots, batch.counts, batch.asv_ids, number)
    joined = Ragged(
        torch.cat([batch.slots.values, slots.values]),
        torch.cat([batch.slots.offsets, slots.offsets[1:] + batch.slots.offsets[-1]]),
        max(batch.slots.max_length, slots.max_length),
    )
    return replace(batch, slots=joined, counts=torch.cat([batch.counts, counts]))


def mix_samples(
    slots: Ragged, counts: Tensor, asv_ids: Tensor, number: int
) -> tuple[Ragged, Tensor]:
    """Communities that lie between two samples: each ASV of either is kept with a probability.

    Args:
        slots: values (slots,) int64, the row of `asv_ids` in each slot of a sample.
        counts: (slots,) reads.
        asv_ids: (rows,) int64, which ASV a row is; without sharing an ASV has several rows.
        number: mixtures to draw. Each is of two different samples i and j and keeps an ASV of i
            with probability p and one of j with 1 - p, p uniform in (0, 1).

    Returns:
        The mixtures' slots and counts; an ASV kept from both samples has the sum of their reads.
    """
    device, samples = slots.values.device, len(slots)
    first = torch.randint(samples, (number,), device=device)
    second = (first + torch.randint(1, samples, (number,), device=device)) % samples
    share = torch.rand(number, device=device)
    pairs = torch.stack([first, second], 1).flatten()
    asvs, reads = take_rows(slots, pairs), take_rows(slots.with_values(counts), pairs)
    mixture = torch.arange(number, device=device).repeat_interleave(2)
    chance = torch.stack([share, 1 - share], 1).flatten()
    of_mixture, of_chance = spread(mixture, asvs.lengths), spread(chance, asvs.lengths)
    kept = torch.rand(len(of_chance), device=device) < of_chance
    empty = torch.ones(number, dtype=torch.bool, device=device)
    empty[of_mixture[kept]] = False
    kept |= empty[of_mixture]  # a mixture of nothing is that of everything
    rows = asvs.values[kept]
    width = int(asv_ids.max()) + 1
    key, place = torch.unique(of_mixture[kept] * width + asv_ids[rows], return_inverse=True)
    mixed_rows = torch.empty_like(key)
    mixed_rows[place] = rows
    mixed_counts = torch.zeros(len(key), dtype=counts.dtype, device=device)
    mixed_counts.index_add_(0, place, reads.values[kept])
    lengths = torch.bincount(key // width, minlength=number)
    offsets = torch.zeros(number + 1, dtype=torch.int32, device=device)
    offsets[1:] = lengths.cumsum(0)
    return Ragged(mixed_rows, offsets, int(lengths.max())), mixed_counts


def spread(per_row: Tensor, lengths: Tensor) -> Tensor:
    """Repeat each row's number for every one of its values."""
    return torch.repeat_interleave(per_row, lengths.long())
