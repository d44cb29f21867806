"""How float32 becomes bfloat16: ties away from zero where there is no instruction, else to even."""

import pytest
import torch
import triton
import triton.language as tl

from aam_kernels._problems import Problem
from aam_kernels._runtime.configurations import round_half_up
from aam_kernels._runtime.kernel_functions import narrow
from aam_kernels._verification import check_problem
from tests.kernels.contract import CPU
from tests.kernels.triton.interpreter import interpreting


@triton.jit
def narrow_all(x_ptr, y_ptr, SIZE: tl.constexpr, ROUND_HALF_UP: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(y_ptr + places, narrow(tl.load(x_ptr + places), tl.bfloat16, ROUND_HALF_UP))


def test_which_ties_go_where():
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], dtype=torch.int32)
    x = torch.cat([ties.view(torch.float32), -ties.view(torch.float32)])
    x = torch.cat([x, torch.tensor([0.0, 1.0, float("inf"), -float("inf")]), torch.randn(4)])
    even, away = (torch.empty(16, dtype=torch.bfloat16) for _ in range(2))
    with interpreting():
        narrow_all[(1,)](x, even, SIZE=16, ROUND_HALF_UP=False)
        narrow_all[(1,)](x, away, SIZE=16, ROUND_HALF_UP=True)
    assert torch.equal(even, x.bfloat16())
    assert (away != even).nonzero().flatten().tolist() == [0, 4]  # ties below an odd neighbour
    assert (
        (away[[0, 4]].float() - x[[0, 4]]).abs() == (even[[0, 4]].float() - x[[0, 4]]).abs()
    ).all()


@pytest.mark.parametrize("mode", ["", "even"])
def test_the_contract_holds_in_both_modes(mode, monkeypatch):
    monkeypatch.setenv("AAM_KERNELS_ROUNDING", mode)
    problem = Problem("attention", "rounding", (1, 17, 40, 151), heads=1, dropout_p=0.1)
    with interpreting("gfx942"):
        assert round_half_up(torch.bfloat16) is (mode == "")
        assert not round_half_up(torch.float16)
        for check in check_problem(problem, ("triton",), torch.bfloat16, CPU):
            assert not check.failures
    with interpreting("gfx950"):
        assert not round_half_up(torch.bfloat16)
