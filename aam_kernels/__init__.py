"""Attention kernels for packed, variable-length batches, forward and backward."""

from aam_kernels.ragged import Ragged

__all__ = ["Ragged"]
