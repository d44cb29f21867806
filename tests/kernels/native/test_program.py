"""The kernels' tests in C++ (tests/native): compiled beside the kernels, and run.

They try every variant that this processor can run against references in double precision, in
memory that ends where touching more ends the program. In a checkout only the tests are compiled:
the kernels' objects are those of `make native`.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAMS = ("native_tests", "thread_tests")


@pytest.fixture(scope="module")
def programs(require_tool):
    """The folder of the compiled programs."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=tools) or require_tool("cmake")
    require_tool(os.environ.get("CXX", "c++").split()[0])

    def run(*words: object) -> None:
        command = [cmake, *map(str, words)]
        result = subprocess.run(
            command, env={**os.environ, "PATH": tools}, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}{result.stderr[-4000:]}"

    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    with (folder / "native.lock").open("a") as lock:  # that of `make native`
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "native" / "build.ninja").exists():
            run("--build", folder / "native", "--target", *PROGRAMS)
            return folder / "native" / "tests"
        run("-S", ROOT / "tests" / "native", "-B", folder / "native-tests")
        run("--build", folder / "native-tests")
        return folder / "native-tests"


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(programs, name):
    result = subprocess.run([programs / name], capture_output=True, text=True, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
