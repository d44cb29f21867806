"""Which samples share a step, and how much memory it takes."""

from aam.batching.calibration import Calibration
from aam.batching.memory import CostModel, StepSize, fit, memory_budget
from aam.batching.meter import Meter
from aam.batching.planner import Contents, EpochPlan, MemoryPlan, Oversize

__all__ = [
    "Calibration",
    "Contents",
    "CostModel",
    "EpochPlan",
    "MemoryPlan",
    "Meter",
    "Oversize",
    "StepSize",
    "fit",
    "memory_budget",
]
