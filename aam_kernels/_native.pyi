"""The CPU kernels, compiled from `aam_kernels/native`.

Tensors are detached, float32 and on the CPU; offsets and lengths int32. Results are written into
tensors that the caller brings. Strides of rows and heads are free where a tensor is not said to be
contiguous; the last dimension is dense. Rows outside every sequence are neither read nor written.
ValueError or TypeError names the argument that does not fit; MemoryError: no memory for
intermediate results.
"""

from collections.abc import Sequence

from torch import Tensor

def attention_forward(
    query: Tensor,  # (rows, heads, head_dim)
    key: Tensor,  # (key_rows, heads, head_dim)
    value: Tensor,  # as key
    output: Tensor,  # as query
    lse: Tensor,  # (rows, heads), contiguous
    offsets: Tensor,  # (count + 1,)
    lengths: Tensor | None,  # (count,)
    key_offsets: Tensor | None,  # None: self-attention
    key_lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int,
    first_row: int,  # of a larger packed batch, that row 0 of the queries is
    first_key_row: int,
    threads: int,
) -> None: ...
def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    offsets: Tensor,
    lengths: Tensor | None,
    key_offsets: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int,
    first_row: int,
    first_key_row: int,
    threads: int,
) -> None: ...
def pooling_forward(
    values: Tensor,  # (rows, dim)
    scores: Tensor,  # (rows,), any stride
    pooled: Tensor,  # (count, dim), contiguous
    lse: Tensor,  # (count,), contiguous
    offsets: Tensor,
    lengths: Tensor | None,
    threads: int,
) -> None: ...
def pooling_backward(
    grad_pooled: Tensor,  # (count, dim), contiguous
    values: Tensor,
    scores: Tensor,
    pooled: Tensor,
    lse: Tensor,
    grad_values: Tensor,  # (rows, dim), contiguous
    grad_scores: Tensor,  # (rows,), contiguous
    offsets: Tensor,
    lengths: Tensor | None,
    threads: int,
) -> None: ...
def layer_forward(
    x: Tensor,  # (rows, dim), dim a multiple of 16
    output: Tensor,  # (rows, dim), contiguous
    saved: Sequence[Tensor] | None,  # the five of encoder_layer.saved.Saved, contiguous
    weights: Sequence[Tensor],  # the twelve of EncoderLayerWeights, contiguous
    offsets: Tensor,
    heads: int,
    dropout_p: float,
    seed: int,
    first_row: int,
    threads: int,
) -> None: ...
def layer_backward(
    grad_output: Tensor,  # (rows, dim)
    x: Tensor,
    saved: Sequence[Tensor] | None,  # None: made again from x
    grad_x: Tensor | None,  # (rows, dim), contiguous; None where not asked for
    grads: Sequence[Tensor | None],  # as the weights; None where not asked for
    weights: Sequence[Tensor],
    offsets: Tensor,
    heads: int,
    dropout_p: float,
    seed: int,
    first_row: int,
    threads: int,
) -> None: ...
def compiled() -> list[str]:
    """Names of the variants in this build, best first."""

def runnable() -> list[str]:
    """Names of the variants that this processor runs, best first."""

def selected() -> str:
    """Name of the variant in use: selected, else AAM_KERNELS_CPU's, else the best.

    Raises:
        ValueError: AAM_KERNELS_CPU names none that runs here.
    """

def width() -> int:
    """Floats in a vector of the variant in use."""

def select(name: str | None) -> None:
    """Uses a variant from now on; None: what AAM_KERNELS_CPU says, else the best.

    Raises:
        ValueError: it is unknown, or does not run here.
    """

def threads_of() -> str:
    """Whose threads the kernels run on, in words."""

def multiply_adds(rounds: int, name: str | None = None, threads: int = 1) -> float:
    """Runs multiply-adds that wait for nothing but registers, and gives their number."""
