"""What is said where there are no kernels, and where AAM_KERNELS_CPU names none that can run."""

import subprocess
import sys
import warnings

import pytest
import torch

from aam_kernels import ragged_attention
from aam_kernels._runtime import native

FIRST_CALL = f"""
import sys, warnings, torch
sys.modules[{native.MODULE!r}] = None
x, offsets = torch.ones(3, 1, 8), torch.tensor([0, 3], dtype=torch.int32)
warnings.simplefilter("error")
from aam_kernels import available_impls, ragged_attention
assert available_impls()["attention"] == ("sdpa", "math")
ragged_attention(x, x, x, offsets, impl="sdpa")
warnings.resetwarnings()
ragged_attention(x, x, x, offsets)
ragged_attention(x, x, x, offsets)
"""


@pytest.fixture
def absent(monkeypatch):
    """As if nothing had been compiled, and nothing had been said about it."""
    native._load.cache_clear()
    monkeypatch.setitem(sys.modules, native.MODULE, None)
    monkeypatch.setattr(native, "_said", False)
    yield
    native._load.cache_clear()


def call(impl="auto", dtype=torch.float32):
    x = torch.ones(3, 1, 8, dtype=dtype)
    return ragged_attention(x, x, x, torch.tensor([0, 3], dtype=torch.int32), impl=impl)


def test_absence_is_said_once_and_only_under_auto(absent):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call("sdpa"), call("math"), call(dtype=torch.float64)
    with pytest.warns(UserWarning, match="no CPU kernels: .*'sdpa' instead.*`make native`") as said:
        call()
    assert "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_absence_is_refused_by_name_with_the_reason(absent):
    with pytest.raises(ValueError, match=r"impl='cpu' is not available .*\(not compiled"):
        call("cpu")
    with pytest.raises(RuntimeError, match=r"no CPU kernels: .*GCC 11"):
        native.kernels()
    assert not native.available()
    assert native.description().startswith("CPU kernels: none, ")


def test_a_module_that_was_never_compiled_says_so(absent, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(native.importlib, "import_module", missing)
    assert native.why_not() == "not compiled when this package was installed"


def test_nothing_is_said_before_the_first_call_and_one_thing_then():
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no CPU kernels") == 1


def test_description_names_variant_width_and_threads(compiled):
    text = native.description()
    assert f"{compiled.selected()} ({compiled.width()} floats a vector)" in text
    assert "torch's OpenMP threads (lib" in text, "the kernels do not run on torch's threads"


@pytest.mark.parametrize("name", ["x86-64-v9", "neon ", "X86-64"])
def test_a_variant_that_is_unknown_is_an_error(compiled, monkeypatch, name):
    runs = ", ".join(compiled.runnable())
    expected = f"'{name}' is not in this build; this processor runs {runs}$"
    compiled.select(None)
    monkeypatch.setenv("AAM_KERNELS_CPU", name)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^AAM_KERNELS_CPU: {expected}"):
            call()
    with pytest.raises(ValueError, match=f"^{expected}"):
        compiled.select(name)
    with pytest.raises(ValueError, match=f"^{expected}"):
        compiled.multiply_adds(1, name)


def test_the_environment_chooses_when_first_used(compiled, monkeypatch):
    for name in compiled.runnable():
        compiled.select(None)
        monkeypatch.setenv("AAM_KERNELS_CPU", name)
        call()
        monkeypatch.setenv("AAM_KERNELS_CPU", "too late")
        assert compiled.selected() == name
    compiled.select(None)
    monkeypatch.setenv("AAM_KERNELS_CPU", "")
    assert compiled.selected() == compiled.runnable()[0]


def test_selecting(compiled):
    for name in compiled.runnable():
        compiled.select(name)
        assert compiled.selected() == name
        assert compiled.multiply_adds(10) == 100 * compiled.width()
    assert set(compiled.runnable()) <= set(compiled.compiled())
