"""Forward of few rows: several programs a row, so that a batch of one still fills the GPU.

Each leaves the statistics of its columns; the last of a row combines them, in a fixed order. The
gradient is backward.py's, whose programs are columns of a row already.
"""

import triton
import triton.language as tl

from .dispatch import kernel
from .online_softmax import (
    exp_of,
    load_target,
    rebased_dot,
    row_loss,
    row_offset,
    row_statistics,
    split_row,
)
from .reduce import (
    DIVISOR,
    GROUP_ROWS,
    ROWS_COMBINED,
    SUM_BLOCK,
    WEIGHT_SUM,
    is_last,
    reduce_losses,
    target_weights,
)

MAX_SPLITS = 128
MAX_SPLIT_ROWS = 128


@triton.jit
def combine(parts_ptr, row, splits, MAX_SPLITS: tl.constexpr):
    """(max, sum, dot) of a row from (max, sum, dot, weight) of its parts; see row_statistics."""
    part = tl.arange(0, MAX_SPLITS)
    ptrs = parts_ptr + (row * splits + part) * 4
    exists = part < splits
    part_max = tl.load(ptrs, mask=exists, other=float("-inf"))
    part_sum = tl.load(ptrs + 1, mask=exists, other=0.0)
    part_dot = tl.load(ptrs + 2, mask=exists, other=0.0)
    part_weight = tl.load(ptrs + 3, mask=exists, other=0.0)
    row_max = tl.max(part_max, axis=0)
    row_sum = tl.sum(part_sum * exp_of(part_max - row_max), axis=0)
    return row_max, row_sum, tl.sum(rebased_dot(part_dot, part_weight, part_max, row_max), axis=0)


@kernel
def cross_entropy_split_kernel(
    logits_ptr, targets_ptr, weight_ptr, parts_ptr, sums_ptr, counters_ptr,
    losses_ptr, loss_ptr, row_max_ptr, row_sum_ptr,
    rows_per_group: tl.int32, logits_group_stride: tl.int64, logits_row_stride: tl.int64,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64,
    vocab_size: tl.int32, part_size: tl.int32, ignore_index: tl.int64, label_smoothing: tl.float64,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, MAX_SPLITS: tl.constexpr, MAX_ROWS: tl.constexpr,
    GROUP_ROWS: tl.constexpr, SUM_BLOCK: tl.constexpr,
    REDUCE: tl.constexpr, MEAN: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Columns [split, split + 1) * part_size of a row's interior; the first has the edges too."""
    DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    row, n_rows = tl.program_id(0), tl.num_programs(0)
    split, splits = tl.program_id(1), tl.num_programs(1)
    offset = row_offset(row, rows_per_group, targets_group_stride, targets_row_stride)
    target, ignored, in_range = load_target(targets_ptr, offset, ignore_index, vocab_size)
    row_ptr = logits_ptr + row_offset(row, rows_per_group, logits_group_stride, logits_row_stride)
    if not ignored:
        _, _, interior_size = split_row(row_ptr, vocab_size, VEC)
        lo = tl.multiple_of(split * part_size, 128)
        part_max, part_sum, part_dot, part_weight, _ = row_statistics(
            row_ptr, weight_ptr, vocab_size, lo, tl.minimum(lo + part_size, interior_size),
            split == 0, DTYPE, BLOCK_V, UNROLL, 0, "evict_last", HAS_WEIGHT, HAS_SMOOTHING,
        )  # fmt: skip
        part_ptr = parts_ptr + (row * splits + split) * 4
        tl.store(part_ptr, part_max)
        tl.store(part_ptr + 1, part_sum)
        tl.store(part_ptr + 2, part_dot)
        tl.store(part_ptr + 3, part_weight)

    if is_last(counters_ptr + ROWS_COMBINED + row, splits):
        if ignored:
            tl.store(losses_ptr + row, 0.0)
        else:
            row_max, row_sum, row_dot = combine(parts_ptr, row, splits, MAX_SPLITS)
            tl.store(row_max_ptr + row, row_max)
            tl.store(row_sum_ptr + row, row_sum)
            x_target = tl.load(row_ptr + target, mask=in_range, other=0.0).to(DTYPE)
            loss, _, _, _ = row_loss(
                row_max, row_sum, row_dot, x_target, target, in_range, weight_ptr,
                sums_ptr + WEIGHT_SUM, vocab_size, label_smoothing,
                DTYPE, HAS_WEIGHT, HAS_SMOOTHING,
            )  # fmt: skip
            tl.store(losses_ptr + row, loss)
        if MEAN:
            # So few targets that each combining program counts them: one launch less.
            weights = target_weights(
                targets_ptr, weight_ptr, tl.arange(0, MAX_ROWS), n_rows, rows_per_group,
                targets_group_stride, targets_row_stride, vocab_size, ignore_index,
                DTYPE, HAS_WEIGHT,
            )  # fmt: skip
            tl.store(sums_ptr + DIVISOR, tl.sum(weights, axis=0))
        if REDUCE:
            reduce_losses(
                losses_ptr, loss_ptr, sums_ptr, counters_ptr, row, n_rows, n_rows,
                1, GROUP_ROWS, SUM_BLOCK, MEAN,
            )  # fmt: skip


def launch_split(logits, targets, weight, workspace, losses, loss, stats, options, config, splits):
    """Fill losses, stats (row_max, row_sum), loss () if given, and the divisor of a mean."""
    n_groups, rows_per_group, vocab_size = logits.shape
    n_rows = n_groups * rows_per_group
    step = config.block_v * config.unroll
    parts = losses.new_empty(n_rows * splits * 4)
    sums, counters = workspace.sums, workspace.counters
    cross_entropy_split_kernel.launch(
        (n_rows, splits),
        (logits, targets, weight, parts, sums, counters, losses, loss, *stats),
        (
            rows_per_group, *logits.stride()[:2], *targets.stride(),
            vocab_size, -(-vocab_size // (splits * step)) * step, options.ignore_index,
            options.label_smoothing,
        ),
        config.num_warps,
        BLOCK_V=config.block_v,
        UNROLL=config.unroll,
        MAX_SPLITS=MAX_SPLITS,
        MAX_ROWS=MAX_SPLIT_ROWS,
        GROUP_ROWS=GROUP_ROWS,
        SUM_BLOCK=SUM_BLOCK,
        REDUCE=loss is not None,
        MEAN=options.reduction == "mean",
        HAS_WEIGHT=weight is not None,
        HAS_SMOOTHING=options.label_smoothing > 0.0,
    )  # fmt: skip
