"""The running statistics of a row: its online softmax, and the sums that ride along.

Online softmax (Milakov and Gimelshein, 2018) keeps a running maximum m and the sum s of
exp(x - m); a new maximum m' rescales s by exp(m - m'). Here every thread keeps its own (m, s) over
the 16 bytes that it loads, so the loop has no shuffle and no barrier; the threads combine once a
row. Two rules keep it exact:

- Subtract first, then scale to base 2: `exp2((x - m) * LOG2E)`. `x * LOG2E - m * LOG2E` rounds at
  the size of x, and is wrong by 1e-3 where all logits share an offset of 1e4.
- Keep (m, s), never lse = m + log(s): at that offset lse has lost the digits of log(s).
"""

import triton
import triton.language as tl

from .row_access import (
    NOWHERE,
    beside_interior,
    edge_columns,
    load_tile,
    split_row,
    streamed_size,
    tile_columns,
)
from .targets import class_share, smooth_of
from .transform import LN2, LOG2E, exp_of, finite, logits_of, transformed


@triton.jit
def lowest_finite(DTYPE: tl.constexpr):
    # The maximum starts here and not at -inf: x - m is then never inf - inf for a logit of -inf,
    # and a row masked with finfo.min still finds its maximum.
    if DTYPE == tl.float64:
        return tl.full([], -1.7976931348623157e308, tl.float64)
    else:
        return tl.full([], -3.4028234663852886e38, tl.float32)


@triton.jit
def rounded(product):
    """A product whose sum over lanes is next.

    Each lane adds its neighbour's to its own, and the compiler would fuse a bare product into that
    sum: one lane then has a * b + round(c * d), the other c * d + round(a * b), and lanes that hold
    the same sum do not agree on its last bit. Fused with 0 it is rounded first, by the one
    instruction that it takes anyway; -0 + 0 is 0, so the compiler has to keep it.
    """
    return product + 0.0


@triton.jit
def online_update(part_max, part_sum, tiles):
    """Tiles [R, VEC] into the running (max, sum) [R] of their threads, rescaled once for all."""
    new_max = part_max
    for x in tl.static_range(len(tiles)):
        new_max = tl.maximum(new_max, tl.max(tiles[x], axis=1))
    part_sum *= exp_of(part_max - new_max)
    for x in tl.static_range(len(tiles)):
        part_sum += tl.sum(exp_of(tiles[x] - new_max[:, None]), axis=1)
    return new_max, part_sum


