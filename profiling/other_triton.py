"""``python -m profiling.other_triton 3.3.1``: the shipped kernels under another version of Triton.

Each torch brings one Triton: 2.7 has 3.3, 2.8 has 3.4, 2.13 has 3.7. This installs a version from
PyPI into a folder of its own, compiles every shipped kernel of the chosen architectures with it, as
far as machine code for NVIDIA and assembly for AMD (whose linker PyPI's older wheels lack), and
prints what failed; exit code 1 when anything did. Spills are counted, not refused: tables are made
for the version in ``constraints-dev.txt``.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

ARCHITECTURES = ("gfx942", "sm_90")


def launches(architectures: list[str]) -> list[dict[str, Any]]:
    """What to compile: every shipped kernel as the installed Triton binds it, in plain types."""
    from profiling.shipped import shipped

    found = []
    for architecture in architectures:
        for one in shipped(architecture=architecture):
            launch = one.launch(compiling=False)
            found.append(
                {
                    "name": one.key,
                    "architecture": architecture,
                    "module": launch.function.fn.__module__,
                    "kernel": launch.kernel,
                    "signature": launch.signature,
                    "constants": launch.constants,
                    "attributes": {
                        name: [[key, int(number)] for key, number in (x.split("=") for x in parts)]
                        for name, parts in launch.attributes.items()
                    },
                    "options": {k: v for k, v in launch.options.items() if v is not None},
                }
            )
    return found


def compile_all(path: Path) -> int:
    """Compiles what `launches` has written, with the Triton that this process imports."""
    import triton
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd_backend = backends["amd"].compiler
    amd_backend.make_hsaco = staticmethod(lambda assembly, metadata, options: b"")
    amd_backend.hash = lambda self: "assembly"  # asks the linker for its version
    failed = spilling = 0
    todo = pickle.loads(path.read_bytes())
    for one in todo:
        amd = one["architecture"].startswith("gfx")
        target = (
            GPUTarget("hip", one["architecture"], 64)
            if amd
            else GPUTarget("cuda", int(one["architecture"].removeprefix("sm_")), 32)
        )
        options = one["options"] if amd else {
            k: v for k, v in one["options"].items() if k in ("num_warps", "num_stages", "maxnreg")
        }  # fmt: skip
        kernel = getattr(import_module(one["module"]), one["kernel"])
        place = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
        source = ASTSource(
            kernel,
            one["signature"],
            {place[name]: value for name, value in one["constants"].items()},
            {place[name]: value for name, value in one["attributes"].items()},
        )
        try:
            compiled = triton.compile(source, target=target, options=options)
        except Exception as problem:  # compilers raise what they like: counted and printed
            failed += 1
            last = " ".join(str(problem).split())[-300:]
            sys.stdout.write(f"FAILED {one['name']}: {type(problem).__name__}: {last}\n")
            continue
        spills = re.search(r"\.vgpr_spill_count:\s+([1-9]\d*)", compiled.asm.get("amdgcn", ""))
        if spills:
            spilling += 1
            sys.stdout.write(f"spills {spills[1]} registers: {one['name']}\n")
    sys.stdout.write(
        f"triton {triton.__version__}: {len(todo) - failed} of {len(todo)} compiled, "
        f"{spilling} of them spill\n"
    )
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m profiling.other_triton", description=__doc__)
    parser.add_argument("version", help="as on PyPI, such as 3.3.1")
    parser.add_argument(
        "--architecture", action="append", help="repeatable; default: gfx942, sm_90"
    )
    parser.add_argument("--compile", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.compile is not None:
        return compile_all(options.compile)
    with tempfile.TemporaryDirectory() as folder:
        install = ["install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run(
            [sys.executable, "-m", "pip", *install, f"triton=={options.version}"], check=True
        )
        todo = Path(folder) / "launches.pickle"
        todo.write_bytes(pickle.dumps(launches(options.architecture or list(ARCHITECTURES))))
        own = ["-m", "profiling.other_triton", options.version, "--compile", str(todo)]
        environment = {**os.environ, "PYTHONPATH": folder, "TRITON_CACHE_DIR": f"{folder}/cache"}
        return subprocess.run([sys.executable, *own], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
