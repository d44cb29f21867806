"""Attention of Hugging Face transformers' encoder models, without a mask of scores.

```python
from aam_kernels.integrations import transformers as aam_transformers

aam_transformers.register()
model = AutoModel.from_pretrained(name, attn_implementation="aam_kernels")
```

A model hands its 2-D padding mask over once a forward pass (`make_mask`), and every layer calls
`attend` with what came of it, a `PaddingMask`: padding on the right or the left is skipped where
it lies, rows with holes are reordered first. Outputs equal those of `"eager"` at every real token;
at padded ones the attention output is 0. What changes attention in a way that is not supported
here raises NotImplementedError and names itself. Nothing happens at import.

Needs transformers 5.0 or newer (the first whose encoders make their masks through an interface).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from aam_kernels._runtime.checks import check_tensors
from aam_kernels._runtime.dispatch import check_name
from aam_kernels._runtime.dropout import resolve_seed
from aam_kernels.attention.ops import call as _operator
from aam_kernels.integrations.padding import PaddingMask, padding_mask, row_offsets

OLDEST = "5.0"
_INSTALL = f"aam_kernels.integrations.transformers needs transformers {OLDEST} or newer"

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(f'{_INSTALL}: pip install "transformers>={OLDEST}"') from None
if int(transformers.__version__.split(".")[0]) < int(OLDEST.split(".")[0]):
    raise ImportError(f"{_INSTALL}, got {transformers.__version__}: pip install -U transformers")

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    bidirectional_mask_function,
    causal_mask_function,
)

NAME = "aam_kernels"

_HARMLESS = {
    "cache_position", "deterministic", "labels", "layer_idx", "max_length_k", "max_length_q",
    "num_items_in_batch", "output_hidden_states", "output_router_logits", "position_embeddings",
    "position_ids", "return_dict", "token_type_ids", "use_cache",
}  # fmt: skip
"""Keywords that models pass along and that no attention of transformers reads."""

_CHANGES = {
    "cache": "a paged key-value cache",
    "head_mask": "a mask of heads",
    "output_attentions": "returning attention weights, which are never formed,",
    "position_bias": "a position bias on the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "sliding_window": "a sliding window",
    "softcap": "capped scores",
}

_OWN_STATES = {
    "self", "hidden_states", "attention_mask", "position_embeddings", "past_key_values",
    "past_key_value", "kwargs", "position_ids", "cache_position", "use_cache",
    "output_attentions", "head_mask", "layer_idx",
}  # fmt: skip
"""Parameters of the forward of a module whose queries and keys come from the same tokens."""


def register(*, impl: str = "auto", holes: bool = True) -> None:
    """Make ``attn_implementation="aam_kernels"`` known to transformers. A later call replaces it.

    Args:
        impl: implementation to use, see `aam_kernels.ragged_attention`.
        holes: masks may have padding between real tokens. Each mask is then looked at once a
            forward pass, which waits for a GPU, as transformers' own "sdpa" does; inside
            `torch.compile` it is not looked at, and tokens are reordered instead. False promises
            that the real tokens of a row stand side by side: nothing is waited for or copied,
            and a broken promise is a ValueError on a CPU and an assertion on a GPU.

    Raises:
        ValueError: an unknown ``impl``.
    """
    check_name(impl)
    AttentionInterface.register(NAME, partial(attend, impl=impl))
    AttentionMaskInterface.register(NAME, partial(make_mask, holes=holes))


def make_mask(
    batch_size: int,
    kv_length: int,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    allow_is_bidirectional_skip: bool = True,
    holes: bool = True,
    **kwargs: Any,
) -> PaddingMask | None:
    """The mask function of transformers' interface: what `attend` gets as ``attention_mask``.

    Args:
        batch_size: rows.
        kv_length: key slots of a row.
        mask_function: the pattern; only transformers' own bidirectional one is served.
        attention_mask: (batch, kv_length) bool, True at real tokens; None: all are real.
        q_offset: position of the first query; not 0 with a key-value cache.
        kv_offset: position of the first key; the same.
        allow_is_bidirectional_skip: False when the model computes with its mask itself.
        holes: see `register`.
        kwargs: further keywords of the interface; none matters to a plain padding mask.

    Returns:
        None when every slot is known to be real.

    Raises:
        NotImplementedError: any other pattern.
        ValueError: a mask of the wrong shape; with ``holes=False`` on a CPU, a mask with holes.
    """
    if mask_function is causal_mask_function:
        raise _unsupported("causal attention (a decoder)")
    if mask_function is not bidirectional_mask_function:
        name = getattr(mask_function, "__qualname__", repr(mask_function))
        raise _unsupported(f"a sliding window or another pattern of attention ({name})")
    if not allow_is_bidirectional_skip:
        raise _unsupported("a model that computes with its attention mask itself")
    if kv_offset != 0 or (not isinstance(q_offset, Tensor) and q_offset != 0):
        raise _unsupported(f"a key-value cache (queries from {q_offset}, keys from {kv_offset})")
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask must be {(batch_size, kv_length)}, True or 1 at real tokens, got "
            f"{tuple(attention_mask.shape)}"
        )
    return padding_mask(attention_mask.bool(), holes)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PaddingMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    impl: str = "auto",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface.

    Args:
        module: the attention layer.
        query: (batch, heads, length, head_dim).
        key: (batch, key_heads, key_length, head_dim); fewer heads serve groups of query heads.
        value: the same shape as ``key``.
        attention_mask: of `make_mask`, or the 2-D bool mask itself.
        dropout: probability of dropping an attention weight while the module trains; the mask's
            seed is drawn from torch's default generator.
        scaling: factor on the scores; None: ``head_dim ** -0.5``.
        is_causal: overrides the module's attribute.
        impl: see `register`.
        kwargs: keywords of the model; one that may change attention is refused.
            ``cu_seq_lens_q`` and ``cu_seq_lens_k`` mark sequences packed into a batch of one.

    Returns:
        (batch, length, heads, head_dim), and None in place of the weights.

    Raises:
        NotImplementedError: something that this attention does not do, with its name and value.
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    _check_call(module, scaling, is_causal, kwargs)
    query, key, value = _same_dtype(query, key, value)
    key, value = _repeat_heads(query, key, value)
    batch, _, length, _ = query.shape
    key_length = key.shape[2]
    mask = _usable_mask(module, attention_mask, batch, key_length, query.device)
    shared = _queries_are_keys(type(module), getattr(module, "is_decoder", None) is False)
    if shared and length != key_length:
        raise _unsupported(f"a key-value cache ({length} queries, {key_length} keys)", module)
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    where: tuple[Any, ...]
    if kwargs.get("cu_seq_lens_q") is not None:
        where = _packed(kwargs, shared, query, key, mask)
    elif mask is None:
        same = shared or length == key_length
        key_offsets = None if same else row_offsets(batch, key_length, key.device)
        where = (row_offsets(batch, length, query.device), key_offsets, None, None)
        where += (length, key_length)
    elif shared:
        where = (mask.offsets, None, mask.lengths, None, mask.longest, -1)
    else:  # the mask is the keys'; every query counts
        offsets = torch.nn.functional.pad(row_offsets(batch, length, query.device), (1, 0))
        where = (offsets, mask.offsets, None, mask.lengths, length, mask.longest)
    if mask is not None and mask.order is not None:
        key, value = key.index_select(0, mask.order), value.index_select(0, mask.order)
        query = query.index_select(0, mask.order) if shared else query
    dropout_p = float(dropout) if module.training else 0.0
    output, _ = _operator(
        query,
        key,
        value,
        *where[:4],
        resolve_seed(None, dropout_p, query.device),
        *where[4:],
        scaling,
        dropout_p,
        impl,
    )
    if shared and mask is not None and mask.inverse is not None:
        output = output.index_select(0, mask.inverse)
    return output.unflatten(0, (batch, length)), None


def _check_call(
    module: torch.nn.Module, scaling: Any, is_causal: bool | None, kwargs: dict[str, Any]
) -> None:
    if is_causal is None:
        is_causal = getattr(module, "is_causal", False)
    if is_causal:
        raise _unsupported(f"causal attention (is_causal={is_causal})", module)
    if scaling is not None and not isinstance(scaling, (int, float)):
        raise _unsupported(f"a scale that is no number ({_show(scaling)})", module)
    for name, given in kwargs.items():
        if given is None or given is False or name in _HARMLESS or name.startswith("cu_seq_lens_"):
            continue
        what = _CHANGES.get(name, "a keyword that may change attention")
        raise _unsupported(f"{what} ({name}={_show(given)})", module)


def _same_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast a model may mix dtypes (rotary positions in float32), as for a product."""
    kind = query.device.type
    if not (query.dtype == key.dtype == value.dtype) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    check_tensors(query=query, key=key, value=value)
    return query, key, value


