"""Any number of threads gives the same bits: work is cut by what there is, sums have one order."""

import pytest
import torch

from aam_kernels._problems import Problem

UNEQUAL = (101, 0, 7, 151, 33, 1, 0, 64, 400, 16) * 4
PROBLEMS = [
    Problem("attention", "self", UNEQUAL, heads=4),
    Problem("attention", "dropout", UNEQUAL, heads=3, head_dim=24, dropout_p=0.1, tail=3),
    Problem("attention", "cross", UNEQUAL, key_lengths=UNEQUAL[::-1], dropout_p=0.3),
    Problem("attention", "one sequence", (1500,), heads=2, dropout_p=0.1),
    # Threads of a busy machine meet only where there is work for milliseconds.
    Problem("pooling", "many", UNEQUAL * 200, heads=1, head_dim=16, tail=3),
    Problem("pooling", "narrow", UNEQUAL * 40, heads=1, head_dim=3),
    Problem("encoder_layer", "recompute", UNEQUAL, heads=4, dropout_p=0.1, tail=3),
    Problem("encoder_layer", "kept", UNEQUAL, heads=4, dropout_p=0.1, recompute=False),
    Problem("encoder_layer", "one sequence", (700,), dropout_p=0.1),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.operation}: {p.name}")
def test_the_same_bits(compiled, with_threads, problem):
    inputs = problem.inputs(torch.float32)
    expected = with_threads(1, lambda: problem.run("cpu", inputs))
    for threads in (2, 2, 3, 5):
        found = with_threads(threads, lambda: problem.run("cpu", inputs))
        for name, true in expected.items():
            assert torch.equal(found[name], true), (threads, name)
