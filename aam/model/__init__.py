"""The ASV encoder, its clade heads, and the predictor on top of it."""

from aam.model.clades import CladeHead, FreeClades, PretrainedModel
from aam.model.encoder import AsvEncoder, EncodedAsvs, EncoderShape
from aam.model.predictor import Predictor, PredictorShape

__all__ = [
    "AsvEncoder", "CladeHead", "EncodedAsvs", "EncoderShape", "FreeClades", "Predictor",
    "PredictorShape", "PretrainedModel",
]  # fmt: skip
