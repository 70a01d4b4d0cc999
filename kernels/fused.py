"""Forward with gradient in one launch: grad_logits = softmax(logits) - onehot(target), per row.

A program reads its row for the statistics and again for the gradient. The second read is
meant to find the row in cache, so that memory sees each logit once in and its gradient once out.
"""

import triton
import triton.language as tl

from .online_softmax import (
    edge_columns,
    gradient_at_target,
    gradient_tile,
    load_target,
    loss_factors,
    mean_divisor,
    row_offset,
    row_statistics,
    split_row,
    tile_columns,
)
from .reduce import PARTIALS


@triton.jit
def write_gradient(
    row_ptr, grad_row_ptr, weight_ptr, row_max, softmax_factor, class_grad, vocab_size,
    DTYPE: tl.constexpr, BLOCK_V: tl.constexpr, UNROLL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """The gradient of one row but for its target column. grad_row_ptr may be row_ptr."""
    OUT: tl.constexpr = grad_row_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // OUT.primitive_bitwidth
    skew, interior_ptr, interior_size = split_row(row_ptr, vocab_size, VEC)
    _, grad_interior_ptr, _ = split_row(grad_row_ptr, vocab_size, VEC)
    cols, first = tile_columns(BLOCK_V, VEC)
    weight_interior_ptr = weight_ptr + (VEC - skew) if HAS_WEIGHT else weight_ptr

    bulk = interior_size // (BLOCK_V * UNROLL) * (BLOCK_V * UNROLL)
    for start in tl.range(0, bulk, BLOCK_V * UNROLL):
        # All loads before the first store: the compiler cannot move a load over a store that may
        # write the same memory, and in place it does.
        tiles = ()
        for tile in tl.static_range(UNROLL):
            tiles = tiles + (tl.load(interior_ptr + start + tile * BLOCK_V + cols),)
        for tile in tl.static_range(UNROLL):
            at = start + tile * BLOCK_V + cols
            weight_ptrs = weight_interior_ptr + at if HAS_WEIGHT else None
            grad = gradient_tile(
                tiles[tile].to(DTYPE), row_max, softmax_factor, class_grad, weight_ptrs, None,
                HAS_WEIGHT, HAS_SMOOTHING,
            )  # fmt: skip
            tl.store(grad_interior_ptr + at, grad.to(OUT))
    for start in tl.range(bulk, interior_size, BLOCK_V):
        at = start + cols
        mask = start + first < interior_size
        x = tl.load(interior_ptr + at, mask=mask, other=0.0).to(DTYPE)
        weight_ptrs = weight_interior_ptr + at if HAS_WEIGHT else None
        grad = gradient_tile(
            x, row_max, softmax_factor, class_grad, weight_ptrs, mask, HAS_WEIGHT, HAS_SMOOTHING
        )
        tl.store(grad_interior_ptr + at, grad.to(OUT), mask=mask)

    edge, is_edge = edge_columns(skew, interior_size, vocab_size, VEC)
    x = tl.load(row_ptr + edge, mask=is_edge, other=0.0).to(DTYPE)
    weight_ptrs = weight_ptr + edge if HAS_WEIGHT else None
    grad = gradient_tile(
        x, row_max, softmax_factor, class_grad, weight_ptrs, is_edge, HAS_WEIGHT, HAS_SMOOTHING
    )
    tl.store(grad_row_ptr + edge, grad.to(OUT), mask=is_edge)


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


@triton.jit(
    do_not_specialize=[
        "rows_per_group", "logits_group_stride", "logits_row_stride", "targets_group_stride",
        "targets_row_stride", "grad_group_stride", "grad_row_stride", "vocab_size", "ignore_index",
    ],
    # split_row aligns the accesses itself: a misaligned slice needs no second binary
    do_not_specialize_on_alignment=["logits_ptr", "targets_ptr", "grad_logits_ptr"],
)  # fmt: skip
def cross_entropy_forward_with_grad_kernel(
    logits_ptr, targets_ptr, weight_ptr, weight_sum_ptr, partials_ptr, losses_ptr, grad_logits_ptr,
    rows_per_group: tl.int32, logits_group_stride: tl.int64, logits_row_stride: tl.int64,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64,
    grad_group_stride: tl.int64, grad_row_stride: tl.int64,
    vocab_size: tl.int32, ignore_index: tl.int64, label_smoothing: tl.float64,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, PARTIALS: tl.constexpr,
    MEAN: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
    row = tl.program_id(0)
    offset = row_offset(row, rows_per_group, targets_group_stride, targets_row_stride)
    target, ignored, in_range = load_target(targets_ptr, offset, ignore_index, vocab_size)
    offset = row_offset(row, rows_per_group, grad_group_stride, grad_row_stride)
    grad_row_ptr = grad_logits_ptr + offset
    if ignored:
        tl.store(losses_ptr + row, 0.0)
        write_zeros(grad_row_ptr, vocab_size, BLOCK_V)
        return

    offset = row_offset(row, rows_per_group, logits_group_stride, logits_row_stride)
    row_ptr = logits_ptr + offset
    x_target = tl.load(row_ptr + target, mask=in_range, other=0.0).to(DTYPE)
    row_max, row_sum, row_dot = row_statistics(
        row_ptr, weight_ptr, vocab_size, DTYPE, BLOCK_V, UNROLL, HAS_WEIGHT, HAS_SMOOTHING
    )

    target_factor, lse_factor, class_factor = loss_factors(
        target, in_range, weight_ptr, weight_sum_ptr, vocab_size, label_smoothing,
        DTYPE, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    # lse - x is log(sum) + (max - x): a common offset of the logits cancels before it can round
    loss = lse_factor * tl.log(row_sum) - target_factor * (x_target - row_max)
    if HAS_SMOOTHING:
        loss -= class_factor * row_dot
    tl.store(losses_ptr + row, loss)

    grad_loss = 1.0 / mean_divisor(partials_ptr, PARTIALS) if MEAN else tl.full([], 1.0, DTYPE)
    softmax_factor = grad_loss * lse_factor / row_sum
    class_grad = grad_loss * class_factor
    write_gradient(
        row_ptr, grad_row_ptr, weight_ptr, row_max, softmax_factor, class_grad, vocab_size,
        DTYPE, BLOCK_V, UNROLL, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    grad = gradient_at_target(
        x_target, row_max, softmax_factor, grad_loss, target_factor, class_grad, weight_ptr,
        target, in_range, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    tl.debug_barrier()  # the target's column is patched after the tile that covers it
    tl.store(grad_row_ptr + target, grad.to(grad_logits_ptr.dtype.element_ty), mask=in_range)


def launch_forward_with_grad(
    logits, targets, weight, weight_sum, partials, losses, grad_logits, options, config
):
    """Fill losses (n_rows,) and grad_logits (may be the logits) from dense rows."""
    n_groups, rows_per_group, vocab_size = logits.shape
    cross_entropy_forward_with_grad_kernel[(n_groups * rows_per_group,)](
        logits, targets, weight, weight_sum, partials, losses, grad_logits,
        rows_per_group, *logits.stride()[:2], *targets.stride(), *grad_logits.stride()[:2],
        vocab_size, options.ignore_index, options.label_smoothing,
        BLOCK_V=config.block_v,
        UNROLL=config.unroll,
        PARTIALS=PARTIALS,
        MEAN=options.reduction == "mean",
        HAS_WEIGHT=weight is not None,
        HAS_SMOOTHING=options.label_smoothing > 0.0,
        num_warps=config.num_warps,
    )  # fmt: skip
