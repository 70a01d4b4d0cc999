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

from typing import NamedTuple

import triton
import triton.language as tl

from .arguments import has_congruent_targets, numbers, row_constants
from .dispatch import kernel
from .fused import write_zeros
from .online_softmax import (
    beside_interior,
    class_share,
    derivative_factor,
    edge_columns,
    exp_of,
    finite,
    gradient_of_probabilities,
    load_target,
    loss_factors,
    lowest_finite,
    rebased_dot,
    rebased_exp_dot,
    row_offset,
    smooth_of,
    split_row,
    streamed_size,
    tile_columns,
    transform_of,
    transformed,
)


class Places(NamedTuple):
    """Where a row, or its interior, begins in each tensor: (pointer,), or () of what is not given.

    The first two and the gradient of logits lie alike, counted from a 16-byte boundary.
    """

    logits: tuple
    direction: tuple
    weight: tuple
    probs: tuple
    probs_direction: tuple
    grad: tuple
    grad_probs: tuple


class Sums(NamedTuple):
    """Of a row, or of what a thread saw of it, with d = x - maximum and ' for a derivative."""

    maximum: tl.tensor
    exp: tl.tensor  # of exp(d)
    exp_dot: tl.tensor  # of exp(d) * d
    moved: tl.tensor  # of exp(d) * x'
    moved_dot: tl.tensor  # of exp(d) * x' * d
    share: tl.tensor  # of q, as are the rest 0 unless they are loaded
    share_moved: tl.tensor  # of q * x'
    share_tangent: tl.tensor  # of q'
    share_tangent_dot: tl.tensor  # of q' * d


class Factors(NamedTuple):
    """What a column of the gradient's tangent needs of its row; the upstream gradient, the
    logit_scale and 1 / sum of exp(d) are in them."""

    maximum: tl.tensor
    mean: tl.tensor  # of x'
    level: tl.tensor  # of exp(d)
    level_tangent: tl.tensor  # of exp(d), where x' is its mean
    entropy: tl.tensor  # of exp(d) * d, subtracted from level
    grad_loss: tl.tensor
    target: tl.tensor  # the share of the target alone
    shares: tl.tensor  # what the loaded shares are multiplied by
    grad_probs: tl.tensor


@triton.jit
def row_of(ptr, row, rows_per_group, group_stride, row_stride):
    if ptr is None:
        return ()
    else:
        return (ptr + row_offset(row, rows_per_group, group_stride, row_stride),)


@triton.jit
def beside(place, shift, VEC: tl.constexpr, CONGRUENT: tl.constexpr):
    if len(place) == 0:
        return ()
    else:
        return (beside_interior(place[0], shift, VEC, CONGRUENT),)


@triton.jit
def interior_of(row, interior_ptr, shift, VEC: tl.constexpr, CONGRUENT: tl.constexpr):
    return Places(
        (interior_ptr,),
        beside(row.direction, shift, VEC, True),
        beside(row.weight, shift, VEC, False),
        beside(row.probs, shift, VEC, CONGRUENT),
        beside(row.probs_direction, shift, VEC, CONGRUENT),
        beside(row.grad, shift, VEC, True),
        beside(row.grad_probs, shift, VEC, CONGRUENT),
    )


@triton.jit
def load_columns(places, cols, mask, DTYPE: tl.constexpr, EVICT: tl.constexpr):
    """Logits and their direction; -inf and 0 where masked."""
    other = None if mask is None else float("-inf")
    x = tl.load(places.logits[0] + cols, mask=mask, other=other, eviction_policy=EVICT).to(DTYPE)
    tangent = tl.zeros(x.shape, DTYPE)
    if len(places.direction) > 0:
        other = None if mask is None else 0.0
        ptrs = places.direction[0] + cols
        tangent = tl.load(ptrs, mask=mask, other=other, eviction_policy=EVICT).to(DTYPE)
    return x, tangent


@triton.jit
def transformed_both(logits, direction, transform, mask):
    """(x, x', the derivative of tanh); x is -inf where masked."""
    x, slope = transformed(logits, transform)
    if len(transform) > 0 and mask is not None:
        x = tl.where(mask, x, float("-inf"))
    tangent = direction
    if len(transform) > 0:
        tangent *= derivative_factor(transform, x.dtype)
    if len(transform) > 1:
        tangent *= slope
    return x, tangent, slope


