"""Backward: grad_logits = grad_losses * (softmax(logits) - onehot(target)), from (max, sum) a row.

Also the in-forward route's backward: grad_logits * grad_losses, which is nothing where that is 1.
"""

import triton
import triton.language as tl

from .arguments import constants, has_congruent_targets, numbers
from .dispatch import kernel
from .reduce import DIVISOR
from .row_access import (
    beside_interior,
    edge_columns,
    elements_of,
    load_tile,
    row_offset,
    split_row,
    tile_columns,
)
from .targets import (
    gradient_at_target,
    gradient_of_probabilities,
    gradient_tile,
    load_target,
    loss_factors,
    n_classes_of,
    smooth_of,
    softmax_factor_of,
)
from .transform import derivative_factor, transform_of, transformed

SCALE_PROGRAMS = 1024  # enough to fill a GPU, few enough to return at once
SCALE_ROW = 1 << 15  # a contiguous gradient is scaled in pieces of this many elements


@triton.jit
def row_factors(
    row, target, counts, in_range, weight_ptr, sample_weight_ptr, workspace_ptr,
    row_max_ptr, row_sum_ptr, row_weight_ptr, entropy_ptr,
    grad_losses_ptr, grad_losses_stride, grad_lse_ptr, grad_entropy_ptr, transform,
    vocab_size, label_smoothing, z_loss, DTYPE: tl.constexpr, PROBS: tl.constexpr,
    MEAN: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_Z_LOSS: tl.constexpr, shard_ptr,
):  # fmt: skip
    """((max, log(sum), softmax_factor, entropy_factor, class_grad, grad_share), grad_target,
    smooth): all that `write_columns` and `gradient_at_target` have to know of a row."""
    # An ignored row may hold NaN: it is not read, its factors are zero and so is its gradient.
    row_max = tl.load(row_max_ptr + row, mask=counts, other=0.0)
    row_sum = tl.load(row_sum_ptr + row, mask=counts, other=1.0)
    log_sum = tl.log(row_sum)
    row_weight = tl.full([], 0.0, DTYPE)
    if row_weight_ptr is not None:
        row_weight = tl.load(row_weight_ptr + row, mask=counts, other=0.0)
    n_classes = n_classes_of(vocab_size, shard_ptr)
    smooth = smooth_of(label_smoothing, n_classes, DTYPE, HAS_SMOOTHING)
    target_factor, lse_factor, class_factor = loss_factors(
        target, in_range, weight_ptr, row_weight, smooth, vocab_size, PROBS, DTYPE,
        shard_ptr is not None,
    )  # fmt: skip
    if shard_ptr is not None:
        lse_factor = row_weight  # of all shards
    grad_loss = tl.full([], 1.0, DTYPE)
    if grad_losses_ptr is not None:
        grad_loss = tl.load(grad_losses_ptr + row.to(tl.int64) * grad_losses_stride).to(DTYPE)
    if MEAN:
        grad_loss /= tl.load(workspace_ptr + DIVISOR)
    if sample_weight_ptr is not None:
        grad_loss *= tl.load(sample_weight_ptr + row).to(DTYPE)
    grad_share = grad_loss * smooth[0] if HAS_SMOOTHING else grad_loss

    softmax_factor = softmax_factor_of(row_max, row_sum, lse_factor, z_loss, HAS_Z_LOSS)
    softmax_factor *= grad_loss
    if grad_lse_ptr is not None:
        softmax_factor += tl.load(grad_lse_ptr + row).to(DTYPE) / row_sum
    derivative = derivative_factor(transform, DTYPE)
    entropy_factor = ()
    if grad_entropy_ptr is not None:  # that of p * d is p * (d - mean of d)
        factor = tl.load(grad_entropy_ptr + row).to(DTYPE) / row_sum
        softmax_factor += factor * (log_sum - tl.load(entropy_ptr + row))
        entropy_factor = (tl.where(counts, derivative * factor, 0.0),)
    softmax_factor = tl.where(counts, derivative * softmax_factor, 0.0)
    class_grad = tl.where(counts, derivative * grad_loss * class_factor, 0.0)
    factors = (row_max, log_sum, softmax_factor, entropy_factor, class_grad, grad_share)
    return factors, derivative * grad_loss * target_factor, smooth


@triton.jit
def write_columns(
    x, cols, mask, weight_ptr, probs_ptr, grad_ptr, grad_probs_ptr, transform, smooth, factors,
    SOFT: tl.constexpr,
):  # fmt: skip
    """The gradients of logits and of probabilities in some columns, whichever have a place."""
    row_max, log_sum, softmax_factor, entropy_factor, class_grad, grad_share = factors
    weight_ptrs = weight_ptr + cols if weight_ptr is not None else None
    if grad_ptr is not None:
        probs_ptrs = probs_ptr + cols if probs_ptr is not None else None
        grad = gradient_tile(
            x, transform, row_max, softmax_factor, entropy_factor, class_grad, weight_ptrs,
            probs_ptrs, smooth, mask, SOFT,
        )  # fmt: skip
        grad = grad.to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + cols, grad, mask=mask, eviction_policy="evict_first")
    if grad_probs_ptr is not None:
        x, _ = transformed(x, transform)
        grad = gradient_of_probabilities(
            x - row_max, log_sum, grad_share, weight_ptrs, mask, grad_probs_ptr.dtype.element_ty
        )
        tl.store(grad_probs_ptr + cols, grad, mask=mask, eviction_policy="evict_first")


