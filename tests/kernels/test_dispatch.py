"""What is used before it has passed its check: on a CPU that here counts as a device to check."""

import json
import threading
import warnings

import pytest
import torch

from aam_kernels import _quick_check, attention_pool, ragged_attention
from aam_kernels._runtime import configurations, device, dispatch, record, trust
from aam_kernels._runtime.trust import case_of
from aam_kernels.attention import sdpa
from aam_kernels.encoder_layer import sdpa as layer
from aam_kernels.pooling import sdpa as pooling_sdpa
from tests.kernels.contract import CPU, offsets_of

pytestmark = pytest.mark.usefixtures("without_cpu_kernels")
CASE = case_of((16,), 20)
OFFSETS = offsets_of((5, 0, 20, 1))


@pytest.fixture(autouse=True)
def checks(monkeypatch):
    """Nothing is trusted; gives the list of checks that were made."""
    made = []

    def counted(*what):
        made.append(what)
        return _quick_check.check(*what)

    monkeypatch.setattr(trust, "TRUSTED_DEVICES", ())
    monkeypatch.setattr(trust, "_checker", counted)
    monkeypatch.delenv("AAM_KERNELS_VERIFY", raising=False)
    trust.forget()
    dispatch._WARNED.clear()
    yield made
    trust.forget()
    dispatch._WARNED.clear()


@pytest.fixture
def broken(monkeypatch):
    """The fast implementation of attention, with a wrong gradient of the key."""
    original = sdpa.backward

    def backward(*arguments):
        grad_query, grad_key, grad_value = original(*arguments)
        return grad_query, grad_key * 1.01, grad_value

    monkeypatch.setattr(sdpa, "backward", backward)


def call(impl="auto", dtype=torch.float32, **options):
    """Output and gradients of a small self-attention."""
    inputs = torch.randn(3, 26, 2, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    leaves = [x.clone().requires_grad_() for x in inputs.unbind(0)]
    options = {"max_length": 20, **options}
    output = ragged_attention(*leaves, OFFSETS, impl=impl, **options)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


def new_process():
    """Forgets what a process knows; the record on disk stays."""
    trust.forget()
    dispatch._WARNED.clear()


def test_what_passes_is_used_and_checked_once(checks):
    for _ in range(3):
        assert dispatch.choose("attention", "auto", CPU, torch.float32, CASE) == "sdpa"
    assert dispatch.choose("attention", "sdpa", CPU, torch.float32, CASE) == "sdpa"
    assert len(checks) == 1
    new_process()
    assert dispatch.choose("attention", "auto", CPU, torch.float32, CASE) == "sdpa"
    assert len(checks) == 1  # the record on disk
    (entries,) = json.loads(record.record_path().read_text()).values()
    assert entries == {"attention/sdpa/float32/width 16, rows to 32, self": ""}


def test_each_kind_of_call_is_checked_apart(checks):
    call()
    assert len(checks) == 1  # forward and backward are one kind
    call(dropout_p=0.1, seed=1)
    call(max_length=40)
    call(max_length=None)
    call(dtype=torch.bfloat16)
    call(key_offsets=OFFSETS, max_key_length=20)
    values = torch.randn(26, 8)
    attention_pool(values, values[:, 0].contiguous(), OFFSETS, max_length=20)
    assert len(checks) == 7
    assert {what[0] for what in checks} == {"attention", "pooling"}
    call(max_length=31, dropout_p=0.3, seed=4)
    assert len(checks) == 7


def test_what_diverges_is_replaced_with_one_warning(broken, checks):
    with pytest.warns(UserWarning) as told:
        found = call()
        call()
        call(dropout_p=0.1, seed=1)
    (warning,) = told
    message = str(warning.message)
    for part in ("attention: impl='sdpa' fails", "grad key: largest error", "allowed", "float32"):
        assert part in message
    assert "uses the slower 'math'" in message
    for a, b in zip(found, call("math"), strict=True):
        assert torch.equal(a, b)
    assert len(checks) == 2


def test_what_diverges_is_refused_when_asked_for(broken, checks):
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"impl='sdpa' fails .*grad key.*Use impl='math'"):
            call("sdpa")
    assert len(checks) == 1
    new_process()
    with pytest.raises(RuntimeError, match="grad key"):  # a failure is remembered too
        call("sdpa")
    assert len(checks) == 1


