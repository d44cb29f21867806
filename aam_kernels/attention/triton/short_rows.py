"""Device functions of both short-row kernels: which sequence and head, tiles of keys, filling rows.

A program serves one (sequence, head). The keys of a sequence are cut into up to three tiles of
sizes that are powers of two, ``TILES``, e.g. (128, 32) for up to 160 keys. A sequence runs with
the first ``COUNT`` tiles that hold its keys: all but the last are full and need no mask.
"""

import triton
import triton.language as tl

SEQUENCE_GROUP = 24
"""Sequences that are interleaved, see `program_place`."""


@triton.constexpr_function
def tile_start(tiles, tile):
    """The first key of a tile, and with ``tile`` = the number of tiles their capacity."""
    return sum(tiles[:tile])


@triton.constexpr_function
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
def span(offsets_ptr, lengths_ptr, sequence):
    """First packed row of a sequence, its real rows, and its rows including the gap behind."""
    first = tl.load(offsets_ptr + sequence)
    slots = tl.load(offsets_ptr + sequence + 1) - first
    length = slots
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + sequence)
    return first, length, slots


@triton.jit
def head_base(pointer, first, head, stride_row, stride_head):
    """Pointer to a packed row of a head; what grows with the batch is 64 bits wide."""
    return pointer + first.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head


@triton.jit
def load_rows(
    pointer, rows, limit, stride_row, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr
):
    """(rows, D) of one head; rows from ``limit`` on (if MASKED) and columns past HEAD_DIM are 0."""
    columns = tl.arange(0, D)
    places = pointer + rows[:, None] * stride_row + columns[None, :]
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
    pointer,
    x,
    rows,
    limit,
    stride_row,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
):
    """Stores (rows, D) of one head: the counterpart of `load_rows`."""
    columns = tl.arange(0, D)
    places = pointer + rows[:, None] * stride_row + columns[None, :]
    x = x.to(pointer.dtype.element_ty)
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
    pointer,
    length,
    stride_row,
    TILES: tl.constexpr,
    COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
):
    """The first COUNT tiles of a sequence's keys or values: a tuple of (tile, D)."""
    tiles = ()
    for tile in tl.static_range(COUNT):
        rows = tile_start(TILES, tile) + tl.arange(0, TILES[tile])
        x = load_rows(pointer, rows, length, stride_row, tile == COUNT - 1, HEAD_DIM, D)
        tiles += (x,)
    return tiles


@triton.jit
def fill_rows(
    pointer,
    first,
    last,
    step,
    stride_row,
    value,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sets rows first..last of one head, BLOCK rows every ``step``."""
    for start in range(first, last, step):
        rows = start + tl.arange(0, BLOCK)
        x = tl.full([BLOCK, D], 0.0, tl.float32) + value
        store_rows(pointer, x, rows.to(tl.int64), last, stride_row, True, HEAD_DIM, D)


@triton.jit
def fill_values(pointer, first, last, step, stride, value, BLOCK: tl.constexpr):
    """Sets one value a row for rows first..last, BLOCK rows every ``step``."""
    for start in range(first, last, step):
        rows = start + tl.arange(0, BLOCK)
        x = tl.full([BLOCK], 0.0, tl.float32) + value
        tl.store(pointer + rows.to(tl.int64) * stride, x, mask=rows < last)
