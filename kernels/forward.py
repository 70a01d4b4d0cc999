"""Forward: losses = lse(logits) - logits[target], reading each logit once."""

import triton
import triton.language as tl

from .online_softmax import (
    load_target,
    loss_factors,
    row_offset,
    row_statistics,
)


@triton.jit(
    do_not_specialize=[
        "rows_per_group", "logits_group_stride", "logits_row_stride", "targets_group_stride",
        "targets_row_stride", "vocab_size", "ignore_index",
    ],
    # split_row aligns the accesses itself: a misaligned slice needs no second binary
    do_not_specialize_on_alignment=["logits_ptr", "targets_ptr"],
)  # fmt: skip
def cross_entropy_forward_kernel(
    logits_ptr, targets_ptr, weight_ptr, weight_sum_ptr, losses_ptr, row_max_ptr, row_sum_ptr,
    rows_per_group: tl.int32, logits_group_stride: tl.int64, logits_row_stride: tl.int64,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64,
    vocab_size: tl.int32, ignore_index: tl.int64, label_smoothing: tl.float64,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
    row = tl.program_id(0)
    offset = row_offset(row, rows_per_group, targets_group_stride, targets_row_stride)
    target, ignored, in_range = load_target(targets_ptr, offset, ignore_index, vocab_size)
    if ignored:
        tl.store(losses_ptr + row, 0.0)
        return

    offset = row_offset(row, rows_per_group, logits_group_stride, logits_row_stride)
    row_ptr = logits_ptr + offset
    x_target = tl.load(row_ptr + target, mask=in_range, other=0.0).to(DTYPE)
    row_max, row_sum, row_dot = row_statistics(
        row_ptr, weight_ptr, vocab_size, DTYPE, BLOCK_V, UNROLL, HAS_WEIGHT, HAS_SMOOTHING
    )
    tl.store(row_max_ptr + row, row_max)
    tl.store(row_sum_ptr + row, row_sum)

    target_factor, lse_factor, class_factor = loss_factors(
        target, in_range, weight_ptr, weight_sum_ptr, vocab_size, label_smoothing,
        DTYPE, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    # lse - x is log(sum) + (max - x): a common offset of the logits cancels before it can round
    loss = lse_factor * tl.log(row_sum) - target_factor * (x_target - row_max)
    if HAS_SMOOTHING:
        loss -= class_factor * row_dot
    tl.store(losses_ptr + row, loss)


def launch_forward(logits, targets, weight, weight_sum, losses, row_max, row_sum, options, config):
    """Fill losses, row_max and row_sum (n_rows,) from dense rows; see launch.py for the order."""
    n_groups, rows_per_group, vocab_size = logits.shape
    cross_entropy_forward_kernel[(n_groups * rows_per_group,)](
        logits, targets, weight, weight_sum, losses, row_max, row_sum,
        rows_per_group, *logits.stride()[:2], *targets.stride(),
        vocab_size, options.ignore_index, options.label_smoothing,
        BLOCK_V=config.block_v,
        UNROLL=config.unroll,
        HAS_WEIGHT=weight is not None,
        HAS_SMOOTHING=options.label_smoothing > 0.0,
        num_warps=config.num_warps,
    )  # fmt: skip