def test_a_failure_leads_to_math_and_not_to_the_next(broken, monkeypatch):
    twin = dispatch.Implementation(
        "aam_kernels.attention.sdpa", None, dispatch.FLOATS, dispatch.FLOATS
    )
    monkeypatch.setitem(dispatch._REGISTRY["attention"], "triton", twin)
    right = dispatch.Implementation(
        "aam_kernels.attention.reference", None, dispatch.FLOATS, dispatch.FLOATS
    )
    monkeypatch.setitem(dispatch._REGISTRY["attention"], "sdpa", right)
    with pytest.warns(UserWarning, match="impl='triton' fails"):
        assert dispatch.choose("attention", "auto", CPU, torch.float32, CASE) == "math"


def test_reading_what_belongs_to_no_sequence_is_found(monkeypatch):
    original = sdpa.forward

    def forward(query, *rest):
        output, lse = original(query, *rest)
        return output + 0 * query[-1:], lse

    monkeypatch.setattr(sdpa, "forward", forward)
    with pytest.raises(RuntimeError, match="output: largest error inf"):
        dispatch.choose("attention", "sdpa", CPU, torch.float32, CASE)


def test_other_bits_on_repeat_are_found(monkeypatch):
    original = sdpa.forward
    calls = []

    def forward(*arguments):
        calls.append(1)
        output, lse = original(*arguments)
        return output * (1 + 1e-7 * len(calls)), lse

    monkeypatch.setattr(sdpa, "forward", forward)
    with pytest.raises(RuntimeError, match=r"repeated: output.* not bitwise equal"):
        dispatch.choose("attention", "sdpa", CPU, torch.float32, CASE)


def test_math_is_never_checked(broken, checks):
    call("math")
    call("auto", dtype=torch.float64)
    assert not checks


