"""Forked processes: what the parent's threads hold at that moment must not stop the child."""

import subprocess
import sys

CODE = """
import os, sys, threading
import torch
from torch.utils.data import DataLoader, Dataset
from aam_kernels import ragged_attention
from aam_kernels._runtime import native

torch.set_num_threads(2)
torch.manual_seed(0)
offsets = torch.arange(0, 33, 4, dtype=torch.int32)
query = torch.randn(32, 2, 16)


def compute(threads=2):
    output, lse = torch.empty_like(query), torch.empty(32, 2)
    native.kernels().attention_forward(
        query, query, query, output, lse, offsets, None, None, None, 0.25, 0.1, 3, 0, 0, threads
    )
    return output


expected = compute()
assert "torch's OpenMP" in native.description(), native.description()
assert torch.equal(compute(1), expected)
going = True


def busy():
    while going:
        compute()


others = [threading.Thread(target=busy) for _ in range(2)]
for other in others:
    other.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        right = torch.equal(compute(), expected) and torch.equal(compute(3), expected)
        os._exit(0 if right and "forked" in native.description() else 1)
    assert os.waitpid(child, 0)[1] == 0
going = False
for other in others:
    other.join()
assert torch.equal(compute(), expected)


class Pieces(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return ragged_attention(query, query, query, offsets, impl="cpu")


own = Pieces()[0]
for piece in DataLoader(Pieces(), batch_size=None, num_workers=2, multiprocessing_context="fork"):
    assert torch.equal(piece, own)
print("done")
"""


def test_forked_processes_compute_what_their_parent_does(compiled):
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "done\n", done.stderr
