"""The interpreter of these tests: right in every dtype, strict about memory, leaving no trace."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from aam_kernels._runtime import configurations, dispatch
from aam_kernels._runtime.kernel_functions import mix, narrow
from profiling.fake_driver import captured
from tests.kernels.contract import numpy_mix
from tests.kernels.triton.interpreter import (
    GuardZones,
    OutOfBounds,
    Race,
    interpreting,
    poisoned_memory,
)

HALVES = [torch.bfloat16, torch.float16]


@triton.jit
def convert(x_ptr, y_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(y_ptr + places, tl.load(x_ptr + places).to(y_ptr.dtype.element_ty))


@triton.jit
def arithmetic(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + places), tl.load(y_ptr + places)
    tl.store(out_ptr + places, x + y)
    tl.store(out_ptr + SIZE + places, x * y)
    tl.store(out_ptr + 2 * SIZE + places, tl.maximum(x, y))
    tl.store(out_ptr + 3 * SIZE + places, tl.where(x < y, x, -y))


@triton.jit
def product(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    places = rows[:, None] * SIZE + rows[None, :]
    x, y = tl.load(x_ptr + places), tl.load(y_ptr + places)
    tl.store(out_ptr + places, tl.dot(x, y, input_precision="ieee"))


@triton.jit
def hashes(x_ptr, out_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    x = tl.load(x_ptr + places).to(tl.uint32, bitcast=True)
    tl.store(out_ptr + places, mix(x).to(tl.int32, bitcast=True))
    tl.store(out_ptr + SIZE + places, (x * 0x9E3779B1 + x).to(tl.int32, bitcast=True))
    tl.store(out_ptr + 2 * SIZE + places, (~x >> 3).to(tl.int32, bitcast=True))


@triton.jit
def fused(x_ptr, y_ptr, out_ptr, factor, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + places), tl.load(y_ptr + places)
    tl.store(out_ptr + places, tl.fma(x, x, y))
    tl.store(out_ptr + SIZE + places, tl.full([SIZE], factor * factor, tl.float32))
    tl.store(out_ptr + 2 * SIZE + places, tl.erf(x))


@triton.jit
def row_sums(x_ptr, out_ptr, columns, stride, BLOCK: tl.constexpr):
    """One program a row; a tensor's methods work as the functions do."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + places, mask=places < columns, other=0.0)
    tl.store(out_ptr + row, x.sum(0))


