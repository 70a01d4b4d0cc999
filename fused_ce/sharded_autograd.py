"""The torch.autograd.Function of a loss whose classes lie on several devices.

Forward reads the columns that are here, tells the other ranks what it has found in each row, and
knows the loss. The gradient of these columns is then made by a second reading, at once or in
backward, and nothing more is exchanged.
"""

import os

import torch
from torch.autograd.graph import increment_version

from fused_ce.arguments import check_in_range
from fused_ce.autograd import (
    gradient_storage,
    grads_of_outputs,
    is_over,
    outputs_of,
    sample_weight_gradient,
    scaled,
)
from fused_ce.backend import implementation
from fused_ce.exchange import Exchange
from fused_ce.options import LossOptions
from fused_ce.rows import Result, Rows, Upstream, in_memory
from fused_ce.shards import Combined, Shard, Targets, combined, targets_of
from fused_ce.tracing import graph_is_kept, is_batched_or_dual


def sharded_cross_entropy(
    source: torch.Tensor, rows: Rows, options: LossOptions, backend: str, exchange: Exchange
) -> tuple[torch.Tensor, ...]:
    """(loss,), or (loss, losses, lse, entropy, predictions) with return_stats; see rows.py.

    `source` is the logits of the rows, or these without the axis of groups.
    """
    if not torch.is_grad_enabled():  # nor does forward then make a gradient, over the logits say
        source, rows = source.detach(), _detached(rows)
    outputs = ShardedCrossEntropy.apply(
        source, rows.sample_weight, rows, options, backend, exchange
    )
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if options.return_stats and options.reduction == "none":
        return outputs[0], *outputs
    return outputs


def _detached(rows):
    return Rows._make(None if tensor is None else tensor.detach() for tensor in rows)


def statistics_of(rows: Rows, options: LossOptions, backend: str):
    """What `Exchange.start` asks for: the statistics of a shard, the weights of its targets."""

    def statistics(shard: Shard):
        found = implementation(backend).shard_statistics(rows, options, shard)
        if rows.weight is None:
            return found, None
        here = rows.targets.reshape(-1).long() - shard.first
        is_mine = (here >= 0) & (here < rows.weight.shape[0])
        if rows.weight.shape[0] == 0:
            return found, torch.zeros_like(found.row_max)
        weight = in_memory(rows.weight).to(found.row_max.dtype)[here.where(is_mine, 0)]
        return found, weight.where(is_mine, 0.0)

    return statistics


def check_targets(gathered, rows, options, on_host) -> None:
    """On a CPU, IndexError on every rank for a target that none of them has."""
    if on_host or os.environ.get("FUSED_CE_DEBUG") == "1":
        targets = rows.targets.reshape(-1).long()
        check_in_range(targets, int(gathered.bounds[-1]), options.ignore_index)


def put_together(gathered, rows, options) -> tuple[Combined, Targets]:
    """What all ranks know of rows."""
    targets = rows.targets.reshape(-1).long()
    known = targets_of(
        targets, gathered.target_weight, gathered.weight_sums, gathered.bounds, options
    )
    if gathered.is_right is not None:  # a GPU does not stop to look
        share = known.share.where(gathered.is_right, torch.nan)
        known = known._replace(share=share)
    return combined(gathered.parts, known, options), known


def counted_weight(rows, known, dtype) -> torch.Tensor:
    """What each loss is multiplied by, (n_rows,); 0 in ignored rows."""
    if rows.sample_weight is None:
        return (~known.ignored).to(dtype)
    return in_memory(rows.sample_weight).to(dtype).masked_fill(known.ignored, 0.0)


def divisor_of(rows, options, weight, target_weight) -> torch.Tensor | None:
    """What "mean" divides by, (); None for the other reductions."""
    if options.reduction != "mean":
        return None
    if rows.normalizer is not None:
        return rows.normalizer.to(weight.dtype)
    if options.normalizer is not None:
        return weight.new_full((), options.normalizer)
    return (weight * target_weight.nan_to_num(1.0 if rows.weight is None else 0.0)).sum()


