"""Softmax attention within ragged sequences."""
