"""Attention pooling: every implementation here against the padded, masked softmax."""

import pytest
import torch

from aam_kernels import available_impls
from benchmarks.comparison import Goal
from benchmarks.kernels import DIM, pooling_calls, pooling_work
from benchmarks.rows import Rows, between

pytestmark = pytest.mark.kernels
IMPLS = available_impls("cpu")["pooling"]
TORCH = "torch, padded and masked"


@pytest.mark.parametrize("count", [512, 2048])  # 27 and 110 MB: a batch, and beyond every cache
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_pooling(compare, timing, full, backward, count):
    if not timing and count != 512:
        pytest.skip("the same code as for 512 rows")
    lengths = between(60, 151, count if timing else 7)
    impls = [impl for impl in IMPLS if not timing or full or impl != "math"]
    calls = pooling_calls(Rows(lengths), impls, backward=backward)
    results, _ = compare(
        f"pooling, {count:,} rows of 60 to 151, {'forward+backward' if backward else 'forward'}",
        calls,
        reference=TORCH,
        work=dict.fromkeys(calls, pooling_work(lengths, DIM, backward=backward)),
        goals=[Goal(f"aam {impls[0]}", 3.0)],
    )
    out, *gradients = results[TORCH]
    expected = [out, *[gradient[Rows(lengths).real] for gradient in gradients]]
    for impl in impls:
        for got, want in zip(results[f"aam {impl}"], expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