@triton.jit
def load_shares(places, cols, mask, smooth, like):
    """What classes have in a soft target, see `class_share`, and its derivative; 0 where masked."""
    weight_ptrs, probs_ptrs = None, None
    if len(places.weight) > 0:
        weight_ptrs = places.weight[0] + cols
    if len(places.probs) > 0:
        probs_ptrs = places.probs[0] + cols
    share = class_share(weight_ptrs, probs_ptrs, smooth, mask, like)
    tangent = tl.zeros(like.shape, like.dtype)
    if len(places.probs_direction) > 0:
        smooth_tangent = (smooth[0], 0.0) if len(smooth) > 0 else ()
        ptrs = places.probs_direction[0] + cols
        tangent = class_share(weight_ptrs, ptrs, smooth_tangent, mask, like)
    if mask is not None:
        share, tangent = tl.where(mask, share, 0.0), tl.where(mask, tangent, 0.0)
    return share, tangent


@triton.jit
def rebased(sums, maximum):
    """Sums relative to their maximum as ones relative to another."""
    rebase = exp_of(sums.maximum - maximum)
    return Sums(
        maximum,
        sums.exp * rebase,
        rebased_exp_dot(sums.exp_dot, sums.exp, sums.maximum, maximum),
        sums.moved * rebase,
        rebased_exp_dot(sums.moved_dot, sums.moved, sums.maximum, maximum),
        sums.share,
        sums.share_moved,
        sums.share_tangent,
        rebased_dot(sums.share_tangent_dot, sums.share_tangent, sums.maximum, maximum),
    )


