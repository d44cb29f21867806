"""The three formulas between an ASV's vector and the distance of two samples.

    membership      x_tk = W a_t + b            how much ASV t belongs to clade k, as a logit
    presence        A_ik = 1 - exp(-sum_t softplus(beta x_tk))      over the ASVs t of sample i
    shared length   S_ij = sum_k l_k A_ik A_jk
    distance        u_ij = 1 - S_ij / (S_ii + S_jj - S_ij)          (Tanimoto)

Where a tree teaches, the clades and their lengths l_k are those of the tree, every ASV's
memberships are known, and UniFrac follows from them exactly (`aam.data.clades`). Where only
distances are known, the clades are free and pairs of samples teach them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aam_kernels import Ragged

SHARPNESS = 4.0  # beta: a smaller one lets many faint memberships add up to a presence


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
        self.head = nn.Linear(dim, clades)
        nn.init.normal_(self.head.weight, std=0.5 / math.sqrt(dim))
        nn.init.constant_(self.head.bias, -1.0)
        self.log_length = nn.Parameter(torch.zeros(clades))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.exponent = nn.Parameter(torch.zeros(()), requires_grad=abundance)
        self.abundance = abundance
        self.register_buffer("unit", torch.ones(()))  # what a distance of 1 is

    def presence(self, vectors: Tensor, slots: Ragged, counts: Tensor) -> Tensor:
        """Presence A_ik of clades in samples.

        Args:
            vectors: (asvs, dim).
            slots: values (slots,) int64, the row of `vectors` in each slot of a sample.
            counts: (slots,) reads.

        Returns:
            (samples, clades).
        """
        member = F.softplus(SHARPNESS * self.head(vectors))[slots.values]
        if self.abundance:
            lengths = slots.lengths
            total = torch.segment_reduce(counts, "sum", lengths=lengths, unsafe=True)
            share = counts / total.repeat_interleave(lengths.long())
            member = member * (share[:, None] * 100).pow(self.exponent)
        return 1 - torch.exp(
            -torch.segment_reduce(member, "sum", lengths=slots.lengths, unsafe=True)
        )

    def distances(self, presence: Tensor, others: Tensor) -> Tensor:
        """Distances (n, m) between samples of these presences (n, clades) and (m, clades)."""
        length = self.log_length.exp()
        shared = shared_length(presence, others, length)
        own = (presence.square() * length).sum(-1)
        theirs = (others.square() * length).sum(-1)
        return self.unit * self.log_scale.exp() * tanimoto(shared, own, theirs)


def shared_length(presence: Tensor, others: Tensor, length: Tensor) -> Tensor:
    """S_ij (n, m) = sum_k l_k A_ik A_jk of presences (n, clades) and (m, clades)."""
    return (presence * length) @ others.T


def tanimoto(shared: Tensor, own: Tensor, theirs: Tensor) -> Tensor:
    """1 - S_ij / (S_ii + S_jj - S_ij) of S (n, m) and its diagonals (n,) and (m,)."""
    whole = own[:, None] + theirs - shared
    return 1 - shared / whole.clamp_min(1e-12)
