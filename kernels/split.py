"""Forward of few rows: several programs a row, so that a batch of one still fills the GPU.

Each leaves the statistics of its columns; the last of a row combines them, in a fixed order. The
gradient is backward.py's, whose programs are columns of a row already.
"""

import triton
import triton.language as tl

from .arguments import constants, has_congruent_targets, numbers
from .dispatch import kernel
from .online_softmax import rebased_dot, rebased_exp_dot, rounded, row_statistics
from .policy import MAX_SPLITS
from .reduce import (
    GROUP_ROWS,
    ROWS_COMBINED,
    SUM_BLOCK,
    is_last,
    reduce_losses,
)
from .row_access import NOWHERE, row_offset, split_row
from .targets import load_target, n_classes_of, smooth_of, store_ignored, store_row, store_share
from .transform import exp_of, transform_of

PARTS = tl.constexpr(6)  # numbers a part, see row_statistics


@triton.jit
def store_part(ptr, part):
    for i in tl.static_range(len(part)):
        tl.store(
            ptr + i, part[i].to(ptr.dtype.element_ty)
        )  # exact: columns up to 2**24, and NOWHERE


@triton.jit
def combine(parts_ptr, row, splits, MAX_SPLITS: tl.constexpr):
    """The statistics of a row from those of its parts; see row_statistics."""
    part = tl.arange(0, MAX_SPLITS)
    ptrs = parts_ptr + (row * splits + part) * PARTS
    exists = part < splits
    part_max = tl.load(ptrs, mask=exists, other=float("-inf"))
    part_sum = tl.load(ptrs + 1, mask=exists, other=0.0)
    part_dot = tl.load(ptrs + 2, mask=exists, other=0.0)
    part_weight = tl.load(ptrs + 3, mask=exists, other=0.0)
    part_exp_dot = tl.load(ptrs + 4, mask=exists, other=0.0)
    part_argmax = tl.load(ptrs + 5, mask=exists, other=0.0).to(tl.int32)
    row_max = tl.max(part_max, axis=0)
    row_sum = tl.sum(rounded(part_sum * exp_of(part_max - row_max)), axis=0)
    row_dot = tl.sum(rebased_dot(part_dot, part_weight, part_max, row_max), axis=0)
    row_exp_dot = tl.sum(rebased_exp_dot(part_exp_dot, part_sum, part_max, row_max), axis=0)
    row_argmax = tl.min(tl.where(part_max == row_max, part_argmax, NOWHERE), axis=0)
    return row_max, row_sum, row_dot, tl.sum(part_weight, axis=0), row_exp_dot, row_argmax


