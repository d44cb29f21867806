import pytest
import torch

from aam_kernels._runtime import native
from tests.kernels.contract import require


@pytest.fixture
def compiled():
    """The compiled module; whatever is selected in a test holds for that test."""
    require("cpu")
    module = native.kernels()
    before = module.selected()
    yield module
    module.select(before)


@pytest.fixture
def with_threads():
    """A function that runs another one with a number of torch's threads."""
    before = torch.get_num_threads()

    def run(threads, function):
        torch.set_num_threads(threads)
        return function()

    yield run
    torch.set_num_threads(before)
