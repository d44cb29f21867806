"""What pretraining saves: the ASV encoder, and what made its vectors teachable."""

from __future__ import annotations

from torch import nn

from aam.model.clades import CladeHead, FreeClades
from aam.model.encoder import AsvEncoder


class PretrainedModel(nn.Module):
    """An ASV encoder with the clades of a tree, or with free ones."""

    def __init__(
        self,
        encoder: AsvEncoder,
        *,
        clades: int = 0,
        free_clades: int = 0,
        abundance: bool = False,
    ) -> None:
        """Build the model.

        Args:
            encoder: the base.
            clades: of a tree; 0 where no tree taught.
            free_clades: where pairs of samples taught; 0 where none did.
            abundance: whether the free clades see abundances.
        """
        super().__init__()
        self.encoder = encoder
        dim = encoder.shape.embedding_dim
        self.clades = CladeHead(dim, clades) if clades else None
        self.pairs = FreeClades(dim, free_clades, abundance=abundance) if free_clades else None

    @property
    def description(self) -> dict[str, int | bool]:
        """What builds the model again around an encoder."""
        return {
            "clades": 0 if self.clades is None else len(self.clades.bias),
            "free_clades": 0 if self.pairs is None else len(self.pairs.mean.bias),
            "abundance": self.pairs is not None and self.pairs.abundance,
        }
