"""Tiles of a row and of a direction: what they add to the sums of its tangents, and the tangent of
their gradient. The formulas are in tangents.py."""

from typing import NamedTuple

import triton
import triton.language as tl

from .online_softmax import lowest_finite, rebased_dot, rebased_exp_dot, rounded
from .row_access import beside_interior, edge_columns, streamed_size, tile_columns
from .targets import class_share, gradient_of_probabilities
from .transform import derivative_factor, exp_of, finite, transformed


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
        tl.sum(rounded(parts.exp), axis=0),
        tl.sum(parts.exp_dot, axis=0),
        tl.sum(rounded(parts.moved), axis=0),
        tl.sum(parts.moved_dot, axis=0),
        tl.sum(parts.share, axis=0),
        tl.sum(parts.share_moved, axis=0),
        tl.sum(parts.share_tangent, axis=0),
        tl.sum(parts.share_tangent_dot, axis=0),
    )


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
