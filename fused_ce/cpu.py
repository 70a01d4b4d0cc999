"""The loss on the CPU: the rows of the reference, a block at a time, so that it stays in cache.

Eager `F.cross_entropy` streams tensors of the size of the logits through memory several times and
holds three of them at its peak. Here every pass over a block but the first runs in cache, and the
only tensor of the size of the logits is the gradient. The arithmetic is that of the kernels:
subtract the row's maximum first (exact at any offset of the logits), then powers of two, which
PyTorch computes four times as fast as those of e.

The public functions are those of kernels/launch.py; autograd.py calls either.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from fused_ce.options import LossOptions
from fused_ce.rows import Direction, Result, Rows, Tangents, Upstream, is_dense

LOG2E = math.log2(math.e)
BLOCK_ELEMENTS_PER_THREAD = 1 << 19  # 2 MiB of float32


def block_rows(vocab_size: int, n_threads: int, in_scratch: bool) -> int:
    """How many rows to work on at once: the one place that decides.

    Measured with two threads, V = 65 to 128,256, float32 and bfloat16: smaller blocks lose up to a
    fifth in the start of their operations, larger ones win nothing. Where a block needs scratch
    memory (16-bit logits, some options) it is half as large: 1 MiB a thread, or four rows.
    """
    elements = BLOCK_ELEMENTS_PER_THREAD // (2 if in_scratch else 1)
    return max(4 * n_threads, elements * n_threads // vocab_size)


def forward(rows: Rows, options: LossOptions, unweighted: bool = False) -> Result:
    """The loss of rows, and what else options ask for; see rows.py."""
    terms = _row_terms(rows, options)
    sums = _empty_sums(rows, options)
    _pass_over_rows(rows, options, terms, sums)
    return _result(terms, sums, options, unweighted)


def forward_with_grad(
    rows: Rows, options: LossOptions, grad_logits: torch.Tensor, unweighted: bool = False
) -> Result:
    """As forward; fills grad_logits (like the logits, or they themselves) for an upstream of 1."""
    terms = _row_terms(rows, options)
    sums = _empty_sums(rows, options)
    grads = _grad_terms(terms, Upstream(1.0), sums, options)
    _pass_over_rows(rows, options, terms, sums, grads, grad_logits)
    return _result(terms, sums, options, unweighted)


def backward(
    upstream: Upstream,
    rows: Rows,
    saved: tuple[()],
    options: LossOptions,
    grad_logits: torch.Tensor | None,
    grad_targets: torch.Tensor | None,
) -> None:
    """Fills grad_logits (like the logits, or they themselves) and grad_targets, where given."""
    terms = _row_terms(rows, options)
    sums = _empty_sums(rows, options, finds_loss=False)
    grads = _grad_terms(terms, upstream, sums, options)
    _pass_over_rows(rows, options, terms, sums, grads, grad_logits, grad_targets)


def scale(grad_logits: torch.Tensor, grad_losses: torch.Tensor, out: torch.Tensor) -> None:
    """out = grad_logits * grad_losses, () or (n_rows,); out may be grad_logits.

    A zero stays zero: an upstream gradient of inf or NaN does not reach the ignored rows.
    """
    if grad_losses.dim() == 0 and grad_losses == 1.0 and out is grad_logits:
        return
    dtype = _compute_dtype(grad_logits)
    all_finite = bool(grad_losses.isfinite().all())
    factors = grad_losses.to(dtype).expand(grad_logits.shape[:2].numel())
    for rows, groups, columns in _blocks(grad_logits, _rows_at_once(grad_logits, True)):
        block = grad_logits[groups, columns]
        scaled = block.to(dtype) * factors[rows].view(*block.shape[:2], 1)
        if not all_finite:
            scaled.masked_fill_(block == 0.0, 0.0)
        out[groups, columns] = scaled


def tangents(
    direction: Direction,
    upstream: Upstream,
    rows: Rows,
    options: LossOptions,
    grad_logits: torch.Tensor | None = None,
    grad_targets: torch.Tensor | None = None,
) -> Tangents:
    """Derivatives of rows along a direction, without sample_weight and reduction.

    Fills grad_logits and grad_targets, where given, with those of what `backward` would write for
    this upstream gradient, (n_rows,) each: a product with the Hessian.
    """
    logits, options = rows.logits, replace(options, reduction="none")
    terms = _row_terms(rows, options)
    sums = _empty_sums(rows, options, finds_loss=False)
    grads = _grad_terms(terms, upstream, sums, options)
    results = Tangents(*(torch.empty_like(sums.exp).squeeze(1) for _ in range(3)))
    for part, groups, columns in _blocks(logits, _rows_at_once(logits, in_scratch=True)):
        block = _tangent_block(rows, direction, options, terms, part, groups, columns)
        found = _tangents_of_rows(block, options, terms, part)
        for result, values in zip(results, found, strict=True):
            result[part] = _counted(values, _at(terms.ignored, part))
        if grad_logits is not None:
            out = grad_logits[groups, columns]
            out.copy_(_tangent_of_gradient(block, options, terms, grads, part).view(out.shape))
        if grad_targets is not None:
            out = grad_targets[groups, columns]
            out.copy_(_tangent_of_soft_gradient(block, options, terms, grads, part).view(out.shape))
    return results


class _TangentBlock(NamedTuple):
    """Of the rows of a block, (n, vocab_size) or (n, 1), in the dtype of the arithmetic.

    With p the softmax of the transformed logits x: deviation is the tangent of x less its mean
    under p, and surplus x less its mean under p.
    """

    p: torch.Tensor
    x: torch.Tensor  # less the row's maximum
    x_tangent: torch.Tensor
    deviation: torch.Tensor
    surplus: torch.Tensor
    slope: torch.Tensor | None  # of the softcap
    cap_tangent: torch.Tensor | None  # the tangent of the slope, over the slope
    log_sum: torch.Tensor
    lse: torch.Tensor
    mean: torch.Tensor  # of the tangent of x, which is the tangent of lse
    covariance: torch.Tensor  # of the two
    soft: torch.Tensor | None  # what probabilities weigh x with
    soft_tangent: torch.Tensor | None


def _tangent_block(rows, direction, options, terms, part, groups, columns) -> _TangentBlock:
    dtype, vocab_size = _compute_dtype(rows.logits), rows.logits.shape[2]
    ignored = _at(terms.ignored, part)

    def loaded(tensor):
        values = tensor[groups, columns].to(dtype).reshape(-1, vocab_size)
        return values if ignored is None else values.masked_fill(ignored, 0.0)

    x, slope, cap_tangent = loaded(rows.logits), None, None
    x_tangent = torch.zeros_like(x) if direction.logits is None else loaded(direction.logits)
    x_tangent = x_tangent * options.logit_scale
    if options.softcap is not None:
        tanh = torch.tanh(x * (options.logit_scale / options.softcap))
        slope = 1.0 - tanh.square()
        cap_tangent = tanh * x_tangent * (-2.0 / options.softcap)
        x, x_tangent = tanh * options.softcap, x_tangent * slope
    elif options.logit_scale != 1.0:
        x = x * options.logit_scale
    maximum = x.amax(dim=1, keepdim=True)
    x = x - maximum
    p = x.exp()
    total = p.sum(dim=1, keepdim=True)
    p /= total
    # Where p is 0 in any dtype, 0 times this and an upstream gradient has to be 0 too.
    finite = x.clamp(min=-2000.0)
    mean = (p * x_tangent).sum(dim=1, keepdim=True)
    deviation = x_tangent - mean
    surplus = finite - (p * finite).sum(dim=1, keepdim=True)
    covariance = (p * deviation * surplus).sum(dim=1, keepdim=True)
    soft = soft_tangent = None
    if rows.has_probabilities:
        weight = 1.0 if terms.weight is None else terms.weight.T
        smoothing = options.label_smoothing
        soft = weight * (loaded(rows.targets) * (1.0 - smoothing) + smoothing / vocab_size)
        if direction.targets is not None:
            soft_tangent = loaded(direction.targets) * (1.0 - smoothing) * weight
    log_sum = total.log()
    return _TangentBlock(
        p, x, x_tangent, deviation, surplus, slope, cap_tangent, log_sum, maximum + log_sum, mean,
        covariance, soft, soft_tangent,
    )  # fmt: skip


def _tangents_of_rows(block, options, terms, part) -> tuple[torch.Tensor, ...]:
    """(n, 1) each, of losses, lse and entropy."""
    if block.soft is None:
        losses = _at(terms.target, part) * block.deviation.gather(1, _at(terms.targets, part))
        if terms.smoothing:
            weight = 1.0 if terms.weight is None else terms.weight.T
            even = (weight * block.deviation).sum(dim=1, keepdim=True)
            losses = losses + terms.smoothing * even
    else:
        losses = (block.soft * block.deviation).sum(dim=1, keepdim=True)
    if block.soft_tangent is not None:
        surprise = block.log_sum - block.x
        losses = losses - (block.soft_tangent * surprise).sum(dim=1, keepdim=True)
    losses = 2.0 * options.z_loss * block.lse * block.mean - losses
    return losses, block.mean.clone(), -block.covariance


def _tangent_of_gradient(block, options, terms, grads, part) -> torch.Tensor:
    """The gradient of x is `of_lse * p - losses * shares - entropy * p * surplus`; its tangent,
    and through the cap that of its slope too."""
    of_losses = _at(grads.x, part)
    soft_sum = _at(terms.lse, part)
    if block.soft is not None:
        soft_sum = block.soft.sum(dim=1, keepdim=True)
    of_lse = of_losses * (soft_sum + 2.0 * options.z_loss * block.lse)
    of_lse_tangent = of_losses * (2.0 * options.z_loss * block.mean)
    if grads.lse is not None:
        of_lse = of_lse + _at(grads.lse, part)
    if block.soft_tangent is not None:
        total = block.soft_tangent.sum(dim=1, keepdim=True)
        of_lse_tangent = of_lse_tangent + of_losses * total
    tangent = of_lse * block.deviation + of_lse_tangent
    if grads.entropy is not None:
        entropy = _at(grads.entropy, part)
        bent = block.deviation * (block.surplus + 1.0) - block.covariance
        tangent = tangent - entropy * bent
    tangent = tangent * block.p
    if block.soft_tangent is not None:
        tangent = tangent - of_losses * block.soft_tangent
    if block.slope is not None:
        gradient = block.p * of_lse
        if grads.entropy is not None:
            gradient = gradient - entropy * block.p * block.surplus
        gradient = gradient - of_losses * _shares(block, terms, part)
        tangent = block.slope * (tangent + block.cap_tangent * gradient)
    return tangent


def _shares(block, terms, part) -> torch.Tensor:
    """What each class has in a target, (n, vocab_size)."""
    if block.soft is not None:
        return block.soft
    weight = 1.0 if terms.weight is None else terms.weight.T
    shares = torch.zeros_like(block.p) + terms.smoothing * weight
    target = torch.as_tensor(_at(terms.target, part), dtype=shares.dtype).expand(len(shares), 1)
    return shares.scatter_add_(1, _at(terms.targets, part), target)


def _tangent_of_soft_gradient(block, options, terms, grads, part) -> torch.Tensor:
    """The gradient of probabilities is `losses * (1 - smoothing) * weight * (lse - x)`."""
    factor = _at(grads.losses, part) * (options.label_smoothing - 1.0)
    tangent = factor * block.deviation
    return tangent if terms.weight is None else tangent * terms.weight.T


def _pass_over_rows(
    rows: Rows,
    options: LossOptions,
    terms: "_RowTerms",
    sums: "_RowSums",
    grads: "_GradTerms | None" = None,
    grad_logits: torch.Tensor | None = None,
    grad_targets: torch.Tensor | None = None,
) -> None:
    """Fills the sums and the gradients that are given."""
    logits, vocab_size = rows.logits, rows.logits.shape[2]
    needs_mean = sums.mean is not None or grads is not None and grads.entropy is not None
    scratch, at_once = _scratch(rows, options, needs_mean, grad_logits)
    for part, groups, columns in _blocks(logits, at_once):
        n = part.stop - part.start
        in_place = scratch.work is None
        work = grad_logits[groups, columns].view(n, vocab_size) if in_place else scratch.work[:n]
        block = _block(part, work, scratch, terms)
        x = _load(logits[groups, columns], block, terms, options)
        if block.soft is not None:
            _load_soft(rows.targets[groups, columns], block, terms, options)
        stats = _sum_up(x, block, terms, sums)
        if grad_targets is not None:
            out = grad_targets[groups, columns]
            out.copy_(_grad_of_soft(block, stats, terms, grads, options).view(out.shape))
        if needs_mean:
            stats = _with_mean(block, stats, sums)
        if grad_logits is not None:
            _make_gradient(block, stats, terms, grads, options)
            if not in_place:
                out = grad_logits[groups, columns]
                out.copy_(work.view(out.shape))


class _Block(NamedTuple):
    """The rows of a block, their targets, and buffers (n, vocab_size) of the arithmetic's dtype.

    For all blocks together the buffers are as large as the largest; None where a pass does without.
    """

    rows: slice | None
    targets: torch.Tensor | None
    work: torch.Tensor | None  # x, then x less the row's maximum, then the gradient
    exp: torch.Tensor | None  # its powers: work itself where nobody needs both
    soft: torch.Tensor | None  # what probabilities weigh x with
    slope: torch.Tensor | None  # of the softcap


class _RowStats(NamedTuple):
    """Of the rows of a block, (n, 1): maximum of x, sum of exp(x - maximum), mean x - maximum."""

    maximum: torch.Tensor
    exp: torch.Tensor
    mean: torch.Tensor | None = None


class _RowSums(NamedTuple):
    """The same of all rows, (n_rows, 1), and what else the loss and its stats are made of."""

    exp: torch.Tensor
    x_target: torch.Tensor | None = None  # less the row's maximum; of probabilities soft * x
    x_smooth: torch.Tensor | None = None
    maximum: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    predictions: torch.Tensor | None = None  # (n_rows,)


def _scratch(rows, options, needs_mean, grad_logits) -> tuple[_Block, int]:
    """The buffers that a pass needs, and how many rows they hold."""
    logits, dtype, soft = rows.logits, _compute_dtype(rows.logits), rows.has_probabilities
    work = grad_logits is None or not _can_hold_work(grad_logits, dtype)
    exp = soft or needs_mean
    slope = options.softcap is not None and grad_logits is not None
    at_once = _rows_at_once(logits, work or exp or slope)
    size = min(logits.shape[0] * logits.shape[1], at_once), logits.shape[2]

    def buffer(needed):
        return logits.new_empty(size, dtype=dtype) if needed else None

    return _Block(None, None, buffer(work), buffer(exp), buffer(soft), buffer(slope)), at_once


def _block(rows, work, scratch, terms) -> _Block:
    n, (*_, exp, soft, slope) = work.shape[0], scratch
    return _Block(
        rows,
        _at(terms.targets, rows),
        work,
        work if exp is None else exp[:n],
        soft if soft is None else soft[:n],
        slope if slope is None else slope[:n],
    )


def _empty_sums(rows, options, finds_loss=True) -> _RowSums:
    logits, n_rows = rows.logits, rows.logits.shape[0] * rows.logits.shape[1]
    # new_empty, not torch.empty: that would follow torch.set_default_device
    exp = logits.new_empty(n_rows, 1, dtype=_compute_dtype(logits))
    if not finds_loss:
        return _RowSums(exp)
    smooth = options.label_smoothing and not rows.has_probabilities
    stats = options.return_stats
    return _RowSums(
        exp,
        torch.empty_like(exp),
        torch.empty_like(exp) if smooth else None,
        torch.empty_like(exp) if stats or options.z_loss else None,
        torch.empty_like(exp) if stats else None,
        logits.new_empty(n_rows, dtype=torch.int64) if stats else None,
    )


def _load(logits, block, terms, options) -> torch.Tensor:
    """A block of logits, scaled and capped, as x (n, vocab_size): in work, or where they lie."""
    work = block.work
    x = logits.view(work.shape) if logits.shape[0] == 1 else logits
    as_they_are = options.logit_scale == 1.0 and options.softcap is None and terms.ignored is None
    if x.dim() == 3 or x.dtype != work.dtype or not as_they_are:
        work.view(x.shape).copy_(x)
        x = work
    if terms.ignored is not None:  # may hold anything: 0 * NaN would come back in its gradient
        x.masked_fill_(_at(terms.ignored, block.rows), 0.0)
    if options.softcap is not None:
        x.mul_(options.logit_scale / options.softcap).tanh_()
        if block.slope is not None:
            torch.mul(x, x, out=block.slope).neg_().add_(1.0)
        x.mul_(options.softcap)
    elif options.logit_scale != 1.0:
        x.mul_(options.logit_scale)
    return x


def _load_soft(probabilities, block, terms, options) -> None:
    """What weighs x: weight * ((1 - smoothing) * probabilities + smoothing / vocab_size)."""
    soft = block.soft
    soft.view(probabilities.shape).copy_(probabilities)
    if options.label_smoothing:
        soft.mul_(1.0 - options.label_smoothing).add_(options.label_smoothing / soft.shape[1])
    if terms.weight is not None:
        soft.mul_(terms.weight.T)
    torch.sum(soft, dim=1, keepdim=True, out=_at(terms.lse, block.rows))


def _sum_up(x, block, terms, sums) -> _RowStats:
    """What the loss needs of every row; leaves (x - maximum) * LOG2E in work, its powers in exp."""
    rows, targets, work, exp, soft, _ = block
    maximum = x.amax(dim=1, keepdim=True)
    if sums.maximum is not None:
        sums.maximum[rows] = maximum
    if sums.predictions is not None:
        sums.predictions[rows] = _first_argmax(x, maximum, exp)
    torch.sub(x, maximum, out=work)
    if sums.x_target is not None and soft is None:
        torch.gather(work, 1, targets, out=_at(sums.x_target, rows))
    elif sums.x_target is not None:
        torch.sum(torch.mul(soft, work, out=exp), dim=1, keepdim=True, out=_at(sums.x_target, rows))
    if sums.x_smooth is not None:
        # Not a matrix product: autocast would run it in bfloat16.
        weighted = work if terms.weight is None else work * terms.weight.T
        torch.sum(weighted, dim=1, keepdim=True, out=_at(sums.x_smooth, rows))
    torch.exp2(work.mul_(LOG2E), out=exp)
    return _RowStats(maximum, torch.sum(exp, dim=1, keepdim=True, out=_at(sums.exp, rows)))


def _first_argmax(x, maximum, scratch) -> torch.Tensor:
    """x.argmax(dim=1) in a quarter of its time: the largest of the places counted from the end.

    Exact in float32 up to 2**24 classes.
    """
    vocab_size = x.shape[1]
    from_end = torch.arange(vocab_size, 0, -1, dtype=scratch.dtype, device=x.device)
    torch.eq(x, maximum, out=scratch)
    first = vocab_size - scratch.mul_(from_end).amax(dim=1).long()
    if (first == vocab_size).any():  # NaN equals nothing
        first = torch.where(first == vocab_size, x.argmax(dim=1), first)
    return first


def _with_mean(block, stats, sums) -> _RowStats:
    """Adds the mean of x - maximum; leaves (x - maximum) * LOG2E * exp in work."""
    work = block.work
    work.clamp_(min=torch.finfo(work.dtype).min)  # 0 * -inf is 0 in an entropy
    mean = work.mul_(block.exp).sum(dim=1, keepdim=True).div_(stats.exp * LOG2E)
    if sums.mean is not None:
        sums.mean[block.rows] = mean
    return stats._replace(mean=mean)


def _grad_of_soft(block, stats, terms, grads, options) -> torch.Tensor:
    """The gradient of probabilities, (1 - smoothing) * weight * (lse - x)."""
    log_probs = (block.work / -LOG2E).add_(stats.exp.log())
    log_probs.mul_(_at(grads.losses, block.rows) * (1.0 - options.label_smoothing))
    return log_probs if terms.weight is None else log_probs.mul_(terms.weight.T)


def _make_gradient(block, stats, terms, grads, options) -> None:
    """The gradient of the logits in work, from what _sum_up and _with_mean left there."""
    rows, targets, work, exp, soft, slope = block
    of_lse = _at(grads.x, rows) * _at(terms.lse, rows)
    if options.z_loss:
        lse = stats.maximum + stats.exp.log()
        of_lse = of_lse + 2.0 * options.z_loss * _at(grads.x, rows) * lse
    if grads.lse is not None:
        of_lse = of_lse + _at(grads.lse, rows)
    if grads.entropy is not None:  # its gradient is softmax * (mean - x)
        of_lse = of_lse + _at(grads.entropy, rows) * stats.mean
        work.mul_(_at(grads.entropy, rows) / (stats.exp * -LOG2E))
        work.addcmul_(exp, of_lse / stats.exp)
    else:
        torch.mul(exp, stats.exp.reciprocal().mul_(of_lse), out=work)
    if soft is not None:
        work.addcmul_(soft, _at(grads.minus_target, rows))
    else:
        if terms.smoothing:
            even = _at(grads.smooth, rows)
            work.sub_(even if terms.weight is None else even * terms.weight.T)
        work.scatter_add_(1, targets, _at(grads.minus_target, rows))
    if slope is not None:
        work.mul_(slope)


def _result(terms, sums, options, unweighted) -> Result:
    """The loss and the stats from the sums of all rows, which it overwrites."""
    log_sum, lse, entropy = sums.exp.log_(), None, None
    if sums.maximum is not None:
        lse = sums.maximum + log_sum
    if sums.mean is not None:
        entropy = log_sum - sums.mean
    losses = _times(log_sum, terms.lse).sub_(_times(sums.x_target, terms.target))
    if sums.x_smooth is not None:
        losses -= terms.smoothing * sums.x_smooth
    if options.z_loss:
        losses.addcmul_(lse, lse, value=options.z_loss)
    before = _counted(losses.clone(), terms.ignored) if unweighted else None
    if terms.sample_weight is not None:
        losses *= terms.sample_weight
    losses = _counted(losses, terms.ignored)
    loss = losses
    if options.reduction != "none":
        loss = losses.sum().div_(terms.divisor)
    divisor = None
    if options.reduction == "mean" and (unweighted or options.return_stats):
        divisor = losses.new_full((), terms.divisor)
    if not options.return_stats:
        return Result(loss, unweighted=before, divisor=divisor)
    # An infinite maximum leaves NaN in its row, but the sum of powers is known.
    lse = torch.where(sums.maximum.isinf(), sums.maximum, lse)
    predictions = sums.predictions
    if terms.ignored is not None:
        predictions = predictions.masked_fill_(terms.ignored.squeeze(1), -1)
    return Result(
        loss,
        None if loss is losses else losses,
        before,
        _counted(lse, terms.ignored),
        _counted(entropy, terms.ignored),
        predictions,
        divisor,
    )


def _times(values: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    """In place."""
    return values if isinstance(factor, float) and factor == 1.0 else values.mul_(factor)


def _counted(values: torch.Tensor, ignored: torch.Tensor | None) -> torch.Tensor:
    """(n_rows, 1) in place as (n_rows,), 0 in ignored rows."""
    if ignored is not None:
        values.masked_fill_(ignored, 0.0)
    return values.squeeze_(1)  # no view, which autograd would not let the user change in place


def _valid_targets(
    targets: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Targets (n_rows, 1), all of them classes, and which rows are ignored, if any is."""
    targets = targets.reshape(-1, 1).long()
    if targets.numel() == 0:
        return targets, None
    lowest, highest = (int(bound) for bound in torch.aminmax(targets))
    if not lowest <= ignore_index <= highest:
        return targets, None
    ignored = targets == ignore_index
    return targets.masked_fill(ignored, 0), ignored


