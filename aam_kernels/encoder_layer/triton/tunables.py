"""What the configurations of the layer's kernels are chosen from; see `Tunable`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from aam_kernels._runtime.configurations import AMD, Configuration, Tunable
from aam_kernels.encoder_layer.triton.launches import LENGTHS, NORM_WIDTHS, WIDTHS, Launcher, Norm
from aam_kernels.encoder_layer.weights import HIDDEN_SITE, OUTPUT_SITE, EncoderLayerWeights

_TOKENS = 1 << 17


def _blocks(
    names: tuple[str, str, str], shapes: Iterable[tuple[int, int, int, int, int]]
) -> list[Configuration]:
    """From (three block sizes, warps, stages)."""
    return [
        Configuration(
            dict(zip(names, sizes, strict=True)), {"num_warps": warps, "num_stages": stages}
        )
        for *sizes, warps, stages in shapes
    ]


def _product(architecture: str, dtype: torch.dtype, width: int, length: int) -> list[Configuration]:
    """The first spills in no use of the kernel: with a norm, long products, float32 input."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    if dtype == torch.float32:
        if architecture in AMD:
            return _blocks(names, [(64, 128, 32, 4, 1), (64, 64, 128, 4, 1), (64, 64, 64, 4, 1)])
        shapes = [(64, 64, 32, 8, 1), (64, 64, 64, 8, 1), (64, 64, 32, 4, 1)]
        return _blocks(names, shapes[1:] if architecture == "sm_100" else shapes)
    if architecture in AMD:
        return _blocks(names, [(128, 128, 64, 4, 2), (64, 128, 128, 4, 1), (128, 64, 128, 4, 1)])
    shapes = [(128, 128, 128, 8, 1), (64, 128, 128, 8, 1), (128, 128, 64, 8, 2)]
    return _blocks(names, shapes[1:] if architecture == "sm_80" else shapes)


def _feed_forward(
    architecture: str, dtype: torch.dtype, width: int, length: int
) -> list[Configuration]:
    if architecture in AMD:
        return _fused(architecture, dtype, ((64, 32), (64, 64)))
    if architecture == "sm_80":  # eight warps of the same rows spill
        return _fused(architecture, dtype, ((64, 64), (64, 32)), warps=4)
    return _fused(architecture, dtype, ((128, 64), (64, 64), (128, 32)))


def _feed_backward(
    architecture: str, dtype: torch.dtype, width: int, length: int
) -> list[Configuration]:
    if architecture in AMD:
        return _fused(architecture, dtype, ((64, 16), (64, 32)))
    if architecture == "sm_80":
        return _fused(architecture, dtype, ((32, 32), (32, 16)), warps=4)
    return _fused(architecture, dtype, ((64, 32), (64, 64)))


def _fused(
    architecture: str, dtype: torch.dtype, shapes: Iterable[tuple[int, int]], *, warps: int = 8
) -> list[Configuration]:
    """None for float32: so many products beside each other fit no register file."""
    if dtype == torch.float32:
        return []
    options = {"num_warps": warps, "num_stages": 1}
    if architecture in AMD:
        # Products of 16 rows: a wave keeps its rows to itself from the norm to the output.
        options = {"num_warps": 4, "num_stages": 1, "matrix_instr_nonkdim": 16}
    names = ("BLOCK_M", "BLOCK_F")
    return [Configuration(dict(zip(names, sizes, strict=True)), options) for sizes in shapes]


def _hidden(architecture: str, dtype: torch.dtype, width: int, length: int) -> list[Configuration]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    if dtype == torch.float32:
        warps = 4 if architecture in AMD else 8
        return _blocks(names, [(64, 64, 32, warps, 1), (64, 64, 64, warps, 1)])
    if architecture in AMD:
        return _blocks(names, [(128, 64, 64, 4, 1), (64, 64, 64, 4, 1), (64, 128, 64, 4, 1)])
    shapes = [(128, 64, 64, 8, 1), (64, 64, 64, 4, 1), (64, 128, 64, 8, 1)]
    return _blocks(names, shapes[1:] if architecture == "sm_100" else shapes)


