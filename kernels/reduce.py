"""Row values to scalars on the device: what "mean" divides by, and the loss itself.

Whichever program comes last adds up what the others stored, in a fixed order: nothing is launched
for it, and a loss is bitwise equal from run to run.
"""

import torch
import triton
import triton.language as tl

from .dispatch import kernel
from .row_access import row_offset

GROUP_ROWS = 1024  # rows whose losses one program adds up, before the last adds up the groups
PARTIALS = 64  # programs that count the targets at most
COUNT_BLOCK = 1024
SUM_BLOCK = 1024

# The places in Workspace.sums
DIVISOR = tl.constexpr(0)
COUNTS = tl.constexpr(1)
GROUPS = tl.constexpr(1 + PARTIALS)

# The places in Workspace.counters
COUNTED = tl.constexpr(0)
REDUCED = tl.constexpr(1)
GROUPS_REDUCED = tl.constexpr(2)
ROWS_COMBINED = tl.constexpr(3)  # of fewer than GROUP_ROWS rows: split.py's


@triton.jit
def is_last(counter_ptr, n_programs):
    """Whether all n_programs have called this; the last then sees what the others stored."""
    tl.debug_barrier()  # one thread counts, for the stores of all
    last = tl.atomic_add(counter_ptr, 1, sem="release") == n_programs - 1
    if last:
        # Acquire only here: it empties the L1 cache, where other programs hold their rows. Its
        # result must be used, or the compiler drops it.
        last = tl.atomic_add(counter_ptr, 0, sem="acquire") == n_programs
    tl.debug_barrier()
    return last


@triton.jit
def sum_of(ptr, size, BLOCK: tl.constexpr):
    """The sum of `size` elements, in a fixed order."""
    total = tl.zeros([BLOCK], ptr.dtype.element_ty)
    for start in tl.range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + cols, mask=cols < size, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def target_weights(
    targets_ptr, weight_ptr, sample_weight_ptr, rows, n_rows, rows_per_group,
    targets_group_stride, targets_row_stride, vocab_size, ignore_index, DTYPE: tl.constexpr,
):  # fmt: skip
    """sample_weight * weight[target] of rows (1 for None), 0 of what is ignored or does not exist;
    of probabilities the sample_weight alone."""
    exists = rows < n_rows
    counts = exists
    weights = tl.full(rows.shape, 1.0, DTYPE)
    if not targets_ptr.dtype.element_ty.is_floating():
        offsets = row_offset(rows, rows_per_group, targets_group_stride, targets_row_stride)
        targets = tl.load(targets_ptr + offsets, mask=exists, other=0).to(tl.int64)
        counts = exists & (targets != ignore_index)
        if weight_ptr is not None:
            in_range = counts & (targets >= 0) & (targets < vocab_size)
            weights = tl.load(weight_ptr + targets, mask=in_range, other=0.0).to(DTYPE)
    if sample_weight_ptr is not None:
        weights *= tl.load(sample_weight_ptr + rows, mask=counts, other=0.0).to(DTYPE)
    return tl.where(counts, weights, 0.0)


@triton.jit
def reduce_losses(
    losses_ptr, loss_ptr, sums_ptr, counters_ptr, program, n_programs, n_rows,
    ROWS: tl.constexpr, GROUP_ROWS: tl.constexpr, SUM_BLOCK: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Called by each program when it has stored the losses of its ROWS rows."""
    GROUP: tl.constexpr = GROUP_ROWS // ROWS
    group = program // GROUP
    n_groups = (n_programs + GROUP - 1) // GROUP
    group_size = tl.minimum(n_programs - group * GROUP, GROUP)
    if is_last(counters_ptr + GROUPS_REDUCED + group, group_size):
        start = group * GROUP_ROWS
        size = tl.minimum(n_rows - start, GROUP_ROWS)
        total = sum_of(losses_ptr + start, size, SUM_BLOCK)
        tl.store(sums_ptr + GROUPS + group, total)
        if is_last(counters_ptr + REDUCED, n_groups):
            loss = sum_of(sums_ptr + GROUPS, n_groups, SUM_BLOCK)
            if MEAN:
                loss /= tl.load(sums_ptr + DIVISOR)
            tl.store(loss_ptr, loss)


@kernel
def mean_divisor_kernel(
    targets_ptr, weight_ptr, sample_weight_ptr, sums_ptr, counters_ptr,
    n_rows: tl.int32, rows_per_group: tl.int32,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64,
    vocab_size: tl.int32, ignore_index: tl.int64,
    BLOCK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """The sum of `target_weights` over all rows."""
    DTYPE: tl.constexpr = sums_ptr.dtype.element_ty
    part = tl.zeros([BLOCK], DTYPE)
    first, step = tl.program_id(0) * BLOCK, tl.num_programs(0) * BLOCK
    for start in tl.range(first, n_rows, step):
        part += target_weights(
            targets_ptr, weight_ptr, sample_weight_ptr, start + tl.arange(0, BLOCK), n_rows,
            rows_per_group, targets_group_stride, targets_row_stride, vocab_size, ignore_index,
            DTYPE,
        )  # fmt: skip
    tl.store(sums_ptr + COUNTS + tl.program_id(0), tl.sum(part, axis=0))
    n_parts = tl.num_programs(0)
    if is_last(counters_ptr + COUNTED, n_parts):
        tl.store(sums_ptr + DIVISOR, sum_of(sums_ptr + COUNTS, n_parts, PARTIALS))


class Workspace:
    """What the programs of a loss tell each other: sums in the dtype of the arithmetic, and, if
    anything counts, counters that start at 0."""

    def __init__(self, logits, dtype, n_row_counters=0, counts=True):
        """For rows of logits (n_groups, rows_per_group, vocab_size)."""
        n_groups = -(-logits.shape[:2].numel() // GROUP_ROWS)
        self.sums = logits.new_empty(1 + PARTIALS + n_groups, dtype=dtype)
        n_counters = 2 + n_groups + n_row_counters
        self.counters = logits.new_zeros(n_counters, dtype=torch.int32) if counts else None


def launch_mean_divisor(rows, workspace, options):
    """Fill DIVISOR, which the row kernels need before their first row."""
    targets, vocab_size = rows.targets, rows.logits.shape[2]
    n_groups, rows_per_group = targets.shape[:2]
    n_rows = n_groups * rows_per_group
    mean_divisor_kernel.launch(
        (min(PARTIALS, -(-n_rows // COUNT_BLOCK)), 1),
        (targets, rows.weight, rows.sample_weight, workspace.sums, workspace.counters),
        (n_rows, rows_per_group, *targets.stride()[:2], vocab_size, options.ignore_index),
        num_warps=4,
        BLOCK=COUNT_BLOCK,
        PARTIALS=PARTIALS,
    )
