"""The hierarchical encoder (nucleotides, samples, UniFrac) and the predictor on top of it."""

from aam.model.encoder import CommunityEncoder, Encoded
from aam.model.predictor import Predictor

__all__ = ["CommunityEncoder", "Encoded", "Predictor"]
