"""Modules on `Ragged`: self-attention, attention pooling, a pre-norm transformer encoder.

Dtypes: a module computes in the dtype of its input and weights as `torch.nn` modules do. float16
and bfloat16 are honoured on a GPU, also under autocast; on a CPU they are computed in float32 and
rounded once. Layer norms at the module level and residual sums keep the dtype of the values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from aam_kernels.encoder_layer.api import encoder_layer
from aam_kernels.encoder_layer.weights import EncoderLayerWeights
from aam_kernels.pooling.api import attention_pool
from aam_kernels.ragged import Ragged


class AttentionPool(nn.Module):
    """One vector a sequence: layer norm of ``sum_i softmax(w . h_i / sqrt(dim))_i h_i``.

    A sequence without rows pools to 0, so its output is the norm's bias.

    Args:
        dim: width of the values.
        norm_eps: epsilon of the layer norm.
        impl: implementation of `attention_pool`.
    """

    def __init__(self, dim: int, *, norm_eps: float = 1e-5, impl: str = "auto") -> None:
        super().__init__()
        self.impl = impl
        self.query = nn.Parameter(torch.empty(dim))
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the query as `torch.nn.Linear(dim, 1)` draws its weight."""
        bound = 1.0 / math.sqrt(len(self.query))
        nn.init.uniform_(self.query, -bound, bound)
        self.norm.reset_parameters()

    def forward(self, x: Ragged) -> Tensor:
        """(total, dim) in n sequences -> (n, dim)."""
        scores = (x.values @ self.query) / math.sqrt(len(self.query))
        pooled = attention_pool(
            x.values, scores, x.offsets, max_length=x.max_length, impl=self.impl
        )
        return self.norm(pooled)


class TransformerEncoderLayer(nn.Module):
    """The weights of one pre-norm layer, named as in `torch.nn.TransformerEncoderLayer`."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def weights(self) -> EncoderLayerWeights:
        """What `encoder_layer` takes."""
        attention = self.self_attn
        return EncoderLayerWeights(
            self.norm1.weight,
            self.norm1.bias,
            attention.in_proj_weight,
            attention.in_proj_bias,
            attention.out_proj.weight,
            attention.out_proj.bias,
            self.norm2.weight,
            self.norm2.bias,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
        )


class TransformerEncoder(nn.Module):
    """A stack of pre-norm layers and a final layer norm, `Ragged` to `Ragged`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_layers: int,
        ffn_dim: int | None = None,
        dropout: float = 0.1,
        recompute: bool = True,
        impl: str = "auto",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.recompute, self.impl = recompute, impl
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(dim, num_heads, ffn_dim or 4 * dim) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x: Ragged) -> Ragged:
        """(total, dim) -> (total, dim); the sequences stay."""
        values = x.values
        dropout_p = self.dropout if self.training else 0.0
        for layer in self.layers:
            values = encoder_layer(
                values,
                x.offsets,
                layer.weights(),
                num_heads=self.num_heads,
                dropout_p=dropout_p,
                max_length=x.max_length,
                recompute=self.recompute,
                impl=self.impl,
            )
        return x.with_values(self.norm(values))
