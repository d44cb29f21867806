"""What the kernels for rows of any length share: where a row lies, and tiles of a head's rows."""

import triton
import triton.language as tl


@triton.jit
def span(offsets_ptr, lengths_ptr, sequence):
    """First packed row and number of rows of one sequence, both int32."""
    first = tl.load(offsets_ptr + sequence)
    if lengths_ptr is None:
        length = tl.load(offsets_ptr + sequence + 1) - first
    else:
        length = tl.load(lengths_ptr + sequence)
    return first, length


@triton.jit
def at(ptr, row, head, stride_row, stride_head):
    """Where one head of a packed row begins; 64-bit, as the packed tensor may be large."""
    return ptr + row.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head


@triton.jit
def slot(first, sequence):
    """Where a sequence begins in a workspace of one number a row: at a multiple of 16, for loads.

    Workspaces have room for 16 more numbers a sequence, so that no two overlap.
    """
    return (first.to(tl.int64) + 16 * sequence) // 16 * 16


@triton.jit
def load_tile(
    ptr,
    stride_row,
    rows,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(BLOCK, BLOCK_D) from ``rows`` rows (all BLOCK unless MASKED); 0 elsewhere."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    place = ptr + row * stride_row + column
    if MASKED:
        if HEAD_DIM == BLOCK_D:
            return tl.load(place, mask=row < rows, other=0.0)
        else:
            return tl.load(place, mask=(row < rows) & (column < HEAD_DIM), other=0.0)
    else:
        if HEAD_DIM == BLOCK_D:
            return tl.load(place)
        else:
            return tl.load(place, mask=column < HEAD_DIM, other=0.0)


@triton.jit
def store_tile(
    ptr,
    stride_row,
    rows,
    tile,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes the first ``rows`` rows of a (BLOCK, BLOCK_D) tile."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    place = ptr + row * stride_row + column
    inside = row < rows
    if HEAD_DIM != BLOCK_D:
        inside = inside & (column < HEAD_DIM)
    tl.store(place, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_terms(ptr, rows, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(BLOCK,) numbers, one a row; 0 from ``rows`` on."""
    row = tl.arange(0, BLOCK)
    if MASKED:
        return tl.load(ptr + row, mask=row < rows, other=0)
    else:
        return tl.load(ptr + row)


@triton.jit
def load_factors(ptr, rows, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(BLOCK,) factors of the dropout hash, as uint32; the compiler sees that they have 24 bits."""
    return load_terms(ptr, rows, BLOCK, MASKED).to(tl.uint32, bitcast=True) & 0xFFFFFF


@triton.jit
def place(blocks, heads):
    """The block, head and sequence of this program; past the last sequence: it clears the tail."""
    program = tl.program_id(0)
    return program % blocks, (program // blocks) % heads, program // blocks // heads


@triton.jit
def left_over(offsets_ptr, lengths_ptr, count, total, blocks, heads, BLOCK: tl.constexpr):
    """What this program has to fill: first row, end, step, first head, end of heads, value.

    The last block of a sequence fills rows that no block reaches, where a sequence is longer than
    promised, with NaN; the programs past the last sequence fill the rows of no sequence with 0.
    """
    # Selected without branches: Triton 3.3 fails on loop bounds that a branch gives.
    block, head, sequence = place(blocks, heads)
    inside = sequence < count
    here = tl.minimum(sequence, count)
    first = tl.load(offsets_ptr + here)
    length = tl.load(offsets_ptr + tl.minimum(here + 1, count)) - first
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + here, mask=inside, other=0)
    others = count * heads * blocks
    begin = first + tl.where(inside, block + 1, tl.program_id(0) - others) * BLOCK
    end = tl.where(inside, tl.where(block == blocks - 1, first + length, 0), total)
    programs = tl.where(inside, 1, tl.num_programs(0) - others)
    last_head = tl.where(inside, head + 1, heads)
    head = tl.where(inside, head, 0)
    value = tl.where(inside, float("nan"), 0.0)
    return begin, end, programs * BLOCK, head, last_head, value


@triton.jit
def fill_rows(
    ptr,
    stride_row,
    stride_head,
    begin,
    end,
    step,
    first_head,
    last_head,
    value,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes ``value`` into every ``step``-th block of BLOCK rows."""
    tile = tl.zeros([BLOCK, BLOCK_D], tl.float32) + value
    for start in range(begin, end, step):
        for head in range(first_head, last_head):
            base = at(
                ptr, tl.cast(start, tl.int32), tl.cast(head, tl.int32), stride_row, stride_head
            )
            store_tile(base, stride_row, end - start, tile, BLOCK, HEAD_DIM, BLOCK_D)


@triton.jit
def fill_scalars(
    ptr,
    stride_row,
    stride_head,
    begin,
    end,
    step,
    first_head,
    last_head,
    value,
    BLOCK: tl.constexpr,
):
    """The same for one number a row and head."""
    row = tl.arange(0, BLOCK)
    numbers = tl.zeros([BLOCK], tl.float32) + value
    for start in range(begin, end, step):
        for head in range(first_head, last_head):
            base = at(
                ptr, tl.cast(start, tl.int32), tl.cast(head, tl.int32), stride_row, stride_head
            )
            tl.store(base + row * stride_row, numbers, mask=row < end - start)
