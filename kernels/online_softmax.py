"""The pieces that the kernels share: where a row lies, its online softmax, its gradient.

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

LOG2E = tl.constexpr(1.4426950408889634)
NOWHERE = tl.constexpr(2**30)  # the column of a maximum that no column has; exact in float32


@triton.jit
def exp_of(difference):
    # FMUL and MUFU.EX2; tl.exp takes five instructions
    return tl.exp2(difference * LOG2E)


@triton.jit
def lowest_finite(DTYPE: tl.constexpr):
    # The maximum starts here and not at -inf: x - m is then never inf - inf for a logit of -inf,
    # and a row masked with finfo.min still finds its maximum.
    if DTYPE == tl.float64:
        return tl.full([], -1.7976931348623157e308, tl.float64)
    else:
        return tl.full([], -3.4028234663852886e38, tl.float32)


@triton.jit
def finite(difference):
    # Of a logit and its maximum: where exp of it is 0 in any dtype, 0 times it has to be 0 too, and
    # 0 times its product with an upstream gradient, which would overflow at the lowest float.
    return tl.maximum(difference, -2000.0)


@triton.jit
def transform_of(
    logit_scale, softcap, DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """What happens to the logits first: (), (scale,) or (scale, softcap). A scale before a cap is
    logit_scale / softcap."""
    if HAS_SOFTCAP:
        return (tl.full([], logit_scale, DTYPE), tl.full([], softcap, DTYPE))
    elif HAS_SCALE:
        return (tl.full([], logit_scale, DTYPE),)
    else:
        return ()


@triton.jit
def transformed(x, transform):
    """(x scaled and capped, the derivative of tanh there, 1 without a cap).

    -inf becomes a number under a cap, and +inf under a negative scale: what masks lanes with -inf
    does so afterwards.
    """
    slope = tl.full([], 1.0, x.dtype)
    if len(transform) > 0:
        x = x * transform[0]
    if len(transform) > 1:
        x, slope = tanh(x)
        x *= transform[1]
    return x, slope


@triton.jit
def derivative_factor(transform, DTYPE: tl.constexpr):
    """The derivative of `transformed`, but for its slope."""
    factor = tl.full([], 1.0, DTYPE)
    if len(transform) > 0:
        factor *= transform[0]
    if len(transform) > 1:
        factor *= transform[1]
    return factor


@triton.jit
def tanh(x):
    """(tanh(x), its derivative), each to a few eps of itself; infinities are 1 and -1.

    One division serves both: up to 0.4 of seven levels of Lambert's continued fraction, whose
    terms have one sign, beyond it of (1 - e) / (1 + e) with e = exp(-2 |x|), where 1 - tanh**2
    would cancel.
    """
    size = tl.abs(x)
    e = exp_of(-2.0 * size)
    square = x * x
    is_small = size < 0.4
    top = size * (135135.0 + square * (17325.0 + square * (378.0 + square)))
    bottom = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    bottom = tl.where(is_small, bottom, 1.0 + e)
    result = tl.where(is_small, top, 1.0 - e) / bottom
    slope = tl.where(is_small, 1.0 - result * result, 4.0 * e / (bottom * bottom))
    return tl.where(x < 0.0, -result, result), slope


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
def logits_of(
    tile, start, size, transform, IN: tl.constexpr, DTYPE: tl.constexpr, BLOCK_V: tl.constexpr
):
    """The transformed elements of a tile of `load_tile`; -inf from column `size` on, if given."""
    x, _ = transformed(elements_of(tile, IN, DTYPE), transform)
    if len(transform) > 0 and size is not None:
        _, first = tile_columns(BLOCK_V, 128 // IN.primitive_bitwidth)
        x = tl.where(start + first < size, x, float("-inf"))
    return x


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
def class_share(weight_ptrs, probs_ptrs, smooth, exists, like):
    """What each class has in a soft target, in the shape and dtype of `like`.

    weight * ((1 - s) * p + s / C) of probabilities, smooth being (1 - s, s / C) or (); the weight
    alone, or 1, of a smoothed class index, whose s / C is in `loss_factors`. Where nothing exists
    it is anything: the caller masks its sum, or its store.
    """
    share = tl.full(like.shape, 1.0, like.dtype)
    if probs_ptrs is not None:
        share = tl.load(probs_ptrs, mask=exists).to(like.dtype)
        if len(smooth) > 0:
            share = share * smooth[0] + smooth[1]
    if weight_ptrs is not None:
        share *= tl.load(weight_ptrs, mask=exists).to(like.dtype)
    return share


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
def streamed_size(lo, hi, BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, HELD: tl.constexpr):
    """How much of columns [lo, hi) of the interior to stream, in whole steps of UNROLL tiles: all
    that there are, or so many that the rest fits in HELD tiles."""
    STEP: tl.constexpr = BLOCK_V * UNROLL
    if HELD == 0:
        return tl.maximum(hi - lo, 0) // STEP * STEP
    else:
        return tl.maximum(hi - lo - HELD * BLOCK_V + STEP - 1, 0) // STEP * STEP


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

    the third and fourth 0 unless SOFT (see `class_share`), the last two meaningless unless STATS.

    held is the last HELD tiles. They, or where HELD is 0 the tiles of a last loop, are all that is
    masked: the steps before need no mask, which costs each vector a compare and four moves.
    """
    IN: tl.constexpr = row_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // IN.primitive_bitwidth
    tl.static_assert(HELD == 0 or HELD >= UNROLL)
    skew, interior_ptr, interior_size = split_row(row_ptr, vocab_size, VEC)
    shift = VEC - skew
    weight_interior_ptr = weight_ptr + shift if weight_ptr is not None else None
    smooth, probs_interior_ptr = (), None
    if probs_row_ptr is not None:
        smooth = smooth_of(label_smoothing, vocab_size, DTYPE, HAS_SMOOTHING)
        probs_interior_ptr = beside_interior(probs_row_ptr, shift, VEC, CONGRUENT)
    part_max = tl.zeros([BLOCK_V // VEC], DTYPE) + lowest_finite(DTYPE)
    part_sum = tl.zeros([BLOCK_V // VEC], DTYPE)
    part_argmax = tl.full([BLOCK_V // VEC], NOWHERE, tl.int32)
    part = (part_max, part_sum, part_sum, part_sum, part_sum, part_argmax)

    # Between pairs and loaded shares the compiler would exchange elements through shared memory.
    LOADS: tl.constexpr = SOFT and (weight_ptr is not None or probs_row_ptr is not None)
    PAIRS: tl.constexpr = HELD > 0 or not LOADS
    rest = lo + streamed_size(lo, hi, BLOCK_V, UNROLL, HELD)
    for start in tl.range(lo, rest, BLOCK_V * UNROLL):
        tiles = ()
        for i in tl.static_range(UNROLL):
            tile = load_tile(interior_ptr, start + i * BLOCK_V, None, BLOCK_V, EVICT, PAIRS)
            x = logits_of(tile, start, None, transform, IN, DTYPE, BLOCK_V)
            tiles = tiles + (x,)
        part = statistics_update(
            part, tiles, weight_interior_ptr, probs_interior_ptr, smooth, shift, start, None,
            BLOCK_V, SOFT, STATS,
        )  # fmt: skip
    held = ()
    for i in tl.static_range(HELD):
        tile = load_tile(interior_ptr, rest + i * BLOCK_V, hi, BLOCK_V, "evict_first", PAIRS)
        held = held + (tile,)
    for i in tl.static_range(HELD):
        start = rest + i * BLOCK_V
        x = logits_of(held[i], start, hi, transform, IN, DTYPE, BLOCK_V)
        part = statistics_update(
            part, (x,), weight_interior_ptr, probs_interior_ptr, smooth, shift, start, hi,
            BLOCK_V, SOFT, STATS,
        )  # fmt: skip
    if HELD == 0:
        for start in tl.range(rest, hi, BLOCK_V):
            tile = load_tile(interior_ptr, start, hi, BLOCK_V, EVICT, PAIRS)
            x = logits_of(tile, start, hi, transform, IN, DTYPE, BLOCK_V)
            part = statistics_update(
                part, (x,), weight_interior_ptr, probs_interior_ptr, smooth, shift, start, hi,
                BLOCK_V, SOFT, STATS,
            )  # fmt: skip
    edge, is_edge = edge_columns(skew, interior_size, tl.where(has_edges, vocab_size, 0), VEC)
    return with_edges(part, row_ptr, weight_ptr, probs_row_ptr, transform, smooth, edge, is_edge,
                      DTYPE, SOFT, STATS), held  # fmt: skip


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
    row_sum = tl.sum(part_sum * exp_of(part_max - row_max), axis=0) + tl.sum(exps, axis=0)
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
        row_exp_dot = tl.sum(exp_dots, axis=0) + tl.sum(exps * finite(difference), axis=0)
        row_argmax = tl.minimum(
            tl.min(tl.where(part_max == row_max, part_argmax, NOWHERE), axis=0),
            tl.min(tl.where(x == row_max, edge, NOWHERE), axis=0),
        )
    return row_max, row_sum, row_dot, row_weight, row_exp_dot, row_argmax


@triton.jit
def load_target(targets_row_ptr, ignore_index, vocab_size):
    """(target, ignored, in_range) of one row; the target is only safe to use where in range, and
    never is where the targets are probabilities."""
    if targets_row_ptr.dtype.element_ty.is_floating():
        never = tl.full([], False, tl.int1)
        return tl.full([], 0, tl.int64), never, never
    else:
        target = tl.load(targets_row_ptr).to(tl.int64)
        return target, target == ignore_index, (target >= 0) & (target < vocab_size)


@triton.jit
def smooth_of(label_smoothing, vocab_size, DTYPE: tl.constexpr, HAS_SMOOTHING: tl.constexpr):
    """(1 - s, s / C), or () without smoothing."""
    if HAS_SMOOTHING:
        smoothing = tl.full([], label_smoothing, DTYPE)  # a Python float in the interpreter
        return (1.0 - smoothing, smoothing / tl.full([], vocab_size, DTYPE))
    else:
        return ()


@triton.jit
def loss_factors(
    target, in_range, weight_ptr, row_weight, smooth, vocab_size,
    PROBS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(target_factor, lse_factor, class_factor) of targets of any shape: the loss of a row is
    lse_factor * lse - target_factor * x[target] - class_factor * sum_c share[c] * x[c], its
    gradient lse_factor * softmax - target_factor * onehot - class_factor * share. row_weight is the
    sum of the shares, where they are loaded.

    NaN where the target is out of range: that poisons loss and gradient of its row, and no other.
    """
    if PROBS:
        return tl.zeros_like(row_weight), row_weight, tl.full([], 1.0, DTYPE)
    else:
        target_factor = tl.where(in_range, 1.0, float("nan")).to(DTYPE)
        if weight_ptr is not None:
            target_factor *= tl.load(weight_ptr + target, mask=in_range, other=0.0).to(DTYPE)
        else:
            row_weight = tl.full([], vocab_size, DTYPE)
        lse_factor = target_factor
        class_factor = tl.full([], 0.0, DTYPE)
        if len(smooth) > 0:
            class_factor = smooth[1]
            target_factor *= smooth[0]
            lse_factor = target_factor + class_factor * row_weight
        return target_factor, lse_factor, class_factor


@triton.jit
def loss_of(row_max, row_sum, row_dot, x_target, factors, z_loss, HAS_Z_LOSS: tl.constexpr):
    """The losses of rows, from their statistics and `loss_factors`."""
    target_factor, lse_factor, class_factor = factors
    # lse - x is log(sum) + (max - x): a common offset of the logits cancels before it can round
    log_sum = tl.log(row_sum)
    loss = lse_factor * log_sum - target_factor * (x_target - row_max) - class_factor * row_dot
    if HAS_Z_LOSS:
        lse, z_loss = row_max + log_sum, tl.full([], z_loss, row_max.dtype)
        loss += z_loss * lse * lse
    return loss


@triton.jit
def softmax_factor_of(row_max, row_sum, lse_factor, z_loss, HAS_Z_LOSS: tl.constexpr):
    """What the exponentials of a row have in its gradient: that of z_loss * lse**2 is 2 z lse."""
    if HAS_Z_LOSS:
        lse_factor += 2.0 * tl.full([], z_loss, row_max.dtype) * (row_max + tl.log(row_sum))
    return lse_factor / row_sum


@triton.jit
def gradient_tile(
    x, transform, row_max, softmax_factor, entropy_factor, class_grad, weight_ptrs, probs_ptrs,
    smooth, mask, SOFT: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of logits, but for the target's column: no compare and no division.

    softmax_factor is grad_loss * `softmax_factor_of`, class_grad is grad_loss * class_factor, with
    the `derivative_factor` in grad_loss; entropy_factor is () or (the same of grad_entropy,), whose
    other half is in softmax_factor.
    """
    x, slope = transformed(x, transform)
    difference = x - row_max
    grad = exp_of(difference)
    if len(entropy_factor) > 0:
        grad *= softmax_factor - entropy_factor[0] * finite(difference)
    else:
        grad *= softmax_factor
    if SOFT:
        grad -= class_grad * class_share(weight_ptrs, probs_ptrs, smooth, mask, x)
    if len(transform) > 1:
        grad *= slope
    return grad


@triton.jit
def gradient_at_target(
    x_target, transform, row_max, softmax_factor, entropy_factor, grad_target, class_grad,
    weight_ptr, smooth, target, in_range, SOFT: tl.constexpr,
):  # fmt: skip
    """The gradient of the target's logit, from float32: stored once the rest of its row is.

    grad_target is grad_loss * target_factor.
    """
    weight_ptr = weight_ptr + target if weight_ptr is not None else None
    grad = gradient_tile(
        x_target, transform, row_max, softmax_factor, entropy_factor, class_grad, weight_ptr, None,
        smooth, in_range, SOFT,
    )  # fmt: skip
    _, slope = transformed(x_target, transform)  # once more for the reader, not for the compiler
    return grad - grad_target * slope


@triton.jit
def gradient_of_probabilities(
    difference, log_sum, grad_share, weight_ptrs, mask, OUT: tl.constexpr
):
    """grad_share * weight * (lse - x): what a probability is multiplied by in the loss."""
    grad = grad_share * (log_sum - difference)
    if weight_ptrs is not None:
        grad *= tl.load(weight_ptrs, mask=mask).to(grad.dtype)
    if OUT.primitive_bitwidth == 16:  # the interpreter's float64 to bfloat16 is wrong
        grad = grad.to(tl.float32)
    return grad.to(OUT)


@triton.jit
def store_losses(losses_ptr, unweighted_ptr, sample_weight_ptr, rows, losses, mask):
    """Of rows that count."""
    if unweighted_ptr is not None:
        tl.store(unweighted_ptr + rows, losses, mask=mask)
    if sample_weight_ptr is not None:
        losses *= tl.load(sample_weight_ptr + rows, mask=mask).to(losses.dtype)
    tl.store(losses_ptr + rows, losses, mask=mask)


@triton.jit
def store_stats(
    lse_ptr, entropy_ptr, predictions_ptr, rows, row_max, row_sum, row_exp_dot, row_argmax, mask
):
    """Of rows that count."""
    log_sum = tl.log(row_sum)
    lse = tl.where(row_max == float("inf"), row_max, row_max + log_sum)  # not inf + NaN
    tl.store(lse_ptr + rows, lse, mask=mask)
    tl.store(entropy_ptr + rows, log_sum - row_exp_dot / row_sum, mask=mask)
    predictions = tl.where(row_argmax == NOWHERE, 0, row_argmax)  # all logits -inf
    tl.store(predictions_ptr + rows, predictions.to(tl.int64), mask=mask)


@triton.jit
def store_ignored(losses_ptr, unweighted_ptr, lse_ptr, entropy_ptr, predictions_ptr, rows, mask):
    """Whatever their sample_weight is, NaN included."""
    tl.store(losses_ptr + rows, 0.0, mask=mask)
    if unweighted_ptr is not None:
        tl.store(unweighted_ptr + rows, 0.0, mask=mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, 0.0, mask=mask)
        tl.store(entropy_ptr + rows, 0.0, mask=mask)
        tl.store(predictions_ptr + rows, -1, mask=mask)


@triton.jit
def store_row(
    statistics, x_target, target, in_range, weight_ptr, sample_weight_ptr, transform, smooth,
    z_loss, vocab_size, row, losses_ptr, unweighted_ptr, lse_ptr, entropy_ptr, predictions_ptr,
    row_max_ptr, row_sum_ptr, row_weight_ptr,
    PROBS: tl.constexpr, HAS_Z_LOSS: tl.constexpr,
):  # fmt: skip
    """All that is known of a row once it is read; returns its `loss_factors`."""
    row_max, row_sum, row_dot, row_weight, row_exp_dot, row_argmax = statistics
    if row_max_ptr is not None:
        tl.store(row_max_ptr + row, row_max)
        tl.store(row_sum_ptr + row, row_sum)
    if row_weight_ptr is not None:
        tl.store(row_weight_ptr + row, row_weight)
    if lse_ptr is not None:
        store_stats(
            lse_ptr, entropy_ptr, predictions_ptr, row, row_max, row_sum, row_exp_dot, row_argmax,
            None,
        )  # fmt: skip
    x_target, _ = transformed(x_target, transform)
    factors = loss_factors(
        target, in_range, weight_ptr, row_weight, smooth, vocab_size, PROBS, row_max.dtype
    )
    loss = loss_of(row_max, row_sum, row_dot, x_target, factors, z_loss, HAS_Z_LOSS)
    store_losses(losses_ptr, unweighted_ptr, sample_weight_ptr, row, loss, None)
    return factors
