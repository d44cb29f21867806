"""Rows further than 2**31 elements from the first: whatever grows with a batch takes 64 bits."""

from unittest import mock

import pytest
import torch

from aam_kernels._runtime import configurations
from aam_kernels._runtime.grouping import Sequences
from aam_kernels.attention import reference
from aam_kernels.attention.triton import backward_into, forward_into
from tests.kernels.triton import interpreter

STRIDE = 1 << 22
ROWS = 540  # 2.26e9 elements
HEAD_DIM = 16


def scattered(storage, column):
    """(rows, 1, head_dim) whose rows lie STRIDE elements apart; untouched pages cost nothing."""
    return storage.as_strided((ROWS, 1, HEAD_DIM), (STRIDE, HEAD_DIM, 1), column * HEAD_DIM)


@pytest.mark.parametrize("kernels", ["short", "long"])
def test_attention_far_from_the_first_row(kernels):
    memory = [torch.empty(ROWS * STRIDE, dtype=torch.bfloat16) for _ in range(2)]
    query, key, value, grad = (scattered(memory[0], column) for column in range(4))
    output, *grads = (scattered(memory[1], column) for column in range(4))
    sequences = Sequences(
        torch.tensor([0, 525, ROWS], dtype=torch.int32),
        lengths=torch.tensor([2, 15], dtype=torch.int32),
        max_length=15,
    )
    torch.manual_seed(0)
    real = torch.tensor([0, 1, *range(525, ROWS)])
    for x in (query, key, value, grad):
        x[real] = torch.randn(len(real), 1, HEAD_DIM).bfloat16()
    dense = [torch.zeros(ROWS, 1, HEAD_DIM) for _ in range(4)]
    for x, far in zip(dense, (query, key, value, grad), strict=True):
        x[real] = far[real].float()
    with (
        interpreter.interpreting(),
        # Writes are checked as reads are: the record of writers is as large as the storage.
        mock.patch.object(interpreter._Memory, "write", interpreter._Memory.read),
        mock.patch.dict(
            configurations._FORCED,
            {} if kernels == "short" else {"short_forward": None, "short_backward": None},
        ),
    ):
        lse = forward_into(output, query, key, value, sequences, 0.25, 0.0, None)
        backward_into(grads, grad, query, key, value, output, lse, sequences, 0.25, 0.0, None)
    expected, _ = reference.forward(*dense[:3], sequences, 0.25, 0.0, None)
    torch.testing.assert_close(output[real].float(), expected[real], rtol=0.02, atol=0.02)
    expected_grads = reference.backward(
        dense[3], *dense[:3], expected, lse, sequences, 0.25, 0.0, None
    )
    for found, true in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found[real].float(), true[real], rtol=0.02, atol=0.02)
