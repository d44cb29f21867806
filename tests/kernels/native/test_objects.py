"""What was compiled for one processor stays apart: older ones never meet an instruction of newer.

The objects are those of `make native`, or of the folder that AAM_NATIVE_BUILD names (`make wheel`).
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aam_kernels._runtime import native

ROOT = Path(__file__).parents[3]
on_x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="about x86-64 processors")


@pytest.fixture
def objects(compiled):
    """{folder of a target: its object files}."""
    build = Path(os.environ.get("AAM_NATIVE_BUILD", ROOT / "build" / "native"))
    found = {}
    for path in [*build.glob("CMakeFiles/*.dir/**/*.o"), *build.glob("*.a")]:
        found.setdefault(path.parent.name.removesuffix(".dir"), []).append(path)
    if not found:
        pytest.skip(f"no objects in {build}: `make native` leaves them there")
    return found


@pytest.fixture
def variants(objects):
    """{name: object file} of the variants."""
    found = {name: paths for name, paths in objects.items() if name.startswith("variant_")}
    assert all(len(paths) == 1 for paths in found.values())
    return {name.removeprefix("variant_"): paths[0] for name, paths in found.items()}


@pytest.fixture
def read(require_tool):
    """A function that gives what a tool prints about a file."""

    def run(tool, *arguments):
        command = [require_tool(tool), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return run


def test_there_is_an_object_for_every_variant(compiled, variants):
    assert {name.replace("-", "_") for name in compiled.compiled()} == set(variants)


def test_variants_share_no_function_through_the_linker(variants, read):
    for name, path in variants.items():
        defined = read("nm", "--defined-only", path)
        kinds = {line.split()[-1]: line.split()[-2] for line in defined.splitlines()}
        assert "attention_forward" in defined, "the check sees nothing"
        outside = {symbol: kind for symbol, kind in kinds.items() if not kind.islower()}
        weak = {symbol: kind for symbol, kind in kinds.items() if kind in "uvwVW"}
        assert not weak, f"{name}: the linker keeps one of these for all variants: {sorted(weak)}"
        assert len(outside) == 1, f"{name}: more than its table is visible: {sorted(outside)}"
        used = read("nm", "--undefined-only", "--demangle", path)
        assert "std::" not in used, f"{name} uses the C++ library:\n{used}"
        assert "operator new" not in used, f"{name} takes memory of its own"


def test_variants_run_nothing_when_loaded(variants, read):
    for name, path in variants.items():
        sections = read("objdump", "-h", path)
        assert ".text" in sections
        assert not re.search(r"\.(init_array|ctors)", sections), f"{name} has initialisers"


def widest(text):
    """What an object uses: "zmm", "ymm" or "vex" of newer processors, else "sse"."""
    for register in ("zmm", "ymm"):
        if f"%{register}" in text:
            return register
    return "vex" if re.search(r"\tv[a-z]\w+ +.*%[xk]", text) else "sse"


@on_x86_64
def test_newer_instructions_are_in_the_variants_only(objects, read):
    expected = {"variant_x86_64_v4": "zmm", "variant_x86_64_v3": "ymm"}
    for target, paths in objects.items():
        for path in paths:
            found = widest(read("objdump", "-d", "--no-show-raw-insn", path))
            assert found == expected.get(target, "sse"), f"{path.name} of {target}"


OLD_PROCESSOR = """
import importlib.util, sys
import numpy as np

spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
assert native.selected() == sys.argv[2], native.selected()
random = np.random.default_rng(0)
values, scores = (random.standard_normal(n, dtype=np.float32) for n in ((8, 20), (8,)))
pooled, lse = np.zeros((2, 20), np.float32), np.zeros(2, np.float32)
native.pooling_forward(values, scores, pooled, lse, np.array([0, 3, 8], np.int32), None, 2)
for row, own in zip(pooled, (slice(0, 3), slice(3, 8))):
    weights = np.exp(scores[own]) / np.exp(scores[own]).sum()
    assert np.abs(row - weights @ values[own]).max() < 1e-6
"""


@on_x86_64
@pytest.mark.parametrize(
    ("processor", "variant"), [("Nehalem", "x86-64"), ("Haswell", "x86-64-v3")]
)
def test_an_older_processor_computes(compiled, require_tool, processor, variant):
    environment = {x: y for x, y in os.environ.items() if not x.startswith("OPENBLAS_")}
    emulator = [require_tool("qemu-x86_64"), "-cpu", processor]
    arguments = ["-c", OLD_PROCESSOR, native.kernels().__file__, variant]
    for forced in ("", "x86-64"):
        environment["AAM_KERNELS_CPU"] = forced
        arguments[-1] = forced or variant
        done = subprocess.run(
            [*emulator, sys.executable, *arguments], env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    environment["AAM_KERNELS_CPU"] = "x86-64-v4"
    done = subprocess.run(
        [*emulator, sys.executable, *arguments], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "'x86-64-v4' cannot run on this processor; it runs" in done.stderr
