"""The ASV encoder, its clade heads, and the predictor on top of it."""

from aam.model.clades import CladeHead, FreeClades
from aam.model.encoder import AsvEncoder, EncodedAsvs, EncoderShape
from aam.model.predictor import Predictor
from aam.model.pretrained import PretrainedModel

__all__ = [
    "AsvEncoder", "CladeHead", "EncodedAsvs", "EncoderShape", "FreeClades", "Predictor",
    "PretrainedModel",
]  # fmt: skip
