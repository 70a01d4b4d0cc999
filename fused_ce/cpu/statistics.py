"""Online statistics of the rows of a block, and the loss that all of them make."""

from typing import NamedTuple

import torch

from fused_ce.cpu import machine
from fused_ce.cpu.blocks import at
from fused_ce.rows import Result, compute_dtype


class Buffers(NamedTuple):
    """Of a thread, as large as its largest block; None where a pass does without. See `Block`."""

    work: torch.Tensor | None
    exp: torch.Tensor | None
    soft: torch.Tensor | None
    slope: torch.Tensor | None


class Block(NamedTuple):
    """The rows of a block, their targets, and buffers (n, vocab_size) of the arithmetic's dtype."""

    rows: slice
    targets: torch.Tensor | None
    work: torch.Tensor  # x, then x less the row's maximum, then the gradient
    exp: torch.Tensor  # its powers: work itself where nobody needs both
    soft: torch.Tensor | None  # what probabilities weigh x with
    slope: torch.Tensor | None  # of the softcap


class RowStats(NamedTuple):
    """Of the rows of a block, (n, 1): maximum of x, sum of exp(x - maximum), mean x - maximum.

    Where powers are those of x itself, the maximum is 0, and the target's probability is known.
    """

    maximum: torch.Tensor
    exp: torch.Tensor
    unit: float  # that the exponential is taken of multiples of
    mean: torch.Tensor | None = None
    p_target: torch.Tensor | None = None


class RowSums(NamedTuple):
    """The same of all rows, (n_rows, 1), and what else the loss and its stats are made of."""

    exp: torch.Tensor
    x_target: torch.Tensor | None = None  # less the row's maximum; of probabilities soft * x
    x_smooth: torch.Tensor | None = None
    maximum: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    predictions: torch.Tensor | None = None  # (n_rows,)

    @property
    def is_plain(self) -> bool:
        """Whether the loss of a class is all that is asked for."""
        return self.x_target is not None and self.x_smooth is None and self.maximum is None


def empty_sums(rows, options, finds_loss=True) -> RowSums:
    """Places for what the options ask of all rows; only for the sum of exp without the loss."""
    logits, n_rows = rows.logits, rows.logits.shape[0] * rows.logits.shape[1]
    # new_empty, not torch.empty: that would follow torch.set_default_device
    exp = logits.new_empty(n_rows, 1, dtype=compute_dtype(logits))
    if not finds_loss:
        return RowSums(exp)
    smooth = options.label_smoothing and not rows.has_probabilities
    stats = options.return_stats
    return RowSums(
        exp,
        torch.empty_like(exp),
        torch.empty_like(exp) if smooth else None,
        torch.empty_like(exp) if stats or options.z_loss else None,
        torch.empty_like(exp) if stats else None,
        logits.new_empty(n_rows, dtype=torch.int64) if stats else None,
    )


def load(logits, block, options) -> torch.Tensor:
    """A block of logits, scaled and capped, as x (n, vocab_size): in work, or where they lie.

    Ignored rows may hold anything, and keep it to themselves: what is made of them is replaced.
    """
    work = block.work
    x = logits.view(work.shape) if logits.shape[0] == 1 else logits
    as_they_are = options.logit_scale == 1.0 and options.softcap is None
    if x.dim() == 3 or x.dtype != work.dtype or not as_they_are:
        work.view(x.shape).copy_(x)
        x = work
    if options.softcap is not None:
        x.mul_(options.logit_scale / options.softcap).tanh_()
        if block.slope is not None:
            torch.mul(x, x, out=block.slope).neg_().add_(1.0)
        x.mul_(options.softcap)
    elif options.logit_scale != 1.0:
        x.mul_(options.logit_scale)
    return x


def load_soft(probabilities, block, terms, options) -> None:
    """What weighs x: weight * ((1 - smoothing) * probabilities + smoothing / vocab_size)."""
    soft = block.soft
    soft.view(probabilities.shape).copy_(probabilities)
    if options.label_smoothing:
        soft.mul_(1.0 - options.label_smoothing).add_(options.label_smoothing / soft.shape[1])
    if terms.weight is not None:
        soft.mul_(terms.weight.T)
    torch.sum(soft, dim=1, keepdim=True, out=at(terms.lse, block.rows))


