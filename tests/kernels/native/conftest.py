import pytest

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