def test_checks_can_be_switched_off(broken, checks, monkeypatch):
    monkeypatch.setenv("AAM_KERNELS_VERIFY", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("attention", "auto", CPU, torch.float32, CASE) == "sdpa"
        assert dispatch.choose("attention", "sdpa", CPU, torch.float32, CASE) == "sdpa"
    assert not checks and not record.record_path().exists()


@pytest.mark.parametrize(
    "error", [RuntimeError("PassManager::run failed\n on gfx942"), AssertionError()], ids=repr
)
@pytest.mark.parametrize("lost", [False, True])
def test_a_crash_counts_as_a_failure(monkeypatch, checks, error, lost):
    def crash(*_):
        raise error

    told = f"{type(error).__name__}: {' '.join(str(error).split())}"
    expected = f"the device is lost .*: {told}" if lost else f"it does not run: {told}"
    with monkeypatch.context() as patch:
        patch.setattr(pooling_sdpa, "forward", crash)
        patch.setattr(trust, "usable", lambda _: not lost)
        with pytest.warns(UserWarning, match=expected):
            assert dispatch.choose("pooling", "auto", CPU, torch.float32, CASE) == "math"
        assert dispatch.choose("pooling", "auto", CPU, torch.float32, CASE) == "math"
    assert len(checks) == 1
    new_process()
    if lost:  # the next process must not lose its device too
        with pytest.raises(RuntimeError, match=expected):
            dispatch.choose("pooling", "sdpa", CPU, torch.float32, CASE)
    else:  # a compiler may have been missing: it is tried again
        assert dispatch.choose("pooling", "sdpa", CPU, torch.float32, CASE) == "sdpa"
    assert len(checks) == (1 if lost else 2)


def test_running_out_of_memory_is_not_remembered(monkeypatch, checks):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(pooling_sdpa, "forward", full)
        with pytest.warns(UserWarning, match="ran out of memory"):
            assert dispatch.choose("pooling", "auto", CPU, torch.float32, CASE) == "math"
    new_process()
    assert dispatch.choose("pooling", "auto", CPU, torch.float32, CASE) == "sdpa"
    assert len(checks) == 2


@pytest.mark.parametrize("change", ["sources", "tables", "torch"])
def test_the_record_ends_with_what_it_was_measured_on(checks, monkeypatch, tmp_path, change):
    def choose():
        return dispatch.choose("attention", "auto", CPU, torch.float32, CASE)

    choose()
    new_process()
    if change == "sources":
        monkeypatch.setattr(device, "fingerprint", lambda: "other")
    elif change == "tables":
        (tmp_path / "tables").mkdir()
        (tmp_path / "tables" / "gfx942.json").write_text("{}")
        monkeypatch.setenv("AAM_KERNELS_TABLES", str(tmp_path / "tables"))
    else:
        monkeypatch.setattr(torch, "__version__", "9.9")
    choose()
    assert len(checks) == 2
    assert len(json.loads(record.record_path().read_text())) == 2


def test_the_fingerprint_follows_the_sources(tmp_path):
    (tmp_path / "kernel.py").write_text("a = 1")
    before = device._fingerprint(str(tmp_path), "")
    (tmp_path / "kernel.py").write_text("a = 2")
    device._fingerprint.cache_clear()
    after = device._fingerprint(str(tmp_path), "")
    assert before != after != device._fingerprint(str(tmp_path), "even")
    device._fingerprint.cache_clear()


@pytest.mark.parametrize("garbage", ["", "{broken", "[1, 2]", '{"x": 3}', "\x00\x01"])
def test_garbage_in_the_record_means_nothing_is_known(checks, garbage):
    record.record_path().write_text(garbage)
    assert dispatch.choose("pooling", "auto", CPU, torch.float32, CASE) == "sdpa"
    assert len(checks) == 1
    where = device.environment(CPU)
    assert record.read(where) == {trust.entry("pooling", "sdpa", torch.float32, CASE): ""}
    for entries in ([1], {"a": 1, "b": ""}):
        record.record_path().write_text(json.dumps({where: entries}))
        assert record.read(where) == ({"b": ""} if isinstance(entries, dict) else {})


def test_a_cache_that_cannot_be_written_does_no_harm(checks, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("AAM_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        assert dispatch.choose("pooling", "auto", CPU, torch.float32, CASE) == "sdpa"
    assert len(checks) == 1


def test_nothing_is_left_behind_when_replacing_fails(monkeypatch, tmp_path):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(record.os, "replace", refuse)
    assert not record.write("here", {"a": ""})
    assert list(tmp_path.iterdir()) == []


def test_a_complete_run_covers_every_case(checks):
    where = device.environment(CPU)
    record.write(where, {trust.entry("attention", "sdpa", torch.float32): ""})
    record.write(where, {trust.entry("pooling", "sdpa", torch.float32): "pooling was wrong"})
    assert dispatch.choose("attention", "auto", CPU, torch.float32, CASE) == "sdpa"
    with pytest.raises(RuntimeError, match="pooling was wrong"):
        dispatch.choose("pooling", "sdpa", CPU, torch.float32, CASE)
    assert not checks


def test_threads_wait_for_one_check(checks, monkeypatch):
    monkeypatch.setattr(record, "write", lambda *_: False)  # the disk does not help
    results = []

    def work():
        results.append(dispatch.choose("attention", "auto", CPU, torch.float32, CASE))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == ["sdpa"] * 6
    assert len(checks) == 1


def test_a_check_that_calls_operators_does_not_start_another(checks, monkeypatch):
    original = sdpa.forward

    def forward(*arguments):
        dispatch.choose("pooling", "sdpa", CPU, torch.float32, CASE)
        return original(*arguments)

    monkeypatch.setattr(sdpa, "forward", forward)
    trust.failure("attention", "sdpa", CPU, torch.float32, CASE)
    assert [what[0] for what in checks] == ["attention"]


def test_a_check_leaves_the_callers_state_alone(checks):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        dispatch.choose("attention", "auto", CPU, torch.float32, CASE)
    assert len(checks) == 1
    assert torch.equal(before, torch.get_rng_state())


def test_a_check_asked_for_inside_a_backward_pass_and_a_transform(checks):
    found = call()
    trust.forget()
    record.record_path().unlink()
    inputs = torch.randn(3, 26, 2, 16, generator=torch.Generator().manual_seed(3)).unbind(0)
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = ragged_attention(*leaves, OFFSETS, max_length=20)
    trust.forget()
    record.record_path().unlink()
    grads = torch.autograd.grad(output.square().sum(), leaves)
    for a, b in zip(found, (output, *grads), strict=True):
        assert torch.equal(a, b)
    assert len(checks) == 3
    trust.forget()
    record.record_path().unlink()

    def loss(query):
        return ragged_attention(query, *inputs[1:], OFFSETS, max_length=20).square().sum()

    assert torch.allclose(torch.func.grad(loss)(inputs[0]), grads[0], atol=1e-6)
    assert len(checks) == 4


def test_a_check_under_compile(checks):
    def loss(query, key, value):
        return ragged_attention(query, key, value, OFFSETS, max_length=20).square()

    inputs = torch.randn(3, 26, 2, 16).unbind(0)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), loss(*inputs))
    assert len(checks) == 1


def test_no_check_during_capture(monkeypatch, checks):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(trust, "environment", lambda _: "some GPU")
    monkeypatch.setattr(trust, "_check", lambda *_: [])
    with pytest.raises(RuntimeError, match="call the operation once before capture"):
        dispatch.choose("attention", "sdpa", gpu, torch.float32, CASE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert dispatch.choose("attention", "sdpa", gpu, torch.float32, CASE) == "sdpa"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch.choose("attention", "sdpa", gpu, torch.float32, CASE) == "sdpa"


def test_a_width_that_is_not_served(monkeypatch):
    found = dispatch.Implementation(
        "aam_kernels.attention.sdpa", None, dispatch.FLOATS, dispatch.FLOATS,
        refuses=dispatch.takes(8, 128),
    )  # fmt: skip
    monkeypatch.setitem(dispatch._REGISTRY["attention"], "triton", found)
    wide, narrow = case_of((129,), 20), case_of((128,), 20)
    assert dispatch.choose("attention", "auto", CPU, torch.float32, wide) == "sdpa"
    assert dispatch.choose("attention", "auto", CPU, torch.float32, narrow) == "triton"
    with pytest.raises(ValueError, match="takes widths of 8 to 128, got 129"):
        dispatch.choose("attention", "triton", CPU, torch.float32, wide)


def test_matmul_precision_is_part_of_the_case(checks):
    before = torch.get_float32_matmul_precision()
    try:
        dispatch.choose("pooling", "auto", CPU, torch.float32, CASE)
        torch.set_float32_matmul_precision("high")
        dispatch.choose("pooling", "auto", CPU, torch.float32, CASE)
        dispatch.choose("pooling", "auto", CPU, torch.bfloat16, CASE)
        torch.set_float32_matmul_precision("highest")
        dispatch.choose("pooling", "auto", CPU, torch.bfloat16, CASE)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(checks) == 3


@pytest.mark.parametrize(
    ("longest", "edge"),
    [(-1, -1), (0, 16), (16, 16), (17, 32), (151, 160), (257, 1024), (4096, 1024)],
)
def test_length_classes(longest, edge):
    assert case_of((8,), longest).longest == edge


def test_length_classes_are_those_of_the_tables():
    # Else a call could be served by a table entry that its class's check does not reach.
    for path in configurations.TABLES.glob("*.json"):
        for kernel, rows in json.loads(path.read_text()).items():
            lengths = {row["length"] for row in rows} - {0}
            short = {length for length in lengths if length <= trust.EDGES[-2]}
            assert short <= set(trust.EDGES), (path.name, kernel)
            assert len(lengths - short) <= 1, (path.name, kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_checked_with_and_without_what_it_keeps(checks, monkeypatch, dtype):
    case = case_of((16, 2), 16, 0.1)
    assert trust.failure("encoder_layer", "sdpa", CPU, dtype, case) == ""
    trust.forget()
    record.record_path().unlink()
    original = layer.backward

    def backward(*arguments):
        grads = original(*arguments)
        if arguments[8][0].numel():  # qkv was kept
            grads[3] = grads[3] * 2
        return grads

    monkeypatch.setattr(layer, "backward", backward)
    found = trust.failure("encoder_layer", "sdpa", CPU, dtype, case)
    assert "with activations kept: grad qkv_weight: largest error" in found
