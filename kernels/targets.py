"""What a target is to a row: its share of every class, the loss and the gradient that follow, and
where they are stored."""

import triton
import triton.language as tl

from .row_access import NOWHERE
from .transform import exp_of, finite, transformed


@triton.jit
def load_target(targets_row_ptr, ignore_index, vocab_size, shard_ptr=None):
    """(target, ignored, in_range) of one row; the target is only safe to use where in range, and
    never is where the targets are probabilities. Of a shard it is the place among its columns."""
    if targets_row_ptr.dtype.element_ty.is_floating():
        never = tl.full([], False, tl.int1)
        return tl.full([], 0, tl.int64), never, never
    else:
        target = tl.load(targets_row_ptr).to(tl.int64)
        ignored = target == ignore_index
        if shard_ptr is not None:
            target -= tl.load(shard_ptr)
        return target, ignored, (target >= 0) & (target < vocab_size)


@triton.jit
def n_classes_of(vocab_size, shard_ptr):
    """How many classes there are, where `vocab_size` columns are here."""
    return vocab_size if shard_ptr is None else tl.load(shard_ptr + 1)


@triton.jit
def smooth_of(label_smoothing, vocab_size, DTYPE: tl.constexpr, HAS_SMOOTHING: tl.constexpr):
    """(1 - s, s / C), or () without smoothing."""
    if HAS_SMOOTHING:
        smoothing = tl.full([], label_smoothing, DTYPE)  # a Python float in the interpreter
        return (1.0 - smoothing, smoothing / tl.full([], vocab_size, DTYPE))
    else:
        return ()


@triton.jit
def class_share(weight_ptrs, probs_ptrs, smooth, exists, like):
    """What each class has in a soft target, in the shape and dtype of `like`.

    weight * ((1 - s) * p + s / C) of probabilities, smooth being (1 - s, s / C) or (); the weight
    alone, or 1, of a smoothed class index, whose s / C is in `loss_factors`. Where nothing exists
    it is anything: the caller masks its sum, or its store.
    """
    share = tl.full(like.shape, 1.0, like.dtype)
    if probs_ptrs is not None:
        share = tl.load(probs_ptrs, mask=exists).to(like.dtype)
        if len(smooth) > 0:
            share = share * smooth[0] + smooth[1]
    if weight_ptrs is not None:
        share *= tl.load(weight_ptrs, mask=exists).to(like.dtype)
    return share


@triton.jit
def loss_factors(
    target, in_range, weight_ptr, row_weight, smooth, vocab_size,
    PROBS: tl.constexpr, DTYPE: tl.constexpr, SHARD: tl.constexpr = False,
):  # fmt: skip
    """(target_factor, lse_factor, class_factor) of targets of any shape: the loss of a row is
    lse_factor * lse - target_factor * x[target] - class_factor * sum_c share[c] * x[c], its
    gradient lse_factor * softmax - target_factor * onehot - class_factor * share. row_weight is the
    sum of the shares, where they are loaded.

    NaN where the target is out of range: that poisons loss and gradient of its row, and no other.
    Of a SHARD, whose columns alone this is then about, the target may be another's.
    """
    if PROBS:
        return tl.zeros_like(row_weight), row_weight, tl.full([], 1.0, DTYPE)
    else:
        target_factor = tl.where(in_range, 1.0, 0.0 if SHARD else float("nan")).to(DTYPE)
        if weight_ptr is not None:
            target_factor *= tl.load(weight_ptr + target, mask=in_range, other=0.0).to(DTYPE)
        else:
            row_weight = tl.full([], vocab_size, DTYPE)
        lse_factor = target_factor
        class_factor = tl.full([], 0.0, DTYPE)
        if len(smooth) > 0:
            class_factor = smooth[1]
            target_factor *= smooth[0]
            lse_factor = target_factor + class_factor * row_weight
        return target_factor, lse_factor, class_factor


