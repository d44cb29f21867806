import pytest

from aam_kernels._runtime import native
from tests.kernels.contract import require


@pytest.fixture
def compiled():
    """The compiled module; in its default state afterwards too."""
    require("cpu")
    module = native.kernels()
    yield module
    module.select(None)