@triton.jit
def sums_update(
    sums, places, cols, mask, transform, smooth,
    DTYPE: tl.constexpr, STEP: tl.constexpr, UNROLL: tl.constexpr, SOFT: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """UNROLL tiles [R, n] of columns, STEP apart, into the sums [R] of their threads; a mask is of
    a single tile."""
    tiles, tangents, maximum = (), (), sums.maximum
    for i in tl.static_range(UNROLL):
        logits, direction = load_columns(places, cols + i * STEP, mask, DTYPE, EVICT)
        x, tangent, _ = transformed_both(logits, direction, transform, mask)
        tiles, tangents = tiles + (x,), tangents + (tangent,)
        maximum = tl.maximum(maximum, tl.max(x, axis=1))
    _, exp, exp_dot, moved, moved_dot, share, share_moved, share_tangent, share_tangent_dot = (
        rebased(sums, maximum)
    )
    for i in tl.static_range(UNROLL):
        difference = tiles[i] - maximum[:, None]
        exps = exp_of(difference)
        exp += tl.sum(exps, axis=1)
        exp_dot += tl.sum(exps * finite(difference), axis=1)
        exps *= tangents[i]
        moved += tl.sum(exps, axis=1)
        moved_dot += tl.sum(exps * finite(difference), axis=1)
        if SOFT:
            shares, share_tangents = load_shares(places, cols + i * STEP, mask, smooth, difference)
            share += tl.sum(shares, axis=1)
            share_moved += tl.sum(shares * tangents[i], axis=1)
            if len(places.probs_direction) > 0:
                dots = share_tangents * difference
                if mask is not None:
                    dots = tl.where(mask, dots, 0.0)
                share_tangent += tl.sum(share_tangents, axis=1)
                share_tangent_dot += tl.sum(dots, axis=1)
    return Sums(
        maximum, exp, exp_dot, moved, moved_dot, share, share_moved, share_tangent,
        share_tangent_dot,
    )  # fmt: skip


@triton.jit
def row_sums(
    row, interior, skew, interior_size, vocab_size, transform, smooth,
    DTYPE: tl.constexpr, VEC: tl.constexpr, BLOCK_V: tl.constexpr, UNROLL: tl.constexpr,
    SOFT: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """The `Sums` of a row. Its edges come first, as a tile of one column a thread."""
    THREADS: tl.constexpr = BLOCK_V // VEC
    zeros = tl.zeros([THREADS], DTYPE)
    lowest = zeros + lowest_finite(DTYPE)
    sums = Sums(lowest, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    edge, is_edge = edge_columns(skew, interior_size, vocab_size, VEC, THREADS)
    sums = sums_update(
        sums, row, edge[:, None], is_edge[:, None], transform, smooth, DTYPE, 0, 1, SOFT, EVICT
    )
    cols, first = tile_columns(BLOCK_V, VEC)
    streamed = streamed_size(0, interior_size, BLOCK_V, UNROLL, 0)
    for start in tl.range(0, streamed, BLOCK_V * UNROLL):
        sums = sums_update(
            sums, interior, start + cols, None, transform, smooth, DTYPE, BLOCK_V, UNROLL, SOFT,
            EVICT,
        )  # fmt: skip
    for start in tl.range(streamed, interior_size, BLOCK_V):
        sums = sums_update(
            sums, interior, start + cols, start + first < interior_size, transform, smooth,
            DTYPE, 0, 1, SOFT, EVICT,
        )  # fmt: skip
    maximum = tl.max(sums.maximum, axis=0)
    parts = rebased(sums, maximum)
    return Sums(
        maximum,
        tl.sum(parts.exp, axis=0),
        tl.sum(parts.exp_dot, axis=0),
        tl.sum(parts.moved, axis=0),
        tl.sum(parts.moved_dot, axis=0),
        tl.sum(parts.share, axis=0),
        tl.sum(parts.share_moved, axis=0),
        tl.sum(parts.share_tangent, axis=0),
        tl.sum(parts.share_tangent_dot, axis=0),
    )


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
def upstream_of(ptr, at, DTYPE: tl.constexpr):
    if ptr is None:
        return tl.full([], 0.0, DTYPE)
    else:
        return tl.load(ptr + at).to(DTYPE)


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
def write_columns(
    logits, direction, places, cols, mask, target, factors, transform, smooth,
    HAS_ENTROPY: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """The tangents of the gradients of logits and of probabilities, whichever have a place.

    target is a class index, counted as cols are, which may be out of range.
    """
    x, tangent, slope = transformed_both(logits, direction, transform, None)
    if len(places.grad) > 0:
        difference = x - factors.maximum
        exps, level = exp_of(difference), factors.level
        if HAS_ENTROPY:
            level -= factors.entropy * finite(difference)
        grad = factors.level_tangent + (tangent - factors.mean) * (level - factors.entropy)
        grad *= exps
        if len(transform) > 1:  # the slope has a tangent too, -2 tanh(x / cap) / cap times its own
            share = tl.where(cols == target, factors.target, 0.0)
            if SOFT:
                shares, _ = load_shares(places, cols, mask, smooth, x)
                share += factors.shares * shares
            bend = (-2.0 * transform[0] / transform[1]) * x * direction
            grad += bend * (exps * level - factors.grad_loss * share)
        if len(places.probs_direction) > 0:
            _, share_tangents = load_shares(places, cols, mask, smooth, x)
            grad -= factors.grad_loss * share_tangents
        if len(transform) > 1:
            grad *= slope
        grad = grad.to(places.grad[0].dtype.element_ty)
        tl.store(places.grad[0] + cols, grad, mask=mask, eviction_policy="evict_first")
    if len(places.grad_probs) > 0:
        weight_ptrs = None
        if len(places.weight) > 0:
            weight_ptrs = places.weight[0] + cols
        grad = gradient_of_probabilities(
            tangent, factors.mean, factors.grad_probs, weight_ptrs, mask,
            places.grad_probs[0].dtype.element_ty,
        )  # fmt: skip
        tl.store(places.grad_probs[0] + cols, grad, mask=mask, eviction_policy="evict_first")


@triton.jit
def write_row(
    row, interior, skew, interior_size, vocab_size, target, factors, transform, smooth,
    DTYPE: tl.constexpr, VEC: tl.constexpr, BLOCK_V: tl.constexpr, UNROLL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """`write_columns` for all of a row, the last first. Its gradient may lie where its logits do:
    what is stored at once is loaded before."""
    cols, first = tile_columns(BLOCK_V, VEC)
    interior_target = target - (VEC - skew)
    streamed = streamed_size(0, interior_size, BLOCK_V, UNROLL, 0)
    for start in tl.range(streamed, interior_size, BLOCK_V):
        at, mask = start + cols, start + first < interior_size
        logits, direction = load_columns(interior, at, mask, DTYPE, "evict_first")
        write_columns(
            logits, direction, interior, at, mask, interior_target, factors, transform, smooth,
            HAS_ENTROPY, SOFT,
        )  # fmt: skip
    for done in tl.range(0, streamed, BLOCK_V * UNROLL):
        last = streamed - BLOCK_V - done
        tiles, tangents = (), ()
        for i in tl.static_range(UNROLL):
            at = last - i * BLOCK_V + cols
            logits, direction = load_columns(interior, at, None, DTYPE, "evict_first")
            tiles, tangents = tiles + (logits,), tangents + (direction,)
        for i in tl.static_range(UNROLL):
            write_columns(
                tiles[i], tangents[i], interior, last - i * BLOCK_V + cols, None, interior_target,
                factors, transform, smooth, HAS_ENTROPY, SOFT,
            )  # fmt: skip
    edge, is_edge = edge_columns(skew, interior_size, vocab_size, VEC)
    logits, direction = load_columns(row, edge, is_edge, DTYPE, "evict_first")
    write_columns(
        logits, direction, row, edge, is_edge, target, factors, transform, smooth,
        HAS_ENTROPY, SOFT,
    )  # fmt: skip


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
