"""The gradient of the rows of a block, from their statistics; and a finished gradient scaled."""

import torch

from fused_ce.cpu.blocks import at, blocks, in_turn, rows_at_once
from fused_ce.cpu.workers import share
from fused_ce.rows import compute_dtype


def make_gradient(block, stats, terms, grads, options) -> None:
    """The gradient of the logits in work, from what sum_up and with_mean left there."""
    rows, targets, work, exp, soft, slope = block
    of_lse = at(grads.x, rows) * at(terms.lse, rows)
    if options.z_loss:
        lse = stats.maximum + stats.exp.log()
        of_lse = of_lse + 2.0 * options.z_loss * at(grads.x, rows) * lse
    if grads.lse is not None:
        of_lse = of_lse + at(grads.lse, rows)
    if grads.entropy is not None:  # its gradient is softmax * (mean - x)
        of_lse = of_lse + at(grads.entropy, rows) * stats.mean
        work.mul_(at(grads.entropy, rows) / (stats.exp * -stats.unit))
        work.addcmul_(exp, of_lse / stats.exp)
    else:
        torch.mul(exp, stats.exp.reciprocal().mul_(of_lse), out=work)
    if soft is not None:
        work.addcmul_(soft, at(grads.minus_target, rows))
    elif stats.p_target is not None:  # 0 where it is 1, whatever exp / sum is rounded to
        work.scatter_(1, targets, stats.p_target * of_lse + at(grads.minus_target, rows))
    else:
        if terms.smoothing:
            even = at(grads.smooth, rows)
            work.sub_(even if terms.weight is None else even * terms.weight.T)
        work.scatter_add_(1, targets, at(grads.minus_target, rows))
    if slope is not None:
        work.mul_(slope)
    if terms.ignored is not None:  # may have held NaN, and 0 * NaN is NaN
        _clear(work, at(terms.ignored, rows).squeeze(1).nonzero().squeeze(1))


def _clear(work, ignored) -> None:
    """Zeros in these rows: one by one where they are long, which index_fill_ takes 6 times for."""
    if work.shape[1] < 1024:
        work.index_fill_(0, ignored, 0.0)
        return
    for row in ignored.tolist():
        work[row].zero_()


def grad_of_soft(block, stats, terms, grads, options) -> torch.Tensor:
    """The gradient of probabilities, (1 - smoothing) * weight * (lse - x)."""
    log_probs = (block.work / -stats.unit).add_(stats.exp.log())
    log_probs.mul_(at(grads.losses, block.rows) * (1.0 - options.label_smoothing))
    return log_probs if terms.weight is None else log_probs.mul_(terms.weight.T)


def scale(grad_logits: torch.Tensor, grad_losses: torch.Tensor, out: torch.Tensor) -> None:
    """out = grad_logits * grad_losses, () or (n_rows,); out may be grad_logits.

    A zero stays zero: an upstream gradient of inf or NaN does not reach the ignored rows.
    """
    if grad_logits.numel() == 0:
        return
    if grad_losses.dim() == 0 and out is grad_logits and grad_losses.item() == 1.0:
        return
    dtype = compute_dtype(grad_logits)
    all_finite = bool(grad_losses.isfinite().all())
    factors = grad_losses.to(dtype).expand(grad_logits.shape[:2].numel())

    def scale_block(where):
        rows, groups, columns = where
        block = grad_logits[groups, columns]
        scaled = block.to(dtype) * factors[rows].view(*block.shape[:2], 1)
        if not all_finite:
            scaled.masked_fill_(block == 0.0, 0.0)
        out[groups, columns] = scaled

    rows_a_block = rows_at_once(grad_logits, n_buffers=1)
    share(blocks(grad_logits, rows_a_block), lambda: scale_block, in_turn(grad_logits))
