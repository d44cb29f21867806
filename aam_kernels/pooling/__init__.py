"""Attention pooling: one softmax-weighted sum a ragged sequence."""
