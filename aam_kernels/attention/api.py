"""Public attention functions: arguments are checked once, the operator does the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from aam_kernels._runtime.checks import check_offsets_argument, check_tensors, known_length
from aam_kernels._runtime.dispatch import check_name
from aam_kernels._runtime.dropout import resolve_seed
from aam_kernels.attention.ops import call as _operator


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    *,
    key_offsets: Tensor | None = None,
    max_length: int | None = None,
    max_key_length: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    first_row: int = 0,
    first_key_row: int | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention within each sequence of a packed batch.

    Sequence ``i`` has queries ``offsets[i]..offsets[i + 1]`` and keys
    ``key_offsets[i]..key_offsets[i + 1]`` (the same rows when ``key_offsets`` is None). Rows past
    ``offsets[-1]`` give output 0 and gradient 0, whatever they hold. A sequence without keys
    gives output 0.

    Args:
        query: (total_q, heads, head_dim) float32, float16, bfloat16 or float64.
        key: (total_k, heads, head_dim), same dtype and device.
        value: (total_k, heads, head_dim).
        offsets: (n + 1,) int32 on the same device, from 0, never decreasing.
        key_offsets: (n + 1,) int32; None for self-attention.
        max_length: bound on the query lengths. Given, no GPU is waited for.
        max_key_length: bound on the key lengths.
        scale: factor on the scores; None: ``head_dim ** -0.5``.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        seed: of the dropout mask, a pure function of (seed, query row, key row, head); an int or
            a 0-d int64 tensor. None: drawn from torch's default generator.
        first_row: the row of a larger packed batch that row 0 of ``query`` is: with the same
            seed, dropout of a part is then that of the whole.
        first_key_row: the same of ``key``; None: ``first_row``.
        return_lse: also return the logsumexp of the scaled scores.
        impl: "auto", "triton", "cpu", "sdpa" or "math". A name is honoured or refused.

    Returns:
        (total_q, heads, head_dim); with ``return_lse`` also (total_q, heads) float32 (float64
        for float64), not differentiable, -inf where there are no keys.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, offset value (looked at on CPU only) or option.
        NotImplementedError: inside forward-mode differentiation.
    """
    check_name(impl)
    check_tensors(query=query, key=key, value=value)
    _check_heads(query, key, value, key_offsets is not None)
    check_offsets_argument("offsets", offsets, query.device)
    if key_offsets is not None:
        check_offsets_argument("key_offsets", key_offsets, query.device)
        if key_offsets.shape != offsets.shape:
            raise ValueError(
                f"key_offsets must be as long as offsets ({offsets.shape[0]}), "
                f"got {key_offsets.shape[0]}"
            )
    output, lse = _operator(
        query,
        key,
        value,
        offsets,
        key_offsets,
        None,
        None,
        resolve_seed(seed, dropout_p, query.device, first_row, first_key_row),
        known_length("max_length", max_length),
        known_length("max_key_length", max_key_length),
        scale,
        float(dropout_p),
        impl,
    )
    return (output, lse) if return_lse else output


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Self-attention of a padded batch, without a mask.

    Served by the ragged operator: padding is never read. Slots past a length count as 0 on
    input, give output 0 and gradient 0, even if they hold NaN.

    Args:
        query: (batch, length, heads, head_dim).
        key: the same shape, dtype and device.
        value: the same.
        lengths: (batch,) int32 real slots of each row; None: all.
        scale: factor on the scores; None: ``head_dim ** -0.5``.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        seed: see `ragged_attention`; a slot's row is ``batch_index * length + slot``.
        impl: see `ragged_attention`.

    Returns:
        (batch, length, heads, head_dim).

    Raises:
        TypeError, ValueError, NotImplementedError: as `ragged_attention`.
    """
    check_name(impl)
    check_tensors(query=query, key=key, value=value)
    if query.dim() != 4 or key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            "query, key and value must share one shape (batch, length, heads, head_dim), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    batch, length = query.shape[:2]
    if batch * length >= 1 << 31:
        raise ValueError(f"at most 2**31 - 1 slots fit into int32 offsets, got {batch * length}")
    if lengths is not None:
        check_offsets_argument("lengths", lengths, query.device)
        if lengths.shape[0] != batch:
            raise ValueError(f"lengths must be ({batch},), got {tuple(lengths.shape)}")
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * length
    output, _ = _operator(
        *(x.flatten(0, 1) for x in (query, key, value)),
        offsets,
        None,
        lengths,
        None,
        resolve_seed(seed, dropout_p, query.device),
        length,
        -1,
        scale,
        float(dropout_p),
        impl,
    )
    return output.unflatten(0, (batch, length))


def _check_heads(query: Tensor, key: Tensor, value: Tensor, cross: bool) -> None:
    if query.dim() != 3:
        raise ValueError(f"query must be (total, heads, head_dim), got {tuple(query.shape)}")
    if value.shape != key.shape or key.shape[1:] != query.shape[1:]:
        raise ValueError(
            f"key and value must be (total_k, {query.shape[1]}, {query.shape[2]}) like query, "
            f"got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if not cross and key.shape[0] != query.shape[0]:
        raise ValueError(
            f"self-attention needs as many key rows as query rows ({query.shape[0]}), got "
            f"{key.shape[0]}; pass key_offsets for keys of their own"
        )