@triton.jit
def half_up(x_ptr, out_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(out_ptr + places, narrow(tl.load(x_ptr + places), tl.bfloat16, True))


@triton.jit
def unmasked(x_ptr, out_ptr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + places, tl.load(x_ptr + places))


@triton.jit
def overlap(x_ptr, out_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Programs write BLOCK elements, STEP apart."""
    places = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places)
    tl.store(out_ptr + tl.program_id(0) * STEP + places, x)


@triton.jit
def scan(out_ptr):
    """Every program adds one to what the program before it has left."""
    program = tl.program_id(0)
    before = tl.load(out_ptr + program - 1, mask=program > 0, other=0.0)
    tl.store(out_ptr + program, before + 1.0)


def test_bfloat16_rounds_to_nearest_even():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    exact, rounded = torch.empty(1 << 16), torch.empty(1 << 16, dtype=torch.bfloat16)
    between = every.float() + torch.rand(1 << 16) * every.float().abs() * 2**-7
    ties = (every.view(torch.int16).to(torch.int32) << 16 | 0x8000).view(torch.float32)
    with interpreting():
        convert[(1,)](every, exact, SIZE=1 << 16)
        assert torch.equal(exact.isnan(), every.isnan())
        assert torch.equal(exact[~every.isnan()], every.float()[~every.isnan()])
        for x in (between, ties):
            convert[(1,)](x, rounded, SIZE=1 << 16)
            expected = x.to(torch.bfloat16)
            assert torch.equal(rounded.isnan(), expected.isnan())
            assert torch.equal(rounded[~x.isnan()], expected[~x.isnan()])


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_arithmetic_is_that_of_torch(dtype):
    x, y = torch.randn(512).to(dtype), torch.randn(512).to(dtype)
    out = torch.empty(4, 512, dtype=dtype)
    with interpreting():
        arithmetic[(1,)](x, y, out, SIZE=512)
    assert torch.equal(out, torch.stack((x + y, x * y, torch.maximum(x, y), x.where(x < y, -y))))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_products_accumulate_in_float32(dtype):
    x, y = (torch.randn(64, 64).to(dtype) for _ in range(2))
    out = torch.empty(64, 64)
    with interpreting():
        product[(1,)](x, y, out, SIZE=64)
    assert (out - (x.double() @ y.double())).abs().max() < 1e-5 * 8


def test_integers_wrap_and_bits_are_kept():
    x = torch.randint(-(1 << 31), 1 << 31, (256,)).to(torch.int32)
    out = torch.empty(3, 256, dtype=torch.int32)
    with interpreting():
        hashes[(1,)](x, out, SIZE=256)
    bits = x.numpy().view(np.uint32)
    with np.errstate(over="ignore"):
        expected = (numpy_mix(bits), bits * np.uint32(0x9E3779B1) + bits, ~bits >> np.uint32(3))
    for row, value in zip(out, expected, strict=True):
        assert np.array_equal(row.numpy().view(np.uint32), value)


def test_fma_rounds_once_and_scalars_are_float32():
    x, y = torch.rand(256) + 1, -(torch.rand(256) + 1)
    out = torch.empty(3, 256)
    with interpreting():
        fused[(1,)](x, y, out, 0.1, SIZE=256)
    assert torch.equal(out[0], (x.double() * x + y).float())
    assert not torch.equal(out[0], x * x + y)  # what two roundings give
    tenth = torch.tensor(0.1)
    assert torch.equal(out[1], (tenth * tenth).expand(256))  # not float32(0.1 * 0.1)
    assert torch.equal(out[2], torch.erf(x.double()).float())


def test_rounding_half_up():
    x = torch.randn(4096)
    ties = (x.view(torch.int32) & -65536 | 0x8000).view(torch.float32)
    for values in (x, ties):
        out = torch.empty(4096, dtype=torch.bfloat16)
        with interpreting():
            half_up[(1,)](values, out, SIZE=4096)
        bits = (values.view(torch.int32) + 0x8000) & -65536
        assert torch.equal(out.float(), bits.view(torch.float32))


def test_rows_of_a_strided_view():
    guard = GuardZones()
    x = torch.randn(5, 33)
    view = guard.place(x)
    out = guard.place(torch.empty(5))
    with interpreting():
        row_sums[(5,)](view, out, 33, view.stride(0), BLOCK=64)
    guard.check()
    assert torch.allclose(out, x.sum(1), atol=1e-5)
    view.copy_(x)  # one column too many is NaN
    with interpreting():
        row_sums[(4,)](view, out, 34, view.stride(0), BLOCK=64)
    assert out[:4].isnan().all()


def test_a_guard_zone_that_was_written_is_found():
    guard = GuardZones(margin=2)
    view = guard.place(torch.zeros(4, 4))
    guard.check()
    view.fill_(float("nan"))
    guard.check()
    torch.as_strided(view, (1,), (1,), view.storage_offset() - 1).zero_()
    with pytest.raises(AssertionError, match="written around"):
        guard.check()


@pytest.mark.parametrize("longer", ["x", "out"])
def test_access_outside_is_refused(longer):
    x, out = torch.randn(64 if longer == "x" else 60), torch.empty(64 if longer == "out" else 60)
    with interpreting(), pytest.raises(OutOfBounds, match="program 3"):
        unmasked[(4,)](x, out, BLOCK=16)
    with interpreting():
        unmasked[(3,)](x, out, BLOCK=16)
    assert torch.equal(out[:48], x[:48])


def test_programs_that_write_the_same_element_are_refused():
    x, out = torch.randn(16), torch.zeros(64)
    with interpreting():
        overlap[(4,)](x, out, STEP=16, BLOCK=16)
        overlap[(4,)](x, out, STEP=16, BLOCK=16)  # another launch may
        with pytest.raises(Race, match="programs 0 and 1 write"):
            overlap[(4,)](x, out, STEP=15, BLOCK=16)


def test_programs_that_read_what_others_write_are_refused():
    out = torch.zeros(4)
    with interpreting():
        scan[(1,)](out)
        with pytest.raises(Race, match="program 1 reads"):
            scan[(4,)](out)


def test_fresh_memory_is_poisoned():
    x = torch.zeros(2)
    with interpreting():
        assert torch.empty(3).isnan().all()
        assert x.new_empty(3).isnan().all()
        assert torch.empty_like(x).isnan().all()
        assert torch.empty_strided((2, 2), (1, 2)).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
        assert not torch.zeros(3).isnan().any()
    with poisoned_memory():
        assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_misspelt_options_are_refused():
    x = torch.zeros(16)
    with interpreting():
        unmasked[(1,)](x, x, BLOCK=16, num_warps=4, waves_per_eu=2)
        with pytest.raises(KeyError, match="num_wraps"):
            unmasked[(1,)](x, x, BLOCK=16, num_wraps=4)


def test_it_leaves_no_trace():
    def everything():
        places = (tl, tl.core, tl.math, tl.standard, tl.tensor, triton.runtime.interpreter)
        values = {(place.__name__, n): v for place in places for n, v in vars(place).items()}
        values |= {("module", name): value for name, value in globals().items()}
        values["registry"] = {name: dict(t) for name, t in dispatch._REGISTRY.items()}
        return values, triton.runtime.JITFunction.run, triton.runtime.JITFunction.__call__

    before = everything()
    x = torch.randn(64)
    with interpreting():
        unmasked[(4,)](x, torch.empty(64), BLOCK=16)
        with pytest.raises(OutOfBounds):
            unmasked[(5,)](x, torch.empty(64), BLOCK=16)
    assert everything() == before
    with captured("gfx942") as launches:  # and the same function compiles
        unmasked[(4,)](x, torch.empty(64), BLOCK=16)
    assert "s_endpgm" in launches[0].compiled.asm["amdgcn"]


@pytest.mark.parametrize("architecture", configurations.ARCHITECTURES)
def test_the_architecture_is_the_one_asked_for(architecture):
    with interpreting(architecture):
        assert configurations.architecture() == architecture
        half_up_there = configurations.round_half_up(torch.bfloat16)
    assert half_up_there == (architecture in ("gfx90a", "gfx942"))


def test_triton_serves_cpu_tensors_inside_only():
    with interpreting():
        assert "triton" in dispatch.available_impls("cpu")["attention"]
        assert dispatch.choose("attention", "auto", torch.device("cpu"), torch.float32) != "triton"
    assert "triton" not in dispatch.available_impls("cpu")["attention"]