@triton.jit
def has_column(target, start, size, skew, interior_size, VEC: tl.constexpr):
    """Whether a column is one of `size` from `start` of the interior, or an edge: those go with the
    first."""
    place = target.to(tl.int32) + skew - VEC  # in the interior
    in_interior = (place >= 0) & (place < interior_size)
    in_tiles = (place >= start) & (place < start + size)
    return tl.where(in_interior, in_tiles, start == 0)


@triton.jit
def write_loaded(
    tiles, start, x_edge, edge, is_edge, counts, skew, vocab_size, interior_size,
    weight_ptr, probs_row_ptr, grad_row_ptr, grad_probs_row_ptr, transform, smooth, factors,
    IN: tl.constexpr, DTYPE: tl.constexpr, BLOCK_V: tl.constexpr, SOFT: tl.constexpr,
    CONGRUENT: tl.constexpr,
):  # fmt: skip
    """`write_columns` for tiles of `load_tile` from column `start` of the interior on, and for the
    edges."""
    VEC: tl.constexpr = 128 // IN.primitive_bitwidth
    cols, first = tile_columns(BLOCK_V, VEC)
    weight_interior_ptr, probs_interior_ptr = None, None
    grad_interior_ptr, grad_probs_interior_ptr = None, None
    if weight_ptr is not None:
        weight_interior_ptr = weight_ptr + (VEC - skew)
    if probs_row_ptr is not None:
        probs_interior_ptr = beside_interior(probs_row_ptr, VEC - skew, VEC, CONGRUENT)
    if grad_row_ptr is not None:
        _, grad_interior_ptr, _ = split_row(grad_row_ptr, vocab_size, VEC)
    if grad_probs_row_ptr is not None:
        grad_probs_interior_ptr = beside_interior(grad_probs_row_ptr, VEC - skew, VEC, CONGRUENT)
    tl.debug_barrier()  # in place: every load of the row comes before every store below
    for tile in tl.static_range(len(tiles)):
        at = start + tile * BLOCK_V
        x = elements_of(tiles[tile], IN, DTYPE)
        if len(transform) > 0:
            x = tl.where(counts, x, 0.0)  # it was masked with -inf, and 0 * inf is NaN
        write_columns(
            x, at + cols, at + first < interior_size,
            weight_interior_ptr, probs_interior_ptr, grad_interior_ptr, grad_probs_interior_ptr,
            transform, smooth, factors, SOFT,
        )  # fmt: skip
    write_columns(
        x_edge, edge, is_edge, weight_ptr, probs_row_ptr, grad_row_ptr, grad_probs_row_ptr,
        transform, smooth, factors, SOFT,
    )  # fmt: skip


