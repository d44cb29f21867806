"""The weights of a layer and the constants that every implementation shares."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

NORM_EPS = 1e-5
BRANCH_SITE, HIDDEN_SITE, OUTPUT_SITE = 1, 2, 3
"""Dropout sites on token features; site 0, the attention probabilities, has a hash of its own."""


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


def weights_from_torch(layer: nn.TransformerEncoderLayer) -> EncoderLayerWeights:
    """The weights of a torch layer, which `encoder_layer` then equals.

    Raises:
        ValueError: the layer is not pre-norm, not exact GELU, has no biases or another epsilon.
    """
    gelu = layer.activation
    exact = gelu is nn.functional.gelu or (isinstance(gelu, nn.GELU) and gelu.approximate == "none")
    if not (layer.norm_first and exact and layer.linear1.bias is not None):
        raise ValueError(
            "expected TransformerEncoderLayer(norm_first=True, activation='gelu', bias=True), got "
            f"norm_first={layer.norm_first}, activation={gelu}, bias="
            f"{layer.linear1.bias is not None}"
        )
    if layer.norm1.eps != 1e-5 or layer.norm2.eps != 1e-5:
        raise ValueError(f"expected layer_norm_eps=1e-5, got {layer.norm1.eps}")
    attention = layer.self_attn
    return EncoderLayerWeights(
        layer.norm1.weight,
        layer.norm1.bias,
        attention.in_proj_weight,
        attention.in_proj_bias,
        attention.out_proj.weight,
        attention.out_proj.bias,
        layer.norm2.weight,
        layer.norm2.bias,
        layer.linear1.weight,
        layer.linear1.bias,
        layer.linear2.weight,
        layer.linear2.bias,
    )
