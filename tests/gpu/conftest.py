"""Tests that need a device. They load alone: torch, numpy and pytest are all that they use.

``python -m pytest -o addopts=--import-mode=importlib --confcutdir tests/gpu tests/gpu`` runs them
where nothing else of the project is installed; ``make gpu-check`` does so.
"""

import pytest
import torch


def pytest_collection_modifyitems(items):
    absent = pytest.mark.skip(reason="needs a CUDA or ROCm device")
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(absent)


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def _memory():
    """Every test starts with the device's memory free."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
