"""Kernels compiled for all targets: the checked-in report is complete, true and within limits."""

import json

import pytest
import torch
import triton
import triton.language as tl

from aam_kernels._runtime.configurations import ARCHITECTURES
from profiling import shipped, static_model
from profiling.ahead_of_time import architecture_of, memory_width, resources
from profiling.fake_driver import TARGETS, captured
from profiling.tunables import tunables


@triton.jit
def multiply(x_ptr, y_ptr, out_ptr, turns, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    places = rows[:, None] * SIZE + rows[None, :]
    x = tl.load(x_ptr + places)
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for turn in range(turns):
        y = tl.load(y_ptr + turn * SIZE * SIZE + places)
        total = tl.dot(x, y, total)
        total = tl.exp2(total)
    tl.store(out_ptr + places, total)


@triton.jit
def hold(x_ptr, out_ptr, SIZE: tl.constexpr):
    """Keeps more values than a warp has registers, all needed until a barrier has passed."""
    places = tl.arange(0, SIZE)
    x = tl.load(x_ptr + places)
    total = tl.sum(x, 0)
    tl.store(out_ptr + places, x * total)


def compiled(target, kernel, *args, **kwargs):
    with captured(target) as launches:
        kernel[(1,)](*args, **kwargs)
    return launches[0].compiled


def halves(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def floats(*shape):
    return torch.empty(shape, device="meta")


# The whole report, without compiling ------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    return shipped.read()


def test_the_report_is_complete_and_of_this_source(report):
    problems = shipped.stale(report)
    hint = "run `make kernel-report` and look at what it changes"
    assert not problems, f"{hint}:\n" + "\n".join(problems[:20])


def test_nothing_shipped_spills_or_overflows(report):
    assert report and shipped.broken(report) == []


def test_every_kernel_has_a_configuration_for_every_target(report):
    served = {(line.split()[0], line.split()[1], line.split()[2]) for line in report}
    for kernel, tunable in tunables().items():
        for architecture in ARCHITECTURES:
            for name, dtype in shipped.DTYPES.items():
                offered = any(
                    tunable.candidates(architecture, dtype, width, length)
                    for width in tunable.widths
                    for length in tunable.lengths
                )
                is_served = (kernel, architecture, name) in served
                # Rows that no short kernel holds without spills are served by the long ones.
                if kernel.startswith("short_") and name == "float32":
                    assert not is_served or offered
                else:
                    assert is_served == offered, (kernel, architecture, name)


def test_products_use_matrix_instructions(report):
    for key, line in report.items():
        kernel, architecture, dtype = key.split()[:3]
        multiplies = any("tl.dot" in text for text in _source(kernel).splitlines())
        ieee_on_nvidia = architecture.startswith("sm_") and dtype == "float32"
        if multiplies and not ieee_on_nvidia:
            assert line["matrix"], key
        if not multiplies:
            assert not line["matrix"], key


def _source(kernel):
    variant = next(shipped.shipped(kernel, "gfx942"))
    return shipped.source(variant.launch(compiling=False).function)


def test_wide_loads_are_the_rule(report):
    # Attention and products read tiles of rows, which are 16 bytes a lane where strides allow it.
    for key, line in report.items():
        if key.startswith(("short_", "long_forward", "long_backward", "layer_product")):
            assert line["loads"].get("16", 0) > 0, key


# A sample, compiled -----------------------------------------------------------------------------


def _sample():
    """The smallest entry of every kernel, on one AMD and one NVIDIA target in turn."""
    chosen = []
    for number, kernel in enumerate(sorted(tunables())):
        for target in (ARCHITECTURES[number % 3], ARCHITECTURES[3 + number % 3]):
            variants = [v for v in shipped.shipped(kernel, target) if v.entry["dtype"] == "half"]
            if variants:
                size = [
                    (v.entry["width"], v.entry["length"], v.variant != "dropout") for v in variants
                ]
                chosen.append(variants[size.index(min(size))])
    return chosen


@pytest.mark.parametrize("variant", _sample(), ids=lambda variant: variant.key)
def test_compiling_gives_what_the_report_says(variant, report):
    line, problem = shipped.compile_one(variant)
    assert line is not None, problem
    assert variant.key in report, "run `make kernel-report`"
    assert line == json.loads(json.dumps(report[variant.key]))


# How resources are read ---------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_resources_of_a_product(target):
    args = (halves(64, 64), halves(64, 64), floats(64, 64))
    found = resources(compiled(target, multiply, *args, 4, SIZE=64, num_warps=4))
    assert found.architecture == target and found.warps == 4
    assert found.broken_limits() == []
    assert sum(found.matrix.values()) >= 2
    assert found.loads.get("16", 0) >= 2 and found.stores.get("16", 0) >= 1
    assert found.exponentials >= 8
    assert 16 <= found.registers <= 256 and found.occupancy >= 1
    assert found.barriers > 0 and found.shared_access > 0 and found.shared > 0


@pytest.mark.parametrize(
    ("target", "options"), [("sm_90", {}), ("gfx942", {"waves_per_eu": 8})], ids=str
)
def test_spills_are_seen(target, options):
    x = floats(1 << 13)
    found = resources(compiled(target, hold, x, x, SIZE=1 << 13, num_warps=1, **options))
    assert found.spills > 0 and found.scratch > 0
    assert any("spills" in text for text in found.broken_limits())


def test_architecture_names():
    for target in TARGETS:
        kernel = compiled(target, hold, floats(64), floats(64), SIZE=64)
        assert architecture_of(kernel) == target


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("global_load_dwordx4", 16), ("buffer_load_dword", 4), ("global_store_dwordx2", 8),
        ("global_load_ushort", 2), ("buffer_load_ubyte", 1), ("global_store_short_d16_hi", 2),
        ("LDG.E.128", 16), ("LDG.E.64.CONSTANT", 8), ("STG.E", 4), ("LDG.E.U16", 2),
        ("LDGSTS.E.BYPASS.128", 16), ("LDG.E.U8", 1), ("UTMALDG.2D", 0),
    ],
)  # fmt: skip
def test_widths(name, width):
    assert memory_width(name) == width


