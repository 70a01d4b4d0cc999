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
from .transform import exp_of, finite, logits_of, transformed


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
def entropy_update(part_exp_dot, part_sum, part_argmax, old_max, new_max, tiles, first_col):
    """Tiles whose first column is first_col into (sum of exp(d) * d, the first column that has the
    maximum) [R], where d is x - max; part_sum is still that of old_max."""
    BLOCK_V: tl.constexpr = tiles[0].shape[0] * tiles[0].shape[1]
    cols, _ = tile_columns(BLOCK_V, tiles[0].shape[1])
    terms = tl.zeros(tiles[0].shape, part_sum.dtype)
    place = tl.full(tiles[0].shape, NOWHERE, tl.int32)
    for tile in tl.static_range(len(tiles)):
        difference = tiles[tile] - new_max[:, None]
        terms += exp_of(difference) * finite(difference)
        is_max = tiles[tile] == new_max[:, None]
        place = tl.minimum(place, tl.where(is_max, first_col + tile * BLOCK_V + cols, NOWHERE))
    part_exp_dot = rebased_exp_dot(part_exp_dot, part_sum, old_max, new_max)
    argmax = tl.min(place, axis=1)
    argmax = tl.where(new_max > old_max, argmax, tl.minimum(part_argmax, argmax))
    return part_exp_dot + tl.sum(terms, axis=1), argmax


@triton.jit
def statistics_update(
    part, tiles, weight_interior_ptr, probs_interior_ptr, smooth, shift, start, size,
    BLOCK_V: tl.constexpr, SOFT: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Tiles, `start` columns into the interior, which begins at column `shift`."""
    part_max, part_sum, part_dot, part_weight, part_exp_dot, part_argmax = part
    new_max, new_sum = online_update(part_max, part_sum, tiles)
    if SOFT:
        part_dot, part_weight = soft_update(
            part_dot, part_weight, part_max, new_max, tiles, weight_interior_ptr,
            probs_interior_ptr, smooth, start, size, BLOCK_V,
        )  # fmt: skip
    if STATS:
        part_exp_dot, part_argmax = entropy_update(
            part_exp_dot, part_sum, part_argmax, part_max, new_max, tiles, shift + start
        )
    return new_max, new_sum, part_dot, part_weight, part_exp_dot, part_argmax


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
    part = (zeros + lowest_finite(DTYPE), zeros, zeros, zeros, zeros, nowhere)

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
                      DTYPE, SOFT, STATS), held  # fmt: skip


@triton.jit
def with_edges(
    part, row_ptr, weight_ptr, probs_row_ptr, transform, smooth, edge, is_edge,
    DTYPE: tl.constexpr, SOFT: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """The statistics of all threads and of the edge columns as those of the row."""
    part_max, part_sum, part_dot, part_weight, part_exp_dot, part_argmax = part
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
        exp_dots = rebased_exp_dot(part_exp_dot, part_sum, part_max, row_max)
        row_exp_dot = tl.sum(exp_dots, axis=0)
        row_exp_dot += tl.sum(rounded(exps * finite(difference)), axis=0)
        row_argmax = tl.minimum(
            tl.min(tl.where(part_max == row_max, part_argmax, NOWHERE), axis=0),
            tl.min(tl.where(x == row_max, edge, NOWHERE), axis=0),
        )
    return row_max, row_sum, row_dot, row_weight, row_exp_dot, row_argmax