@kernel
def cross_entropy_backward_kernel(
    logits_ptr, targets_ptr, weight_ptr, sample_weight_ptr, shard_ptr, workspace_ptr,
    row_max_ptr, row_sum_ptr, row_weight_ptr, entropy_ptr,
    grad_losses_ptr, grad_lse_ptr, grad_entropy_ptr, grad_logits_ptr, grad_targets_ptr,
    grad_losses_stride: tl.int64,
    rows_per_group: tl.int32, logits_group_stride: tl.int64, logits_row_stride: tl.int64,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64,
    grad_group_stride: tl.int64, grad_row_stride: tl.int64,
    grad_targets_group_stride: tl.int64, grad_targets_row_stride: tl.int64, vocab_size: tl.int32,
    ignore_index: tl.int64, label_smoothing: tl.float64, z_loss: tl.float64,
    logit_scale: tl.float64, softcap: tl.float64,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr,
    SOFT: tl.constexpr, CONGRUENT: tl.constexpr, MEAN: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One program a row and BLOCK_V * UNROLL of its columns: it loads them all, then stores."""
    DTYPE: tl.constexpr = row_max_ptr.dtype.element_ty
    IN: tl.constexpr = logits_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // IN.primitive_bitwidth
    PROBS: tl.constexpr = targets_ptr.dtype.element_ty.is_floating()
    transform = transform_of(logit_scale, softcap, DTYPE, HAS_SCALE, HAS_SOFTCAP)
    row = tl.program_id(0)
    start = tl.program_id(1) * (BLOCK_V * UNROLL)
    offset = row_offset(row, rows_per_group, targets_group_stride, targets_row_stride)
    target, ignored, in_range = load_target(
        targets_ptr + offset, ignore_index, vocab_size, shard_ptr
    )
    probs_row_ptr = targets_ptr + offset if PROBS else None
    counts = tl.full([], True, tl.int1) if PROBS else ignored == 0
    row_ptr = logits_ptr + row_offset(row, rows_per_group, logits_group_stride, logits_row_stride)

    factors, grad_target, smooth = row_factors(
        row, target, counts, in_range, weight_ptr, sample_weight_ptr, workspace_ptr,
        row_max_ptr, row_sum_ptr, row_weight_ptr, entropy_ptr,
        grad_losses_ptr, grad_losses_stride, grad_lse_ptr, grad_entropy_ptr, transform,
        vocab_size, label_smoothing, z_loss, DTYPE, PROBS, MEAN, HAS_SMOOTHING, HAS_Z_LOSS,
        shard_ptr,
    )  # fmt: skip

    skew, interior_ptr, interior_size = split_row(row_ptr, vocab_size, VEC)
    read_size = tl.where(counts, interior_size, 0)
    tiles = ()
    for tile in tl.static_range(UNROLL):
        at = start + tile * BLOCK_V
        tiles = tiles + (load_tile(interior_ptr, at, read_size, BLOCK_V, "evict_first", True),)
    edge_size = tl.where(start == 0, vocab_size, 0)  # the first program of a row takes its edges
    edge, is_edge = edge_columns(skew, interior_size, edge_size, VEC)
    _, is_read = edge_columns(skew, interior_size, tl.where(counts, edge_size, 0), VEC)
    x_edge = tl.load(row_ptr + edge, mask=is_read, other=0.0).to(DTYPE)
    owns_target = in_range & counts
    owns_target &= has_column(target, start, BLOCK_V * UNROLL, skew, interior_size, VEC)
    x_target = tl.load(row_ptr + target, mask=owns_target, other=0.0).to(DTYPE)

    grad_row_ptr, grad_probs_row_ptr = None, None
    if grad_logits_ptr is not None:
        offset = row_offset(row, rows_per_group, grad_group_stride, grad_row_stride)
        grad_row_ptr = grad_logits_ptr + offset
    if grad_targets_ptr is not None:
        grad_probs_row_ptr = grad_targets_ptr + row_offset(
            row, rows_per_group, grad_targets_group_stride, grad_targets_row_stride
        )
    write_loaded(
        tiles, start, x_edge, edge, is_edge, counts, skew, vocab_size, interior_size,
        weight_ptr, probs_row_ptr, grad_row_ptr, grad_probs_row_ptr, transform, smooth, factors,
        IN, DTYPE, BLOCK_V, SOFT, CONGRUENT,
    )  # fmt: skip
    if grad_logits_ptr is not None and not PROBS:
        row_max, _, softmax_factor, entropy_factor, class_grad, _ = factors
        grad = gradient_at_target(
            x_target, transform, row_max, softmax_factor, entropy_factor, grad_target, class_grad,
            weight_ptr, smooth, target, in_range, SOFT,
        )  # fmt: skip
        tl.debug_barrier()  # the target's column is patched after the tile that covers it
        tl.store(grad_row_ptr + target, grad.to(IN), mask=owns_target)


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
    upstream, rows, options, workspace, statistics, entropy, grad_logits, grad_targets, config,
    shard=None,
):  # fmt: skip
    """Fill grad_logits (may be the logits) and grad_targets, whichever is given, from dense rows.

    Of a shard, statistics and entropy are those of all its rows, row_weight being the lse_factor.

    The gradients of upstream are (n_rows,), that of the loss () too; None for it stands for 1.
    """
    logits, targets = rows.logits, rows.targets
    n_groups, rows_per_group, vocab_size = logits.shape
    steps = -(-vocab_size // (config.block_v * config.unroll))
    strides = [
        (0, 0) if grad is None else grad.stride()[:2] for grad in (grad_logits, grad_targets)
    ]
    cross_entropy_backward_kernel.launch(
        (n_groups * rows_per_group, steps),
        (*rows[:4], shard, workspace, *statistics, entropy, *upstream, grad_logits, grad_targets),
        (
            upstream.loss.stride(0) if upstream.loss is not None and upstream.loss.dim() else 0,
            rows_per_group, *logits.stride()[:2], *targets.stride()[:2], *strides[0], *strides[1],
            vocab_size, *numbers(options),
        ),
        config.num_warps,
        BLOCK_V=config.block_v,
        UNROLL=config.unroll,
        CONGRUENT=has_congruent_targets(rows, grad_targets),
        **constants(rows, options),
    )  # fmt: skip


def launch_scale(grad_logits, grad_losses, out, config, any_order=False):
    """out = grad_logits * grad_losses, which is () or (n_rows,); out may be grad_logits.

    Rows are dense; in `any_order` both only fill their storage without gaps, the factor is ().
    """
    n_groups, rows_per_group, row_size = grad_logits.shape
    n_rows, n_elements = n_groups * rows_per_group, grad_logits.numel()
    one_factor = grad_losses.dim() == 0
    if any_order:
        # one long row in any order: a row of 65 classes would leave most of a tile empty
        n_rows, row_size = -(-n_elements // SCALE_ROW), SCALE_ROW
        rows_per_group, strides = n_rows, (0, SCALE_ROW, 0, SCALE_ROW)
    else:
        strides = (*grad_logits.stride()[:2], *out.stride()[:2])
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