class _RowTerms(NamedTuple):
    """What is known of the rows before the pass: targets, and factors of the loss without z_loss.

    It is `lse * log_sum_exp - target * x_y - smoothing * sum_c weight[c] * x_c` for classes, and
    `lse * log_sum_exp - target * sum_c soft[c] * x_c` for probabilities; times sample_weight. A
    number where it is the same for all rows, which spares a dozen small operations, else
    (n_rows, 1); weight is (C, 1).
    """

    targets: torch.Tensor | None
    ignored: torch.Tensor | None
    lse: torch.Tensor | float  # of probabilities the sum of soft, which the pass fills in
    target: torch.Tensor | float
    smoothing: float
    weight: torch.Tensor | None
    sample_weight: torch.Tensor | None
    divisor: float


def _row_terms(rows, options) -> _RowTerms:
    logits, vocab_size = rows.logits, rows.logits.shape[2]
    dtype, smoothing = _compute_dtype(logits), options.label_smoothing
    weight = None if rows.weight is None else rows.weight.to(dtype)[:, None]
    sample_weight = None if rows.sample_weight is None else rows.sample_weight.to(dtype)[:, None]
    if rows.has_probabilities:
        divisor = _divisor(rows, 1.0, sample_weight, None, options)
        lse = logits.new_empty(logits.shape[0] * logits.shape[1], 1, dtype=dtype)
        return _RowTerms(None, None, lse, 1.0, 0.0, weight, sample_weight, divisor)
    targets, ignored = _valid_targets(rows.targets, options.ignore_index)
    row_weight, weight_sum = 1.0, vocab_size
    if weight is not None:
        weight_sum = float(weight.sum()) if smoothing else 0.0
        row_weight = weight[targets.squeeze(1)]
    divisor = _divisor(rows, row_weight, sample_weight, ignored, options)
    target = row_weight * (1.0 - smoothing)
    smoothing /= vocab_size
    lse = target + smoothing * weight_sum
    return _RowTerms(targets, ignored, lse, target, smoothing, weight, sample_weight, divisor)