# The static model -----------------------------------------------------------------------------


def code_of(text, architecture="gfx942"):
    lines = tuple(line.strip() for line in text.strip().splitlines())
    return static_model._code(architecture, lines)


NESTED = """
s_cbranch_scc1 .LBB0_9
v_mov_b32 v0, v1
.LBB0_1:
v_add_f32 v0, v0, v1
v_add_f32 v0, v0, v1
.LBB0_2:
v_exp_f32_e32 v0, v0
v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
global_load_dwordx4 v[4:7], v8, s[0:1]
s_cbranch_scc1 .LBB0_2
s_cbranch_scc0 .LBB0_1
s_branch .LBB0_12
.LBB0_9:
v_mul_lo_u32 v0, v0, v1
.LBB0_10:
v_mov_b32 v0, v1
v_mov_b32 v0, v1
ds_write_b128 v0, v[0:3]
s_cbranch_vccnz .LBB0_10
v_mov_b32 v0, v1
.LBB0_12:
v_mov_b32 v0, v1
s_endpgm
"""


def test_blocks_count_as_often_as_they_run():
    found = code_of(NESTED)
    assert [loop.depth for loop in found.loops] == [0, 1, 0]
    cost = found.cost([3, 5, 0])
    # entry 4; outer 3 x 8; inner 15 x 16; last 4. The branch with the idle loop counts nothing.
    assert cost.issue == 4 + 24 + 15 * 16 + 4
    assert cost.matrix == 15 * 2 * 16**3 / 512
    assert cost.exponentials == 15 and cost.bytes == 15 * 64 * 16 and cost.shared == 0
    other = found.cost([0, 0, 7])
    assert other.issue == 16 + 7 * 8 + 4 + 4
    assert other.shared == 7 * 64 * 16 / 128 * 4 and other.matrix == 0


OUT_OF_LINE = """
s_cbranch_scc1 .LBB0_2
.LBB0_1:
v_mov_b32 v0, v1
v_mov_b32 v0, v1
s_endpgm
.LBB0_2:
v_mov_b32 v0, v1
v_mov_b32 v0, v1
s_branch .LBB0_1
"""


def test_a_jump_back_that_is_no_loop():
    # A block that was laid out behind the end and jumps back.
    found = code_of(OUT_OF_LINE)
    assert found.loops == ()
    assert found.cost([]).issue == 16


def test_trips_must_match_loops():
    with pytest.raises(ValueError, match="1 matrix"):
        code_of(NESTED).cost([3])


def test_nvidia_instructions():
    found = code_of("MOV R1, c[0x0][0x28]\n.L_x_1:\nHMMA.16816.F32.BF16 R4, R8, R12, R4\n"
                    "MUFU.EX2 R0, R1\nLDG.E.128 R4, [R2.64]\n@P0 BRA `(.L_x_1)\nEXIT\n"
                    ".L_x_9:\nBRA `(.L_x_9)\nNOP", "sm_90")  # fmt: skip
    cost = found.cost([10])
    assert len(found.loops) == 1
    assert cost.issue == cost.instructions == 1 + 40 + 1
    assert (cost.matrix, cost.exponentials, cost.bytes) == (40, 10, 10 * 32 * 16)
    wide = code_of("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24", "sm_90").cost([])
    assert wide.matrix == 64 * 32 * 16 * 2 / 4096


def test_trips_of_a_compiled_loop():
    args = (halves(64, 64), halves(8, 64, 64), floats(64, 64))
    for target in ("gfx942", "sm_90"):
        found = static_model.code(compiled(target, multiply, *args, 8, SIZE=64, num_stages=1))
        assert len(found.loops) == 1
        one, nine = found.cost([1]), found.cost([9])
        assert nine.issue - one.issue == pytest.approx(8 * found.loops[0].cost.issue)
        assert nine.matrix == pytest.approx(9 * one.matrix)
