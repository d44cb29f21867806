"""What the contract tests share: implementations, oracles that use plain torch and numpy only."""

import os

import numpy as np
import pytest
import torch

from aam_kernels._runtime import native

IMPLS = ("math", "sdpa", "cpu")
"""Implementations under contract on a CPU: a new one joins here."""

CPU = torch.device("cpu")
FLOAT64 = ("math", "sdpa")
"""Implementations that take float64."""


def require(impl):
    """Skips a test of "cpu" where nothing was compiled; fails it under AAM_REQUIRE_TOOLS."""
    if impl == "cpu" and not native.available():
        missing = pytest.fail if os.environ.get("AAM_REQUIRE_TOOLS") else pytest.skip
        missing(f"no CPU kernels: {native.why_not()}")


def exact_dtype(impl):
    """The dtype in which an implementation is compared with a formula."""
    return torch.float64 if impl in FLOAT64 else torch.float32


def assert_close(found, expected, rtol=1e-11, atol=1e-12):
    """Equal to float64's precision, or where ``found`` is float32 to that."""
    if found.dtype == torch.float32:
        sizes = expected.detach().abs().nan_to_num(posinf=0.0).flatten().tolist()
        rtol, atol = 1e-5, 1e-6 * max([1.0, *sizes])
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=rtol, atol=atol)


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def oracle_attention(query, key, value, lengths, key_lengths, scale, drop=None, dropout_p=0.0):
    """Sequence by sequence, differentiable; drop(queries, keys, heads) gives a bool mask."""
    rows, first, first_key = [], 0, 0
    for length, key_length in zip(lengths, key_lengths, strict=True):
        queries = range(first, first + length)
        keys = range(first_key, first_key + key_length)
        first, first_key = first + length, first_key + key_length
        if key_length == 0:
            rows.append(query[queries.start : queries.stop] * 0)
            continue
        q = query[queries.start : queries.stop]
        k, v = (x[keys.start : keys.stop] for x in (key, value))
        weights = (torch.einsum("qhd,khd->hqk", q, k) * scale).softmax(-1)
        if drop is not None:
            mask = torch.from_numpy(drop(queries, keys, query.shape[1]))
            weights = weights * ~mask / (1 - dropout_p)
        rows.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(rows)


def numpy_mix(x):
    x = np.asarray(x, dtype=np.uint32).copy()
    with np.errstate(over="ignore"):
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x7FEB352D)
        x ^= x >> np.uint32(15)
        x *= np.uint32(0x846CA68B)
        x ^= x >> np.uint32(16)
    return x


def numpy_dropped(seed, queries, keys, heads, dropout_p):
    """The dropout hash in unsigned arithmetic: (heads, queries, keys) bool."""
    seed %= 1 << 64
    word = numpy_mix(np.uint32(seed & 0xFFFFFFFF) ^ numpy_mix(seed >> 32))
    q = np.array([row % (1 << 32) for row in queries], dtype=np.uint32)[None, :, None]
    k = np.array([row % (1 << 24) for row in keys], dtype=np.uint32)[None, None, :]
    head = np.array([h % (1 << 32) for h in heads], dtype=np.uint32)[:, None, None]
    with np.errstate(over="ignore"):
        place = q * np.uint32(0x9E3779B1) + head * np.uint32(0x85EBCA77)
        row = (numpy_mix(place ^ word) >> np.uint32(8)) | np.uint32(0x800001)
        x = k * np.uint32(0x9E3779)
        x = ((x ^ (x >> np.uint32(15))) & np.uint32(0xFFFFFF)) * np.uint32(0xB5297B)
        product = row * ((x >> np.uint32(8)) | np.uint32(0x800001))
    return product.view(np.int32) < int(dropout_p * 2**32) - 2**31
