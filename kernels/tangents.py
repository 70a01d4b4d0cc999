"""Tangents: derivatives of each row's loss, lse and entropy along a direction, and of its gradient.

With x the transformed logits, x' their derivative along the direction, p their softmax, q the
shares of the targets, m the mean of x under p, and e = x' less its mean, the derivatives are

    lse' = sum p x'        entropy' = -sum p e (x - m)
    loss' = sum q' (lse - x) - sum q e + 2 z_loss lse lse'
    (grad of x)' = p (a' + a e - g (e (x - m + 1) + entropy')) - b q'

with the upstream gradients b of the loss, l of lse and g of the entropy, and
a = b (sum q + 2 z_loss lse) + l. The last, a product with the Hessian, is that of `backward`.

A program reads its row, of logits and of the direction, once for the sums that all of these are
made of, and for the last once more, in the other direction: what was read last is still in a cache.
"""

import triton
import triton.language as tl

from .arguments import has_congruent_targets, numbers, row_constants
from .dispatch import kernel
from .row_access import row_offset, split_row, write_zeros
from .tangent_tiles import (
    Factors,
    Places,
    interior_of,
    load_columns,
    row_sums,
    transformed_both,
    write_row,
)
from .targets import load_target, loss_factors, smooth_of
from .transform import derivative_factor, transform_of


@triton.jit
def tangents_of(sums, factors, target_tangent, z_loss, HAS_Z_LOSS: tl.constexpr):
    """(loss', lse', entropy') of a row, from its sums, `loss_factors` and x' of its target."""
    target_factor, _, class_factor = factors
    mean = sums.moved / sums.exp
    covariance = sums.moved_dot / sums.exp - mean * (sums.exp_dot / sums.exp)
    log_sum = tl.log(sums.exp)
    loss = target_factor * (mean - target_tangent)
    loss += class_factor * (sums.share * mean - sums.share_moved)
    loss += sums.share_tangent * log_sum - sums.share_tangent_dot
    if HAS_Z_LOSS:
        loss += 2.0 * tl.full([], z_loss, mean.dtype) * (sums.maximum + log_sum) * mean
    return loss, mean, -covariance


@triton.jit
def gradient_factors(
    sums, factors, grads, mean, entropy_tangent, transform, smooth, z_loss,
    HAS_Z_LOSS: tl.constexpr,
):  # fmt: skip
    """The `Factors` of a row from its sums, `loss_factors` and the three upstream gradients."""
    grad_loss, grad_lse, grad_entropy = grads
    target_factor, lse_factor, class_factor = factors
    lse_factor_tangent = sums.share_tangent
    if HAS_Z_LOSS:
        double = 2.0 * tl.full([], z_loss, mean.dtype)
        lse_factor += double * (sums.maximum + tl.log(sums.exp))
        lse_factor_tangent += double * mean
    level = grad_loss * lse_factor + grad_lse + grad_entropy * (sums.exp_dot / sums.exp)
    level_tangent = grad_loss * lse_factor_tangent - grad_entropy * entropy_tangent
    derivative = derivative_factor(transform, mean.dtype)
    of_exp = derivative / sums.exp
    return Factors(
        sums.maximum, mean, of_exp * level, of_exp * level_tangent, of_exp * grad_entropy,
        derivative * grad_loss, target_factor, class_factor,
        grad_loss * smooth[0] if len(smooth) > 0 else grad_loss,
    )  # fmt: skip


@triton.jit
def upstream_of(ptr, at, DTYPE: tl.constexpr):
    if ptr is None:
        return tl.full([], 0.0, DTYPE)
    else:
        return tl.load(ptr + at).to(DTYPE)


@triton.jit
def row_of(ptr, row, rows_per_group, group_stride, row_stride):
    if ptr is None:
        return ()
    else:
        return (ptr + row_offset(row, rows_per_group, group_stride, row_stride),)


