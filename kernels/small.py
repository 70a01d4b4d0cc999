"""Tiny vocabularies: several rows a program, each whole in registers, loss and gradient at once.

One kernel serves the forward (LOSS), the separate backward (GRAD) and both in one launch: a row
is so short that computing its softmax again costs less than keeping its statistics. Classes may lie
at any stride, so that (N, C, d1, ...) logits need no copy.
"""

import torch
import triton.language as tl

from .dispatch import kernel
from .online_softmax import exp_of, loss_factors, lowest_finite, row_offset
from .reduce import DIVISOR, GROUP_ROWS, WEIGHT_SUM, reduce_losses

SUM_BLOCK = 256  # eight losses a thread of one warp
TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@kernel
def cross_entropy_small_kernel(
    logits_ptr, grad_losses_ptr, targets_ptr, weight_ptr, sums_ptr, counters_ptr,
    losses_ptr, loss_ptr, grad_logits_ptr,
    grad_losses_stride: tl.int64, n_rows: tl.int32, rows_per_group: tl.int32,
    logits_group_stride: tl.int64, logits_row_stride: tl.int64, logits_class_stride: tl.int64,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64,
    grad_group_stride: tl.int64, grad_row_stride: tl.int64, grad_class_stride: tl.int64,
    vocab_size: tl.int32, ignore_index: tl.int64, label_smoothing: tl.float64,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr, GROUP_ROWS: tl.constexpr,
    SUM_BLOCK: tl.constexpr, DENSE: tl.constexpr, GROUPED: tl.constexpr,
    LOSS: tl.constexpr, REDUCE: tl.constexpr,
    GRAD: tl.constexpr, UPSTREAM: tl.constexpr,
    MEAN: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_V)[None, :]
    logits_cols, grad_cols = cols, cols
    if not DENSE:  # 64-bit: times a stride of H * W
        logits_cols = cols.to(tl.int64) * logits_class_stride
        grad_cols = cols.to(tl.int64) * grad_class_stride
    exists = rows < n_rows
    offsets = row_offset(rows, rows_per_group, targets_group_stride, targets_row_stride, GROUPED)
    targets = tl.load(targets_ptr + offsets, mask=exists, other=0).to(tl.int64)
    counts = exists & (targets != ignore_index)  # an ignored row may hold NaN: it is not read
    in_range = (targets >= 0) & (targets < vocab_size)

    offsets = row_offset(rows, rows_per_group, logits_group_stride, logits_row_stride, GROUPED)
    x_ptrs = logits_ptr + offsets[:, None] + logits_cols
    x = tl.load(x_ptrs, mask=counts[:, None] & (cols < vocab_size), other=float("-inf")).to(DTYPE)
    row_max = tl.maximum(tl.max(x, axis=1), lowest_finite(DTYPE))
    difference = x - row_max[:, None]
    exps = exp_of(difference)
    row_sum = tl.sum(exps, axis=1)
    is_target = cols == targets[:, None]
    target_factor, lse_factor, class_factor = loss_factors(
        targets, in_range & counts, weight_ptr, sums_ptr + WEIGHT_SUM, vocab_size, label_smoothing,
        DTYPE, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    if HAS_SMOOTHING:
        class_weight = tl.full([1, BLOCK_V], 1.0, DTYPE)
        if HAS_WEIGHT:
            class_weight = tl.load(weight_ptr + cols, mask=cols < vocab_size, other=0.0).to(DTYPE)

    if LOSS:
        x_target = tl.sum(tl.where(is_target, difference, 0.0), axis=1)
        losses = lse_factor * tl.log(row_sum) - target_factor * x_target
        if HAS_SMOOTHING:
            terms = tl.where(cols < vocab_size, class_weight * difference, 0.0)
            losses -= class_factor * tl.sum(terms, axis=1)
        tl.store(losses_ptr + rows, tl.where(counts, losses, 0.0), mask=exists)

    if GRAD:
        grad_losses = tl.full([BLOCK_ROWS], 1.0, DTYPE)
        if UPSTREAM:
            at = rows.to(tl.int64) * grad_losses_stride
            grad_losses = tl.load(grad_losses_ptr + at, mask=exists, other=0.0).to(DTYPE)
        if MEAN:
            grad_losses /= tl.load(sums_ptr + DIVISOR)
        grad = exps * (grad_losses * lse_factor / row_sum)[:, None]
        grad -= tl.where(is_target, (grad_losses * target_factor)[:, None], 0.0)
        if HAS_SMOOTHING:
            grad -= (grad_losses * class_factor)[:, None] * class_weight
        grad = tl.where(counts[:, None], grad, 0.0)
        offsets = row_offset(rows, rows_per_group, grad_group_stride, grad_row_stride, GROUPED)
        grad_ptrs = grad_logits_ptr + offsets[:, None] + grad_cols
        out = grad.to(grad_logits_ptr.dtype.element_ty)
        tl.store(grad_ptrs, out, mask=exists[:, None] & (cols < vocab_size))
    if REDUCE:
        reduce_losses(
            losses_ptr, loss_ptr, sums_ptr, counters_ptr, tl.program_id(0), tl.num_programs(0),
            n_rows, BLOCK_ROWS, GROUP_ROWS, SUM_BLOCK, MEAN,
        )  # fmt: skip


def launch_small(
    logits, targets, weight, sums, options, config, dtype,
    *, losses=None, loss=None, counters=None, grad_logits=None, grad_losses=None,
):  # fmt: skip
    """Fill losses (n_rows,), grad_logits (may be the logits) or both, whichever is given; and
    loss () if given.

    grad_losses, () or (n_rows,), is the upstream gradient; None stands for 1.
    """
    n_groups, rows_per_group, vocab_size = logits.shape
    n_rows = n_groups * rows_per_group
    grad_strides = (0, 0, 0) if grad_logits is None else grad_logits.stride()
    has_stride = grad_losses is not None and grad_losses.dim() > 0
    both = [tensor for tensor in (logits, grad_logits) if tensor is not None]
    cross_entropy_small_kernel.launch(
        (-(-n_rows // config.block_rows), 1),
        (logits, grad_losses, targets, weight, sums, counters, losses, loss, grad_logits),
        (
            grad_losses.stride(0) if has_stride else 0,
            n_rows, rows_per_group, *logits.stride(), *targets.stride(), *grad_strides,
            vocab_size, options.ignore_index, options.label_smoothing,
        ),
        config.num_warps,
        DTYPE=TRITON_DTYPES[dtype],
        BLOCK_ROWS=config.block_rows,
        BLOCK_V=config.block_v,
        GROUP_ROWS=GROUP_ROWS,
        SUM_BLOCK=SUM_BLOCK,
        DENSE=all(tensor.stride(2) == 1 for tensor in both),
        GROUPED=n_groups > 1,  # a division a row, which the usual contiguous batch can do without
        LOSS=losses is not None,
        REDUCE=loss is not None,
        GRAD=grad_logits is not None,
        UPSTREAM=grad_losses is not None,
        MEAN=options.reduction == "mean",
        HAS_WEIGHT=weight is not None,
        HAS_SMOOTHING=options.label_smoothing > 0.0,
    )  # fmt: skip
