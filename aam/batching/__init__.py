"""Which samples share a step."""

from aam.batching.planner import EpochPlan

__all__ = ["EpochPlan"]
