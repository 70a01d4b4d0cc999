"""Where a row lies: its address, its whole 16-byte vectors and its edges, and tiles of it."""

import triton
import triton.language as tl

NOWHERE = tl.constexpr(2**30)  # a column that no row has; exact in float32


@triton.jit
def row_offset(row, rows_per_group, group_stride, row_stride, GROUPED: tl.constexpr = True):
    # 64-bit: row * stride passes 2**31 at 32,768 rows of 65,536
    if not GROUPED:
        return row.to(tl.int64) * row_stride
    group = (row // rows_per_group).to(tl.int64)
    return group * group_stride + (row % rows_per_group).to(tl.int64) * row_stride


@triton.jit
def split_row(row_ptr, vocab_size, VEC: tl.constexpr):
    """(skew, interior_ptr, interior_size): the whole 16-byte vectors inside a row of any address.

    The row starts `skew` elements after a 16-byte boundary. Its interior starts at the next
    boundary, column VEC - skew, and holds a multiple of VEC elements; what lies before and after,
    fewer than 2 * VEC elements, are the edge columns. One binary then serves V = 50,257 and every
    stride with 16-byte loads and stores, where a mask per element would fall to 2-byte ones.
    """
    address = row_ptr.to(tl.int64)
    skew = ((address & 15) // (16 // VEC)).to(tl.int32)
    # as a multiple of 16 that can be seen: Triton 3.9 loses the hint of a sum with 16
    interior_ptr = tl.multiple_of((((address >> 4) + 1) * 16).to(row_ptr.dtype), 16)
    interior_size = tl.maximum((vocab_size + skew) // VEC - 1, 0) * VEC
    return skew, interior_ptr, tl.multiple_of(interior_size, VEC)


@triton.jit
def edge_columns(skew, interior_size, vocab_size, VEC: tl.constexpr, LANES: tl.constexpr = None):
    """Columns [2 * VEC] outside the interior, and which of them exist; in more lanes, if asked."""
    lane = tl.arange(0, 2 * VEC if LANES is None else LANES)
    cols = tl.where(lane < VEC, lane - skew, interior_size + lane - skew)
    return cols, (cols >= 0) & (cols < vocab_size)


@triton.jit
def tile_columns(BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """Columns of a tile [BLOCK_V / VEC, VEC], and the first column of each element's vector.

    A mask made from the latter is constant over 16 bytes, which keeps the access whole.
    """
    first = tl.arange(0, BLOCK_V // VEC)[:, None] * VEC
    return first + tl.arange(0, VEC)[None, :], first + tl.zeros([1, VEC], tl.int32)


@triton.jit
def beside_interior(probs_row_ptr, shift, VEC: tl.constexpr, CONGRUENT: tl.constexpr):
    """The probabilities of the interior. Where their rows lie as those of the logits do, element
    for element, a vector of them begins at a multiple of 16 bytes too (8 if they are half as
    wide), and is loaded at once."""
    BYTES: tl.constexpr = probs_row_ptr.dtype.element_ty.primitive_bitwidth // 8
    ptr = probs_row_ptr + shift
    if CONGRUENT:
        ptr = tl.multiple_of(ptr, min(16, VEC * BYTES))
    return ptr


@triton.jit
def streamed_size(lo, hi, BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, HELD: tl.constexpr):
    """How much of columns [lo, hi) of the interior to stream, in whole steps of UNROLL tiles: all
    that there are, or so many that the rest fits in HELD tiles."""
    STEP: tl.constexpr = BLOCK_V * UNROLL
    if HELD == 0:
        return tl.maximum(hi - lo, 0) // STEP * STEP
    else:
        return tl.maximum(hi - lo - HELD * BLOCK_V + STEP - 1, 0) // STEP * STEP


@triton.jit
def load_tile(
    interior_ptr, start, size, BLOCK_V: tl.constexpr, EVICT: tl.constexpr, PAIRS: tl.constexpr
):
    """A tile [R, VEC] of the interior; -inf from column `size` on, where given.

    With PAIRS, 16-bit elements come as int32 pairs [R, VEC / 2]: 6.7 instructions an element in the
    loop of the statistics against 7.1, and the form in which registers hold two of them.
    """
    IN: tl.constexpr = interior_ptr.dtype.element_ty
    BITS: tl.constexpr = IN.primitive_bitwidth
    if PAIRS and BITS == 16:
        cols, first = tile_columns(BLOCK_V // 2, 64 // BITS)
        ptrs = interior_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + start // 2 + cols
        mask = None if size is None else start + 2 * first < size
        INFINITIES: tl.constexpr = -8323200 if IN == tl.bfloat16 else -67044352  # ff80, fc00 twice
        other = None if size is None else INFINITIES
        return tl.load(ptrs, mask=mask, other=other, eviction_policy=EVICT)
    else:
        cols, first = tile_columns(BLOCK_V, 128 // BITS)
        mask = None if size is None else start + first < size
        other = None if size is None else float("-inf")
        return tl.load(interior_ptr + start + cols, mask=mask, other=other, eviction_policy=EVICT)


@triton.jit
def elements_of(tile, IN: tl.constexpr, DTYPE: tl.constexpr):
    """The elements [R, VEC] of a tile of `load_tile`, in the dtype of the arithmetic."""
    if tile.dtype != tl.int32:
        return tile.to(DTYPE)
    else:
        if IN == tl.bfloat16:
            low = (tile << 16).to(tl.float32, bitcast=True)
            high = (tile & -65536).to(tl.float32, bitcast=True)
        else:
            low = tile.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (tile >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return tl.reshape(tl.join(low, high), [tile.shape[0], 2 * tile.shape[1]])


@triton.jit
def write_zeros(row_ptr, vocab_size, BLOCK_V: tl.constexpr):
    """Zeros over one row; an ignored row may hold NaN, so nothing is read."""
    OUT: tl.constexpr = row_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // OUT.primitive_bitwidth
    skew, interior_ptr, interior_size = split_row(row_ptr, vocab_size, VEC)
    cols, first = tile_columns(BLOCK_V, VEC)
    zeros = tl.zeros([BLOCK_V // VEC, VEC], OUT)
    for start in tl.range(0, interior_size, BLOCK_V):
        tl.store(interior_ptr + start + cols, zeros, mask=start + first < interior_size)
    edge, is_edge = edge_columns(skew, interior_size, vocab_size, VEC)
    tl.store(row_ptr + edge, tl.zeros([2 * VEC], OUT), mask=is_edge)
