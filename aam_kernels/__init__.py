"""Attention kernels for packed, variable-length batches, forward and backward."""

from aam_kernels._runtime.dispatch import available_impls
from aam_kernels._verification import VerificationReport, verify
from aam_kernels.attention.api import attention, ragged_attention
from aam_kernels.encoder_layer.api import encoder_layer
from aam_kernels.encoder_layer.weights import EncoderLayerWeights, weights_from_torch
from aam_kernels.pooling.api import attention_pool
from aam_kernels.ragged import Ragged

__all__ = [
    "EncoderLayerWeights",
    "Ragged",
    "VerificationReport",
    "attention",
    "attention_pool",
    "available_impls",
    "encoder_layer",
    "ragged_attention",
    "verify",
    "weights_from_torch",
]