def _repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    heads, key_heads = query.shape[1], key.shape[1]
    if value.shape != key.shape or key.shape[0] != query.shape[0] or heads % key_heads != 0:
        raise ValueError(
            "key and value must share one shape, the batch of query and a divisor of its heads, "
            f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key must have head_dim {query.shape[3]}, got {key.shape[3]}")
    if heads == key_heads:
        return key, value
    groups = heads // key_heads
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _usable_mask(
    module: torch.nn.Module, mask: Any, batch: int, key_length: int, device: torch.device
) -> PaddingMask | None:
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.dtype == torch.bool:
        mask = padding_mask(mask)
    if mask is None:
        return None
    if not isinstance(mask, PaddingMask):
        raise _unsupported(
            f"an attention mask that is not a 2-D padding mask ({_show(mask)})", module
        )
    if (mask.batch, mask.length) != (batch, key_length):
        raise ValueError(
            f"the attention mask is for {(mask.batch, mask.length)} slots, but the keys of "
            f"{type(module).__name__} are {(batch, key_length)}"
        )
    return mask if mask.offsets.device == device else mask.to(device)


@torch.compiler.assume_constant_result
def _queries_are_keys(module_type: type[torch.nn.Module], marked_self: bool) -> bool:
    """Whether queries and keys are surely the same tokens, so that padding may be skipped in both.

    Modules that also serve as cross-attention take the other states as a parameter; those of them
    that carry ``is_decoder = False`` are the encoder's.
    """
    return marked_self or _parameters(module_type.forward) <= _OWN_STATES


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _packed(
    kwargs: dict[str, Any], shared: bool, query: Tensor, key: Tensor, mask: PaddingMask | None
) -> tuple[Any, ...]:
    """Sequences packed into one row, as transformers' flattening collator makes them."""
    starts, key_starts = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
    if key_starts is None or key_starts.shape != starts.shape or mask is not None:
        raise ValueError(
            "cu_seq_lens_q needs cu_seq_lens_k of the same shape and no attention_mask, got "
            f"{_show(starts)}, {_show(key_starts)} and {_show(mask)}"
        )
    bounds = tuple(-1 if kwargs.get(x) is None else int(kwargs[x]) for x in _LONGEST)
    key_offsets = None if shared else key_starts.to(key.device, torch.int32)
    return (starts.to(query.device, torch.int32), key_offsets, None, None, *bounds)


_LONGEST = ("max_length_q", "max_length_k")


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor of shape {tuple(value.shape)}"
    return repr(value)


def _unsupported(what: str, module: torch.nn.Module | None = None) -> NotImplementedError:
    where = f" in {type(module).__name__}" if module is not None else ""
    return NotImplementedError(
        f'attn_implementation="{NAME}" does not support {what}{where}; use '
        'attn_implementation="sdpa" or "eager" for this model'
    )