@kernel
def cross_entropy_split_kernel(
    logits_ptr, targets_ptr, weight_ptr, sample_weight_ptr, shard_ptr, parts_ptr, workspace_ptr,
    losses_ptr, loss_ptr, unweighted_ptr, lse_ptr, entropy_ptr, predictions_ptr,
    row_max_ptr, row_sum_ptr, row_weight_ptr,
    rows_per_group: tl.int32, logits_group_stride: tl.int64, logits_row_stride: tl.int64,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64, vocab_size: tl.int32,
    part_size: tl.int32, ignore_index: tl.int64, label_smoothing: tl.float64, z_loss: tl.float64,
    logit_scale: tl.float64, softcap: tl.float64,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, MAX_SPLITS: tl.constexpr,
    GROUP_ROWS: tl.constexpr, SUM_BLOCK: tl.constexpr,
    SOFT: tl.constexpr, CONGRUENT: tl.constexpr, MEAN: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Columns [split, split + 1) * part_size of a row's interior; the first has the edges too."""
    DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    PROBS: tl.constexpr = targets_ptr.dtype.element_ty.is_floating()
    STATS: tl.constexpr = entropy_ptr is not None
    transform = transform_of(logit_scale, softcap, DTYPE, HAS_SCALE, HAS_SOFTCAP)
    row, n_rows = tl.program_id(0), tl.num_programs(0)
    split, splits = tl.program_id(1), tl.num_programs(1)
    offset = row_offset(row, rows_per_group, targets_group_stride, targets_row_stride)
    target, ignored, in_range = load_target(
        targets_ptr + offset, ignore_index, vocab_size, shard_ptr
    )
    probs_row_ptr = targets_ptr + offset if PROBS else None
    row_ptr = logits_ptr + row_offset(row, rows_per_group, logits_group_stride, logits_row_stride)
    if not ignored:
        _, _, interior_size = split_row(row_ptr, vocab_size, VEC)
        lo = tl.multiple_of(split * part_size, 128)
        part, _ = row_statistics(
            row_ptr, weight_ptr, probs_row_ptr, transform, label_smoothing, vocab_size, lo,
            tl.minimum(lo + part_size, interior_size), split == 0,
            DTYPE, BLOCK_V, UNROLL, 0, "evict_last", SOFT, HAS_SMOOTHING, CONGRUENT, STATS,
        )  # fmt: skip
        store_part(parts_ptr + (row * splits + split) * PARTS, part)

    if is_last(workspace_ptr + ROWS_COMBINED + row, splits):
        if ignored:
            store_ignored(
                losses_ptr, unweighted_ptr, lse_ptr, entropy_ptr, predictions_ptr, row, None
            )
        else:
            statistics = combine(parts_ptr, row, splits, MAX_SPLITS)
            x_target = tl.load(row_ptr + target, mask=in_range, other=0.0).to(DTYPE)
            n_classes = n_classes_of(vocab_size, shard_ptr)
            smooth = smooth_of(label_smoothing, n_classes, DTYPE, HAS_SMOOTHING)
            if shard_ptr is None:
                store_row(
                    statistics, x_target, target, in_range, weight_ptr, sample_weight_ptr,
                    transform, smooth, z_loss, vocab_size, row, losses_ptr, unweighted_ptr,
                    lse_ptr, entropy_ptr, predictions_ptr, row_max_ptr, row_sum_ptr,
                    row_weight_ptr, PROBS, HAS_Z_LOSS,
                )  # fmt: skip
            else:
                store_share(
                    statistics, x_target, target, in_range, weight_ptr, transform, smooth,
                    vocab_size, row, shard_ptr, losses_ptr, entropy_ptr, predictions_ptr,
                    row_max_ptr, row_sum_ptr,
                )  # fmt: skip
        if loss_ptr is not None:
            reduce_losses(
                losses_ptr, loss_ptr, workspace_ptr, row, n_rows, n_rows,
                1, GROUP_ROWS, SUM_BLOCK, MEAN,
            )  # fmt: skip


def launch_split(rows, options, workspace, outputs, statistics, config, splits, shard=None):
    """Fill outputs and statistics of dense rows, or of a shard of them."""
    logits, targets = rows.logits, rows.targets
    n_groups, rows_per_group, vocab_size = logits.shape
    n_rows = n_groups * rows_per_group
    step = config.block_v * config.unroll
    parts = outputs.losses.new_empty(n_rows * splits * PARTS.value)
    cross_entropy_split_kernel.launch(
        (n_rows, splits),
        (*rows[:4], shard, parts, workspace, *outputs, *statistics),
        (
            rows_per_group, *logits.stride()[:2], *targets.stride()[:2], vocab_size,
            -(-vocab_size // (splits * step)) * step, *numbers(options),
        ),
        config.num_warps,
        BLOCK_V=config.block_v,
        UNROLL=config.unroll,
        MAX_SPLITS=MAX_SPLITS,
        GROUP_ROWS=GROUP_ROWS,
        SUM_BLOCK=SUM_BLOCK,
        CONGRUENT=has_congruent_targets(rows),
        **constants(rows, options),
    )  # fmt: skip
