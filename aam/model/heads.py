"""The last step from a pooled sample to its prediction."""

from __future__ import annotations

from torch import Tensor, nn


class ResidualHead(nn.Module):
    """Linear plus MLP: the line that fits, and what bends around it."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, outputs)
        self.mlp = mlp(dim, outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """(samples, dim) to (samples, outputs)."""
        return self.linear(pooled) + self.mlp(pooled)


def mlp(dim: int, outputs: int) -> nn.Module:
    """Two layers with a GELU between them."""
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, outputs))


HEADS = {"linear": nn.Linear, "mlp": mlp, "linear+mlp": ResidualHead}
