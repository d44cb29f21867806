"""What `--compile-model` makes of our modules, compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("architecture", ["gfx942", "sm_90"])
def test_inductors_kernels_compile_and_reduce_no_booleans(architecture, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "profiling.inductor", architecture],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    ours = found["pooled stack"]
    # Each of our operators stays one node, forward and backward.
    assert ours["operators"] == [
        "attention_pool", "attention_pool_backward", "encoder_layer", "encoder_layer_backward",
    ]  # fmt: skip
    assert ours["kernels"] and ours["boolean_reductions"] == 0
    assert found["boolean reduction"]["boolean_reductions"] == 1  # the count sees what it is for
