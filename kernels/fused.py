"""Forward with gradient in one launch: grad_logits = softmax(logits) - onehot(target), per row.

A program keeps the end of its row in registers, streams the rest, and streams it once more for the
gradient, last tile first: what was read last is still in L1, what came before it in L2. Memory
sees each logit once in and its gradient once out.
"""

import triton
import triton.language as tl

from .dispatch import kernel
from .online_softmax import (
    edge_columns,
    elements_of,
    gradient_at_target,
    gradient_tile,
    load_target,
    load_tile,
    row_loss,
    row_offset,
    row_statistics,
    split_row,
    streamed_size,
    tile_columns,
)
from .reduce import DIVISOR, GROUP_ROWS, SUM_BLOCK, WEIGHT_SUM, reduce_losses


@triton.jit
def write_tile(
    tile, grad_interior_ptr, weight_interior_ptr, start, size, row_max, softmax_factor,
    class_grad, DTYPE: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of `load_tile`; nothing from column `size` on, where given."""
    IN: tl.constexpr = grad_interior_ptr.dtype.element_ty
    cols, first = tile_columns(BLOCK_V, 128 // IN.primitive_bitwidth)
    mask = None if size is None else start + first < size
    weight_ptrs = weight_interior_ptr + start + cols if HAS_WEIGHT else None
    grad = gradient_tile(
        elements_of(tile, IN, DTYPE), row_max, softmax_factor, class_grad, weight_ptrs, mask,
        HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    out_ptrs = grad_interior_ptr + start + cols
    tl.store(out_ptrs, grad.to(IN), mask=mask, eviction_policy="evict_first")


@triton.jit
def write_gradient(
    row_ptr, grad_row_ptr, weight_ptr, held, row_max, softmax_factor, class_grad, vocab_size, zero,
    DTYPE: tl.constexpr, BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, HELD: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """The gradient of one row but for its target column. grad_row_ptr may be row_ptr."""
    IN: tl.constexpr = row_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // IN.primitive_bitwidth
    STEP: tl.constexpr = BLOCK_V * UNROLL
    skew, interior_ptr, interior_size = split_row(row_ptr, vocab_size, VEC)
    _, grad_interior_ptr, _ = split_row(grad_row_ptr, vocab_size, VEC)
    weight_interior_ptr = weight_ptr + (VEC - skew) if HAS_WEIGHT else None

    streamed = streamed_size(0, interior_size, BLOCK_V, UNROLL, HELD)
    for i in tl.static_range(HELD):
        tile = held[i]
        if IN.primitive_bitwidth == 16:
            # zero is 0, which the compiler cannot know: else it keeps the float32 elements of the
            # first pass for the second, 2 registers for every 1 of the pairs, and spills.
            tile = tile ^ zero
        write_tile(
            tile, grad_interior_ptr, weight_interior_ptr, streamed + i * BLOCK_V, interior_size,
            row_max, softmax_factor, class_grad, DTYPE, BLOCK_V,
            HAS_WEIGHT, HAS_SMOOTHING,
        )  # fmt: skip
    for done in tl.range(0, streamed, STEP):
        # All loads before the first store: the compiler cannot move a load over a store that may
        # write the same memory, and in place it does.
        last = streamed - BLOCK_V - done
        tiles = ()
        for i in tl.static_range(UNROLL):
            start = last - i * BLOCK_V
            tiles = tiles + (load_tile(interior_ptr, start, None, BLOCK_V, "evict_first", True),)
        for i in tl.static_range(UNROLL):
            write_tile(
                tiles[i], grad_interior_ptr, weight_interior_ptr, last - i * BLOCK_V, None,
                row_max, softmax_factor, class_grad, DTYPE, BLOCK_V, HAS_WEIGHT, HAS_SMOOTHING,
            )  # fmt: skip

    edge, is_edge = edge_columns(skew, interior_size, vocab_size, VEC)
    x = tl.load(row_ptr + edge, mask=is_edge, other=0.0).to(DTYPE)
    weight_ptrs = weight_ptr + edge if HAS_WEIGHT else None
    grad = gradient_tile(
        x, row_max, softmax_factor, class_grad, weight_ptrs, is_edge, HAS_WEIGHT, HAS_SMOOTHING
    )
    tl.store(grad_row_ptr + edge, grad.to(IN), mask=is_edge)


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


@kernel
def cross_entropy_forward_with_grad_kernel(
    logits_ptr, targets_ptr, weight_ptr, sums_ptr, counters_ptr,
    losses_ptr, loss_ptr, grad_logits_ptr,
    rows_per_group: tl.int32, logits_group_stride: tl.int64, logits_row_stride: tl.int64,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64,
    grad_group_stride: tl.int64, grad_row_stride: tl.int64,
    vocab_size: tl.int32, ignore_index: tl.int64, label_smoothing: tl.float64, zero: tl.int32,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, HELD: tl.constexpr, EVICT: tl.constexpr,
    GROUP_ROWS: tl.constexpr, SUM_BLOCK: tl.constexpr,
    REDUCE: tl.constexpr, MEAN: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0)
    offset = row_offset(row, rows_per_group, targets_group_stride, targets_row_stride)
    target, ignored, in_range = load_target(targets_ptr, offset, ignore_index, vocab_size)
    offset = row_offset(row, rows_per_group, grad_group_stride, grad_row_stride)
    grad_row_ptr = grad_logits_ptr + offset
    if ignored:
        tl.store(losses_ptr + row, 0.0)
        write_zeros(grad_row_ptr, vocab_size, BLOCK_V)
    else:
        offset = row_offset(row, rows_per_group, logits_group_stride, logits_row_stride)
        row_ptr = logits_ptr + offset
        x_target = tl.load(row_ptr + target, mask=in_range, other=0.0).to(DTYPE)
        grad_loss = 1.0 / tl.load(sums_ptr + DIVISOR) if MEAN else tl.full([], 1.0, DTYPE)
        _, _, interior_size = split_row(row_ptr, vocab_size, VEC)
        row_max, row_sum, row_dot, _, held = row_statistics(
            row_ptr, weight_ptr, vocab_size, 0, interior_size, True,
            DTYPE, BLOCK_V, UNROLL, HELD, EVICT, HAS_WEIGHT, HAS_SMOOTHING,
        )  # fmt: skip
        loss, target_factor, lse_factor, class_factor = row_loss(
            row_max, row_sum, row_dot, x_target, target, in_range, weight_ptr,
            sums_ptr + WEIGHT_SUM, vocab_size, label_smoothing, DTYPE, HAS_WEIGHT, HAS_SMOOTHING,
        )  # fmt: skip
        tl.store(losses_ptr + row, loss)

        softmax_factor = grad_loss * lse_factor / row_sum
        class_grad = grad_loss * class_factor
        write_gradient(
            row_ptr, grad_row_ptr, weight_ptr, held, row_max, softmax_factor, class_grad,
            vocab_size, zero, DTYPE, BLOCK_V, UNROLL, HELD, HAS_WEIGHT, HAS_SMOOTHING,
        )  # fmt: skip
        grad = gradient_at_target(
            x_target, row_max, softmax_factor, grad_loss, target_factor, class_grad, weight_ptr,
            target, in_range, HAS_WEIGHT, HAS_SMOOTHING,
        )  # fmt: skip
        tl.debug_barrier()  # the target's column is patched after the tile that covers it
        tl.store(grad_row_ptr + target, grad.to(grad_logits_ptr.dtype.element_ty), mask=in_range)
    if REDUCE:
        n_rows = tl.num_programs(0)
        reduce_losses(
            losses_ptr, loss_ptr, sums_ptr, counters_ptr, row, n_rows, n_rows,
            1, GROUP_ROWS, SUM_BLOCK, MEAN,
        )  # fmt: skip


def launch_forward_with_grad(
    logits, targets, weight, workspace, losses, loss, grad_logits, options, config
):
    """Fill losses (n_rows,), loss () if given, and grad_logits (may be the logits)."""
    n_groups, rows_per_group, vocab_size = logits.shape
    sums, counters = workspace.sums, workspace.counters
    cross_entropy_forward_with_grad_kernel.launch(
        (n_groups * rows_per_group, 1),
        (logits, targets, weight, sums, counters, losses, loss, grad_logits),
        (
            rows_per_group, *logits.stride()[:2], *targets.stride(), *grad_logits.stride()[:2],
            vocab_size, options.ignore_index, options.label_smoothing, 0,
        ),
        config.num_warps,
        BLOCK_V=config.block_v,
        UNROLL=config.unroll,
        HELD=config.held,
        EVICT=config.evict,
        GROUP_ROWS=GROUP_ROWS,
        SUM_BLOCK=SUM_BLOCK,
        REDUCE=loss is not None,
        MEAN=options.reduction == "mean",
        HAS_WEIGHT=weight is not None,
        HAS_SMOOTHING=options.label_smoothing > 0.0,
    )  # fmt: skip