@triton.jit
def loss_of(row_max, row_sum, row_dot, x_target, factors, z_loss, HAS_Z_LOSS: tl.constexpr):
    """The losses of rows, from their statistics and `loss_factors`."""
    target_factor, lse_factor, class_factor = factors
    # lse - x is log(sum) + (max - x): a common offset of the logits cancels before it can round
    log_sum = tl.log(row_sum)
    loss = lse_factor * log_sum - target_factor * (x_target - row_max) - class_factor * row_dot
    if HAS_Z_LOSS:
        lse, z_loss = row_max + log_sum, tl.full([], z_loss, row_max.dtype)
        loss += z_loss * lse * lse
    return loss


@triton.jit
def softmax_factor_of(row_max, row_sum, lse_factor, z_loss, HAS_Z_LOSS: tl.constexpr):
    """What the exponentials of a row have in its gradient: that of z_loss * lse**2 is 2 z lse."""
    if HAS_Z_LOSS:
        lse_factor += 2.0 * tl.full([], z_loss, row_max.dtype) * (row_max + tl.log(row_sum))
    return lse_factor / row_sum


@triton.jit
def gradient_tile(
    x, transform, row_max, softmax_factor, entropy_factor, class_grad, weight_ptrs, probs_ptrs,
    smooth, mask, SOFT: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of logits, but for the target's column: no compare and no division.

    softmax_factor is grad_loss * `softmax_factor_of`, class_grad is grad_loss * class_factor, with
    the `derivative_factor` in grad_loss; entropy_factor is () or (the same of grad_entropy,), whose
    other half is in softmax_factor.
    """
    x, slope = transformed(x, transform)
    difference = x - row_max
    grad = exp_of(difference)
    if len(entropy_factor) > 0:
        grad *= softmax_factor - entropy_factor[0] * finite(difference)
    else:
        grad *= softmax_factor
    if SOFT:
        grad -= class_grad * class_share(weight_ptrs, probs_ptrs, smooth, mask, x)
    if len(transform) > 1:
        grad *= slope
    return grad


@triton.jit
def gradient_at_target(
    x_target, transform, row_max, softmax_factor, entropy_factor, grad_target, class_grad,
    weight_ptr, smooth, target, in_range, SOFT: tl.constexpr,
):  # fmt: skip
    """The gradient of the target's logit, from float32: stored once the rest of its row is.

    grad_target is grad_loss * target_factor.
    """
    weight_ptr = weight_ptr + target if weight_ptr is not None else None
    grad = gradient_tile(
        x_target, transform, row_max, softmax_factor, entropy_factor, class_grad, weight_ptr, None,
        smooth, in_range, SOFT,
    )  # fmt: skip
    _, slope = transformed(x_target, transform)  # once more for the reader, not for the compiler
    return grad - grad_target * slope


@triton.jit
def gradient_of_probabilities(
    difference, log_sum, grad_share, weight_ptrs, mask, OUT: tl.constexpr
):
    """grad_share * weight * (lse - x): what a probability is multiplied by in the loss."""
    grad = grad_share * (log_sum - difference)
    if weight_ptrs is not None:
        grad *= tl.load(weight_ptrs, mask=mask).to(grad.dtype)
    if OUT.primitive_bitwidth == 16:  # the interpreter's float64 to bfloat16 is wrong
        grad = grad.to(tl.float32)
    return grad.to(OUT)


@triton.jit
def store_losses(losses_ptr, unweighted_ptr, sample_weight_ptr, rows, losses, mask):
    """Of rows that count."""
    if unweighted_ptr is not None:
        tl.store(unweighted_ptr + rows, losses, mask=mask)
    if sample_weight_ptr is not None:
        losses *= tl.load(sample_weight_ptr + rows, mask=mask).to(losses.dtype)
    tl.store(losses_ptr + rows, losses, mask=mask)


@triton.jit
def store_stats(
    lse_ptr, entropy_ptr, predictions_ptr, rows, row_max, row_sum, row_exp_dot, row_argmax, mask
):
    """Of rows that count."""
    log_sum = tl.log(row_sum)
    lse = tl.where(row_max == float("inf"), row_max, row_max + log_sum)  # not inf + NaN
    tl.store(lse_ptr + rows, lse, mask=mask)
    tl.store(entropy_ptr + rows, log_sum - row_exp_dot / row_sum, mask=mask)
    predictions = tl.where(row_argmax == NOWHERE, 0, row_argmax)  # all logits -inf
    tl.store(predictions_ptr + rows, predictions.to(tl.int64), mask=mask)


@triton.jit
def store_ignored(losses_ptr, unweighted_ptr, lse_ptr, entropy_ptr, predictions_ptr, rows, mask):
    """Whatever their sample_weight is, NaN included."""
    tl.store(losses_ptr + rows, 0.0, mask=mask)
    if unweighted_ptr is not None:
        tl.store(unweighted_ptr + rows, 0.0, mask=mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, 0.0, mask=mask)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + rows, 0.0, mask=mask)
        tl.store(predictions_ptr + rows, -1, mask=mask)


@triton.jit
def store_row(
    statistics, x_target, target, in_range, weight_ptr, sample_weight_ptr, transform, smooth,
    z_loss, vocab_size, row, losses_ptr, unweighted_ptr, lse_ptr, entropy_ptr, predictions_ptr,
    row_max_ptr, row_sum_ptr, row_weight_ptr,
    PROBS: tl.constexpr, HAS_Z_LOSS: tl.constexpr,
):  # fmt: skip
    """All that is known of a row once it is read; returns its `loss_factors`."""
    row_max, row_sum, row_dot, row_weight, row_exp_dot, row_argmax = statistics
    if row_max_ptr is not None:
        tl.store(row_max_ptr + row, row_max)
        tl.store(row_sum_ptr + row, row_sum)
    if row_weight_ptr is not None:
        tl.store(row_weight_ptr + row, row_weight)
    if lse_ptr is not None:
        store_stats(
            lse_ptr, entropy_ptr, predictions_ptr, row, row_max, row_sum, row_exp_dot, row_argmax,
            None,
        )  # fmt: skip
    x_target, _ = transformed(x_target, transform)
    factors = loss_factors(
        target, in_range, weight_ptr, row_weight, smooth, vocab_size, PROBS, row_max.dtype
    )
    loss = loss_of(row_max, row_sum, row_dot, x_target, factors, z_loss, HAS_Z_LOSS)
    store_losses(losses_ptr, unweighted_ptr, sample_weight_ptr, row, loss, None)
    return factors


@triton.jit
def store_share(
    statistics, x_target, target, in_range, weight_ptr, transform, smooth, vocab_size, row,
    shard_ptr, dots_ptr, exp_dots_ptr, predictions_ptr, row_max_ptr, row_sum_ptr,
):  # fmt: skip
    """What a shard of the classes knows of a row, see `ShardStatistics`."""
    row_max, row_sum, row_dot, row_weight, row_exp_dot, row_argmax = statistics
    tl.store(row_max_ptr + row, row_max)
    tl.store(row_sum_ptr + row, row_sum)
    x_target, _ = transformed(x_target, transform)
    target_factor, _, class_factor = loss_factors(
        target, in_range, weight_ptr, row_weight, smooth, vocab_size, False, row_max.dtype, True
    )
    dot = tl.where(in_range, target_factor * (x_target - row_max), 0.0)
    tl.store(dots_ptr + row, dot + class_factor * row_dot)
    if exp_dots_ptr is not None:
        tl.store(exp_dots_ptr + row, row_exp_dot)
        predictions = tl.where(row_argmax == NOWHERE, -1, row_argmax + tl.load(shard_ptr))
        tl.store(predictions_ptr + row, predictions)
