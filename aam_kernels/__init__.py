"""Attention kernels for packed, variable-length batches, forward and backward."""

from aam_kernels.encoder_layer import EncoderLayerWeights, encoder_layer
from aam_kernels.ragged import Ragged

__all__ = ["EncoderLayerWeights", "Ragged", "encoder_layer"]
