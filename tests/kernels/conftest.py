import pytest
import torch

from aam_kernels._runtime import dispatch, native
from tests.kernels.contract import IMPLS, require


@pytest.fixture(params=IMPLS)
def impl(request):
    require(request.param)
    return request.param


@pytest.fixture
def without_cpu_kernels(monkeypatch):
    """What is chosen, checked and reported is then the same whether anything was compiled."""
    for table in dispatch._REGISTRY.values():
        monkeypatch.delitem(table, "cpu", raising=False)
    monkeypatch.setattr(native, "warn_if_absent", lambda: None)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AAM_KERNELS_CACHE", str(tmp_path))
