"""Device functions of both short-row kernels: which sequence and head, tiles of keys, filling rows.

A program serves one (sequence, head). The keys of a sequence are cut into up to three tiles of
sizes that are powers of two, ``TILES``, e.g. (128, 32, 0) for up to 160 keys. A sequence runs with
the first ``COUNT`` tiles that hold its keys: all but the last are full and need no mask.

A tensor of packed rows is a tuple (pointer, stride of a row, stride of a head).
"""

import triton
import triton.language as tl

from aam_kernels._runtime.kernel_functions import constexpr_function

SEQUENCE_GROUP = 24
"""Sequences that are interleaved, see `program_place`."""


@constexpr_function
def tile_start(tiles, tile):
    """The first key of a tile."""
    return sum(tiles[:tile])


@constexpr_function
def tile_size(tiles, tile):
    """The number of keys of a tile."""
    return tiles[tile]


@constexpr_function
def narrowest(tiles, count):
    """The smallest of the first ``count`` tiles."""
    return min(tiles[:count])


@triton.jit
def program_place(heads, GROUP: tl.constexpr):
    """(sequence, head) of this program.

    Heads of a sequence lie beside each other in memory and share cache lines. Processors with
    several dies (4, 6 or 8, each with its own cache) deal programs to them in turn, so that the
    heads of a sequence are GROUP programs apart: they meet in the same cache at the same time.
    """
    program = tl.program_id(0)
    group = program // (GROUP * heads)
    place = program % (GROUP * heads)
    return group * GROUP + place % GROUP, place // GROUP


@triton.jit
def span(offsets_ptr, lengths_ptr, sequence, count):
    """First packed row of a sequence, its real rows, and its rows including the gap behind.

    Past the last sequence: where that ends, and no rows.
    """
    place = tl.minimum(sequence, count)
    first = tl.load(offsets_ptr + place)
    slots = tl.load(offsets_ptr + tl.minimum(place + 1, count)) - first
    length = slots
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + place, mask=place < count, other=0)
    return first, length, slots


@triton.jit
def left_over(first, used, slots, total, sequence, count, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """First, last and step of the rows that a program has to fill.

    Those of its sequence from ``used`` on; for a program past the last sequence a share of the
    rows that follow. Selected without branches: Triton 3.3 fails on bounds that a branch gives.
    """
    inside = sequence < count
    begin = first + tl.where(inside, used, (sequence - count) * BLOCK)
    end = tl.where(inside, first + slots, total)
    return begin, end, tl.where(inside, BLOCK, (GROUP - count % GROUP) * BLOCK)


@triton.jit
def head_rows(tensor, first, head):
    """(pointer to a packed row of a head, stride); what grows with the batch is 64 bits wide."""
    pointer, stride, stride_head = tensor
    return pointer + first.to(tl.int64) * stride + head.to(tl.int64) * stride_head, stride


@triton.jit
def load_rows(
    rows_of, start, rows, limit, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr
):
    """(rows, D) from row ``start`` on; rows from ``limit`` on (if MASKED) and past HEAD_DIM are 0.

    ``rows_of`` is (pointer, stride); ``start`` is 64 bits wide, ``rows`` are few.
    """
    pointer, stride = rows_of
    columns = tl.arange(0, D)
    places = pointer + start * stride + (rows[:, None] * stride + columns[None, :])
    if MASKED and HEAD_DIM != D:
        mask = (rows[:, None] < limit) & (columns[None, :] < HEAD_DIM)
        return tl.load(places, mask=mask, other=0.0)
    if MASKED:
        return tl.load(places, mask=rows[:, None] < limit, other=0.0)
    if HEAD_DIM != D:
        return tl.load(places, mask=columns[None, :] < HEAD_DIM, other=0.0)
    return tl.load(places)


@triton.jit
def store_rows(
    rows_of, start, x, rows, limit, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr
):
    """Stores (rows, D) where `load_rows` would load it."""
    pointer, stride = rows_of
    columns = tl.arange(0, D)
    places = pointer + start * stride + (rows[:, None] * stride + columns[None, :])
    if MASKED and HEAD_DIM != D:
        tl.store(places, x, mask=(rows[:, None] < limit) & (columns[None, :] < HEAD_DIM))
    elif MASKED:
        tl.store(places, x, mask=rows[:, None] < limit)
    elif HEAD_DIM != D:
        tl.store(places, x, mask=columns[None, :] < HEAD_DIM)
    else:
        tl.store(places, x)


@triton.jit
def load_tiles(
    rows_of,
    length,
    TILES: tl.constexpr,
    COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
):
    """The first COUNT tiles of a sequence's keys or values: a tuple of (tile, D)."""
    tiles = ()
    for tile in tl.static_range(COUNT):
        rows = tile_start(TILES, tile) + tl.arange(0, tile_size(TILES, tile))
        tiles += (load_rows(rows_of, 0, rows, length, tile == COUNT - 1, HEAD_DIM, D),)
    return tiles


@triton.jit
def fill_rows(
    tensor,
    head,
    first,
    last,
    step,
    value,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sets packed rows first..last of one head, BLOCK rows every ``step``."""
    pointer, stride, stride_head = tensor
    block = tl.arange(0, BLOCK)
    for start in range(first, last, step):
        begin = tl.full([], 0, tl.int64) + start
        x = (tl.full([BLOCK, D], 0.0, tl.float32) + value).to(pointer.dtype.element_ty)
        rows_of = (pointer + head.to(tl.int64) * stride_head, stride)
        store_rows(rows_of, begin, x, block, last - start, True, HEAD_DIM, D)


@triton.jit
def unknown_zero(x):
    """0 for a finite ``x``, which the compiler has to compute.

    Choosing between a value and a *known* 0 is moved behind the narrowing to 16 bits, where two
    values no longer share an instruction: it costs a third of dropout.
    """
    return x - x
