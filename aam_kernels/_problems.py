"""The problems on which `verify` and the contract tests measure every implementation.

A problem is one call of one public operation with inputs drawn from a seed. `run` gives output
and gradients; `aam_kernels._accuracy` compares them with `math` in float64 on the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Lengths = tuple[int, ...]
UNEQUAL: Lengths = (1, 2, 5, 0, 17, 33, 101, 151)
EVERY_LENGTH: Lengths = (
    0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 101, 127, 128, 129, 150, 151, 152, 160, 192, 255,
    256, 257, 511, 1024,
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """One call of an operation.

    Attributes:
        operation: "attention", "pooling" or "encoder_layer".
        name: what is particular about it.
        lengths: rows of each sequence.
        heads: attention heads.
        head_dim: elements of a head.
        key_lengths: key rows of each sequence; None: self-attention.
        dropout_p: probability of dropping.
        tail: rows past the last sequence.
        padded: call the padded `attention` (with gaps) instead of the ragged one.
        recompute: `encoder_layer` only.
        magnitude: factor on what the logits are made of: query and key, or scores.
        bounded: tell the call the longest sequence.
    """

    operation: str
    name: str
    lengths: Lengths = UNEQUAL
    heads: int = 2
    head_dim: int = 32
    key_lengths: Lengths | None = None
    dropout_p: float = 0.0
    tail: int = 0
    padded: bool = False
    recompute: bool = True
    magnitude: float = 1.0
    bounded: bool = True
    seed: int = field(default=20240229, repr=False)

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Differentiable inputs and the output's gradient, the same on every device."""
        generator = torch.Generator().manual_seed(self.seed)
        return {
            # Matrices of a layer are scaled to keep the variance, as trained ones do.
            name: (torch.randn(shape, generator=generator) * self._spread(name, shape)).to(
                device, dtype
            )
            for name, shape in self._shapes().items()
        }

    def ignored(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Rows of each input that belong to no sequence, as bool masks of its first dimension."""
        if self.operation == "encoder_layer":
            tails = {"x": self._outside(self.lengths), "grad": self._outside(self.lengths)}
        elif self.operation == "pooling":
            tails = {"values": self._outside(self.lengths), "scores": self._outside(self.lengths)}
        else:
            keys = self._outside(self.lengths if self.key_lengths is None else self.key_lengths)
            queries = self._outside(self.lengths)
            tails = {"query": queries, "key": keys, "value": keys, "grad": queries}
        return {name: mask.to(device) for name, mask in tails.items()}

    def run(self, impl: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Output and the gradient of every differentiable input, by name."""
        leaves = {
            name: x.detach().clone().requires_grad_()
            for name, x in inputs.items()
            if name != "grad"
        }
        output = self.call(impl, leaves)
        grads = torch.autograd.grad(output, tuple(leaves.values()), inputs["grad"])
        names = (f"grad {name}" for name in leaves)
        return {"output": output.detach(), **dict(zip(names, grads, strict=True))}

    def call(self, impl: str, x: dict[str, Tensor]) -> Tensor:
        """The operation's output."""
        device = next(iter(x.values())).device
        offsets = offsets_of(self.lengths, device)
        if self.operation == "pooling":
            from aam_kernels.pooling.api import attention_pool

            return attention_pool(
                x["values"], x["scores"], offsets, max_length=self._bound(), impl=impl
            )
        if self.operation == "encoder_layer":
            return self._encoder_layer(impl, x, offsets)
        from aam_kernels.attention.api import attention, ragged_attention

        qkv = (x["query"], x["key"], x["value"])
        if self.padded:
            shape = (len(self.lengths), self._longest() + self.tail)
            lengths = torch.tensor(self.lengths, dtype=torch.int32, device=device)
            padded = attention(
                *(t.unflatten(0, shape) for t in qkv),
                lengths=lengths,
                dropout_p=self.dropout_p,
                seed=self.seed,
                impl=impl,
            )
            return padded.flatten(0, 1)
        keys = self.key_lengths
        output = ragged_attention(
            *qkv,
            offsets,
            key_offsets=None if keys is None else offsets_of(keys, device),
            max_length=self._bound(),
            max_key_length=None if keys is None or not self.bounded else max(keys, default=0),
            dropout_p=self.dropout_p,
            seed=self.seed,
            impl=impl,
        )
        assert isinstance(output, Tensor)
        return output

    def _encoder_layer(self, impl: str, x: dict[str, Tensor], offsets: Tensor) -> Tensor:
        from aam_kernels.encoder_layer.api import EncoderLayerWeights, encoder_layer

        weights = EncoderLayerWeights(**{name: x[name] for name in EncoderLayerWeights._fields})
        return encoder_layer(
            x["x"],
            offsets,
            weights,
            num_heads=self.heads,
            dropout_p=self.dropout_p,
            seed=self.seed,
            max_length=self._bound(),
            recompute=self.recompute,
            impl=impl,
        )

    def largest_logit(self) -> float:
        """About, where logits were made large; else 0."""
        if self.magnitude <= 1:
            return 0.0
        return 4.5 * self.magnitude ** (1 if self.operation == "pooling" else 2)

    def size(self) -> int:
        """Elements of the scores of all heads, or of the largest input if that is more."""
        keys = self.lengths if self.key_lengths is None else self.key_lengths
        scores = sum(a * b for a, b in zip(self.lengths, keys, strict=True)) * self.heads
        rows = sum(self.lengths) if self.operation == "encoder_layer" else 1
        return max(scores, rows * max(math.prod(shape) for shape in self._shapes().values()))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        total = sum(self.lengths) + self.tail
        width = self.heads * self.head_dim
        if self.operation == "pooling":
            return {
                "values": (total, width),
                "scores": (total,),
                "grad": (len(self.lengths), width),
            }
        if self.operation == "encoder_layer":
            return {"x": (total, width), "grad": (total, width), **_layer_shapes(width)}
        if self.padded:
            total = len(self.lengths) * (self._longest() + self.tail)
        keys = total if self.key_lengths is None else sum(self.key_lengths) + self.tail
        heads = (self.heads, self.head_dim)
        return {
            "query": (total, *heads),
            "key": (keys, *heads),
            "value": (keys, *heads),
            "grad": (total, *heads),
        }

    def _outside(self, lengths: Lengths) -> Tensor:
        if self.padded:
            slots = torch.arange(self._longest() + self.tail)
            return (slots >= torch.tensor(lengths).unsqueeze(1)).flatten()
        total = sum(lengths)
        return torch.arange(total + self.tail) >= total

    def _longest(self) -> int:
        return max(self.lengths, default=0)

    def _bound(self) -> int | None:
        return self._longest() if self.bounded else None

    def _spread(self, name: str, shape: tuple[int, ...]) -> float:
        if name in ("query", "key", "scores"):
            return self.magnitude
        return shape[1] ** -0.5 if name.endswith("_weight") and len(shape) == 2 else 1.0


def attention_problems() -> list[Problem]:
    """Shapes, head sizes, empty rows, dropout and gaps of the contract."""
    cross = (3, 0, 40, 7, 0, 151, 2, 64)
    problems = [
        Problem("attention", f"head_dim {size}", head_dim=size, lengths=(1, 0, 40, 151, 40))
        for size in (8, 16, 24, 40, 64, 80, 96, 128)
    ]
    return [
        Problem("attention", "unequal lengths", tail=3),
        Problem("attention", "equal lengths", (101,) * 12, heads=4),
        Problem("attention", "empty first and last", (0, 3, 0, 0, 7, 0)),
        Problem("attention", "length one", (1,) * 50),
        Problem("attention", "no sequences", ()),
        Problem("attention", "all empty", (0, 0, 0), tail=2),
        Problem("attention", "70,000 sequences", (1, 0, 2, 3, 1) * 14_000, heads=1, head_dim=8),
        Problem("attention", "length 4,096", (4096, 5), heads=1),
        Problem("attention", "cross, empty keys", key_lengths=cross, tail=2),
        Problem("attention", "cross, no keys at all", (3, 4), key_lengths=(0, 0)),
        Problem("attention", "padded with gaps", padded=True, tail=2),
        Problem("attention", "dropout", dropout_p=0.1, tail=3),
        Problem("attention", "dropout, cross", dropout_p=0.5, key_lengths=cross),
        Problem("attention", "dropout, padded", dropout_p=0.3, padded=True),
        Problem("attention", "dropout, length 1,024", (1024, 3), heads=1, dropout_p=0.1),
        *problems,
    ]


def pooling_problems() -> list[Problem]:
    """Shapes and empty rows of the contract; dim is heads x head_dim."""
    return [
        Problem("pooling", "unequal lengths", tail=3),
        Problem("pooling", "equal lengths", (101,) * 12, heads=4),
        Problem("pooling", "empty first and last", (0, 3, 0, 0, 7, 0)),
        Problem("pooling", "length one", (1,) * 50),
        Problem("pooling", "no sequences", ()),
        Problem("pooling", "all empty", (0, 0, 0), tail=2),
        Problem("pooling", "70,000 sequences", (1, 0, 2, 3, 1) * 14_000, heads=1, head_dim=8),
        Problem("pooling", "length 4,096", (4096, 5), heads=4),
        Problem("pooling", "dim 24", heads=1, head_dim=24),
        Problem("pooling", "dim 1", heads=1, head_dim=1),
    ]


def encoder_layer_problems() -> list[Problem]:
    """Shapes, dropout and recomputation of the contract."""
    return [
        Problem("encoder_layer", "unequal lengths", tail=3),
        Problem("encoder_layer", "equal lengths", (101,) * 12, heads=4),
        Problem("encoder_layer", "empty first and last", (0, 3, 0, 0, 7, 0)),
        Problem("encoder_layer", "no sequences", ()),
        Problem("encoder_layer", "length 1,024", (1024, 5), heads=4),
        Problem("encoder_layer", "head_dim 24", head_dim=24),
        Problem("encoder_layer", "activations kept", recompute=False),
        Problem("encoder_layer", "dropout", dropout_p=0.1),
        Problem("encoder_layer", "dropout, activations kept", dropout_p=0.1, recompute=False),
    ]


def more_problems(operation: str) -> list[Problem]:
    """What `verify` measures beside the problems above: every length class, grids, large logits."""
    problems = [
        Problem(operation, "every length class", EVERY_LENGTH, tail=3),
        Problem(operation, "longest row not given", bounded=False, tail=1),
    ]
    if operation == "pooling":
        problems += [Problem(operation, "large scores", magnitude=50.0)]
        problems += [
            Problem(operation, f"dim {size}", heads=1, head_dim=size, lengths=(1, 0, 40, 151))
            for size in (16, 96, 384, 1152)
        ]
    elif operation == "attention":
        many = (1, 0, 2, 3, 1) * 14_000
        problems += [
            Problem(operation, "70,000 sequences, 4 heads", many, heads=4, head_dim=16),
            Problem(operation, "large logits", magnitude=8.0),
            Problem(operation, "large logits, long rows", (600, 3), magnitude=8.0),
            Problem(operation, "every length class, dropout", EVERY_LENGTH, dropout_p=0.1),
            Problem(operation, "cross, 4,096 keys", (5, 70), key_lengths=(4096, 300), heads=1),
            Problem(operation, "head_dim 128, long rows", (600, 0, 257), head_dim=128),
        ]
    else:
        problems += [
            Problem(operation, f"head_dim {size}", head_dim=size, lengths=(1, 0, 40, 151))
            for size in (8, 64, 128)
        ]
    return problems


PROBLEMS: dict[str, Callable[[], list[Problem]]] = {
    "attention": attention_problems,
    "pooling": pooling_problems,
    "encoder_layer": encoder_layer_problems,
}


def problems_of(operation: str, *, quick: bool = False) -> list[Problem]:
    """What `verify` measures: all, or rows of unequal length with a tail, dropout and cross."""
    problems = PROBLEMS[operation]()
    if not quick:
        return [*problems, *more_problems(operation)]
    return [p for p in problems if p.name in ("unequal lengths", "dropout", "cross, empty keys")]


def _layer_shapes(width: int) -> dict[str, tuple[int, ...]]:
    hidden = 4 * width
    return {
        "norm1_weight": (width,),
        "norm1_bias": (width,),
        "qkv_weight": (3 * width, width),
        "qkv_bias": (3 * width,),
        "out_weight": (width, width),
        "out_bias": (width,),
        "norm2_weight": (width,),
        "norm2_bias": (width,),
        "ffn_in_weight": (hidden, width),
        "ffn_in_bias": (hidden,),
        "ffn_out_weight": (width, hidden),
        "ffn_out_bias": (width,),
    }


def offsets_of(lengths: Iterable[int], device: torch.device | str) -> Tensor:
    """(n + 1,) int32 cumulative lengths."""
    counts = torch.tensor((0, *lengths), dtype=torch.int64)
    return counts.cumsum(0).to(device, torch.int32)
