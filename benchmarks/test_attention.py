"""Ragged attention: every implementation here against torch's own, each way it can be called."""

import pytest
import torch

from aam_kernels import available_impls
from benchmarks.comparison import Goal
from benchmarks.kernels import DIM, attention_calls, attention_work
from benchmarks.rows import Rows, between

pytestmark = pytest.mark.kernels
IMPLS = available_impls("cpu")["attention"]
CASES = {
    "64 rows of 151": ((151,) * 64, 2.0),
    "64 rows of 60 to 151": (between(60, 151, 64), 2.0),
    "16 rows of 10 to 400": (between(10, 400, 16), 1.0),
    "4 rows of 1,024": ((1024,) * 4, 1.0),
    "1 row of 4,096": ((4096,), 1.0),
}
SMALL = {"64 rows of 151": (21,) * 6, "64 rows of 60 to 151": between(1, 30, 5)}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("case", CASES)
def test_attention(compare, timing, full, case, backward):
    if not timing and case not in SMALL:
        pytest.skip("the same code as for shorter rows")
    lengths, goal = CASES[case] if timing else (SMALL[case], 1.0)
    impls = [impl for impl in IMPLS if not timing or full or impl != "math"]
    rows = Rows(lengths)
    calls = attention_calls(rows, impls, backward=backward)
    what = "forward+backward" if backward else "forward"
    results, _ = compare(
        f"attention, {case}, {what}",
        calls,
        reference=[name for name in calls if name.startswith("torch")],
        work=dict.fromkeys(calls, attention_work(lengths, DIM, backward=backward)),
        goals=[Goal(f"aam {impls[0]}", goal)],
    )
    expected = [x.transpose(1, 2)[rows.real] for x in results["torch SDPA, padded and masked"]]
    for impl in impls:
        for got, want in zip(results[f"aam {impl}"], expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
