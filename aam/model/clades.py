"""The three formulas between an ASV's vector and the distance of two samples.

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
        share = share.to(self.bias).clamp(1e-6, 1 - 1e-6)
        self.bias.copy_(torch.logit(share))

    def forward(self, vectors: Tensor, clades: Tensor | None = None) -> Tensor:
        """Vectors (asvs, dim) to logits (asvs, clades), of all clades or of some (m,) int64."""
        if clades is None:
            return F.linear(vectors, self.weight, self.bias)
        return F.linear(vectors, self.weight[clades], self.bias[clades])


class FreeClades(nn.Module):
    """Clades that no tree gives: what samples share is learned from their distances."""

    unit: Tensor

    def __init__(self, dim: int, clades: int, *, abundance: bool) -> None:
        """Build the head.

        Args:
            dim: width of the ASVs' vectors.
            clades: how many.
            abundance: whether an ASV may count by its share of the sample's reads: by a power of
                it that is learned, from 0 on.
        """
        super().__init__()
        self.strongest, self.mean = nn.Linear(dim, clades), nn.Linear(dim, clades)
        self.norm = nn.LayerNorm(2 * clades)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.exponent = nn.Parameter(torch.zeros(()), requires_grad=abundance)
        self.abundance = abundance
        self.register_buffer("unit", torch.ones(()))  # what a distance of 1 is

    def profiles(self, vectors: Tensor, slots: Ragged, counts: Tensor) -> Tensor:
        """What samples hold of the clades.

        Args:
            vectors: (asvs, dim).
            slots: values (slots,) int64, the row of `vectors` in each slot of a sample.
            counts: (slots,) reads.

        Returns:
            z (samples, 2 clades).
        """
        lengths = slots.lengths
        strongest = self.strongest(vectors)[slots.values]
        strongest = torch.segment_reduce(strongest, "max", lengths=lengths, unsafe=True)
        mean = self.mean(vectors)[slots.values]
        if self.abundance:
            total = torch.segment_reduce(counts, "sum", lengths=lengths, unsafe=True)
            share = counts / total.repeat_interleave(lengths.long())
            weight = share.pow(self.exponent)
            whole = torch.segment_reduce(weight, "mean", lengths=lengths, unsafe=True)
            mean = mean * (weight / whole.repeat_interleave(lengths.long()))[:, None]
        mean = torch.segment_reduce(mean, "mean", lengths=lengths, unsafe=True)
        return self.norm(torch.cat([strongest, mean], dim=-1))

    def distances(self, profiles: Tensor, others: Tensor) -> Tensor:
        """Distances (n, m) between samples of these profiles (n, width) and (m, width)."""
        own, theirs = profiles.square().sum(-1), others.square().sum(-1)
        return self.unit * self.log_scale.exp() * tanimoto(profiles @ others.T, own, theirs)


def tanimoto(shared: Tensor, own: Tensor, theirs: Tensor) -> Tensor:
    """1 - S_ij / (S_ii + S_jj - S_ij) of S (n, m) and its diagonals (n,) and (m,)."""
    whole = own[:, None] + theirs - shared
    return 1 - shared / whole.clamp_min(1e-12)