def _divisor(rows, row_weight, sample_weight, ignored, options) -> float:
    """What the reduction divides by; 0 where no row counts."""
    if options.reduction != "mean":
        return 1.0
    if options.normalizer is not None:
        return options.normalizer
    if rows.normalizer is not None:
        return float(rows.normalizer)
    if sample_weight is not None:
        row_weight = row_weight * sample_weight
    if isinstance(row_weight, torch.Tensor):
        counted = row_weight if ignored is None else row_weight.masked_fill(ignored, 0.0)
        return float(counted.sum())
    n_rows = rows.targets.shape[0] * rows.targets.shape[1]
    return float(n_rows if ignored is None else n_rows - int(ignored.sum()))


class _GradTerms(NamedTuple):
    """Factors of the gradient, 0 in ignored rows: numbers or (n_rows, 1), as in _RowTerms.

    They have the upstream gradient, the mean's divisor and sample_weight in them; all but the first
    are of the gradient of logits, and have logit_scale too.
    """

    losses: torch.Tensor | float  # the upstream gradient of a row's loss before sample_weight
    x: torch.Tensor | float  # the same, times logit_scale
    minus_target: torch.Tensor
    smooth: torch.Tensor | float
    lse: torch.Tensor | None
    entropy: torch.Tensor | None


