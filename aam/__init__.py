"""Attention All Microbes: train transformers on microbiome feature tables."""

__version__ = "0.1.0"
