"""What pretraining teaches: the three formulas between an ASV's vector and samples' distances.

    membership      x_tk = W a_t + b            how much ASV t belongs to clade k, as a logit
    shared length   S_ij = z_i . z_j            of what two samples hold
    distance        u_ij = 1 - S_ij / (S_ii + S_jj - S_ij)          (Tanimoto)

Where a tree teaches, the clades and their lengths l_k are those of the tree, every ASV's
memberships are known, z_ik is sqrt(l_k) where the sample holds the clade, and UniFrac follows
exactly (`aam.data.clades`, `aam.data.embedding`). Where only distances are known the clades are
free, pairs of samples teach them, and z_i is the strongest and the mean membership of the sample's
ASVs in each, normalised.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aam.model.encoder import AsvEncoder
from aam_kernels import Ragged


class CladeHead(nn.Module):
    """Membership logits of ASVs in the clades of a tree."""

    def __init__(self, dim: int, clades: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(clades, dim))
        self.bias = nn.Parameter(torch.zeros(clades))
        nn.init.normal_(self.weight, std=0.5 / math.sqrt(dim))

    @torch.no_grad()
    def begin_at(self, share: Tensor) -> None:
        """Begin with the share (clades,) of the known ASVs that are members of each clade."""
        self.bias.copy_(torch.logit(share.to(self.bias).clamp(1e-6, 1 - 1e-6)))

    def forward(self, vectors: Tensor, clades: Tensor | None = None) -> Tensor:
        """Vectors (asvs, dim) to logits (asvs, clades), of all clades or of some (m,) int64."""
        if clades is None:
            return F.linear(vectors, self.weight, self.bias)
        return F.linear(vectors, self.weight[clades], self.bias[clades])


class FreeClades(nn.Module):
    """Clades that no tree gives: what samples share is learned from their distances.

    With `abundance`, an ASV counts by a power of its share of the sample's reads, which is
    learned, from 0 on.
    """

    unit: Tensor

    def __init__(self, dim: int, clades: int, *, abundance: bool) -> None:
        super().__init__()
        self.strongest, self.mean = nn.Linear(dim, clades), nn.Linear(dim, clades)
        self.norm = nn.LayerNorm(2 * clades)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.exponent = nn.Parameter(torch.zeros(()), requires_grad=abundance)
        self.abundance = abundance
        self.register_buffer("unit", torch.ones(()))  # what a distance of 1 is

    def profiles(self, vectors: Tensor, slots: Ragged, counts: Tensor) -> Tensor:
        """What samples hold of the clades, z (samples, 2 clades).

        Args:
            vectors: (asvs, dim).
            slots: values (slots,) int64, the row of `vectors` in each slot of a sample.
            counts: (slots,) reads.
        """
        lengths = slots.lengths

        def over_samples(values: Tensor, how: str) -> Tensor:
            return torch.segment_reduce(values, how, lengths=lengths, unsafe=True)

        strongest = over_samples(self.strongest(vectors)[slots.values], "max")
        mean = self.mean(vectors)[slots.values]
        if self.abundance:
            slots_each = lengths.long()
            share = counts / over_samples(counts, "sum").repeat_interleave(slots_each)
            weight = share.pow(self.exponent)
            whole = over_samples(weight, "mean").repeat_interleave(slots_each)
            mean = mean * (weight / whole)[:, None]
        return self.norm(torch.cat([strongest, over_samples(mean, "mean")], dim=-1))

    def distances(self, profiles: Tensor, others: Tensor) -> Tensor:
        """Distances (n, m) between samples of these profiles (n, width) and (m, width)."""
        own, theirs = profiles.square().sum(-1), others.square().sum(-1)
        shared = profiles @ others.T
        whole = own[:, None] + theirs - shared
        return self.unit * self.log_scale.exp() * (1 - shared / whole.clamp_min(1e-12))


class PretrainedModel(nn.Module):
    """What pretraining saves: an ASV encoder with the clades of a tree, or with free ones.

    Args:
        encoder: the base.
        clades: of a tree; 0 where no tree taught.
        free_clades: where pairs of samples taught; 0 where none did.
        abundance: whether the free clades see abundances.
    """

    def __init__(
        self,
        encoder: AsvEncoder,
        *,
        clades: int = 0,
        free_clades: int = 0,
        abundance: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        # What builds the model again around an encoder.
        self.description = {
            "clades": clades, "free_clades": free_clades, "abundance": abundance
        }  # fmt: skip
        dim = encoder.shape.embedding_dim
        self.clades = CladeHead(dim, clades) if clades else None
        self.pairs = FreeClades(dim, free_clades, abundance=abundance) if free_clades else None
