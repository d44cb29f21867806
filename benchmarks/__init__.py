"""Timings of this repository against its baselines: `pytest benchmarks/ --benchmark`."""
