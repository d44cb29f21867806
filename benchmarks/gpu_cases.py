"""What is compared on a GPU: ragged attention, pooling and the layer against what torch offers.

Every case is a function of the device and of sizes, so that the tests run all of it, tiny, on a
CPU. All contestants of a case see the same rows: packed, or padded to the longest with a padding
mask. ``python -m benchmarks.gpu_cases [--json FILE] [--seconds N]`` runs all of them on this GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from aam_kernels import (
    EncoderLayerWeights,
    attention_pool,
    available_impls,
    encoder_layer,
    ragged_attention,
    weights_from_torch,
)
from benchmarks.on_device import Case, Contestant, Unavailable, Work, compare
from benchmarks.rows import Rows, between

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Errors beyond rounding in that dtype (TF32 products, in float32)."""


def asv_rows(device: torch.device, dtype: torch.dtype, count: int, length: int = 151) -> Rows:
    """Nucleotides within ASVs: rows of about one length."""
    return Rows(between(max(1, 2 * length // 3), length, count), device, dtype)


def sample_rows(device: torch.device, dtype: torch.dtype, count: int, longest: int) -> Rows:
    """ASVs within samples: rows of very unequal length."""
    return Rows(between(max(1, longest // 100), longest, count), device, dtype)


def attention_case(
    rows: Rows, heads: int, head_dim: int, *, backward: bool, budget: float, compiled: bool = True
) -> Case:
    """Attention, padded and masked or ragged; no dropout.

    Args:
        rows: the batch.
        heads: attention heads.
        head_dim: elements of a head.
        backward: time the gradients of query, key and value too.
        budget: seconds for the rounds.
        compiled: compile FlexAttention, without which it is no contestant but a test.
    """
    query, key, value, grad = (x.contiguous() for x in rows.draw(4, heads, head_dim).unbind(1))
    inputs = [x.requires_grad_(backward) for x in (query, key, value)]
    padded_inputs = [_heads_first(rows, x).requires_grad_(backward) for x in inputs]
    padded_grad = _heads_first(rows, grad)
    real = rows.real

    def packed(make: Callable[[], Callable[..., Tensor]]) -> Contestant:
        return _contestant(make, inputs, grad, backward)

    def padded(make: Callable[[], Callable[..., Tensor]]) -> Contestant:
        found = _contestant(make, padded_inputs, padded_grad, backward)
        return replace(found, unpack=lambda result: [x.transpose(1, 2)[real] for x in result])

    contestants = {
        f"aam_kernels {impl}": packed(partial(_ragged, rows, impl))
        for impl in available_impls(rows.device)["attention"]
    }
    for name, backend in BACKENDS.items():
        contestants[f"torch SDPA {name}, padded + mask"] = padded(partial(_sdpa, backend, rows))
    contestants["torch varlen_attn"] = packed(partial(_varlen, rows))
    contestants["torch FlexAttention, padded"] = padded(partial(_flex, rows, compiled))
    contestants["flash-attn varlen"] = packed(partial(_flash_attention, rows))
    exact = [x.detach().double().requires_grad_(backward) for x in inputs]
    return compare(
        f"attention {'forward+backward' if backward else 'forward'}, {_shape(rows)}, "
        f"{heads} heads of {head_dim}",
        contestants,
        reference="torch SDPA math, padded + mask",
        truth=_work(_ragged(rows, "math"), exact, grad.double(), backward)(),
        device=rows.device,
        tolerance=TOLERANCE[rows.dtype],
        budget=budget,
    )


def pooling_case(rows: Rows, dim: int, *, backward: bool, budget: float) -> Case:
    """Attention pooling against the masked softmax on padded tensors."""
    inputs = [x.requires_grad_(backward) for x in (rows.draw(dim), rows.draw())]
    padded_inputs = [rows.pad(x.detach()).requires_grad_(backward) for x in inputs]
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(len(rows.lengths), dim, generator=generator).to(rows.device, rows.dtype)
    real = rows.real

    def masked(values: Tensor, scores: Tensor) -> Tensor:
        weights = scores.masked_fill(~real, float("-inf")).softmax(-1)
        return torch.einsum("bl,bld->bd", weights, values)

    contestants = {
        f"aam_kernels {impl}": _contestant(partial(_pool, rows, impl), inputs, grad, backward)
        for impl in available_impls(rows.device)["pooling"]
    }
    contestants["torch, padded and masked"] = replace(
        _contestant(lambda: masked, padded_inputs, grad, backward),
        unpack=lambda result: [result[0], *(x[real] for x in result[1:])],
    )
    exact = [x.detach().double().requires_grad_(backward) for x in inputs]
    return compare(
        f"pooling {'forward+backward' if backward else 'forward'}, {_shape(rows)}, width {dim}",
        contestants,
        reference="torch, padded and masked",
        truth=_work(_pool(rows, "math"), exact, grad.double(), backward)(),
        device=rows.device,
        tolerance=TOLERANCE[rows.dtype],
        budget=budget,
    )


def layer_case(rows: Rows, dim: int, heads: int, *, dropout_p: float, budget: float) -> Case:
    """One pre-norm layer, forward and backward, against nn.TransformerEncoderLayer, padded."""
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(
        dim, heads, 4 * dim, dropout_p, activation="gelu", batch_first=True, norm_first=True
    ).to(rows.device, rows.dtype)
    weights = weights_from_torch(layer)
    x, grad = (t.contiguous() for t in rows.draw(2, dim).unbind(1))
    inputs = [x.requires_grad_(), *weights]
    padded_inputs = [rows.pad(x.detach()).requires_grad_(), *weights]
    real = rows.real

    def padded(tokens: Tensor, *_: Tensor) -> Tensor:
        return layer(tokens, src_key_padding_mask=~real)

    contestants = {}
    for impl in available_impls(rows.device)["encoder_layer"]:
        for recompute in (False, True):
            make = partial(_layer, rows, heads, dropout_p, recompute, impl)
            name = f"aam_kernels {impl}{', recompute' if recompute else ''}"
            contestants[name] = _contestant(make, inputs, grad, True)
    contestants["nn.TransformerEncoderLayer, padded"] = replace(
        _contestant(lambda: padded, padded_inputs, rows.pad(grad), True),
        unpack=lambda result: [result[0][real], result[1][real], *result[2:]],
    )
    truth = []
    if not dropout_p:  # with it torch draws another mask than the counter hash
        exact = [t.detach().double().requires_grad_() for t in inputs]
        truth = _work(_layer(rows, heads, 0.0, True, "math"), exact, grad.double(), True)()
    return compare(
        f"encoder layer forward+backward, {_shape(rows)}, width {dim}, dropout {dropout_p}",
        contestants,
        reference="nn.TransformerEncoderLayer, padded",
        truth=truth,
        device=rows.device,
        tolerance=TOLERANCE[rows.dtype],
        budget=budget,
    )


def all_cases(
    device: torch.device, *, budget: float, full: bool = False
) -> Iterator[Callable[[], Case]]:
    """The cases of a GPU run, the most telling first."""
    half, single = torch.bfloat16, torch.float32
    asvs = partial(asv_rows, device)
    samples = partial(sample_rows, device)
    for backward in (False, True):
        options = {"backward": backward, "budget": budget}
        yield partial(attention_case, asvs(half, 4096), 4, 32, **options)
        yield partial(attention_case, samples(half, 64, 1024), 4, 32, **options)
        yield partial(attention_case, asvs(single, 2048), 4, 32, **options)
    yield partial(layer_case, asvs(half, 2048), 128, 4, dropout_p=0.0, budget=budget)
    yield partial(layer_case, asvs(half, 2048), 128, 4, dropout_p=0.1, budget=budget)
    yield partial(pooling_case, asvs(half, 4096), 128, backward=True, budget=budget)
    if full:
        for head_dim in (64, 128):
            options = {"backward": True, "budget": budget}
            yield partial(attention_case, asvs(half, 2048), 4, head_dim, **options)
        yield partial(attention_case, samples(half, 8, 4096), 4, 32, backward=True, budget=budget)
        yield partial(layer_case, asvs(single, 1024), 128, 4, dropout_p=0.0, budget=budget)
        yield partial(pooling_case, samples(single, 64, 1024), 128, backward=True, budget=budget)


def _work(call: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, backward: bool) -> Work:
    """Output of a call, and its gradients."""

    def work() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            out = call(*tensors)
        return [out, *torch.autograd.grad(out, tensors, grad)] if backward else [out]

    return work


def _contestant(
    make: Callable[[], Callable[..., Tensor]], tensors: list[Tensor], grad: Tensor, backward: bool
) -> Contestant:
    """Does `_work` with what ``make`` gives; what it keeps counts where there is a backward."""
    forward = (lambda: make()(*tensors)) if backward else None
    return Contestant(lambda: _work(make(), tensors, grad, backward), forward)


def _heads_first(rows: Rows, x: Tensor) -> Tensor:
    """(total, heads, head_dim) -> (rows, heads, longest, head_dim)."""
    return rows.pad(x.detach()).transpose(1, 2).contiguous()


def _sdpa(backend: SDPBackend, rows: Rows) -> Callable[..., Tensor]:
    mask = rows.real[:, None, None, :]

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return call


def _varlen(rows: Rows) -> Callable[..., Tensor]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Unavailable(f"torch {torch.__version__} has no varlen_attn") from None
    offsets, longest = rows.offsets, rows.longest
    return lambda q, k, v: varlen_attn(q, k, v, offsets, offsets, longest, longest)


def _flex(rows: Rows, compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(rows.lengths, device=rows.device)

    def inside(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < lengths[batch]

    count, longest = len(rows.lengths), rows.longest
    mask = create_block_mask(inside, count, None, longest, longest, device=rows.device)
    call = torch.compile(flex_attention) if compiled else flex_attention
    return lambda q, k, v: call(q, k, v, block_mask=mask)


def _flash_attention(rows: Rows) -> Callable[..., Tensor]:
    if find_spec("flash_attn") is None:
        raise Unavailable("flash-attn is not installed")
    from flash_attn import flash_attn_varlen_func

    offsets, longest = rows.offsets, rows.longest
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest)


def _ragged(rows: Rows, impl: str) -> Callable[..., Tensor]:
    return partial(ragged_attention, offsets=rows.offsets, max_length=rows.longest, impl=impl)


def _pool(rows: Rows, impl: str) -> Callable[..., Tensor]:
    return partial(attention_pool, offsets=rows.offsets, max_length=rows.longest, impl=impl)


def _layer(
    rows: Rows, heads: int, dropout_p: float, recompute: bool, impl: str
) -> Callable[..., Tensor]:
    offsets, longest = rows.offsets, rows.longest

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return encoder_layer(
            x, offsets, EncoderLayerWeights(*weights), num_heads=heads, dropout_p=dropout_p,
            seed=5, max_length=longest, recompute=recompute, impl=impl,
        )  # fmt: skip

    return call


def _shape(rows: Rows) -> str:
    count, dtype = len(rows.lengths), str(rows.dtype).removeprefix("torch.")
    filled = sum(rows.lengths) / (count * rows.longest)
    return f"{count} rows of {min(rows.lengths)} to {rows.longest} ({filled:.0%} filled), {dtype}"


def main(arguments: list[str] | None = None) -> int:
    """Runs every case that fits the time; the exit code is 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_cases")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no case after this")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of rounds a case")
    parser.add_argument("--full", action="store_true", help="more shapes")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("error: no GPU here: these cases need a CUDA or ROCm device\n")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    started, found, left_out = time.perf_counter(), [], 0
    for case in all_cases(device, budget=options.budget, full=options.full):
        if time.perf_counter() - started > options.seconds:
            left_out += 1
            continue
        result = case()
        found.append(result.to_dict())
        sys.stdout.write("\n".join(result.lines()) + "\n\n")
        sys.stdout.flush()
        if options.json is not None:
            options.json.write_text(json.dumps({"cases": found}, indent=1))
    if left_out:
        sys.stdout.write(f"{left_out} cases left out: the time was up\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
