"""Forward with gradient in one launch: grad_logits = softmax(logits) - onehot(target), per row.

A program keeps the end of its row in registers, streams the rest, and streams it once more for the
gradient, last tile first: what was read last is still in L1, what came before it in L2. Memory
sees each logit once in and its gradient once out.
"""

import triton
import triton.language as tl

from .arguments import constants, has_congruent_targets, numbers
from .dispatch import kernel
from .online_softmax import row_statistics
from .reduce import GROUP_ROWS, SUM_BLOCK, load_parts, reduce_losses
from .row_access import (
    beside_interior,
    edge_columns,
    elements_of,
    load_tile,
    row_offset,
    split_row,
    streamed_size,
    tile_columns,
    write_zeros,
)
from .targets import (
    gradient_at_target,
    gradient_tile,
    load_target,
    smooth_of,
    softmax_factor_of,
    store_ignored,
    store_row,
)
from .transform import derivative_factor, transform_of


@triton.jit
def write_tile(
    tile, grad_interior_ptr, weight_interior_ptr, probs_interior_ptr, start, size, transform,
    smooth, row_max, softmax_factor, class_grad,
    DTYPE: tl.constexpr, BLOCK_V: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of `load_tile`; nothing from column `size` on, where given."""
    IN: tl.constexpr = grad_interior_ptr.dtype.element_ty
    cols, first = tile_columns(BLOCK_V, 128 // IN.primitive_bitwidth)
    mask = None if size is None else start + first < size
    weight_ptrs = None if weight_interior_ptr is None else weight_interior_ptr + start + cols
    probs_ptrs = None if probs_interior_ptr is None else probs_interior_ptr + start + cols
    grad = gradient_tile(
        elements_of(tile, IN, DTYPE), transform, row_max, softmax_factor, (), class_grad,
        weight_ptrs, probs_ptrs, smooth, mask, SOFT,
    )  # fmt: skip
    out_ptrs = grad_interior_ptr + start + cols
    tl.store(out_ptrs, grad.to(IN), mask=mask, eviction_policy="evict_first")


@triton.jit
def write_gradient(
    row_ptr, grad_row_ptr, weight_ptr, probs_row_ptr, held, transform, smooth, row_max,
    softmax_factor, class_grad, vocab_size, zero,
    DTYPE: tl.constexpr, BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, HELD: tl.constexpr,
    CONGRUENT: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """The gradient of one row but for its target column. grad_row_ptr may be row_ptr."""
    IN: tl.constexpr = row_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // IN.primitive_bitwidth
    STEP: tl.constexpr = BLOCK_V * UNROLL
    skew, interior_ptr, interior_size = split_row(row_ptr, vocab_size, VEC)
    _, grad_interior_ptr, _ = split_row(grad_row_ptr, vocab_size, VEC)
    weight_interior_ptr = weight_ptr + (VEC - skew) if weight_ptr is not None else None
    probs_interior_ptr = None
    if probs_row_ptr is not None:
        probs_interior_ptr = beside_interior(probs_row_ptr, VEC - skew, VEC, CONGRUENT)

    streamed = streamed_size(0, interior_size, BLOCK_V, UNROLL, HELD)
    for i in tl.static_range(HELD):
        tile = held[i]
        # zero is 0, which the compiler cannot know: else it keeps what the first pass made of the
        # pairs for the second, 2 registers for every 1 of theirs, and spills.
        if tile.dtype == tl.int32:
            tile = tile ^ zero
        elif tile.dtype == tl.float32 and len(transform) > 1:
            tile = (tile.to(tl.int32, bitcast=True) ^ zero).to(tl.float32, bitcast=True)
        write_tile(
            tile, grad_interior_ptr, weight_interior_ptr, probs_interior_ptr,
            streamed + i * BLOCK_V, interior_size, transform, smooth, row_max, softmax_factor,
            class_grad, DTYPE, BLOCK_V, SOFT,
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
                tiles[i], grad_interior_ptr, weight_interior_ptr, probs_interior_ptr,
                last - i * BLOCK_V, None, transform, smooth, row_max, softmax_factor,
                class_grad, DTYPE, BLOCK_V, SOFT,
            )  # fmt: skip

    edge, is_edge = edge_columns(skew, interior_size, vocab_size, VEC)
    x = tl.load(row_ptr + edge, mask=is_edge, other=0.0).to(DTYPE)
    weight_ptrs = weight_ptr + edge if weight_ptr is not None else None
    probs_ptrs = probs_row_ptr + edge if probs_row_ptr is not None else None
    grad = gradient_tile(
        x, transform, row_max, softmax_factor, (), class_grad, weight_ptrs, probs_ptrs, smooth,
        is_edge, SOFT,
    )  # fmt: skip
    tl.store(grad_row_ptr + edge, grad.to(IN), mask=is_edge)


@kernel
def cross_entropy_forward_with_grad_kernel(
    logits_ptr, targets_ptr, weight_ptr, sample_weight_ptr, workspace_ptr,
    losses_ptr, loss_ptr, unweighted_ptr, lse_ptr, entropy_ptr, predictions_ptr,
    row_max_ptr, row_sum_ptr, row_weight_ptr, grad_logits_ptr,
    rows_per_group: tl.int32, logits_group_stride: tl.int64, logits_row_stride: tl.int64,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64,
    grad_group_stride: tl.int64, grad_row_stride: tl.int64, vocab_size: tl.int32, zero: tl.int32,
    ignore_index: tl.int64, label_smoothing: tl.float64, z_loss: tl.float64,
    logit_scale: tl.float64, softcap: tl.float64,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, HELD: tl.constexpr, EVICT: tl.constexpr,
    GROUP_ROWS: tl.constexpr, SUM_BLOCK: tl.constexpr,
    SOFT: tl.constexpr, CONGRUENT: tl.constexpr, MEAN: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    PROBS: tl.constexpr = targets_ptr.dtype.element_ty.is_floating()
    STATS: tl.constexpr = lse_ptr is not None
    transform = transform_of(logit_scale, softcap, DTYPE, HAS_SCALE, HAS_SOFTCAP)
    row = tl.program_id(0)
    offset = row_offset(row, rows_per_group, targets_group_stride, targets_row_stride)
    target, ignored, in_range = load_target(targets_ptr + offset, ignore_index, vocab_size)
    probs_row_ptr = targets_ptr + offset if PROBS else None
    offset = row_offset(row, rows_per_group, grad_group_stride, grad_row_stride)
    grad_row_ptr = grad_logits_ptr + offset
    if ignored:
        store_ignored(losses_ptr, unweighted_ptr, lse_ptr, entropy_ptr, predictions_ptr, row, None)
        write_zeros(grad_row_ptr, vocab_size, BLOCK_V)
    else:
        offset = row_offset(row, rows_per_group, logits_group_stride, logits_row_stride)
        row_ptr = logits_ptr + offset
        x_target = tl.load(row_ptr + target, mask=in_range, other=0.0).to(DTYPE)
        grad_loss = derivative_factor(transform, DTYPE)
        if MEAN and not HAS_SMOOTHING:
            parts = load_parts(workspace_ptr)  # it comes while the row does
        if sample_weight_ptr is not None:
            grad_loss *= tl.load(sample_weight_ptr + row).to(DTYPE)
        _, _, interior_size = split_row(row_ptr, vocab_size, VEC)
        statistics, held = row_statistics(
            row_ptr, weight_ptr, probs_row_ptr, transform, label_smoothing, vocab_size, 0,
            interior_size, True, DTYPE, BLOCK_V, UNROLL, HELD, EVICT, SOFT, HAS_SMOOTHING,
            CONGRUENT, STATS,
        )  # fmt: skip
        smooth = smooth_of(label_smoothing, vocab_size, DTYPE, HAS_SMOOTHING)
        target_factor, lse_factor, class_factor = store_row(
            statistics, x_target, target, in_range, weight_ptr, sample_weight_ptr, transform,
            smooth, z_loss, vocab_size, row, losses_ptr, unweighted_ptr, lse_ptr, entropy_ptr,
            predictions_ptr, row_max_ptr, row_sum_ptr, row_weight_ptr, PROBS, HAS_Z_LOSS,
        )  # fmt: skip

        if MEAN:
            if HAS_SMOOTHING:  # one register more during the row, and this variant spills
                parts = load_parts(workspace_ptr)
            grad_loss /= tl.sum(parts, axis=0)
        row_max, row_sum = statistics[0], statistics[1]
        softmax_factor = softmax_factor_of(row_max, row_sum, lse_factor, z_loss, HAS_Z_LOSS)
        softmax_factor *= grad_loss
        class_grad = grad_loss * class_factor
        write_gradient(
            row_ptr, grad_row_ptr, weight_ptr, probs_row_ptr, held, transform, smooth, row_max,
            softmax_factor, class_grad, vocab_size, zero,
            DTYPE, BLOCK_V, UNROLL, HELD, CONGRUENT, SOFT,
        )  # fmt: skip
        if not PROBS:
            grad = gradient_at_target(
                x_target, transform, row_max, softmax_factor, (), grad_loss * target_factor,
                class_grad, weight_ptr, smooth, target, in_range, SOFT,
            )  # fmt: skip
            tl.debug_barrier()  # the target's column is patched after the tile that covers it
            OUT: tl.constexpr = grad_logits_ptr.dtype.element_ty
            tl.store(grad_row_ptr + target, grad.to(OUT), mask=in_range)
    if loss_ptr is not None:
        n_rows = tl.num_programs(0)
        reduce_losses(
            losses_ptr, loss_ptr, workspace_ptr, row, n_rows, n_rows,
            1, GROUP_ROWS, SUM_BLOCK, MEAN,
        )  # fmt: skip


def launch_forward_with_grad(rows, options, workspace, outputs, statistics, grad_logits, config):
    """Fill outputs, statistics if given, and grad_logits (may be the logits) from dense rows."""
    logits, targets = rows.logits, rows.targets
    n_groups, rows_per_group, vocab_size = logits.shape
    cross_entropy_forward_with_grad_kernel.launch(
        (n_groups * rows_per_group, 1),
        (*rows[:4], workspace, *outputs, *statistics, grad_logits),
        (
            rows_per_group, *logits.stride()[:2], *targets.stride()[:2], *grad_logits.stride()[:2],
            vocab_size, 0, *numbers(options),
        ),
        config.num_warps,
        BLOCK_V=config.block_v,
        UNROLL=config.unroll,
        HELD=config.held,
        EVICT=config.evict,
        GROUP_ROWS=GROUP_ROWS,
        SUM_BLOCK=SUM_BLOCK,
        CONGRUENT=has_congruent_targets(rows),
        **constants(rows, options),
    )  # fmt: skip
