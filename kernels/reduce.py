"""Row values to scalars on the device: what "mean" divides by, and the loss itself.

Sums run in a fixed order, so that a loss is bitwise equal from run to run.
"""

import triton
import triton.language as tl

from .online_softmax import mean_divisor, row_offset

PARTIALS = 64  # programs that count the targets; every reader adds their partial sums up again
COUNT_BLOCK = 1024
SUM_BLOCK = 4096


@triton.jit(
    do_not_specialize=[
        "n_rows", "rows_per_group", "targets_group_stride", "targets_row_stride", "vocab_size",
        "ignore_index",
    ]
)  # fmt: skip
def mean_divisor_kernel(
    targets_ptr, weight_ptr, partials_ptr,
    n_rows: tl.int32, rows_per_group: tl.int32,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64,
    vocab_size: tl.int32, ignore_index: tl.int64,
    BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Partial sums, one a program, of weight[target] (or 1) over the rows that are not ignored."""
    DTYPE: tl.constexpr = partials_ptr.dtype.element_ty
    part = tl.zeros([BLOCK], DTYPE)
    for start in tl.range(tl.program_id(0) * BLOCK, n_rows, tl.num_programs(0) * BLOCK):
        rows = start + tl.arange(0, BLOCK)
        exists = rows < n_rows
        offsets = row_offset(rows, rows_per_group, targets_group_stride, targets_row_stride)
        targets = tl.load(targets_ptr + offsets, mask=exists, other=0).to(tl.int64)
        counts = exists & (targets != ignore_index)
        if HAS_WEIGHT:
            in_range = counts & (targets >= 0) & (targets < vocab_size)
            part += tl.load(weight_ptr + targets, mask=in_range, other=0.0)
        else:
            part += counts.to(DTYPE)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(part, axis=0))


@triton.jit(do_not_specialize=["n_rows"])
def reduce_losses_kernel(
    losses_ptr, partials_ptr, loss_ptr, n_rows: tl.int32,
    BLOCK: tl.constexpr, PARTIALS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """loss = sum(losses), divided by the sum of the partials for a mean; one program."""
    total = tl.zeros([BLOCK], losses_ptr.dtype.element_ty)
    for start in tl.range(0, n_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + rows, mask=rows < n_rows, other=0.0)
    loss = tl.sum(total, axis=0)
    if MEAN:
        loss /= mean_divisor(partials_ptr, PARTIALS)
    tl.store(loss_ptr, loss)


def launch_mean_divisor(targets, weight, partials, vocab_size, ignore_index):
    """Fill partials (PARTIALS,) with sums of the class weights of targets that count."""
    n_groups, rows_per_group = targets.shape
    mean_divisor_kernel[(PARTIALS,)](
        targets, weight, partials, n_groups * rows_per_group, rows_per_group, *targets.stride(),
        vocab_size, ignore_index, BLOCK=COUNT_BLOCK, HAS_WEIGHT=weight is not None, num_warps=4,
    )  # fmt: skip


def launch_reduce_losses(losses, partials, loss):
    """Fill loss () with the sum of losses (n_rows,), over that of partials where given."""
    reduce_losses_kernel[(1,)](
        losses, partials, loss, losses.numel(),
        BLOCK=SUM_BLOCK, PARTIALS=PARTIALS, MEAN=partials is not None, num_warps=8,
    )  # fmt: skip
