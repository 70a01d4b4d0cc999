"""Forward: losses = lse(logits) - logits[target], reading each logit once."""

import triton.language as tl

from .arguments import constants, has_congruent_targets, numbers
from .dispatch import kernel
from .online_softmax import row_statistics
from .reduce import GROUP_ROWS, SUM_BLOCK, reduce_losses
from .row_access import row_offset, split_row
from .targets import load_target, n_classes_of, smooth_of, store_ignored, store_row, store_share
from .transform import transform_of


@kernel
def cross_entropy_forward_kernel(
    logits_ptr, targets_ptr, weight_ptr, sample_weight_ptr, shard_ptr, workspace_ptr,
    losses_ptr, loss_ptr, unweighted_ptr, lse_ptr, entropy_ptr, predictions_ptr,
    row_max_ptr, row_sum_ptr, row_weight_ptr,
    rows_per_group: tl.int32, logits_group_stride: tl.int64, logits_row_stride: tl.int64,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64, vocab_size: tl.int32,
    ignore_index: tl.int64, label_smoothing: tl.float64, z_loss: tl.float64,
    logit_scale: tl.float64, softcap: tl.float64,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, GROUP_ROWS: tl.constexpr, SUM_BLOCK: tl.constexpr,
    SOFT: tl.constexpr, CONGRUENT: tl.constexpr, MEAN: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    PROBS: tl.constexpr = targets_ptr.dtype.element_ty.is_floating()
    STATS: tl.constexpr = entropy_ptr is not None
    transform = transform_of(logit_scale, softcap, DTYPE, HAS_SCALE, HAS_SOFTCAP)
    row = tl.program_id(0)
    offset = row_offset(row, rows_per_group, targets_group_stride, targets_row_stride)
    target, ignored, in_range = load_target(
        targets_ptr + offset, ignore_index, vocab_size, shard_ptr
    )
    probs_row_ptr = targets_ptr + offset if PROBS else None
    if ignored:
        store_ignored(losses_ptr, unweighted_ptr, lse_ptr, entropy_ptr, predictions_ptr, row, None)
    else:
        offset = row_offset(row, rows_per_group, logits_group_stride, logits_row_stride)
        row_ptr = logits_ptr + offset
        x_target = tl.load(row_ptr + target, mask=in_range, other=0.0).to(DTYPE)
        _, _, interior_size = split_row(row_ptr, vocab_size, VEC)
        statistics, _ = row_statistics(
            row_ptr, weight_ptr, probs_row_ptr, transform, label_smoothing, vocab_size, 0,
            interior_size, True, DTYPE, BLOCK_V, UNROLL, 0, "evict_first", SOFT, HAS_SMOOTHING,
            CONGRUENT, STATS,
        )  # fmt: skip
        n_classes = n_classes_of(vocab_size, shard_ptr)
        smooth = smooth_of(label_smoothing, n_classes, DTYPE, HAS_SMOOTHING)
        if shard_ptr is None:
            store_row(
                statistics, x_target, target, in_range, weight_ptr, sample_weight_ptr, transform,
                smooth, z_loss, vocab_size, row, losses_ptr, unweighted_ptr, lse_ptr, entropy_ptr,
                predictions_ptr, row_max_ptr, row_sum_ptr, row_weight_ptr, PROBS, HAS_Z_LOSS,
            )  # fmt: skip
        else:
            store_share(
                statistics, x_target, target, in_range, weight_ptr, transform, smooth, vocab_size,
                row, shard_ptr, losses_ptr, entropy_ptr, predictions_ptr, row_max_ptr, row_sum_ptr,
            )  # fmt: skip
    if loss_ptr is not None:
        n_rows = tl.num_programs(0)
        reduce_losses(
            losses_ptr, loss_ptr, workspace_ptr, row, n_rows, n_rows,
            1, GROUP_ROWS, SUM_BLOCK, MEAN,
        )  # fmt: skip


def launch_forward(rows, options, workspace, outputs, statistics, config, shard=None):
    """Fill outputs and statistics from dense rows, or from a shard of them."""
    logits, targets = rows.logits, rows.targets
    n_groups, rows_per_group, vocab_size = logits.shape
    cross_entropy_forward_kernel.launch(
        (n_groups * rows_per_group, 1),
        (*rows[:4], shard, workspace, *outputs, *statistics),
        (
            rows_per_group, *logits.stride()[:2], *targets.stride()[:2], vocab_size,
            *numbers(options),
        ),
        config.num_warps,
        BLOCK_V=config.block_v,
        UNROLL=config.unroll,
        GROUP_ROWS=GROUP_ROWS,
        SUM_BLOCK=SUM_BLOCK,
        CONGRUENT=has_congruent_targets(rows),
        **constants(rows, options),
    )  # fmt: skip