@kernel
def cross_entropy_tangents_kernel(
    logits_ptr, targets_ptr, weight_ptr, direction_ptr, targets_direction_ptr,
    losses_ptr, lse_ptr, entropy_ptr,
    grad_losses_ptr, grad_lse_ptr, grad_entropy_ptr, grad_logits_ptr, grad_targets_ptr,
    grad_losses_stride: tl.int64,
    rows_per_group: tl.int32, logits_group_stride: tl.int64, logits_row_stride: tl.int64,
    targets_group_stride: tl.int64, targets_row_stride: tl.int64,
    direction_group_stride: tl.int64, direction_row_stride: tl.int64,
    targets_direction_group_stride: tl.int64, targets_direction_row_stride: tl.int64,
    grad_group_stride: tl.int64, grad_row_stride: tl.int64,
    grad_targets_group_stride: tl.int64, grad_targets_row_stride: tl.int64, vocab_size: tl.int32,
    ignore_index: tl.int64, label_smoothing: tl.float64, z_loss: tl.float64,
    logit_scale: tl.float64, softcap: tl.float64,
    BLOCK_V: tl.constexpr, UNROLL: tl.constexpr, EVICT: tl.constexpr, CONGRUENT: tl.constexpr,
    SOFT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_Z_LOSS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    PROBS: tl.constexpr = targets_ptr.dtype.element_ty.is_floating()
    transform = transform_of(logit_scale, softcap, DTYPE, HAS_SCALE, HAS_SOFTCAP)
    smooth = smooth_of(label_smoothing, vocab_size, DTYPE, HAS_SMOOTHING)
    i, n = tl.program_id(0), rows_per_group
    targets = row_of(targets_ptr, i, n, targets_group_stride, targets_row_stride)
    row = Places(
        row_of(logits_ptr, i, n, logits_group_stride, logits_row_stride),
        row_of(direction_ptr, i, n, direction_group_stride, direction_row_stride),
        row_of(weight_ptr, i, n, 0, 0),
        targets if PROBS else (),
        row_of(
            targets_direction_ptr, i, n, targets_direction_group_stride,
            targets_direction_row_stride,
        ),
        row_of(grad_logits_ptr, i, n, grad_group_stride, grad_row_stride),
        row_of(grad_targets_ptr, i, n, grad_targets_group_stride, grad_targets_row_stride),
    )  # fmt: skip
    target, ignored, in_range = load_target(targets[0], ignore_index, vocab_size)
    if ignored:
        tl.store(losses_ptr + i, 0.0)
        tl.store(lse_ptr + i, 0.0)
        tl.store(entropy_ptr + i, 0.0)
        if grad_logits_ptr is not None:
            write_zeros(row.grad[0], vocab_size, BLOCK_V)
    else:
        skew, interior_ptr, interior_size = split_row(row.logits[0], vocab_size, VEC)
        interior = interior_of(row, interior_ptr, VEC - skew, VEC, CONGRUENT)
        logits, direction = load_columns(row, target, in_range, DTYPE, "")
        _, target_tangent, _ = transformed_both(logits, direction, transform, None)
        shares = smooth if PROBS else ()  # of class indices it is in the factors
        sums = row_sums(
            row, interior, skew, interior_size, vocab_size, transform, shares,
            DTYPE, VEC, BLOCK_V, UNROLL, SOFT, EVICT,
        )  # fmt: skip
        factors = loss_factors(
            target, in_range, weight_ptr, sums.share, smooth, vocab_size, PROBS, DTYPE
        )
        loss, mean, entropy = tangents_of(sums, factors, target_tangent, z_loss, HAS_Z_LOSS)
        tl.store(losses_ptr + i, loss)
        tl.store(lse_ptr + i, mean)
        tl.store(entropy_ptr + i, entropy)
        if grad_logits_ptr is not None or grad_targets_ptr is not None:
            grads = (
                upstream_of(grad_losses_ptr, i.to(tl.int64) * grad_losses_stride, DTYPE),
                upstream_of(grad_lse_ptr, i, DTYPE),
                upstream_of(grad_entropy_ptr, i, DTYPE),
            )
            grad_factors = gradient_factors(
                sums, factors, grads, mean, entropy, transform, smooth, z_loss, HAS_Z_LOSS
            )
            tl.debug_barrier()  # in place: the target is loaded before anything is stored
            write_row(
                row, interior, skew, interior_size, vocab_size, target.to(tl.int32), grad_factors,
                transform, shares, DTYPE, VEC, BLOCK_V, UNROLL, grad_entropy_ptr is not None, SOFT,
            )  # fmt: skip


def launch_tangents(
    direction, upstream, rows, options, tangents, grad_logits, grad_targets, config
):
    """Fill tangents, grad_logits (may be the logits) and grad_targets, whichever are given.

    Rows are dense, the direction's congruent to them; gradients of upstream are (n_rows,), that of
    the loss () too.
    """
    logits, targets = rows.logits, rows.targets
    n_groups, rows_per_group, vocab_size = logits.shape
    strided = (logits, targets, *direction, grad_logits, grad_targets)
    strides = [(0, 0) if tensor is None else tensor.stride()[:2] for tensor in strided]
    cross_entropy_tangents_kernel.launch(
        (n_groups * rows_per_group, 1),
        (*rows[:3], *direction, *tangents, *upstream, grad_logits, grad_targets),
        (
            upstream.loss.stride(0) if upstream.loss is not None and upstream.loss.dim() else 0,
            rows_per_group, *(stride for pair in strides for stride in pair), vocab_size,
            *numbers(options),
        ),
        config.num_warps,
        BLOCK_V=config.block_v,
        UNROLL=config.unroll,
        EVICT=config.evict,
        CONGRUENT=has_congruent_targets(rows, grad_targets, direction.targets),
        **row_constants(rows, options),
    )  # fmt: skip
