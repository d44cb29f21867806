"""`Ragged`: rows of unequal length, packed one after another, never padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class Ragged:
    """Sequences of unequal length packed along the first dimension.

    Sequence ``i`` is ``values[offsets[i]:offsets[i + 1]]``. Rows past ``offsets[-1]`` belong to
    no sequence and never reach a result.

    Attributes:
        values: (total, ...) any dtype.
        offsets: (n + 1,) int32 on the same device, from 0, never decreasing.
        max_length: the longest sequence, or an upper bound of it. Carried so that no operation
            has to ask the device for it. None at construction: computed (waits for a GPU).

    Registered with torch's pytree: ``values`` and ``offsets`` are leaves, ``max_length`` is
    context, so it passes through `torch.compile`, `torch.export` and `torch.func`.

    Raises:
        TypeError: ``values`` or ``offsets`` is not a tensor, or ``offsets`` is not int32.
        ValueError: shapes, devices or offset values break the rules above (offset values are
            looked at on CPU only: reading them from a GPU would wait for it).
    """

    values: Tensor
    offsets: Tensor
    max_length: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        _check_structure(self.values, self.offsets)
        longest = None
        if self.offsets.device.type == "cpu" and not torch.compiler.is_compiling():
            longest = check_offsets(self.offsets, self.values.shape[0])
        if self.max_length is None:
            if longest is None:
                longest = int(self.offsets.diff().max()) if self.offsets.shape[0] > 1 else 0
            object.__setattr__(self, "max_length", longest)
        elif longest is not None and self.max_length < longest:
            raise ValueError(
                f"max_length must be at least the longest sequence ({longest}), "
                f"got {self.max_length}"
            )

    @classmethod
    def from_padded(cls, x: Tensor, lengths: Tensor) -> Ragged:
        """Packs ``x`` (n, length, ...) whose row ``i`` holds ``lengths[i]`` real slots.

        What stands past a length is not copied. ``lengths`` is (n,), any integer dtype.

        Raises:
            ValueError: shapes do not fit, or a length is negative or beyond ``x.shape[1]``.
        """
        if x.dim() < 2 or lengths.shape != x.shape[:1]:
            raise ValueError(
                f"expected x (n, length, ...) and lengths (n,), got {tuple(x.shape)} "
                f"and {tuple(lengths.shape)}"
            )
        lengths = lengths.to(device=x.device, dtype=torch.int64)
        if len(lengths) and (int(lengths.min()) < 0 or int(lengths.max()) > x.shape[1]):
            raise ValueError(
                f"lengths must lie in 0..{x.shape[1]}, got {int(lengths.min())}.."
                f"{int(lengths.max())}"
            )
        real = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
        longest = int(lengths.max()) if len(lengths) else 0
        return cls(x[real], offsets_from_lengths(lengths), longest)

    @classmethod
    def from_list(cls, sequences: Sequence[Tensor]) -> Ragged:
        """Packs a list of (length_i, ...) tensors of one dtype and trailing shape.

        Raises:
            ValueError: the list is empty (dtype and trailing shape would be unknown).
        """
        if not sequences:
            raise ValueError("from_list needs at least one sequence; the list is empty")
        lengths = torch.tensor([len(row) for row in sequences], dtype=torch.int64)
        values = torch.cat(list(sequences))
        offsets = offsets_from_lengths(lengths).to(values.device)
        return cls(values, offsets, int(lengths.max()))

    @classmethod
    def from_nested(cls, nested: Tensor) -> Ragged:
        """Converts a jagged `torch.nested` tensor (n, ragged, ...) without copying its values.

        Raises:
            ValueError: the tensor is not jagged, or has holes.
        """
        if not nested.is_nested or nested.layout != torch.jagged:
            raise ValueError(f"expected a nested tensor of jagged layout, got {nested.layout}")
        if nested.lengths() is not None:  # type: ignore[attr-defined]
            raise ValueError("nested tensors with holes are not accepted; call .contiguous()")
        return cls(nested.values(), nested.offsets().to(torch.int32))  # type: ignore[attr-defined]

    def to_nested(self) -> Tensor:
        """A jagged `torch.nested` tensor over the same values."""
        return torch.nested.nested_tensor_from_jagged(
            self.values[: int(self.offsets[-1])],
            self.offsets.to(torch.int64),
            max_seqlen=self.max_length,
        )

    def to_padded(self, fill: float = 0) -> Tensor:
        """(n, max_length, ...) with ``fill`` past each sequence's end. Differentiable."""
        slots = torch.arange(self.max_length, device=self.offsets.device)
        real = slots < self.lengths.unsqueeze(1)  # (n, max_length)
        real = real.reshape(real.shape + (1,) * (self.values.dim() - 1))
        if self.values.shape[0] == 0:
            shape = (len(self), self.max_length, *self.values.shape[1:])
            return self.values.new_full(shape, fill)
        rows = self.offsets[:-1, None].long() + slots
        padded = self.values[rows.clamp_(max=self.values.shape[0] - 1)]
        return torch.where(real, padded, padded.new_full((), fill))

    def with_values(self, values: Tensor) -> Ragged:
        """The same sequences over other values (total, ...); the offsets are not checked again."""
        if values.shape[0] != self.values.shape[0]:
            raise ValueError(f"expected {self.values.shape[0]} rows, got {values.shape[0]}")
        return _unchecked(values, self.offsets, self.max_length)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Ragged:
        """Moves values and offsets; dtypes stay."""
        return _unchecked(
            self.values.to(device, non_blocking=non_blocking),
            self.offsets.to(device, non_blocking=non_blocking),
            self.max_length,
        )

    @property
    def lengths(self) -> Tensor:
        """(n,) int32."""
        return self.offsets.diff()

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1

    def __getitem__(self, index: int) -> Tensor:
        """Sequence ``index`` as a view (length, ...). Waits for a GPU."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        index %= len(self)
        return self.values[int(self.offsets[index]) : int(self.offsets[index + 1])]

    def __iter__(self) -> Iterator[Tensor]:
        bounds = self.offsets.tolist()
        return (self.values[a:b] for a, b in pairwise(bounds))


def offsets_from_lengths(lengths: Tensor) -> Tensor:
    """(n,) integer lengths -> (n + 1,) int32 offsets on the same device.

    Raises:
        ValueError: the rows number 2**31 or more (checked on CPU).
    """
    total = lengths.to(torch.int64).cumsum(0)
    if lengths.device.type == "cpu" and len(total) and int(total[-1]) >= 1 << 31:
        raise ValueError(f"at most 2**31 - 1 rows fit into int32 offsets, got {int(total[-1])}")
    return torch.nn.functional.pad(total, (1, 0)).to(torch.int32)


def check_offsets(offsets: Tensor, total: int, name: str = "offsets") -> int:
    """Checks the values of CPU offsets and returns the longest length.

    Raises:
        ValueError: they do not start at 0, decrease, or reach past ``total`` rows.
    """
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        raise ValueError(f"{name} must start at 0, got {first}")
    lengths = offsets.diff()
    if len(lengths):
        shortest, longest = (int(bound) for bound in lengths.aminmax())
        if shortest < 0:
            where = int((lengths < 0).nonzero()[0])
            raise ValueError(
                f"{name} must never decrease, got {int(offsets[where])} then "
                f"{int(offsets[where + 1])} at position {where}"
            )
    else:
        longest = 0
    if last > total:
        raise ValueError(f"{name} end at {last}, but there are only {total} rows")
    return longest


def _check_structure(values: Any, offsets: Any) -> None:
    if not isinstance(values, Tensor) or not isinstance(offsets, Tensor):
        raise TypeError(f"expected tensors, got {type(values)} and {type(offsets)}")
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets must be int32, got {offsets.dtype}; use offsets.to(torch.int32)")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must be (n + 1,), got shape {tuple(offsets.shape)}")
    if values.dim() < 1:
        raise ValueError("values must be (total, ...), got a 0-d tensor")
    if values.device != offsets.device:
        raise ValueError(f"values are on {values.device}, offsets on {offsets.device}")


def _unchecked(values: Tensor, offsets: Tensor, max_length: int) -> Ragged:
    ragged = object.__new__(Ragged)
    object.__setattr__(ragged, "values", values)
    object.__setattr__(ragged, "offsets", offsets)
    object.__setattr__(ragged, "max_length", max_length)
    return ragged


def _flatten(ragged: Ragged) -> tuple[list[Any], int]:
    return [ragged.values, ragged.offsets], ragged.max_length


def _unflatten(leaves: Any, max_length: int) -> Ragged:
    values, offsets = leaves
    return _unchecked(values, offsets, max_length)


def _flatten_with_keys(ragged: Ragged) -> tuple[list[tuple[Any, Any]], int]:
    keys = (pytree.GetAttrKey("values"), pytree.GetAttrKey("offsets"))
    return list(zip(keys, (ragged.values, ragged.offsets), strict=True)), ragged.max_length


pytree.register_pytree_node(
    Ragged,
    _flatten,
    _unflatten,
    serialized_type_name="aam_kernels.ragged.Ragged",
    to_dumpable_context=lambda context: context,
    from_dumpable_context=lambda context: context,
    flatten_with_keys_fn=_flatten_with_keys,
)