class ShardedCrossEntropy(torch.autograd.Function):
    """Columns of logits to the loss of all of them."""

    @staticmethod
    def forward(ctx, source, sample_weight, rows, options, backend, exchange):
        """Loss, and stats if asked for; one exchange."""
        needs_logits, needs_sample_weight, *_ = ctx.needs_input_grad
        ctx.options, ctx.implementation = options, implementation(backend)
        ctx.is_grouped = source.dim() == 3
        ctx.set_materialize_grads(False)
        statistics = statistics_of(rows, options, backend)
        gathered = exchange.of_rows(statistics, rows.weight)
        ctx.shard = exchange.layout.shard
        check_targets(gathered, rows, options, exchange.on_host)
        found, known = put_together(gathered, rows, options)
        weight = counted_weight(rows, known, found.losses.dtype)
        losses = found.losses * weight  # both 0 in ignored rows
        divisor = divisor_of(rows, options, weight, known.weight)
        loss = losses
        if options.reduction != "none":
            loss = losses.sum() if divisor is None else losses.sum() / divisor
        statistics = found.row_max, found.row_sum, known.share, found.entropy
        grad_logits = None
        if needs_logits and options.makes_grad_in_forward(rows.logits.dtype):
            grad_logits = gradient_storage(rows.logits, options)
            upstream = Upstream(weight if divisor is None else weight / divisor)
            ctx.implementation.shard_gradient(
                upstream, rows, statistics, options, ctx.shard, grad_logits
            )
            if is_over(grad_logits, rows.logits):
                increment_version(rows.logits)
                rows = rows._replace(logits=None)
            elif not options.return_stats:
                rows = rows._replace(logits=None)
        if found.entropy is not None:
            statistics = *statistics[:3], found.entropy.clone()  # the user may change the other
        ctx.save_for_backward(
            grad_logits, *rows, weight, loss.clone() if needs_sample_weight else None,
            found.losses, known.weight, divisor, *statistics,
        )  # fmt: skip
        result = Result(loss, losses, None, found.lse, found.entropy, found.predictions)
        outputs = outputs_of(result, options)
        if not options.return_stats:
            return outputs[0]
        ctx.mark_non_differentiable(found.predictions)
        return outputs

    @staticmethod
    def backward(ctx, *grad_outputs):
        """The gradients of the logits that are here, and of sample_weight."""
        check_once(grad_outputs)
        options, kept = ctx.options, graph_is_kept()
        finished, *saved = ctx.saved_tensors
        rows, (weight, loss, unweighted, target_weight, divisor, *statistics) = (
            Rows(*saved[:5]), saved[5:],
        )  # fmt: skip
        grad_loss, grad_losses, grad_lse, grad_entropy = grads_of_outputs(grad_outputs, options)
        grad_logits = grad_sample_weight = None
        if ctx.needs_input_grad[1] and not (grad_loss is None and grad_losses is None):
            grad_sample_weight = sample_weight_gradient(
                grad_loss, grad_losses, rows, loss, unweighted, target_weight, divisor, options
            )
        if ctx.needs_input_grad[0]:
            if finished is not None and grad_losses is grad_lse is grad_entropy is None:
                grad_logits = scaled(ctx, finished, grad_loss, kept)
            else:
                grad_loss = upstream_of_rows(grad_loss, grad_losses, weight, divisor)
                grad_logits = _read_again(
                    ctx,
                    Upstream(grad_loss, grad_lse, grad_entropy),
                    rows,
                    finished,
                    statistics,
                    kept,
                )
        if grad_logits is not None and not ctx.is_grouped:
            grad_logits = grad_logits.squeeze(0)
        return grad_logits, grad_sample_weight, None, None, None, None


def check_once(grad_outputs) -> None:
    """Raise RuntimeError where a backward is asked for more than numbers.

    Not only when the second derivative is taken: of upstream gradients that need none, autograd
    would take these for constants, and say nothing.
    """
    if torch.is_grad_enabled() or any(map(is_batched_or_dual, grad_outputs)):
        raise RuntimeError(
            "a sharded vocabulary is differentiated once: not with create_graph=True, for a second "
            "derivative, nor with batched gradients"
        )


def upstream_of_rows(grad_loss, grad_losses, weight, divisor) -> torch.Tensor | None:
    """The upstream gradient of each row's loss without sample_weight, (n_rows,)."""
    if grad_loss is None and grad_losses is None:
        return None
    total = 0.0
    if grad_loss is not None:
        total = grad_loss if divisor is None else grad_loss / divisor
    if grad_losses is not None:
        total = total + grad_losses
    return total * weight


def _read_again(ctx, upstream, rows, finished, statistics, kept):
    """The gradient of the logits; a finished one, which lacks the stats, gives its memory."""
    if rows.logits is None:
        raise RuntimeError(
            "a gradient through the stats reads the logits again, but inplace=True has overwritten "
            "them with their gradient: pass inplace=False, or grad_in_forward=False"
        )
    logits = rows.logits.detach()
    if finished is None or kept:
        grad_logits = gradient_storage(logits, ctx.options)
    else:
        grad_logits = finished
        increment_version(finished)
    ctx.implementation.shard_gradient(
        upstream, rows._replace(logits=logits), tuple(statistics), ctx.options, ctx.shard,
        grad_logits,
    )  # fmt: skip
    if is_over(grad_logits, logits):
        increment_version(logits)
    return grad_logits
