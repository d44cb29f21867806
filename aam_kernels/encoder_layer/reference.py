"""The layer in plain torch, any dtype: the specification of every implementation.

With ``x`` (tokens, dim) and LN the layer norm (eps 1e-5)::

    q, k, v = split(LN1(x) Wqkv' + bqkv);   p = softmax(q k' / sqrt(head_dim)) per head and sequence
    mid = x + drop1((drop0(p) v) Wout' + bout)
    out = mid + drop3(drop2(gelu(LN2(mid) Win' + bin)) Wffn' + bffn)

Dropout site 0 acts on attention probabilities, sites 1 to 3 on token features. Rows that belong
to no sequence are 0 in the output and are never read.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from aam_kernels._runtime import dropout

NORM_EPS = 1e-5
BRANCH_SITE, HIDDEN_SITE, OUTPUT_SITE = 1, 2, 3


class EncoderLayerWeights(NamedTuple):
    """The weights of one layer; D is the model width, F the width of the feed-forward part."""

    norm1_weight: Tensor  # (D,)
    norm1_bias: Tensor  # (D,)
    qkv_weight: Tensor  # (3 D, D): query, key, value rows, each heads x head_dim
    qkv_bias: Tensor  # (3 D,)
    out_weight: Tensor  # (D, D)
    out_bias: Tensor  # (D,)
    norm2_weight: Tensor  # (D,)
    norm2_bias: Tensor  # (D,)
    ffn_in_weight: Tensor  # (F, D)
    ffn_in_bias: Tensor  # (F,)
    ffn_out_weight: Tensor  # (D, F)
    ffn_out_bias: Tensor  # (D,)


def encoder_layer(
    x: Tensor,
    offsets: Tensor,
    weights: EncoderLayerWeights,
    num_heads: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The layer, differentiable by autograd: (tokens, D) -> (tokens, D), one dtype throughout."""
    w, end = weights, int(offsets[-1])
    real = x[:end]
    rows = torch.arange(end, device=x.device)

    def drop(values: Tensor, site: int) -> Tensor:
        if dropout_p == 0.0:
            return values
        assert seed is not None
        lost = dropout.feature_dropped(seed, rows, values.shape[1], site, dropout_p)
        return values.masked_fill(lost, 0.0) / (1.0 - dropout_p)

    normed = layer_norm(real, real.shape[1:], w.norm1_weight, w.norm1_bias, NORM_EPS)
    qkv = linear(normed, w.qkv_weight, w.qkv_bias)
    attended = _attention(qkv, offsets, num_heads, dropout_p, seed)
    mid = real + drop(linear(attended, w.out_weight, w.out_bias), BRANCH_SITE)
    normed = layer_norm(mid, mid.shape[1:], w.norm2_weight, w.norm2_bias, NORM_EPS)
    hidden = drop(gelu(linear(normed, w.ffn_in_weight, w.ffn_in_bias)), HIDDEN_SITE)
    out = mid + drop(linear(hidden, w.ffn_out_weight, w.ffn_out_bias), OUTPUT_SITE)
    return torch.cat([out, out.new_zeros(x.shape[0] - end, x.shape[1])])


def _attention(
    qkv: Tensor, offsets: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    bounds, attended = offsets.tolist(), [qkv.new_zeros(0, qkv.shape[1] // 3)]
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        sequence = qkv[start:stop].unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)
        query, key, value = sequence  # (heads, length, head_dim)
        scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
        probabilities = torch.softmax(scores, dim=-1)
        if dropout_p > 0.0:
            assert seed is not None
            rows = torch.arange(start, stop, device=qkv.device)
            lost = dropout.attention_dropped(seed, rows, rows, num_heads, dropout_p)
            probabilities = probabilities.masked_fill(lost, 0.0) / (1.0 - dropout_p)
        attended.append((probabilities @ value).transpose(0, 1).flatten(1))
    return torch.cat(attended)
