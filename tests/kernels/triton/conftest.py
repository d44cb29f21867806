"""These tests run kernels by the internals of one Triton, and compare what that one compiles.

Where there is none (Triton exists for Linux only), nothing here is collected; with another
version, which torch's own wheels may bring, every test is skipped and says so.
"""

from importlib.metadata import PackageNotFoundError, version

import pytest

PINNED = "3.7.1"

try:
    FOUND = version("triton")
except PackageNotFoundError:
    FOUND = ""
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _pinned_triton():
    if FOUND != PINNED:
        pytest.skip(f"needs triton {PINNED}, the one of constraints-dev.txt; found {FOUND}")
