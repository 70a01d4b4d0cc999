"""Forward: losses = lse(logits) - logits[target], reading each logit once."""

import triton.language as tl

from .dispatch import kernel
from .online_softmax import (
    load_target,
    row_loss,
    row_offset,
    row_statistics,
    split_row,
)
from .reduce import GROUP_ROWS, SUM_BLOCK, WEIGHT_SUM, reduce_losses


@kernel
def cross_entropy_forward_kernel(
    logits_ptr, targets_ptr, weight_ptr, sums_ptr, counters_ptr,
    losses_ptr, loss_ptr, row_max_ptr, row_sum_ptr,
    rows_per_group: tl.int32, logits_group_stride: tl.int64, logits_row_stride: tl.int64,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64,
    vocab_size: tl.int32, ignore_index: tl.int64, label_smoothing: tl.float64,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, GROUP_ROWS: tl.constexpr, SUM_BLOCK: tl.constexpr,
    REDUCE: tl.constexpr, MEAN: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0)
    offset = row_offset(row, rows_per_group, targets_group_stride, targets_row_stride)
    target, ignored, in_range = load_target(targets_ptr, offset, ignore_index, vocab_size)
    if ignored:
        tl.store(losses_ptr + row, 0.0)
    else:
        offset = row_offset(row, rows_per_group, logits_group_stride, logits_row_stride)
        row_ptr = logits_ptr + offset
        x_target = tl.load(row_ptr + target, mask=in_range, other=0.0).to(DTYPE)
        _, _, interior_size = split_row(row_ptr, vocab_size, VEC)
        row_max, row_sum, row_dot, _, _ = row_statistics(
            row_ptr, weight_ptr, vocab_size, 0, interior_size, True,
            DTYPE, BLOCK_V, UNROLL, 0, "evict_first", HAS_WEIGHT, HAS_SMOOTHING,
        )  # fmt: skip
        tl.store(row_max_ptr + row, row_max)
        tl.store(row_sum_ptr + row, row_sum)
        loss, _, _, _ = row_loss(
            row_max, row_sum, row_dot, x_target, target, in_range, weight_ptr,
            sums_ptr + WEIGHT_SUM, vocab_size, label_smoothing, DTYPE, HAS_WEIGHT, HAS_SMOOTHING,
        )  # fmt: skip
        tl.store(losses_ptr + row, loss)
    if REDUCE:
        n_rows = tl.num_programs(0)
        reduce_losses(
            losses_ptr, loss_ptr, sums_ptr, counters_ptr, row, n_rows, n_rows,
            1, GROUP_ROWS, SUM_BLOCK, MEAN,
        )  # fmt: skip


def launch_forward(logits, targets, weight, workspace, losses, loss, stats, options, config):
    """Fill losses and stats (row_max, row_sum), each (n_rows,), from dense rows; and loss () if
    given."""
    n_groups, rows_per_group, vocab_size = logits.shape
    cross_entropy_forward_kernel.launch(
        (n_groups * rows_per_group, 1),
        (logits, targets, weight, workspace.sums, workspace.counters, losses, loss, *stats),
        (
            rows_per_group, *logits.stride()[:2], *targets.stride(),
            vocab_size, options.ignore_index, options.label_smoothing,
        ),
        config.num_warps,
        BLOCK_V=config.block_v,
        UNROLL=config.unroll,
        GROUP_ROWS=GROUP_ROWS,
        SUM_BLOCK=SUM_BLOCK,
        REDUCE=loss is not None,
        MEAN=options.reduction == "mean",
        HAS_WEIGHT=weight is not None,
        HAS_SMOOTHING=options.label_smoothing > 0.0,
    )  # fmt: skip
