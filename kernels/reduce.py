"""Row values to scalars on the device: what "mean" divides by, and the loss itself.

One kernel prepares a workspace: it counts the targets and zeroes counters. By these the programs of
the next find out which comes last and adds up what the others stored, in a fixed order: nothing is
launched for it, and a loss is bitwise equal from run to run. A workspace belongs to one call, so
that no stream, thread, CUDA graph or exception can leave one half used to another.
"""

import torch
import triton
import triton.language as tl

from .dispatch import kernel
from .row_access import row_offset

GROUP_ROWS = 1024  # rows whose losses one program adds up, before the last adds up the groups
COUNT_BLOCK = 1024
SUM_BLOCK = 1024

# The places in a workspace, in the dtype of the arithmetic. Counters are int32 where a number is.
DIVISOR = tl.constexpr(0)  # what the loss was divided by
PARTS = tl.constexpr(32)  # of it, as many as a warp of any GPU adds up without shared memory
FIRST_PART = tl.constexpr(1)
REDUCED = tl.constexpr(33)  # a counter; from here on all begin at 0
GROUPS_REDUCED = tl.constexpr(34)  # counters; the sums of as many groups follow
ROWS_COMBINED = tl.constexpr(36)  # counters, of fewer than GROUP_ROWS rows: split.py's


@triton.jit
def is_last(counter_ptr, n_programs):
    """Whether all n_programs have called this; the last then sees what the others stored."""
    counter_ptr = counter_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
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
def load_parts(workspace_ptr):
    """The parts of the divisor, [PARTS]: a program loads them early, and late adds them up."""
    return tl.load(workspace_ptr + FIRST_PART + tl.arange(0, PARTS))


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
    losses_ptr, loss_ptr, workspace_ptr, program, n_programs, n_rows,
    ROWS: tl.constexpr, GROUP_ROWS: tl.constexpr, SUM_BLOCK: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Called by each program when it has stored the losses of its ROWS rows."""
    GROUP: tl.constexpr = GROUP_ROWS // ROWS
    group = program // GROUP
    n_groups = (n_programs + GROUP - 1) // GROUP
    group_size = tl.minimum(n_programs - group * GROUP, GROUP)
    if is_last(workspace_ptr + GROUPS_REDUCED + group, group_size):
        start = group * GROUP_ROWS
        size = tl.minimum(n_rows - start, GROUP_ROWS)
        total = sum_of(losses_ptr + start, size, SUM_BLOCK)
        sums_ptr = workspace_ptr + GROUPS_REDUCED + n_groups
        tl.store(sums_ptr + group, total)
        if is_last(workspace_ptr + REDUCED, n_groups):
            loss = sum_of(sums_ptr, n_groups, SUM_BLOCK)
            if MEAN:
                divisor = tl.sum(load_parts(workspace_ptr), axis=0)
                tl.store(workspace_ptr + DIVISOR, divisor)
                loss /= divisor
            tl.store(loss_ptr, loss)


@kernel
def prepare_kernel(
    targets_ptr, weight_ptr, sample_weight_ptr, normalizer_ptr, workspace_ptr,
    n_rows: tl.int32, rows_per_group: tl.int32,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64,
    vocab_size: tl.int32, ignore_index: tl.int64, normalizer: tl.float64, n_zeros: tl.int32,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zero what has to be, and store the parts of the divisor: with COUNT the sums of
    `target_weights` over the rows of each program, else the normalizer."""
    DTYPE: tl.constexpr = workspace_ptr.dtype.element_ty
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    first, step = program * BLOCK, n_programs * BLOCK
    part = tl.full([], normalizer, DTYPE)
    if COUNT:
        parts = tl.zeros([BLOCK], DTYPE)
        for start in tl.range(first, n_rows, step):
            parts += target_weights(
                targets_ptr, weight_ptr, sample_weight_ptr, start + tl.arange(0, BLOCK), n_rows,
                rows_per_group, targets_group_stride, targets_row_stride, vocab_size, ignore_index,
                DTYPE,
            )  # fmt: skip
        part = tl.sum(parts, axis=0)
    elif normalizer_ptr is not None:
        part = tl.load(normalizer_ptr).to(DTYPE)
    place = tl.arange(0, PARTS)
    is_own = place == program
    # no `&` with a scalar: Triton 3.9 interpreted splats a truth to an int32, which is no mask
    nobodys = place >= tl.where(program == 0, n_programs, PARTS)
    tl.store(workspace_ptr + FIRST_PART + place, tl.where(is_own, part, 0.0), mask=is_own | nobodys)
    for start in tl.range(first, n_zeros, step):
        at = start + tl.arange(0, BLOCK)
        tl.store(workspace_ptr + REDUCED + at, tl.zeros([BLOCK], DTYPE), mask=at < n_zeros)


def prepared_workspace(rows, options, dtype, splits=1):
    """A workspace for the row kernels of this call; None where they have nothing to count."""
    targets = rows.targets
    n_groups, rows_per_group, vocab_size = rows.logits.shape
    n_rows = n_groups * rows_per_group
    if n_rows == 0 or options.reduction == "none" and splits == 1:
        return None
    n_zeros = 1 + 2 * -(-n_rows // GROUP_ROWS) + (n_rows if splits > 1 else 0)
    workspace = torch.empty(REDUCED.value + n_zeros, dtype=dtype, device=targets.device)
    weight, sample_weight, normalizer, number = *rows[2:], options.normalizer
    if number is None:
        number = float(n_rows)  # of probabilities without weights, all of them count
    count = options.reduction == "mean" and options.normalizer is None and normalizer is None
    if rows.has_probabilities and sample_weight is None:
        count = False
    if not count:
        weight = sample_weight = None
    prepare_kernel.launch(
        (min(PARTS.value, -(-n_rows // COUNT_BLOCK)) if count else 1, 1),
        (targets, weight, sample_weight, normalizer, workspace),
        (
            n_rows, rows_per_group, *targets.stride()[:2], vocab_size, options.ignore_index,
            number, n_zeros,
        ),
        num_warps=4,
        COUNT=count,
        BLOCK=COUNT_BLOCK,
    )  # fmt: skip
    return workspace
