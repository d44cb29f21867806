"""Narrow heads on NVIDIA: columns are added in memory, because masks for them would spill."""

import pytest
import torch

from aam_kernels._problems import Problem
from aam_kernels._runtime.grouping import Sequences
from aam_kernels._verification import check_problem
from aam_kernels.attention import triton as attention
from profiling.ahead_of_time import resources
from profiling.fake_driver import captured
from tests.kernels.contract import CPU, offsets_of
from tests.kernels.triton.interpreter import interpreting

LENGTHS = (1, 0, 17, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 40])
def test_the_contract_holds(head_dim, dtype):
    problem = Problem(
        "attention", "narrow", LENGTHS, heads=2, head_dim=head_dim, dropout_p=0.2, tail=3
    )
    with interpreting("sm_90"):
        assert attention._columns_to_add(torch.empty(1, 1, head_dim)) > 0
        for check in check_problem(problem, ("triton",), dtype, CPU):
            assert not check.failures


def test_only_where_masks_cost_registers():
    heads = {size: torch.empty(1, 1, size) for size in (8, 16, 24, 32, 40, 64, 80, 128)}
    with interpreting("gfx942"):
        assert not any(attention._columns_to_add(x) for x in heads.values())
    with interpreting("sm_80"):
        added = {size: attention._columns_to_add(x) for size, x in heads.items()}
    assert added == {8: 8, 16: 0, 24: 8, 32: 0, 40: 24, 64: 0, 80: 0, 128: 0}


@pytest.mark.parametrize("length", [151, 600])
def test_nothing_spills(length):
    query, key, value = (torch.zeros(2 * length, 2, 24, dtype=torch.float16) for _ in range(3))
    sequences = Sequences(offsets_of([length, length]), max_length=length)
    rest = (sequences, 0.2, 0.1, torch.tensor(3))
    with captured("sm_90") as launches:
        output, lse = attention.forward(query, key, value, *rest)
        attention.backward(output, query, key, value, output, lse, *rest)
    assert {launch.kernel.split("_")[0] for launch in launches} == {
        "short" if length == 151 else "long"
    }
    for launch in launches:
        assert resources(launch.compiled).spills == 0, launch.kernel
