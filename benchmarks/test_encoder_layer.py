"""A whole pre-norm layer: every implementation here against nn.TransformerEncoderLayer."""

import pytest
import torch

from aam_kernels import available_impls
from benchmarks.comparison import Goal
from benchmarks.kernels import layer_call, layer_work, torch_layer_calls
from benchmarks.machine import PEAK
from benchmarks.rows import Rows, between

pytestmark = pytest.mark.kernels
IMPLS = available_impls("cpu")["encoder_layer"]
CASES = {
    "64 rows of 151": (151,) * 64,
    "64 rows of 101": (101,) * 64,
    "64 rows of 60 to 151": between(60, 151, 64),
}
SMALL = {"64 rows of 151": (21,) * 6, "64 rows of 60 to 151": between(1, 30, 5)}
MASKED = "nn.TransformerEncoderLayer, masked"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("case", CASES)
def test_encoder_layer(compare, timing, full, case, backward, dropout):
    if not timing and case not in SMALL:
        pytest.skip("the same code as for rows of 151")
    lengths = CASES[case] if timing else SMALL[case]
    rows = Rows(lengths)
    calls, work = {}, {}
    for impl in IMPLS:
        if timing and not full and impl == "math":
            continue
        for recompute in (True, False) if backward else (True,):
            kind = ("", ", kept", ", recompute")[backward + (backward and recompute)]
            calls[f"aam {impl}{kind}"] = layer_call(
                lengths, dropout=dropout, backward=backward, recompute=recompute, impl=impl
            )
            work[f"aam {impl}{kind}"] = layer_work(
                lengths, backward=backward, recompute=backward and recompute
            )
    ours = list(calls)
    calls |= torch_layer_calls(rows, dropout=dropout, backward=backward)
    torchs = [name for name in calls if name not in ours]
    work |= dict.fromkeys(torchs, layer_work(lengths, backward=backward))
    shares = {"": 0.75, ", recompute": 0.60, ", kept": 0.68}
    results, _ = compare(
        f"layer, {case}, dropout {dropout}, {'forward+backward' if backward else 'forward'}",
        calls,
        reference=torchs,
        work=work,
        goals=[
            Goal(f"aam {IMPLS[0]}{kind}", share, over=PEAK, of="operations")
            for kind, share in shares.items()
        ],
    )
    # With dropout torch draws another mask than the counter hash: ours agree among themselves.
    expected = list(results[ours[0] if dropout else MASKED])
    if not dropout:
        expected[:2] = [x[rows.real] for x in expected[:2]]
    for name in ours:
        for got, want in zip(results[name], expected, strict=True):
            torch.testing.assert_close(
                got, want, rtol=1e-3, atol=1e-3 * float(want.detach().abs().max())
            )
