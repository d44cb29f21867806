"""Modules on `Ragged`: self-attention, attention pooling, a pre-norm transformer encoder.

Parameters are named, shaped and drawn as in `torch.nn.MultiheadAttention` and
`torch.nn.TransformerEncoder`, whose state dicts load here. (The residual branches are not scaled
down with depth: pre-norm stacks of the few layers meant here train without.)

Dtypes: a module computes in the dtype of its values and parameters. On a CPU float16 and bfloat16
are computed in float32 and rounded once an operation, and autocast changes nothing inside the
layers. Under autocast on a GPU each layer runs in the autocast dtype, and its output takes the
dtype of its input again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from aam_kernels.attention.api import ragged_attention
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
        scores = scores.to(x.values.dtype)  # autocast may have lowered the product
        pooled = attention_pool(
            x.values, scores, x.offsets, max_length=x.max_length, impl=self.impl
        )
        return self.norm(pooled)


class SelfAttention(nn.Module):
    """Multi-head self-attention within each sequence.

    Args:
        dim: width of the values.
        num_heads: divides ``dim``.
        dropout: probability of dropping an attention weight while training.
        impl: implementation of `ragged_attention`.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self, dim: int, num_heads: int, *, dropout: float = 0.0, impl: str = "auto"
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim={dim}, got {num_heads}")
        self.num_heads, self.dropout, self.impl = num_heads, dropout, impl
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for the joint query, key and value matrix; biases 0."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        self.out_proj.reset_parameters()
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Ragged, first_row: int = 0) -> Ragged:
        """(total, dim) -> (total, dim); the sequences stay. ``first_row``: `ragged_attention`."""
        projected = nn.functional.linear(x.values, self.in_proj_weight, self.in_proj_bias)
        query, key, value = projected.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        attended = ragged_attention(
            query,
            key,
            value,
            x.offsets,
            max_length=x.max_length,
            dropout_p=self.dropout if self.training else 0.0,
            first_row=first_row,
            impl=self.impl,
        )
        return x.with_values(self.out_proj(attended.flatten(1)))


class TransformerEncoderLayer(nn.Module):
    """The parameters of one pre-norm layer, named as in `torch.nn.TransformerEncoderLayer`."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads)
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
    """A stack of pre-norm layers and a final layer norm, `Ragged` to `Ragged`.

    While training with dropout every layer draws a seed from torch's default generator, so
    `torch.manual_seed` reproduces a step.

    Args:
        dim: width of the values.
        num_heads: divides ``dim``.
        num_layers: layers.
        ffn_dim: width of the feed-forward part; None: ``4 * dim``.
        dropout: probability of dropping, at the four sites of `encoder_layer`.
        recompute: keep only the layers' inputs for the backward pass.
        impl: implementation of `encoder_layer`.
        norm_eps: epsilon of the final norm (that of the layers is 1e-5).

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

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

    def forward(self, x: Ragged, first_row: int = 0) -> Ragged:
        """(total, dim) -> (total, dim); the sequences stay. ``first_row``: `encoder_layer`."""
        values = x.values
        dropout_p = self.dropout if self.training else 0.0
        for layer in self.layers:
            values = encoder_layer(
                values,
                x.offsets,
                layer.weights(),
                num_heads=self.num_heads,
                dropout_p=dropout_p,
                first_row=first_row,
                max_length=x.max_length,
                recompute=self.recompute,
                impl=self.impl,
            )
        return x.with_values(self.norm(values))
