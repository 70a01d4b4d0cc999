"""Second derivatives: those of rows and of their gradients along a direction."""

from typing import NamedTuple

import torch

from fused_ce.cpu.blocks import at, blocks, in_turn, rows_at_once
from fused_ce.cpu.statistics import counted, empty_sums
from fused_ce.cpu.terms import grad_terms, row_terms
from fused_ce.cpu.workers import share
from fused_ce.options import LossOptions
from fused_ce.rows import Direction, Rows, Tangents, Upstream, compute_dtype


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
    logits, options = rows.logits, options._replace(reduction="none")
    terms = row_terms(rows, options)
    sums = empty_sums(rows, options, finds_loss=False)
    grads = grad_terms(terms, upstream, sums, options)
    results = Tangents(*(torch.empty_like(sums.exp).squeeze(1) for _ in range(3)))

    def compute(where):
        part, groups, columns = where
        block = _tangent_block(rows, direction, options, terms, part, groups, columns)
        found = _tangents_of_rows(block, options, terms, part)
        for result, values in zip(results, found, strict=True):
            result[part] = counted(values, at(terms.ignored, part))
        if grad_logits is not None:
            out = grad_logits[groups, columns]
            out.copy_(_tangent_of_gradient(block, options, terms, grads, part).view(out.shape))
        if grad_targets is not None:
            out = grad_targets[groups, columns]
            out.copy_(_tangent_of_soft_gradient(block, options, terms, grads, part).view(out.shape))

    rows_a_block = rows_at_once(logits, n_buffers=2)
    share(blocks(logits, rows_a_block), lambda: compute, in_turn(logits))
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
    dtype, vocab_size = compute_dtype(rows.logits), rows.logits.shape[2]
    ignored = at(terms.ignored, part)

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
        losses = at(terms.target, part) * block.deviation.gather(1, at(terms.targets, part))
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
    of_losses = at(grads.x, part)
    soft_sum = at(terms.lse, part)
    if block.soft is not None:
        soft_sum = block.soft.sum(dim=1, keepdim=True)
    of_lse = of_losses * (soft_sum + 2.0 * options.z_loss * block.lse)
    of_lse_tangent = of_losses * (2.0 * options.z_loss * block.mean)
    if grads.lse is not None:
        of_lse = of_lse + at(grads.lse, part)
    if block.soft_tangent is not None:
        total = block.soft_tangent.sum(dim=1, keepdim=True)
        of_lse_tangent = of_lse_tangent + of_losses * total
    tangent = of_lse * block.deviation + of_lse_tangent
    if grads.entropy is not None:
        entropy = at(grads.entropy, part)
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
    target = torch.as_tensor(at(terms.target, part), dtype=shares.dtype).expand(len(shares), 1)
    return shares.scatter_add_(1, at(terms.targets, part), target)


def _tangent_of_soft_gradient(block, options, terms, grads, part) -> torch.Tensor:
    """The gradient of probabilities is `losses * (1 - smoothing) * weight * (lse - x)`."""
    factor = at(grads.losses, part) * (options.label_smoothing - 1.0)
    tangent = factor * block.deviation
    return tangent if terms.weight is None else tangent * terms.weight.T
