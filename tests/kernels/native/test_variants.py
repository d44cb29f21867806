"""Every compiled variant that this processor runs keeps the contract."""

from dataclasses import replace

import pytest
import torch

from aam_kernels import _verification
from aam_kernels._problems import Problem
from aam_kernels._runtime import native
from tests.kernels.contract import CPU

VARIANTS = native.kernels().runnable() if native.available() else ["none"]
LENGTHS = (1, 0, 5, 40, 151, 17, 65)
CROSS = (3, 4, 0, 40, 7, 2, 64)
PROBLEMS = [
    *(
        Problem("attention", f"head_dim {size}", LENGTHS, head_dim=size, dropout_p=p, tail=2)
        for size, p in ((8, 0.2), (20, 0.0), (32, 0.0), (32, 0.1), (72, 0.1), (128, 0.0))
    ),
    Problem("attention", "cross", LENGTHS, key_lengths=CROSS, dropout_p=0.3, tail=1),
    Problem("attention", "padded", LENGTHS, padded=True, tail=2),
    Problem("attention", "large logits", magnitude=8.0),
    Problem("attention", "long", (1100, 3), heads=1, dropout_p=0.1),
    *(
        Problem("pooling", f"dim {dim}", LENGTHS, heads=1, head_dim=dim, tail=2)
        for dim in (1, 3, 4, 7, 8, 15, 16, 17, 33, 100, 128, 300)
    ),
    Problem("pooling", "large scores", magnitude=50.0),
    Problem("pooling", "long", (5000, 3)),
    *(
        Problem("encoder_layer", f"{heads} heads of {size}", LENGTHS, heads, size, tail=2,
                dropout_p=p, recompute=recompute)
        for heads, size, p, recompute in (
            (2, 8, 0.1, True), (4, 32, 0.1, False), (3, 16, 0.0, True), (5, 32, 0.0, False),
            (1, 80, 0.1, True),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.operation}: {p.name}")
@pytest.mark.parametrize("variant", VARIANTS)
def test_accuracy_poison_and_repetition(compiled, variant, problem):
    compiled.select(variant)
    assert compiled.selected() == variant
    failures = []
    for seed in range(3):  # one draw's largest error is a matter of luck, all else is not
        drawn = replace(problem, seed=seed)
        (check,) = _verification.check_problem(drawn, ("cpu",), torch.float32, CPU)
        failures.append(check.failures)
        if not check.failures:
            return
    raise AssertionError(failures)


def test_the_variants_differ(compiled):
    # Else `select` would have selected nothing.
    problem = Problem("encoder_layer", "", (40, 151), heads=4)
    inputs = problem.inputs(torch.float32)
    found = []
    for variant in VARIANTS:
        compiled.select(variant)
        found.append(problem.run("cpu", inputs)["grad x"])
    assert not any(torch.equal(found[0], other) for other in found[1:])
