"""Triton's own launch path, without a device: what is compiled, how often, and for which grid.

Tensors are "meta": they have shapes and strides but no memory, so a launcher that waited for a
GPU to read a length would fail here. Binding and specialisation are Triton's own; only the first
test compiles.
"""

import importlib
import json

import pytest
import torch

from aam_kernels._problems import _layer_shapes
from aam_kernels._runtime import configurations
from aam_kernels._runtime.grouping import Sequences
from aam_kernels.encoder_layer.weights import EncoderLayerWeights
from profiling import shipped
from profiling.fake_driver import captured
from profiling.tunables import tunables

TARGETS = ("gfx942", "sm_90")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
attention = importlib.import_module("aam_kernels.attention.triton")
layer = importlib.import_module("aam_kernels.encoder_layer.triton")
pooling = importlib.import_module("aam_kernels.pooling.triton")


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(count, max_length, total, dtype, *, heads=4, head_dim=32, dropout=0.0, backward=False):
    """Launches self-attention of ``count`` sequences in ``total`` packed rows."""
    query, key, value = meta(total, 3, heads, head_dim, dtype=dtype).unbind(1)
    sequences = Sequences(meta(count + 1, dtype=torch.int32), max_length=max_length)
    seed = meta(dtype=torch.int64) if dropout else None
    rest = (sequences, head_dim**-0.5, dropout, seed)
    if not backward:
        return attention.forward(query, key, value, *rest)
    output, lse = meta(total, heads, head_dim, dtype=dtype), meta(total, heads)
    return attention.backward(output, query, key, value, output, lse, *rest)


def pool(count, max_length, total, dtype, *, dim=128, backward=False):
    values, scores = meta(total, dim, dtype=dtype), meta(total, dtype=dtype)
    sequences = Sequences(meta(count + 1, dtype=torch.int32), max_length=max_length)
    if not backward:
        return pooling.forward(values, scores, sequences)
    pooled, lse = meta(count, dim, dtype=dtype), meta(count)
    return pooling.backward(pooled, values, scores, pooled, lse, sequences)


# (count, longest, total rows): a batch of one, odd and even numbers, multiples of 16, tails, in the
# bucket of lengths up to 160. On AMD, tensors from 2 GiB on have a compiled kernel of their own.
BATCHES = (
    (1, 151, 151), (2, 150, 300), (16, 160, 2560), (17, 129, 2000), (1000, 152, 151_123),
    (8192, 151, 8192 * 151),
)  # fmt: skip
LARGE_BATCHES = ((100_001, 150, 100_001 * 150), (130_000, 160, 130_000 * 160))
LONG_BATCHES = ((1, 1024, 1024), (3, 1000, 2500), (16, 1024, 16_384), (1000, 513, 513_000))


def by_kernel(launches):
    kinds = {}
    for launch in launches:
        kinds.setdefault(launch.kernel, set()).add(launch.specialisation)
    return kinds


@pytest.mark.parametrize("target", TARGETS)
def test_real_compilation_happens_once(target):
    with captured(target) as launches:
        for count, length, total in BATCHES:
            pool(count, min(length, 256), total, torch.bfloat16)
    assert len(launches) == len(BATCHES)
    assert len({id(launch.compiled) for launch in launches}) == 1
    assert len({launch.specialisation for launch in launches}) == 1
    with captured(target) as again:
        pool(4, 160, 640, torch.float32)
    assert again[0].specialisation != launches[0].specialisation
    assert again[0].compiled is not launches[0].compiled


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "batches", [BATCHES, LARGE_BATCHES, LONG_BATCHES], ids=["short", "large", "long"]
)
def test_attention_is_specialised_once(target, dtype, dropout, backward, batches):
    with captured(target, compiling=False) as launches:
        for count, length, total in batches:
            attend(count, length, total, dtype, dropout=dropout, backward=backward)
    kinds = by_kernel(launches)
    assert kinds and all(len(found) == 1 for found in kinds.values()), kinds


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_what_must_differ_differs(backward):
    kinds, cases = {}, {}
    for dtype in DTYPES:
        for dropout in (0.0, 0.1):
            with captured("gfx942", compiling=False) as launches:
                attend(8, 151, 8 * 151, dtype, dropout=dropout, backward=backward)
            for launch in launches:
                if "query_ptr" in launch.signature:
                    kinds.setdefault(launch.kernel, set()).add(launch.specialisation)
                    cases.setdefault(launch.kernel, []).append((dtype, dropout))
    assert kinds
    assert {name: len(found) for name, found in kinds.items()} == {
        name: len(found) for name, found in cases.items()
    }