def _weight(architecture: str, dtype: torch.dtype, width: int, length: int) -> list[Configuration]:
    names = ("BLOCK_ROWS", "BLOCK_N", "BLOCK_K")
    if dtype == torch.float32:
        return _blocks(names, [(32, 64, 64, 4, 1), (32, 128, 64, 8, 1)])
    if architecture in AMD:
        return _blocks(names, [(32, 128, 128, 4, 2), (64, 128, 128, 4, 1), (64, 64, 128, 4, 1)])
    return _blocks(names, [(64, 128, 128, 8, 2), (32, 128, 128, 8, 2), (64, 64, 128, 4, 1)])


def _norm(architecture: str, dtype: torch.dtype, width: int, length: int) -> list[Configuration]:
    """About 16 elements a thread of whole rows, which a program must hold."""
    warps = 8 if width > 128 else 4
    elements = 512 * warps if architecture in AMD else 256 * warps
    return [
        Configuration({"BLOCK_ROWS": rows}, {"num_warps": warps})
        for rows in (elements // width, 2 * elements // width, elements // width // 2)
        if rows >= 1
    ]


def _sum(architecture: str, dtype: torch.dtype, width: int, length: int) -> list[Configuration]:
    return [Configuration({"BLOCK": block}, {"num_warps": 4}) for block in (512, 1024)]


class _Example:
    """The matrices of a feed-forward part, D = width and F = 4 D, with dropout."""

    def __init__(self, dtype: torch.dtype, width: int, device: torch.device) -> None:
        def some(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device).to(dtype)

        self.x, self.hidden = some(_TOKENS, width), some(_TOKENS, 4 * width)
        self.norm = Norm(some(width), some(width))
        self.ffn_in, self.ffn_in_bias = some(4 * width, width), some(4 * width)
        self.ffn_out = some(width, 4 * width)
        attention = some(3 * width, width), some(3 * width), some(width, width), some(width)
        norm = self.norm.weight, self.norm.bias
        self.weights = EncoderLayerWeights(
            *norm, *attention, *norm, self.ffn_in, self.ffn_in_bias, self.ffn_out, some(width)
        )
        offsets = torch.tensor([0, _TOKENS], dtype=torch.int32, device=device)
        seed = torch.zeros(3, dtype=torch.int64, device=device)
        self.launcher = Launcher(offsets, 0.1, seed)

    def product(self) -> object:
        return self.launcher.product(
            self.x, self.ffn_in, self.ffn_in_bias, norm=self.norm, gelu=True,
            output_site=HIDDEN_SITE,
        )  # fmt: skip

    def feed_forward(self) -> object:
        return self.launcher.feed_forward(self.x, self.x, self.weights)

    def feed_backward(self) -> object:
        return self.launcher.feed_backward(self.x, self.x.float(), self.x, self.weights)

    def hidden_backward(self) -> object:
        return self.launcher.hidden_backward(
            self.x, self.x, self.norm, self.ffn_in, self.ffn_in_bias, self.ffn_out,
            (HIDDEN_SITE, OUTPUT_SITE),
        )  # fmt: skip

    def norm_backward(self) -> object:
        return self.launcher.norm_backward(self.x, self.x, self.norm, self.x)

    def weight_gradient(self) -> object:
        return self.launcher.weight_gradient(
            self.hidden, self.x, self.ffn_in, self.ffn_in_bias, site=HIDDEN_SITE
        )


def _example(method: Callable[[_Example], object]) -> Callable[..., Callable[[], object]]:
    def make(
        dtype: torch.dtype, width: int, length: int, device: torch.device
    ) -> Callable[[], object]:
        example = _Example(dtype, width, device)
        return lambda: method(example)

    return make


TUNABLES = tuple(
    Tunable(
        kernel,
        NORM_WIDTHS if kernel == "layer_norm_backward" else WIDTHS,
        LENGTHS,
        candidates,
        _example(method),
    )
    for kernel, candidates, method in (
        ("layer_product", _product, _Example.product),
        ("layer_feed_forward", _feed_forward, _Example.feed_forward),
        ("layer_feed_backward", _feed_backward, _Example.feed_backward),
        ("layer_hidden_backward", _hidden, _Example.hidden_backward),
        ("layer_norm_backward", _norm, _Example.norm_backward),
        ("layer_weight_gradient", _weight, _Example.weight_gradient),
        ("layer_add_partials", _sum, _Example.norm_backward),
    )
)
