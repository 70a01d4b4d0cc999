"""Tiny vocabularies: several rows a program, each whole in registers, loss and gradient at once.

One kernel serves the forward, the separate backward and both in one launch, by which places for
results it is given: a row is so short that computing its softmax again costs less than keeping its
statistics. Classes may lie at any stride, so that (N, C, d1, ...) logits need no copy.
"""

import torch
import triton
import triton.language as tl

from ..rows import Upstream
from .arguments import NO_STATISTICS, Outputs, constants, numbers
from .dispatch import kernel
from .online_softmax import lowest_finite, rounded
from .reduce import GROUP_ROWS, load_parts, reduce_losses
from .row_access import NOWHERE, row_offset
from .targets import (
    class_share,
    gradient_of_probabilities,
    loss_factors,
    loss_of,
    smooth_of,
    softmax_factor_of,
    store_ignored,
    store_losses,
    store_stats,
)
from .transform import derivative_factor, exp_of, finite, transform_of, transformed

SUM_BLOCK = 256  # eight losses a thread of one warp
TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
NO_OUTPUTS, NO_UPSTREAM = Outputs(losses=None), Upstream(loss=None)


@triton.jit
def columns_of(
    ptr, rows, cols, rows_per_group, group_stride, row_stride, class_stride,
    DENSE: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Where the elements [rows, cols] lie."""
    offsets = row_offset(rows, rows_per_group, group_stride, row_stride, GROUPED)
    return ptr + of_rows(offsets) + at_class(cols, class_stride, DENSE)


@triton.jit
def of_rows(values):
    """One a row, for each of its columns."""
    return values[None, :, None]


@triton.jit
def sum_of_rows(tile):
    """Of columns [steps, rows, lanes], a thread adds up its own steps first."""
    return tl.sum(tl.sum(tile, axis=0), axis=1)


@triton.jit
def at_class(cols, class_stride, DENSE: tl.constexpr):
    # 64-bit: times a stride of H * W
    return cols if DENSE else cols.to(tl.int64) * class_stride


@triton.jit
def load_targets(targets_ptrs, exists, ignore_index, vocab_size, PROBS: tl.constexpr):
    """(targets, counts, in_range) of rows: `load_target` of several."""
    if PROBS:
        return tl.full(exists.shape, -1, tl.int64), exists, exists & False
    else:
        targets = tl.load(targets_ptrs, mask=exists, other=0).to(tl.int64)
        counts = exists & (targets != ignore_index)  # an ignored row may hold NaN: it is not read
        return targets, counts, counts & (targets >= 0) & (targets < vocab_size)


@triton.jit
def small_statistics(x):
    """(max, sum of exp(d), sum of exp(d) * d, d, exp(d)) of rows, where d is x - max."""
    row_max = tl.maximum(tl.max(tl.max(x, axis=0), axis=1), lowest_finite(x.dtype))
    difference = x - of_rows(row_max)
    exps = exp_of(difference)
    row_exp_dot = sum_of_rows(rounded(exps * finite(difference)))
    return row_max, sum_of_rows(exps), row_exp_dot, difference, exps


@triton.jit
def small_shares(weight_ptrs, probs_ptrs, smooth, is_read, difference, SOFT: tl.constexpr):
    """(share, sum of share * difference, sum of share) of rows, see `class_share`, or 0."""
    share = tl.zeros_like(difference)
    if SOFT:
        share = class_share(weight_ptrs, probs_ptrs, smooth, is_read, difference)
        share = tl.where(is_read, share, 0.0)
        row_dot = sum_of_rows(tl.where(is_read, share * difference, 0.0))
        return share, row_dot, sum_of_rows(share)
    else:
        zeros = tl.zeros([share.shape[1]], share.dtype)
        return share, zeros, zeros


@triton.jit
def x_of_targets(
    logits_ptr, rows, targets, in_range, rows_per_group, group_stride, row_stride, class_stride,
    transform, DTYPE: tl.constexpr, DENSE: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """The transformed logit of each row's target, read once more: it is in a cache."""
    offsets = row_offset(rows, rows_per_group, group_stride, row_stride, GROUPED)
    offsets += at_class(targets, class_stride, DENSE)
    x, _ = transformed(tl.load(logits_ptr + offsets, mask=in_range, other=0.0).to(DTYPE), transform)
    return x


@triton.jit
def store_rows(
    losses_ptr, unweighted_ptr, lse_ptr, entropy_ptr, predictions_ptr, row_max_ptr, row_sum_ptr,
    row_weight_ptr, sample_weight_ptr, rows, exists, counts, losses, x, cols, row_max, row_sum,
    row_exp_dot, row_weight,
):  # fmt: skip
    """What was asked for of rows, ignored ones included."""
    if row_max_ptr is not None:
        tl.store(row_max_ptr + rows, row_max, mask=exists)
        tl.store(row_sum_ptr + rows, row_sum, mask=exists)
    if row_weight_ptr is not None:
        tl.store(row_weight_ptr + rows, row_weight, mask=exists)
    store_losses(losses_ptr, unweighted_ptr, sample_weight_ptr, rows, losses, counts)
    ignored = exists & (counts == 0)
    store_ignored(losses_ptr, unweighted_ptr, lse_ptr, entropy_ptr, predictions_ptr, rows, ignored)
    if lse_ptr is not None:
        row_argmax = tl.min(tl.min(tl.where(x == of_rows(row_max), cols, NOWHERE), axis=0), axis=1)
        store_stats(
            lse_ptr, entropy_ptr, predictions_ptr, rows, row_max, row_sum, row_exp_dot, row_argmax,
            counts,
        )  # fmt: skip


@triton.jit
def small_gradients(
    rows, exists, counts, mask, exps, difference, share, slope, row_max, row_sum, row_exp_dot,
    factors, is_target, transform, smooth, weight_ptrs, sample_weight_ptr, workspace_ptr,
    grad_losses_ptr, grad_losses_stride, grad_lse_ptr, grad_entropy_ptr, grad_ptrs, grad_probs_ptrs,
    z_loss, DTYPE: tl.constexpr, SOFT: tl.constexpr, MEAN: tl.constexpr, HAS_Z_LOSS: tl.constexpr,
):  # fmt: skip
    """Store the gradients of logits and of probabilities, whichever have a place."""
    target_factor, lse_factor, class_factor = factors
    grad_losses = tl.full(rows.shape, 1.0, DTYPE)
    if grad_losses_ptr is not None:
        at = rows.to(tl.int64) * grad_losses_stride
        grad_losses = tl.load(grad_losses_ptr + at, mask=exists, other=0.0).to(DTYPE)
    if MEAN:
        grad_losses /= tl.sum(load_parts(workspace_ptr), axis=0)
    if sample_weight_ptr is not None:
        grad_losses *= tl.load(sample_weight_ptr + rows, mask=exists, other=0.0).to(DTYPE)
    if grad_ptrs is not None:
        softmax_factor = softmax_factor_of(row_max, row_sum, lse_factor, z_loss, HAS_Z_LOSS)
        softmax_factor *= grad_losses
        if grad_lse_ptr is not None:
            softmax_factor += tl.load(grad_lse_ptr + rows, mask=exists).to(DTYPE) / row_sum
        grad = exps * of_rows(softmax_factor)
        if grad_entropy_ptr is not None:
            factor = tl.load(grad_entropy_ptr + rows, mask=exists).to(DTYPE) / row_sum
            from_mean = of_rows(row_exp_dot / row_sum) - finite(difference)
            grad += exps * (of_rows(factor) * from_mean)
        grad -= tl.where(is_target, of_rows(grad_losses * target_factor), 0.0)
        if SOFT:
            grad -= of_rows(grad_losses * class_factor) * share
        grad *= slope * derivative_factor(transform, DTYPE)
        grad = tl.where(of_rows(counts), grad, 0.0).to(grad_ptrs.dtype.element_ty)
        tl.store(grad_ptrs, grad, mask=mask)
    if grad_probs_ptrs is not None:
        grad_share = grad_losses * smooth[0] if len(smooth) > 0 else grad_losses
        grad = gradient_of_probabilities(
            difference, of_rows(tl.log(row_sum)), of_rows(grad_share), weight_ptrs, mask,
            grad_probs_ptrs.dtype.element_ty,
        )  # fmt: skip
        tl.store(grad_probs_ptrs, grad, mask=mask)


@kernel
def cross_entropy_small_kernel(
    logits_ptr, targets_ptr, weight_ptr, sample_weight_ptr, workspace_ptr, losses_ptr, loss_ptr,
    unweighted_ptr, lse_ptr, entropy_ptr, predictions_ptr, row_max_ptr, row_sum_ptr, row_weight_ptr,
    grad_losses_ptr, grad_lse_ptr, grad_entropy_ptr, grad_logits_ptr, grad_targets_ptr,
    grad_losses_stride: tl.int64, n_rows: tl.int32, rows_per_group: tl.int32,
    logits_group_stride: tl.int64, logits_row_stride: tl.int64, logits_class_stride: tl.int64,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64, targets_class_stride: tl.int64,
    grad_group_stride: tl.int64, grad_row_stride: tl.int64, grad_class_stride: tl.int64,
    grad_targets_group_stride: tl.int64, grad_targets_row_stride: tl.int64,
    grad_targets_class_stride: tl.int64, vocab_size: tl.int32, ignore_index: tl.int64,
    label_smoothing: tl.float64, z_loss: tl.float64, logit_scale: tl.float64, softcap: tl.float64,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
    GROUP_ROWS: tl.constexpr, SUM_BLOCK: tl.constexpr, DENSE: tl.constexpr, GROUPED: tl.constexpr,
    SOFT: tl.constexpr, MEAN: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    PROBS: tl.constexpr = targets_ptr.dtype.element_ty.is_floating()
    transform = transform_of(logit_scale, softcap, DTYPE, HAS_SCALE, HAS_SOFTCAP)
    smooth = smooth_of(label_smoothing, vocab_size, DTYPE, HAS_SMOOTHING)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_V // LANES)[:, None, None] * LANES
    cols += tl.arange(0, LANES)[None, None, :]
    exists = rows < n_rows
    offsets = row_offset(rows, rows_per_group, targets_group_stride, targets_row_stride, GROUPED)
    targets_ptrs = targets_ptr + offsets
    targets, counts, in_range = load_targets(targets_ptrs, exists, ignore_index, vocab_size, PROBS)
    is_read = cols < of_rows(tl.where(counts, vocab_size, 0))  # no predicate to combine
    x_ptrs = columns_of(
        logits_ptr, rows, cols, rows_per_group, logits_group_stride, logits_row_stride,
        logits_class_stride, DENSE, GROUPED,
    )  # fmt: skip
    x, slope = transformed(tl.load(x_ptrs, mask=is_read, other=float("-inf")).to(DTYPE), transform)
    x = tl.where(is_read, x, float("-inf")) if HAS_SCALE or HAS_SOFTCAP else x
    row_max, row_sum, row_exp_dot, difference, exps = small_statistics(x)
    weight_ptrs = None if weight_ptr is None else weight_ptr + cols + tl.zeros_like(x).to(tl.int32)
    probs_ptrs = None
    if PROBS:
        probs_ptrs = of_rows(targets_ptrs) + at_class(cols, targets_class_stride, DENSE)
    share, row_dot, row_weight = small_shares(
        weight_ptrs, probs_ptrs, smooth, is_read, difference, SOFT
    )
    factors = loss_factors(
        targets, in_range, weight_ptr, row_weight, smooth, vocab_size, PROBS, DTYPE
    )
    if losses_ptr is not None:
        x_target = x_of_targets(
            logits_ptr, rows, targets, in_range, rows_per_group, logits_group_stride,
            logits_row_stride, logits_class_stride, transform, DTYPE, DENSE, GROUPED,
        )  # fmt: skip
        losses = loss_of(row_max, row_sum, row_dot, x_target, factors, z_loss, HAS_Z_LOSS)
        store_rows(
            losses_ptr, unweighted_ptr, lse_ptr, entropy_ptr, predictions_ptr, row_max_ptr,
            row_sum_ptr, row_weight_ptr, sample_weight_ptr, rows, exists, counts, losses, x, cols,
            row_max, row_sum, row_exp_dot, row_weight,
        )  # fmt: skip
    grad_ptrs, grad_probs_ptrs = None, None
    if grad_logits_ptr is not None:
        grad_ptrs = columns_of(
            grad_logits_ptr, rows, cols, rows_per_group, grad_group_stride, grad_row_stride,
            grad_class_stride, DENSE, GROUPED,
        )  # fmt: skip
    if grad_targets_ptr is not None:
        grad_probs_ptrs = columns_of(
            grad_targets_ptr, rows, cols, rows_per_group, grad_targets_group_stride,
            grad_targets_row_stride, grad_targets_class_stride, DENSE, GROUPED,
        )  # fmt: skip
    if grad_logits_ptr is not None or grad_targets_ptr is not None:
        mask = cols < of_rows(tl.where(exists, vocab_size, 0))
        is_target = cols == of_rows(tl.where(in_range, targets, -1).to(tl.int32))
        small_gradients(
            rows, exists, counts, mask, exps, difference, share, slope, row_max, row_sum,
            row_exp_dot, factors, is_target, transform, smooth, weight_ptrs, sample_weight_ptr,
            workspace_ptr, grad_losses_ptr, grad_losses_stride, grad_lse_ptr, grad_entropy_ptr,
            grad_ptrs, grad_probs_ptrs, z_loss, DTYPE, SOFT, MEAN, HAS_Z_LOSS,
        )  # fmt: skip
    if loss_ptr is not None:
        reduce_losses(
            losses_ptr, loss_ptr, workspace_ptr, tl.program_id(0), tl.num_programs(0),
            n_rows, BLOCK_ROWS, GROUP_ROWS, SUM_BLOCK, MEAN,
        )  # fmt: skip


def launch_small(
    rows, options, workspace, config, dtype,
    *, outputs=NO_OUTPUTS, statistics=NO_STATISTICS, upstream=NO_UPSTREAM, grad_logits=None,
    grad_targets=None,
):  # fmt: skip
    """Fill outputs, statistics, grad_logits (may be the logits) and grad_targets, whichever are
    given.

    The gradients of upstream are (n_rows,), that of the loss () too; None for it stands for 1.
    """
    logits, targets = rows.logits, rows.targets
    n_groups, rows_per_group, vocab_size = logits.shape
    n_rows = n_groups * rows_per_group
    tensors = [logits, grad_logits, grad_targets, *([targets] if rows.has_probabilities else [])]
    strides = [(0, 0, 0) if t is None else t.stride() for t in (grad_logits, grad_targets)]
    cross_entropy_small_kernel.launch(
        (-(-n_rows // config.block_rows), 1),
        (*rows[:4], workspace, *outputs, *statistics, *upstream, grad_logits, grad_targets),
        (
            upstream.loss.stride(0) if upstream.loss is not None and upstream.loss.dim() else 0,
            n_rows, rows_per_group, *logits.stride(), *(*targets.stride(), 0)[:3], *strides[0],
            *strides[1], vocab_size, *numbers(options),
        ),
        config.num_warps,
        DTYPE=TRITON_DTYPES[dtype],
        BLOCK_ROWS=config.block_rows,
        BLOCK_V=config.block_v,
        LANES=config.lanes,
        GROUP_ROWS=GROUP_ROWS,
        SUM_BLOCK=SUM_BLOCK,
        DENSE=all(tensor is None or tensor.stride(2) == 1 for tensor in tensors),
        GROUPED=n_groups > 1,  # a division a row, which the usual contiguous batch can do without
        **constants(rows, options),
    )  # fmt: skip
