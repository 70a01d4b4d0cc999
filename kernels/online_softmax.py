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
def edge_columns(skew, interior_size, vocab_size, VEC: tl.constexpr):
    """Columns [2 * VEC] outside the interior, and which of them exist."""
    lane = tl.arange(0, 2 * VEC)
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
def smoothing_update(
    part_dot, part_weight, old_max, new_max, tiles, weight_interior_ptr, start, size,
    BLOCK_V: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Tiles into (sum of weight * (x - max), sum of weight) [R]; columns from `size` on, where
    given, do not count.

    The dot product is kept relative to the running maximum, so that all its terms have one sign:
    relative to anything else, a common offset or one masked logit would cancel its digits.
    """
    VEC: tl.constexpr = tiles[0].shape[1]
    cols, first = tile_columns(BLOCK_V, VEC)
    # One sum of all tiles, not one each: a loop that adds the sum of a load twice crashes Triton
    # 3.7's thread-locality pass.
    weights = tl.zeros([BLOCK_V // VEC, VEC], part_dot.dtype)
    terms = tl.zeros([BLOCK_V // VEC, VEC], part_dot.dtype)
    for tile in tl.static_range(len(tiles)):
        at = start + tile * BLOCK_V
        exists = None if size is None else at + first < size
        weight = tl.full([BLOCK_V // VEC, VEC], 1.0, part_dot.dtype)
        if HAS_WEIGHT:
            weight = tl.load(weight_interior_ptr + at + cols, mask=exists).to(part_dot.dtype)
        term = weight * (tiles[tile] - new_max[:, None])
        if exists is not None:
            weight = tl.where(exists, weight, 0.0)
            term = tl.where(exists, term, 0.0)
        weights += weight
        terms += term
    part_dot = rebased_dot(part_dot, part_weight, old_max, new_max) + tl.sum(terms, axis=1)
    return part_dot, part_weight + tl.sum(weights, axis=1)


@triton.jit
def statistics_update(
    part_max, part_sum, part_dot, part_weight, tiles, weight_interior_ptr, start, size,
    BLOCK_V: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    new_max, part_sum = online_update(part_max, part_sum, tiles)
    if HAS_SMOOTHING:
        part_dot, part_weight = smoothing_update(
            part_dot, part_weight, part_max, new_max, tiles, weight_interior_ptr, start, size,
            BLOCK_V, HAS_WEIGHT,
        )  # fmt: skip
    return new_max, part_sum, part_dot, part_weight


@triton.jit
def rebased_dot(part_dot, part_weight, part_max, row_max):
    """Sums of weight * (x - part_max) as ones of weight * (x - row_max)."""
    # Who saw no column still has the lowest finite maximum: finite, so that 0 times it is 0.
    difference = tl.maximum(part_max - row_max, lowest_finite(part_dot.dtype))
    return part_dot + part_weight * difference


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
    row_ptr, weight_ptr, vocab_size, lo, hi, has_edges,
    DTYPE: tl.constexpr, BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, HELD: tl.constexpr,
    EVICT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """(max, sum of exp(x - max), sum of weight * (x - max), sum of weight, held) of one row, or of
    its columns [lo, hi) of the interior and, if has_edges, those outside it; the third and fourth
    are 0 without smoothing.

    held is the last HELD tiles. They, or where HELD is 0 the tiles of a last loop, are all that is
    masked: the steps before need no mask, which costs each vector a compare and four moves.
    """
    IN: tl.constexpr = row_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // IN.primitive_bitwidth
    tl.static_assert(HELD == 0 or HELD >= UNROLL)
    skew, interior_ptr, interior_size = split_row(row_ptr, vocab_size, VEC)
    weight_interior_ptr = weight_ptr + (VEC - skew) if HAS_WEIGHT else None
    part_max = tl.zeros([BLOCK_V // VEC], DTYPE) + lowest_finite(DTYPE)
    part_sum = tl.zeros([BLOCK_V // VEC], DTYPE)
    part_dot = tl.zeros([BLOCK_V // VEC], DTYPE)
    part_weight = tl.zeros([BLOCK_V // VEC], DTYPE)  # of the columns that are in part_dot

    # Between pairs and class weights the compiler would exchange elements through shared memory.
    PAIRS: tl.constexpr = HELD > 0 or not (HAS_WEIGHT and HAS_SMOOTHING)
    rest = lo + streamed_size(lo, hi, BLOCK_V, UNROLL, HELD)
    for start in tl.range(lo, rest, BLOCK_V * UNROLL):
        tiles = ()
        for i in tl.static_range(UNROLL):
            tile = load_tile(interior_ptr, start + i * BLOCK_V, None, BLOCK_V, EVICT, PAIRS)
            tiles = tiles + (elements_of(tile, IN, DTYPE),)
        part_max, part_sum, part_dot, part_weight = statistics_update(
            part_max, part_sum, part_dot, part_weight, tiles, weight_interior_ptr, start, None,
            BLOCK_V, HAS_WEIGHT, HAS_SMOOTHING,
        )  # fmt: skip
    held = ()
    for i in tl.static_range(HELD):
        tile = load_tile(interior_ptr, rest + i * BLOCK_V, hi, BLOCK_V, "evict_first", PAIRS)
        held = held + (tile,)
    for i in tl.static_range(HELD):
        part_max, part_sum, part_dot, part_weight = statistics_update(
            part_max, part_sum, part_dot, part_weight, (elements_of(held[i], IN, DTYPE),),
            weight_interior_ptr, rest + i * BLOCK_V, hi, BLOCK_V, HAS_WEIGHT, HAS_SMOOTHING,
        )  # fmt: skip
    if HELD == 0:
        for start in tl.range(rest, hi, BLOCK_V):
            tile = load_tile(interior_ptr, start, hi, BLOCK_V, EVICT, PAIRS)
            part_max, part_sum, part_dot, part_weight = statistics_update(
                part_max, part_sum, part_dot, part_weight, (elements_of(tile, IN, DTYPE),),
                weight_interior_ptr, start, hi, BLOCK_V, HAS_WEIGHT, HAS_SMOOTHING,
            )  # fmt: skip

    edge, is_edge = edge_columns(skew, interior_size, tl.where(has_edges, vocab_size, 0), VEC)
    x = tl.load(row_ptr + edge, mask=is_edge, other=float("-inf")).to(DTYPE)
    row_max = tl.maximum(tl.max(part_max, axis=0), tl.max(x, axis=0))
    row_max = tl.maximum(row_max, lowest_finite(DTYPE))
    row_sum = tl.sum(part_sum * exp_of(part_max - row_max), axis=0)
    row_sum += tl.sum(exp_of(x - row_max), axis=0)
    row_dot, row_weight = tl.full([], 0.0, DTYPE), tl.full([], 0.0, DTYPE)
    if HAS_SMOOTHING:
        weight = tl.where(is_edge, 1.0, 0.0).to(DTYPE)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + edge, mask=is_edge, other=0.0).to(DTYPE)
        row_dot = tl.sum(rebased_dot(part_dot, part_weight, part_max, row_max), axis=0)
        row_dot += tl.sum(tl.where(is_edge, weight * (x - row_max), 0.0), axis=0)
        row_weight = tl.sum(part_weight, axis=0) + tl.sum(weight, axis=0)
    return row_max, row_sum, row_dot, row_weight, held


@triton.jit
def load_target(targets_ptr, offset, ignore_index, vocab_size):
    """(target, ignored, in_range) of one row; the target is only safe to use where in range."""
    target = tl.load(targets_ptr + offset).to(tl.int64)
    return target, target == ignore_index, (target >= 0) & (target < vocab_size)


@triton.jit
def loss_factors(
    target, in_range, weight_ptr, weight_sum_ptr, vocab_size, label_smoothing,
    DTYPE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """(target_factor, lse_factor, class_factor) of targets of any shape: the loss of a row is
    lse_factor * lse - target_factor * x[target] - class_factor * sum_c weight[c] * x[c], its
    gradient lse_factor * softmax - target_factor * onehot - class_factor * weight.

    NaN where the target is out of range: that poisons loss and gradient of its row, and no other.
    """
    target_factor = tl.where(in_range, 1.0, float("nan")).to(DTYPE)
    if HAS_WEIGHT:
        target_factor *= tl.load(weight_ptr + target, mask=in_range, other=0.0).to(DTYPE)
    lse_factor = target_factor
    class_factor = tl.full([], 0.0, DTYPE)
    if HAS_SMOOTHING:
        smoothing = tl.full([], label_smoothing, DTYPE)  # a Python float in the interpreter
        weight_sum = tl.full([], vocab_size, DTYPE)
        class_factor = smoothing / weight_sum
        if HAS_WEIGHT:
            weight_sum = tl.load(weight_sum_ptr)
        target_factor *= 1.0 - smoothing
        lse_factor = target_factor + class_factor * weight_sum
    return target_factor, lse_factor, class_factor


@triton.jit
def row_loss(
    row_max, row_sum, row_dot, x_target, target, in_range, weight_ptr, weight_sum_ptr, vocab_size,
    label_smoothing, DTYPE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """The loss of a row from its `row_statistics`, and its `loss_factors`."""
    target_factor, lse_factor, class_factor = loss_factors(
        target, in_range, weight_ptr, weight_sum_ptr, vocab_size, label_smoothing,
        DTYPE, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    # lse - x is log(sum) + (max - x): a common offset of the logits cancels before it can round
    loss = lse_factor * tl.log(row_sum) - target_factor * (x_target - row_max)
    return loss - class_factor * row_dot, target_factor, lse_factor, class_factor


@triton.jit
def gradient_tile(
    x, row_max, softmax_factor, class_grad, weight_ptrs, mask,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile, but for the target's column: no compare and no division here.

    softmax_factor is grad_loss * lse_factor / sum, class_grad is grad_loss * class_factor.
    """
    grad = exp_of(x - row_max) * softmax_factor
    if HAS_SMOOTHING:
        if HAS_WEIGHT:
            weight = tl.load(weight_ptrs, mask=mask)  # unstored lanes: anything
            grad -= class_grad * weight.to(grad.dtype)
        else:
            grad -= class_grad
    return grad


@triton.jit
def gradient_at_target(
    x_target, row_max, softmax_factor, grad_loss, target_factor, class_grad, weight_ptr, target,
    in_range, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """The gradient of the target's logit, from float32: stored once the rest of its row is."""
    grad = exp_of(x_target - row_max) * softmax_factor - grad_loss * target_factor
    if HAS_SMOOTHING:
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + target, mask=in_range, other=0.0)
            grad -= class_grad * weight.to(grad.dtype)
        else:
            grad -= class_grad
    return grad