@pytest.mark.parametrize("target", TARGETS)
def test_two_gibibytes_are_the_only_border(target):
    with captured(target, compiling=False) as launches:
        for count, length, total in (*BATCHES, *LARGE_BATCHES):
            attend(count, length, total, torch.bfloat16)
    for found in by_kernel(launches).values():
        assert len(found) == (2 if target == "gfx942" else 1)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_pooling_is_specialised_once(backward):
    with captured("sm_90", compiling=False) as launches:
        for count, length, total in BATCHES:
            pool(count, length, total, torch.bfloat16, backward=backward)
    assert {name: len(found) for name, found in by_kernel(launches).items()} == {
        "pool_backward" if backward else "pool_forward": 1
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("length", [151, 1024])
def test_the_grid_lies_on_its_first_axis(target, backward, length):
    count, heads = 70_000, 4
    with captured(target, compiling=False) as launches:
        attend(count, length, count * 20, torch.bfloat16, heads=heads, backward=backward)
        pool(count, length, count * 20, torch.bfloat16, backward=backward)
    assert len(launches) >= 2
    for launch in launches:
        assert launch.grid[1:] == (1, 1)
        assert count <= launch.grid[0] < 1 << 31
        if not launch.kernel.startswith("pool"):
            assert launch.grid[0] >= count * heads


def test_no_sequence_and_no_row():
    with captured("gfx942", compiling=False) as launches:
        attend(0, 0, 0, torch.bfloat16)
        attend(0, 0, 0, torch.bfloat16, backward=True)
        pool(0, 0, 0, torch.bfloat16)
    assert all(launch.programs > 0 for launch in launches)  # an empty grid is an error on a device


@pytest.mark.parametrize("target", TARGETS)
def test_an_unknown_option_is_refused(target, tmp_path, monkeypatch):
    table = {
        "pool_forward": [
            {
                "dtype": "half", "width": 128, "length": 4096,
                "meta": {"BLOCK_ROWS": 32, "BLOCK_DIM": 128}, "options": {"num_wraps": 4},
            }
        ]
    }  # fmt: skip
    (tmp_path / f"{target}.json").write_text(json.dumps(table))
    monkeypatch.setenv("AAM_KERNELS_TABLES", str(tmp_path))
    configurations.load_table.cache_clear()
    configurations._lookup.cache_clear()
    try:
        with captured(target, compiling=False), pytest.raises(ValueError, match="num_wraps"):
            pool(4, 100, 400, torch.bfloat16)
    finally:
        configurations.load_table.cache_clear()
        configurations._lookup.cache_clear()


@pytest.mark.parametrize("architecture", configurations.ARCHITECTURES)
def test_tables_name_what_kernels_have(architecture):
    for name, entries in configurations.load_table(architecture).items():
        tunable = tunables()[name]
        for entry in entries:
            assert entry["dtype"] in ("half", "float32")
            assert entry["width"] in tunable.widths and entry["length"] in tunable.lengths
            assert not tunable.constants or set(entry["meta"]) == set(tunable.constants)
            assert set(entry["options"]) <= set(configurations.OPTIONS)
            if architecture.startswith("sm_"):
                assert not {"waves_per_eu", "matrix_instr_nonkdim", "kpack"} & set(entry["options"])


def test_a_kernel_that_cannot_be_compiled_is_a_record():
    too_much = configurations.Configuration(
        {"BLOCK_ROWS": 33, "BLOCK_DIM": 128}, {"num_warps": 4}
    )  # not a power of two
    with (
        configurations.forced("pool_forward", too_much),
        captured("gfx942", survive=True) as launches,
    ):
        pool(4, 100, 400, torch.bfloat16)
    assert launches[0].compiled is None and "power of 2" in launches[0].error
    with (
        configurations.forced("pool_forward", too_much),
        captured("gfx942"),
        pytest.raises(Exception, match="power of 2"),
    ):
        pool(4, 100, 400, torch.bfloat16)


def run_layer(count, max_length, total, dtype, *, dim=128, heads=4, dropout=0.1):
    """Forward and backward of the encoder layer, recomputing."""
    shapes = _layer_shapes(dim)
    weights = EncoderLayerWeights(*(meta(*shapes[name], dtype=dtype) for name in shapes))
    x, offsets = meta(total, dim, dtype=dtype), meta(count + 1, dtype=torch.int32)
    rest = (offsets, weights, heads, dropout, meta(dtype=torch.int64), max_length)
    layer.forward(x, *rest, False)
    saved = [meta(0)] * 3
    layer.backward(x, x, *rest, saved, [True] * (1 + len(weights)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batches", [BATCHES[:-1], LARGE_BATCHES], ids=["short", "large"])
def test_batches_add_no_specialisation_of_the_layer(dtype, batches):
    # A kernel serves several products, and large batches add their partial sums in two steps, so
    # there are several specialisations; the smallest and the largest batch have them all.
    found = []
    for count, length, total in batches:
        with captured("gfx942", compiling=False) as launches:
            run_layer(count, length, total, dtype)
        assert all(launch.grid[1:] == (1, 1) and launch.programs > 0 for launch in launches)
        found.append(by_kernel(launches))
    for kinds in found:
        for kernel, several in kinds.items():
            assert several <= found[0].get(kernel, set()) | found[-1].get(kernel, set()), kernel


UNTABLED = {"long_key_factors"}
"""Kernels with one fixed configuration: a hash a key row, nothing to choose."""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_that_is_launched_is_in_the_report(target, dtype):
    with captured(target, compiling=False) as launches:
        for length in (16, 64, 101, 151, 256, 257, 1024, 4096):
            for backward in (False, True):
                attend(8, length, 8 * length, dtype, dropout=0.1, backward=backward)
                pool(8, length, 8 * length, dtype, backward=backward)
        for dim in (32, 128, 192, 512):
            run_layer(8, 151, 8 * 151, dtype, dim=dim)
    found = {launch.kernel for launch in launches}
    assert found - UNTABLED <= set(tunables())
    lines = {tuple(line.split()[:3]) for line in shipped.read()}
    kind = configurations.dtype_class(dtype)
    assert {(name, target, kind) for name in found - UNTABLED} <= lines