def sum_up(x, block, terms, sums, lowest=None) -> RowStats:
    """What the loss needs of every row; leaves (x - maximum) * unit in work, its powers in exp.

    With `lowest`, a row of -inf alone has this maximum, and a sum of 0.
    """
    rows, targets, work, exp, soft, _ = block
    maximum = x.amax(dim=1, keepdim=True)
    if lowest is not None:
        maximum.clamp_(min=lowest)
    if sums.maximum is not None:
        sums.maximum[rows] = maximum
    if sums.predictions is not None:
        sums.predictions[rows] = _first_argmax(x, maximum, exp)
    torch.sub(x, maximum, out=work)
    if sums.x_target is not None and soft is None:
        torch.gather(work, 1, targets, out=at(sums.x_target, rows))
    elif sums.x_target is not None:
        torch.sum(torch.mul(soft, work, out=exp), dim=1, keepdim=True, out=at(sums.x_target, rows))
    if sums.x_smooth is not None:
        # Not a matrix product: autocast would run it in bfloat16.
        weighted = work if terms.weight is None else work * terms.weight.T
        torch.sum(weighted, dim=1, keepdim=True, out=at(sums.x_smooth, rows))
    power, unit = machine.exponential(work.numel())
    if unit != 1.0:
        work.mul_(unit)
    power(work, out=exp)
    total = torch.sum(exp, dim=1, keepdim=True, out=at(sums.exp, rows))
    return RowStats(maximum, total, unit)


def log_probabilities(x, block, sums) -> None:
    """What the loss of a class needs and nothing else, from one operation of PyTorch's.

    Three quarters of the time of `sum_up`, which leaves what a gradient is made of.
    """
    x = x if x.is_contiguous() else block.work.copy_(x)
    torch._log_softmax(x, 1, False, out=block.work)
    torch.gather(block.work, 1, block.targets, out=at(sums.x_target, block.rows))
    at(sums.exp, block.rows).fill_(1.0)  # the logarithm of the sum is subtracted already


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


def with_mean(block, stats, sums) -> RowStats:
    """Adds the mean of x - maximum; leaves (x - maximum) * unit * exp in work."""
    work = block.work
    work.clamp_(min=torch.finfo(work.dtype).min)  # 0 * -inf is 0 in an entropy
    work.mul_(block.exp)
    if stats.mean is not None:  # other columns count too
        return stats
    mean = work.sum(dim=1, keepdim=True).div_(stats.exp * stats.unit)
    if sums.mean is not None:
        sums.mean[block.rows] = mean
    return stats._replace(mean=mean)


def result_of(terms, sums, options, unweighted) -> Result:
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
        # What the options ask for has a place among the sums.
        losses.addcmul_(lse, lse, value=options.z_loss)  # type: ignore[arg-type]
    before = counted(losses.clone(), terms.ignored) if unweighted else None
    if terms.sample_weight is not None:
        losses *= terms.sample_weight
    losses = counted(losses, terms.ignored)
    loss = losses
    if options.reduction != "none":
        loss = losses.sum().div_(terms.divisor)
    divisor = None
    if options.reduction == "mean" and (unweighted or options.return_stats):
        divisor = losses.new_full((), terms.divisor)
    if not options.return_stats:
        return Result(loss, unweighted=before, divisor=divisor)
    # An infinite maximum leaves NaN in its row, but the sum of powers is known.
    lse = torch.where(sums.maximum.isinf(), sums.maximum, lse)  # type: ignore[arg-type]  # again
    predictions = sums.predictions
    if terms.ignored is not None:
        predictions = predictions.masked_fill_(terms.ignored.squeeze(1), -1)
    return Result(
        loss,
        None if loss is losses else losses,
        before,
        counted(lse, terms.ignored),
        counted(entropy, terms.ignored),  # type: ignore[arg-type]  # again
        predictions,
        divisor,
    )


def _times(values: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    """In place."""
    return values if isinstance(factor, float) and factor == 1.0 else values.mul_(factor)


def counted(values: torch.Tensor, ignored: torch.Tensor | None) -> torch.Tensor:
    """(n_rows, 1) in place as (n_rows,), 0 in ignored rows."""
    if ignored is not None:
        values.masked_fill_(ignored, 0.0)
    return values.squeeze_(1)  # no view, which autograd would not let the user change in place
