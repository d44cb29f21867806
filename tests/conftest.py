"""Fixtures shared by all tests: real data and system tools, skipped with a reason where absent."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real data sets: ``$AAM_DATA``, else ``../shared/data``."""
    folder = Path(os.environ.get("AAM_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "ibd" / "table.biom").is_file():
        pytest.skip(f"no real data in {folder} (set AAM_DATA to the folder that holds ibd/)")
    return folder


@pytest.fixture(scope="session")
def require_tool() -> Callable[[str], str]:
    """Return a function that gives a system tool's path, or skips the test.

    With AAM_REQUIRE_TOOLS set, as `.ci/run` does, a missing tool fails the test instead.
    """

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            missing = pytest.fail if os.environ.get("AAM_REQUIRE_TOOLS") else pytest.skip
            missing(f"needs the system tool {name!r}, which is not installed")
        return path

    return find