@triton.jit
def soft_update(
    part_dot, part_weight, old_max, new_max, tiles, weight_interior_ptr, probs_interior_ptr,
    smooth, start, size, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Tiles into (sum of share * (x - max), sum of share) [R]; columns from `size` on, where given,
    do not count.

    The dot product is kept relative to the running maximum, so that all its terms have one sign:
    relative to anything else, a common offset or one masked logit would cancel its digits.
    """
    VEC: tl.constexpr = tiles[0].shape[1]
    cols, first = tile_columns(BLOCK_V, VEC)
    # One sum of all tiles, not one each: a loop that adds the sum of a load twice crashes Triton
    # 3.7's thread-locality pass.
    shares = tl.zeros([BLOCK_V // VEC, VEC], part_dot.dtype)
    terms = tl.zeros([BLOCK_V // VEC, VEC], part_dot.dtype)
    for tile in tl.static_range(len(tiles)):
        at = start + tile * BLOCK_V
        exists = None if size is None else at + first < size
        weight_ptrs = None if weight_interior_ptr is None else weight_interior_ptr + at + cols
        probs_ptrs = None if probs_interior_ptr is None else probs_interior_ptr + at + cols
        share = class_share(weight_ptrs, probs_ptrs, smooth, exists, tiles[tile])
        term = share * (tiles[tile] - new_max[:, None])
        if exists is not None:
            share = tl.where(exists, share, 0.0)
            term = tl.where(exists, term, 0.0)
        shares += share
        terms += term
    part_dot = rebased_dot(part_dot, part_weight, old_max, new_max) + tl.sum(terms, axis=1)
    return part_dot, part_weight + tl.sum(shares, axis=1)


@triton.jit
def rebased_dot(part_dot, part_weight, part_max, row_max):
    """Sums of share * (x - part_max) as ones of share * (x - row_max)."""
    # Who saw no column still has the lowest finite maximum.
    return part_dot + part_weight * tl.maximum(part_max - row_max, lowest_finite(part_dot.dtype))


@triton.jit
def rebased_exp_dot(part_exp_dot, part_sum, part_max, row_max):
    """Sums of exp(d) * d, where d is x - part_max, as ones of x - row_max."""
    difference = finite(part_max - row_max)
    rebase = exp_of(difference)
    return part_exp_dot * rebase + part_sum * (rebase * difference)


@triton.jit
def entropy_update(part_max, part_sum, part_exp_dot, part_place, tiles, start):
    """`online_update`, with the sum of exp(d) * d, where d is x - max in base 2, and the place of
    the first tile that had the maximum [R].

    One product and one clamp an element; which column it was is found when the row is read. The
    maximum starts at -inf, below the lowest finite float, or that would have no place.
    """
    BLOCK_V: tl.constexpr = tiles[0].shape[0] * tiles[0].shape[1]
    lowest = lowest_finite(part_sum.dtype)
    new_max = part_max
    for tile in tl.static_range(len(tiles)):
        tile_max = tl.max(tiles[tile], axis=1)
        part_place = tl.where(tile_max > new_max, start + tile * BLOCK_V, part_place)
        new_max = tl.maximum(new_max, tile_max)
    base = tl.maximum(new_max, lowest)
    moved = finite(tl.maximum(part_max, lowest) - base) * LOG2E
    rebase = tl.exp2(moved)
    part_sum *= rebase
    part_exp_dot = part_exp_dot * rebase + part_sum * moved
    for tile in tl.static_range(len(tiles)):
        difference = finite(tiles[tile] - base[:, None]) * LOG2E
        exps = tl.exp2(difference)
        part_sum += tl.sum(exps, axis=1)
        part_exp_dot += tl.sum(exps * difference, axis=1)
    return new_max, part_sum, part_exp_dot, part_place


@triton.jit
def first_column_of(places, candidates, row_ptr, shift, hi, transform, DTYPE: tl.constexpr):
    """The first column of the maximum of a row, which rows [R] of tiles have that are candidates,
    in the tiles at `places`: those are read again."""
    VEC: tl.constexpr = 128 // row_ptr.dtype.element_ty.primitive_bitwidth
    _, interior_ptr, _ = split_row(row_ptr, hi, VEC)
    cols, first = tile_columns(places.shape[0] * VEC, VEC)
    places = tl.where(candidates, places, 0)[:, None]
    mask = candidates[:, None] & (first + places < hi)
    x = tl.load(interior_ptr + places + cols, mask=mask, other=0.0)
    x, _ = transformed(x.to(DTYPE), transform)
    x = tl.where(mask, x, float("-inf"))
    # The maximum of what was read: the compiler may round a transformed logit in another way here.
    is_max = mask & (x == tl.max(x, axis=1)[:, None])
    return tl.min(tl.min(tl.where(is_max, shift + places + cols, NOWHERE), axis=1), axis=0)


@triton.jit
def statistics_update(
    part, tiles, weight_interior_ptr, probs_interior_ptr, smooth, shift, start, size,
    BLOCK_V: tl.constexpr, SOFT: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Tiles, `start` columns into the interior, which begins at column `shift`."""
    part_max, part_sum, part_dot, part_weight, part_exp_dot, part_place = part
    if STATS:
        new_max, new_sum, part_exp_dot, part_place = entropy_update(
            part_max, part_sum, part_exp_dot, part_place, tiles, start
        )
    else:
        new_max, new_sum = online_update(part_max, part_sum, tiles)
    if SOFT:
        lowest = lowest_finite(new_sum.dtype)
        old_base = tl.maximum(part_max, lowest) if STATS else part_max
        new_base = tl.maximum(new_max, lowest) if STATS else new_max
        part_dot, part_weight = soft_update(
            part_dot, part_weight, old_base, new_base, tiles, weight_interior_ptr,
            probs_interior_ptr, smooth, start, size, BLOCK_V,
        )  # fmt: skip
    return new_max, new_sum, part_dot, part_weight, part_exp_dot, part_place


@triton.jit
def last_update(
    part, tile, weight_interior_ptr, probs_interior_ptr, smooth, shift, start, size, transform,
    IN: tl.constexpr, DTYPE: tl.constexpr, BLOCK_V: tl.constexpr, SOFT: tl.constexpr,
    STATS: tl.constexpr,
):  # fmt: skip
    """`statistics_update` by one tile of `load_tile`, of which columns from `size` on are not."""
    x = logits_of(tile, start, size, transform, IN, DTYPE, BLOCK_V)
    return statistics_update(
        part, (x,), weight_interior_ptr, probs_interior_ptr, smooth, shift, start, size,
        BLOCK_V, SOFT, STATS,
    )  # fmt: skip


@triton.jit
def row_statistics(
    row_ptr, weight_ptr, probs_row_ptr, transform, label_smoothing, vocab_size, lo, hi, has_edges,
    DTYPE: tl.constexpr, BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, HELD: tl.constexpr,
    EVICT: tl.constexpr, SOFT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    CONGRUENT: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """(row, held) of one row, or of its columns [lo, hi) of the interior and, if has_edges, those
    outside it. With d = x - max of the transformed logits x, row is

    (max, sum of exp(d), sum of share * d, sum of share, sum of exp(d) * d, first column of max),

    the third and fourth 0 unless SOFT (see `class_share`), the last two meaningless unless STATS;
    held is the last HELD tiles. They, or where HELD is 0 the tiles of a last loop, are all that is
    masked: the steps before need no mask, which costs each vector a compare and four moves.
    """
    IN: tl.constexpr = row_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // IN.primitive_bitwidth
    tl.static_assert(HELD == 0 or HELD >= UNROLL)
    skew, interior_ptr, interior_size = split_row(row_ptr, vocab_size, VEC)
    shift, smooth, probs_interior_ptr = VEC - skew, (), None
    weight_interior_ptr = weight_ptr + shift if weight_ptr is not None else None
    if probs_row_ptr is not None:
        smooth = smooth_of(label_smoothing, vocab_size, DTYPE, HAS_SMOOTHING)
        probs_interior_ptr = beside_interior(probs_row_ptr, shift, VEC, CONGRUENT)
    zeros = tl.zeros([BLOCK_V // VEC], DTYPE)
    nowhere = tl.full([BLOCK_V // VEC], NOWHERE, tl.int32)
    maximum = zeros + (float("-inf") if STATS else lowest_finite(DTYPE))
    part = (maximum, zeros, zeros, zeros, zeros, nowhere)

    # Between pairs and loaded shares the compiler would exchange elements through shared memory.
    LOADS: tl.constexpr = SOFT and (weight_ptr is not None or probs_row_ptr is not None)
    PAIRS: tl.constexpr = HELD > 0 or not LOADS
    rest = lo + streamed_size(lo, hi, BLOCK_V, UNROLL, HELD)
    for start in tl.range(lo, rest, BLOCK_V * UNROLL):
        tiles = ()
        for i in tl.static_range(UNROLL):
            tile = load_tile(interior_ptr, start + i * BLOCK_V, None, BLOCK_V, EVICT, PAIRS)
            tiles = tiles + (logits_of(tile, start, None, transform, IN, DTYPE, BLOCK_V),)
        part = statistics_update(
            part, tiles, weight_interior_ptr, probs_interior_ptr, smooth, shift, start, None,
            BLOCK_V, SOFT, STATS,
        )  # fmt: skip
    held = ()
    for i in tl.static_range(HELD):
        at = rest + i * BLOCK_V
        held = held + (load_tile(interior_ptr, at, hi, BLOCK_V, "evict_first", PAIRS),)
    for i in tl.static_range(HELD):
        part = last_update(
            part, held[i], weight_interior_ptr, probs_interior_ptr, smooth, shift,
            rest + i * BLOCK_V, hi, transform, IN, DTYPE, BLOCK_V, SOFT, STATS,
        )  # fmt: skip
    if HELD == 0:
        for start in tl.range(rest, hi, BLOCK_V):
            tile = load_tile(interior_ptr, start, hi, BLOCK_V, EVICT, PAIRS)
            part = last_update(
                part, tile, weight_interior_ptr, probs_interior_ptr, smooth, shift, start, hi,
                transform, IN, DTYPE, BLOCK_V, SOFT, STATS,
            )  # fmt: skip
    edge, is_edge = edge_columns(skew, interior_size, tl.where(has_edges, vocab_size, 0), VEC)
    return with_edges(part, row_ptr, weight_ptr, probs_row_ptr, transform, smooth, edge, is_edge,
                      shift, hi, DTYPE, SOFT, STATS), held  # fmt: skip


@triton.jit
def with_edges(
    part, row_ptr, weight_ptr, probs_row_ptr, transform, smooth, edge, is_edge,
    shift, hi, DTYPE: tl.constexpr, SOFT: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """The statistics of all threads and of the edge columns as those of the row."""
    part_max, part_sum, part_dot, part_weight, part_exp_dot, part_place = part
    x, _ = transformed(tl.load(row_ptr + edge, mask=is_edge, other=0.0).to(DTYPE), transform)
    x = tl.where(is_edge, x, float("-inf"))
    row_max = tl.maximum(tl.max(part_max, axis=0), tl.max(x, axis=0))
    row_max = tl.maximum(row_max, lowest_finite(DTYPE))
    difference = x - row_max
    exps = exp_of(difference)
    row_sum = tl.sum(rounded(part_sum * exp_of(part_max - row_max)), axis=0)
    row_sum += tl.sum(exps, axis=0)
    row_dot, row_weight = tl.full([], 0.0, DTYPE), tl.full([], 0.0, DTYPE)
    if SOFT:
        weight_ptrs = weight_ptr + edge if weight_ptr is not None else None
        probs_ptrs = probs_row_ptr + edge if probs_row_ptr is not None else None
        share = class_share(weight_ptrs, probs_ptrs, smooth, is_edge, x)
        row_dot = tl.sum(rebased_dot(part_dot, part_weight, part_max, row_max), axis=0)
        row_dot += tl.sum(tl.where(is_edge, share * difference, 0.0), axis=0)
        row_weight = tl.sum(part_weight, axis=0) + tl.sum(tl.where(is_edge, share, 0.0), axis=0)
    row_exp_dot, row_argmax = tl.full([], 0.0, DTYPE), tl.full([], 0, tl.int32)
    if STATS:
        part_exp_dot *= LN2
        exp_dots = rebased_exp_dot(part_exp_dot, part_sum, part_max, row_max)
        row_exp_dot = tl.sum(exp_dots, axis=0)
        row_exp_dot += tl.sum(rounded(exps * finite(difference)), axis=0)
        candidates = (part_max == row_max) & (part_place != NOWHERE)
        row_argmax = tl.minimum(
            first_column_of(part_place, candidates, row_ptr, shift, hi, transform, DTYPE),
            tl.min(tl.where(x == row_max, edge, NOWHERE), axis=0),
        )
    return row_max, row_sum, row_dot, row_weight, row_exp_dot, row_argmax
