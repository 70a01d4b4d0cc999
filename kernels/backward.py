"""Backward: grad_logits = grad_losses * (softmax(logits) - onehot(target)), from (max, sum) a row.

Also the in-forward route's backward: grad_logits * grad_losses, which is nothing where that is 1.
"""

import triton.language as tl

from ..rows import is_packed
from .dispatch import kernel
from .online_softmax import (
    edge_columns,
    elements_of,
    gradient_at_target,
    gradient_tile,
    load_target,
    load_tile,
    loss_factors,
    row_offset,
    split_row,
    tile_columns,
)
from .reduce import DIVISOR, WEIGHT_SUM

SCALE_PROGRAMS = 1024  # enough to fill a GPU, few enough to return at once
SCALE_ROW = 1 << 15  # a contiguous gradient is scaled in pieces of this many elements


@kernel
def cross_entropy_backward_kernel(
    logits_ptr, grad_losses_ptr, targets_ptr, weight_ptr, sums_ptr,
    row_max_ptr, row_sum_ptr, grad_logits_ptr,
    grad_losses_stride: tl.int64,
    rows_per_group: tl.int32, logits_group_stride: tl.int64, logits_row_stride: tl.int64,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64,
    grad_group_stride: tl.int64, grad_row_stride: tl.int64,
    vocab_size: tl.int32, ignore_index: tl.int64, label_smoothing: tl.float64,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, UPSTREAM: tl.constexpr,
    MEAN: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """One program a row and BLOCK_V * UNROLL of its columns: it loads them all, then stores."""
    DTYPE: tl.constexpr = row_max_ptr.dtype.element_ty
    OUT: tl.constexpr = grad_logits_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // OUT.primitive_bitwidth
    row = tl.program_id(0)
    start = tl.program_id(1) * (BLOCK_V * UNROLL)
    offset = row_offset(row, rows_per_group, targets_group_stride, targets_row_stride)
    target, ignored, in_range = load_target(targets_ptr, offset, ignore_index, vocab_size)
    counts = target != ignore_index
    row_ptr = logits_ptr + row_offset(row, rows_per_group, logits_group_stride, logits_row_stride)
    offset = row_offset(row, rows_per_group, grad_group_stride, grad_row_stride)
    grad_row_ptr = grad_logits_ptr + offset

    # An ignored row may hold NaN: it is not read, its factors are zero and so is its gradient.
    row_max = tl.load(row_max_ptr + row, mask=counts, other=0.0)
    row_sum = tl.load(row_sum_ptr + row, mask=counts, other=1.0)
    grad_loss = tl.full([], 1.0, DTYPE)
    if UPSTREAM:
        grad_loss = tl.load(grad_losses_ptr + row.to(tl.int64) * grad_losses_stride).to(DTYPE)
    if MEAN:
        grad_loss /= tl.load(sums_ptr + DIVISOR)
    target_factor, lse_factor, class_factor = loss_factors(
        target, in_range, weight_ptr, sums_ptr + WEIGHT_SUM, vocab_size, label_smoothing,
        DTYPE, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    softmax_factor = tl.where(counts, grad_loss * lse_factor / row_sum, 0.0)
    class_grad = tl.where(counts, grad_loss * class_factor, 0.0)

    skew, interior_ptr, interior_size = split_row(row_ptr, vocab_size, VEC)
    _, grad_interior_ptr, _ = split_row(grad_row_ptr, vocab_size, VEC)
    cols, first = tile_columns(BLOCK_V, VEC)
    read_size = tl.where(counts, interior_size, 0)
    tiles = ()
    for tile in tl.static_range(UNROLL):
        at = start + tile * BLOCK_V
        tiles = tiles + (load_tile(interior_ptr, at, read_size, BLOCK_V, "evict_first", True),)
    edge_size = tl.where(start == 0, vocab_size, 0)  # the first program of a row takes its edges
    edge, is_edge = edge_columns(skew, interior_size, edge_size, VEC)
    _, is_read = edge_columns(skew, interior_size, tl.where(counts, edge_size, 0), VEC)
    x_edge = tl.load(row_ptr + edge, mask=is_read, other=0.0).to(DTYPE)
    place = target.to(tl.int32) + skew - VEC  # of the target in the interior
    in_interior = (place >= 0) & (place < interior_size)
    in_tiles = (place >= start) & (place < start + BLOCK_V * UNROLL)
    owns_target = in_range & counts & tl.where(in_interior, in_tiles, start == 0)
    x_target = tl.load(row_ptr + target, mask=owns_target, other=0.0).to(DTYPE)

    tl.debug_barrier()  # in place: every load above comes before every store below
    for tile in tl.static_range(UNROLL):
        at = start + tile * BLOCK_V + cols
        mask = start + tile * BLOCK_V + first < interior_size
        weight_ptrs = weight_ptr + (VEC - skew) + at if HAS_WEIGHT else None
        grad = gradient_tile(
            elements_of(tiles[tile], OUT, DTYPE), row_max, softmax_factor, class_grad, weight_ptrs,
            mask, HAS_WEIGHT, HAS_SMOOTHING,
        )  # fmt: skip
        tl.store(grad_interior_ptr + at, grad.to(OUT), mask=mask, eviction_policy="evict_first")
    weight_ptrs = weight_ptr + edge if HAS_WEIGHT else None
    grad = gradient_tile(
        x_edge, row_max, softmax_factor, class_grad, weight_ptrs, is_edge,
        HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    tl.store(grad_row_ptr + edge, grad.to(OUT), mask=is_edge)
    grad = gradient_at_target(
        x_target, row_max, softmax_factor, grad_loss, target_factor, class_grad, weight_ptr,
        target, in_range, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    tl.debug_barrier()  # the target's column is patched after the tile that covers it
    tl.store(grad_row_ptr + target, grad.to(OUT), mask=owns_target)


@kernel
def scale_kernel(
    grad_logits_ptr, grad_losses_ptr, out_ptr,
    grad_losses_stride: tl.int64, n_rows: tl.int64, rows_per_group: tl.int32,
    group_stride: tl.int64, row_stride: tl.int64,
    out_group_stride: tl.int64, out_row_stride: tl.int64,
    n_elements: tl.int64, row_size: tl.int32,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, SKIP_ONE: tl.constexpr,
):  # fmt: skip
    """out = grad_logits * grad_losses. In place with one factor for all, SKIP_ONE returns at once
    where it is 1: the host never learns the value, so nothing waits. A zero stays zero, so that an
    upstream gradient of inf or NaN does not reach the ignored rows.

    A fixed number of programs walks over the rows; the last row may be cut short by n_elements.
    """
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // OUT.primitive_bitwidth
    if SKIP_ONE:
        if tl.load(grad_losses_ptr) == 1.0:
            return
    cols, first = tile_columns(BLOCK_V, VEC)
    for row in tl.range(tl.program_id(0), n_rows, tl.num_programs(0)):
        factor = tl.load(grad_losses_ptr + row * grad_losses_stride)
        size = tl.minimum(n_elements - row * row_size, row_size).to(tl.int32)
        row_ptr = grad_logits_ptr + row_offset(row, rows_per_group, group_stride, row_stride)
        out_row_ptr = out_ptr + row_offset(row, rows_per_group, out_group_stride, out_row_stride)
        skew, interior_ptr, interior_size = split_row(row_ptr, size, VEC)
        _, out_interior_ptr, _ = split_row(out_row_ptr, size, VEC)
        for start in tl.range(0, interior_size, BLOCK_V * UNROLL):
            tiles = ()  # all loads before the first store, which may be to the same memory
            for i in tl.static_range(UNROLL):
                at = start + i * BLOCK_V
                mask = at + first < interior_size
                tiles = tiles + (tl.load(interior_ptr + at + cols, mask=mask, other=0.0),)
            for i in tl.static_range(UNROLL):
                at = start + i * BLOCK_V
                x = tiles[i].to(factor.dtype)
                x = tl.where(x == 0.0, x, x * factor)
                mask = at + first < interior_size
                tl.store(out_interior_ptr + at + cols, x.to(OUT), mask=mask)
        edge, is_edge = edge_columns(skew, interior_size, size, VEC)
        x = tl.load(row_ptr + edge, mask=is_edge, other=0.0).to(factor.dtype)
        x = tl.where(x == 0.0, x, x * factor)
        tl.store(out_row_ptr + edge, x.to(OUT), mask=is_edge)


def launch_backward(
    grad_losses, logits, targets, weight, sums, row_max, row_sum, grad_logits, options, config
):
    """Fill grad_logits (may be the logits) from dense rows.

    grad_losses, () or (n_rows,), is the upstream gradient; None stands for 1.
    """
    n_groups, rows_per_group, vocab_size = logits.shape
    steps = -(-vocab_size // (config.block_v * config.unroll))
    has_stride = grad_losses is not None and grad_losses.dim() > 0
    cross_entropy_backward_kernel.launch(
        (n_groups * rows_per_group, steps),
        (logits, grad_losses, targets, weight, sums, row_max, row_sum, grad_logits),
        (
            grad_losses.stride(0) if has_stride else 0,
            rows_per_group, *logits.stride()[:2], *targets.stride(), *grad_logits.stride()[:2],
            vocab_size, options.ignore_index, options.label_smoothing,
        ),
        config.num_warps,
        BLOCK_V=config.block_v,
        UNROLL=config.unroll,
        UPSTREAM=grad_losses is not None,
        MEAN=options.reduction == "mean",
        HAS_WEIGHT=weight is not None,
        HAS_SMOOTHING=options.label_smoothing > 0.0,
    )  # fmt: skip


def launch_scale(grad_logits, grad_losses, out, config):
    """out = grad_logits * grad_losses, which is () or (n_rows,); out may be grad_logits.

    Rows are dense, but for a scalar factor and storage without gaps (see `is_packed`).
    """
    n_groups, rows_per_group, row_size = grad_logits.shape
    n_rows, n_elements = n_groups * rows_per_group, grad_logits.numel()
    strides = (*grad_logits.stride()[:2], *out.stride()[:2])
    one_factor = grad_losses.dim() == 0
    if one_factor and is_packed(grad_logits) and out.stride() == grad_logits.stride():
        # one long row in any order: a row of 65 classes would leave most of a tile empty
        n_rows, row_size = -(-n_elements // SCALE_ROW), SCALE_ROW
        rows_per_group, strides = n_rows, (0, SCALE_ROW, 0, SCALE_ROW)
    grad_stride = 0 if one_factor else grad_losses.stride(0)
    scale_kernel.launch(
        (min(n_rows, SCALE_PROGRAMS), 1),
        (grad_logits, grad_losses, out),
        (grad_stride, n_rows, rows_per_group, *strides, n_elements, row_size),
        config.num_warps,
        BLOCK_V=config.block_v,
        UNROLL=config.unroll,
        SKIP_ONE=one_factor and out is grad_logits,
    )