def _grad_terms(terms, upstream, sums, options) -> _GradTerms:
    like = sums.exp
    losses = 0.0  # where only stats have a gradient: the divisor may be 0
    if upstream.loss is not None:
        losses = _of_rows(upstream.loss, like)
        # no weight at all, or a normalizer of 0: as a GPU divides
        losses = losses / terms.divisor if terms.divisor else losses * math.inf
        if terms.sample_weight is not None:
            losses = losses * terms.sample_weight
        losses = _counted_factor(losses, terms, like)
    x = losses if options.logit_scale == 1.0 else losses * options.logit_scale
    minus_target = x * -terms.target
    if not isinstance(minus_target, torch.Tensor):
        minus_target = torch.full_like(like, minus_target)
    lse, entropy = upstream.lse, upstream.entropy
    if lse is not None:
        lse = _counted_factor(_of_rows(lse, like) * options.logit_scale, terms, like)
    if entropy is not None:
        entropy = _counted_factor(_of_rows(entropy, like) * options.logit_scale, terms, like)
    return _GradTerms(losses, x, minus_target, x * terms.smoothing, lse, entropy)


def _of_rows(grad: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor | float:
    """An upstream gradient as a number, or (n_rows, 1)."""
    if not isinstance(grad, torch.Tensor):
        return grad
    return grad.to(like.dtype).reshape(-1, 1) if grad.dim() else float(grad)


def _counted_factor(factor, terms, like) -> torch.Tensor | float:
    """The factor, 0 in ignored rows even where it is NaN or inf."""
    if terms.ignored is None:
        return factor
    if not isinstance(factor, torch.Tensor):
        factor = torch.full_like(like, factor)
    return factor.masked_fill(terms.ignored, 0.0)


def _at(value: torch.Tensor | float, rows: slice) -> torch.Tensor | float:
    """The value of these rows: of a number for all, or of a (n_rows, 1) tensor."""
    if not isinstance(value, torch.Tensor) or value.shape[0] == rows.stop - rows.start:
        return value  # a single block needs no slices, in calls so small that they show
    return value[rows]


def _can_hold_work(grad_logits: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a block of the gradient is itself a place to compute in: no scratch, no copy back."""
    one_level = grad_logits.shape[0] == 1 and is_dense(grad_logits)
    return grad_logits.dtype == dtype and (one_level or grad_logits.is_contiguous())


def _compute_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _rows_at_once(logits: torch.Tensor, in_scratch: bool) -> int:
    """`block_rows`, in whole groups where a group is smaller than a block."""
    rows_per_group = max(logits.shape[1], 1)
    rows = block_rows(logits.shape[2], torch.get_num_threads(), in_scratch)
    return rows if rows <= rows_per_group else rows // rows_per_group * rows_per_group


def _blocks(logits: torch.Tensor, rows: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of flat rows, groups and rows within a group that cover (n_groups, rows_per_group)."""
    n_groups, rows_per_group, _ = logits.shape
    if n_groups * rows_per_group == 0:
        return
    groups = max(1, rows // rows_per_group)
    rows = min(rows, rows_per_group)
    for group in range(0, n_groups, groups):
        group_stop = min(group + groups, n_groups)
        for row in range(0, rows_per_group, rows):
            row_stop = min(row + rows, rows_per_group)
            first = group * rows_per_group + row
            count = (group_stop - group) * (row_stop - row)
            yield slice(first, first + count), slice(group, group_stop), slice(row, row_stop)
