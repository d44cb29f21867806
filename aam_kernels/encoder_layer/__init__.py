"""The whole pre-norm transformer encoder layer on ragged sequences."""

from aam_kernels.encoder_layer.api import encoder_layer
from aam_kernels.encoder_layer.reference import EncoderLayerWeights

__all__ = ["EncoderLayerWeights", "encoder_layer"]
