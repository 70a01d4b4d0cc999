"""The torch.autograd.Function: what is saved, and which of the two gradient routes runs.

`implementation` is cpu/ or kernels/launch.py; both offer the same functions. Whoever wants more
than one derivative, or a graph to compile, gets row_losses.py instead.
"""

import torch
from torch.autograd.graph import increment_version

from fused_ce.backend import implementation
from fused_ce.cpu.few import are_few, loss_of_few
from fused_ce.options import LossOptions
from fused_ce.reference import reference
from fused_ce.row_losses import cross_entropy_of_rows, grads_of_used
from fused_ce.rows import Result, Rows, Upstream, empty_gradient, in_memory, overlaps
from fused_ce.tracing import graph_is_kept, is_batched_or_dual, saved_tensors_have_hooks


def cross_entropy(
    source: torch.Tensor, rows: Rows, options: LossOptions, backend: str
) -> tuple[torch.Tensor, ...]:
    """(loss,), or (loss, losses, lse, entropy, predictions) with return_stats; see rows.py.

    A loss is (n_rows,) or its scalar reduction, the rest is (n_rows,). `source` is the logits of
    the rows, or these without the axis of groups: the backward of a view costs microseconds.
    """
    if backend == "cpu" and are_few(rows, options):
        loss = loss_of_few(source, rows.targets, options)
        if loss is not None:
            return (loss,)
    needs_grad = any([tensor is not None and tensor.requires_grad for tensor in rows])
    if needs_grad and torch.is_grad_enabled():
        outputs = FusedCrossEntropy.apply(
            source, rows.targets, rows.sample_weight, rows, options, backend
        )
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    else:
        if needs_grad:
            rows = Rows._make(tensor if tensor is None else tensor.detach() for tensor in rows)
        outputs = outputs_of(implementation(backend).forward(rows, options), options)
    if options.return_stats and options.reduction == "none":
        return outputs[0], *outputs
    return outputs


def outputs_of(result: Result, options: LossOptions) -> tuple[torch.Tensor, ...]:
    """(loss,), or (loss, losses, lse, entropy, predictions), losses only where loss is not they."""
    if not options.return_stats:
        return (result.loss,)
    losses = () if options.reduction == "none" else (result.losses,)
    return (  # pyright: ignore[reportReturnType]  # what was asked for is there
        result.loss, *losses, result.lse, result.entropy, result.predictions,
    )  # fmt: skip


class FusedCrossEntropy(torch.autograd.Function):
    """Loss whose gradient is made in forward, or in backward from the saved row statistics."""

    @staticmethod
    def forward(ctx, source, targets, sample_weight, rows, options, backend):
        """Rows to loss, and stats if asked for; saves what backward needs."""
        needs_logits, needs_targets, needs_sample_weight, *_ = ctx.needs_input_grad
        logits = rows.logits
        ctx.options, ctx.backend = options, backend
        ctx.is_grouped = source.dim() == 3
        ctx.implementation, ctx.unsaved = implementation(backend), None
        ctx.set_materialize_grads(False)  # a stat that nobody uses costs backward nothing
        # Probabilities get their gradient from a second reading, which the logits then share.
        ctx.in_forward = (
            needs_logits and not needs_targets and options.makes_grad_in_forward(logits.dtype)
        )
        if ctx.in_forward:
            grad_logits = gradient_storage(logits, options)
            result = ctx.implementation.forward_with_grad(
                rows, options, grad_logits, needs_sample_weight
            )
            overwritten = is_over(grad_logits, logits)
            if overwritten:
                increment_version(logits)
            # Only a second derivative may read the logits again. Unsaved they may be changed until
            # then; saved, whoever has set hooks sees them (a checkpoint, say, which drops them).
            is_saved = not options.inplace and saved_tensors_have_hooks()
            if not options.inplace and not is_saved:
                ctx.unsaved = rows, _versions(rows)
            if not options.return_stats and not needs_sample_weight and not is_saved:
                ctx.save_for_backward(grad_logits)
                return result.loss
            if overwritten or not options.return_stats and not is_saved:
                rows = rows._replace(logits=None)
        else:
            grad_logits = None
            result = ctx.implementation.forward(rows, options, needs_sample_weight)
        loss = None
        if needs_sample_weight and divides_by_weights(rows, options):
            loss = result.loss.clone()  # the user may change the other
        ctx.save_for_backward(
            grad_logits, *rows, loss, result.unweighted, result.divisor, *result.saved
        )
        outputs = outputs_of(result, options)
        if not options.return_stats:
            return outputs[0]
        ctx.mark_non_differentiable(result.predictions)
        return outputs

    @staticmethod
    def backward(ctx, *grad_outputs):
        """The gradients of logits, probabilities and sample_weight; the rest has none."""
        options = ctx.options
        finished, *saved = ctx.saved_tensors
        kept, unsaved = graph_is_kept(), ctx.unsaved
        if not kept:
            ctx.unsaved = None
        if torch.is_grad_enabled() or any(map(is_batched_or_dual, grad_outputs)):
            return _of_inputs(ctx, *_differentiable(ctx, grad_outputs, saved, unsaved))
        if not saved:
            return _of_inputs(ctx, scaled(ctx, finished, grad_outputs[0], kept))
        grad_loss, grad_losses, grad_lse, grad_entropy = grads_of_outputs(grad_outputs, options)
        rows, (loss, unweighted, divisor, *saved) = Rows(*saved[:5]), saved[5:]
        needs_logits, needs_targets, needs_sample_weight, *_ = ctx.needs_input_grad
        grad_logits = grad_targets = grad_sample_weight = None
        if grad_loss is None and grad_losses is None:
            needs_targets = needs_sample_weight = False  # lse and entropy know nothing of them
        if needs_sample_weight:
            grad_sample_weight = grad_of_sample_weight(
                grad_loss, grad_losses, rows, loss, unweighted, divisor, options
            )
        if ctx.in_forward and grad_losses is None and grad_lse is None and grad_entropy is None:
            if needs_logits:
                grad_logits = scaled(ctx, finished, grad_loss, kept)
        elif needs_logits or needs_targets:
            upstream, options = _merged(grad_loss, grad_losses, divisor, options)
            grad_logits, grad_targets = _second_reading(
                ctx, Upstream(upstream, grad_lse, grad_entropy), rows, finished, tuple(saved),
                options, needs_logits, needs_targets, kept,
            )  # fmt: skip
        return _of_inputs(ctx, grad_logits, grad_targets, grad_sample_weight)


def _of_inputs(ctx, grad_logits, grad_targets=None, grad_sample_weight=None):
    """The gradients of what `FusedCrossEntropy.forward` was given."""
    if grad_logits is not None and not ctx.is_grouped:
        grad_logits = grad_logits.squeeze(0)  # the derivative of [0] would fill a buffer
    return grad_logits, grad_targets, grad_sample_weight, None, None, None


def _versions(rows: Rows) -> list[int | None]:
    """How often each tensor has been changed in place."""
    return [None if tensor is None or tensor.is_inference() else tensor._version for tensor in rows]


def _differentiable(ctx, grad_outputs, saved, unsaved):
    """The gradients of the rows' tensors as functions of them and of the upstream gradients."""
    if ctx.options.inplace:
        raise RuntimeError(
            "inplace=True overwrites the logits, which a second derivative (create_graph=True) and "
            "batched gradients read again: pass inplace=False"
        )
    if unsaved is None:
        rows = Rows(*saved[:5])
    else:
        rows, versions = unsaved
        if _versions(rows) != versions:
            raise RuntimeError(
                "a second derivative (create_graph=True) and batched gradients read the logits "
                "again, but they or their targets were changed in place after the loss: pass a "
                "clone"
            )
    with torch.enable_grad():
        if any(map(is_batched_or_dual, grad_outputs)):  # plain PyTorch takes them as they are
            outputs = reference(rows, ctx.options)
        else:
            outputs = cross_entropy_of_rows(rows, ctx.options, ctx.backend)
    if ctx.options.return_stats and ctx.options.reduction == "none":
        outputs = outputs[1:]  # the loss is the losses
    inputs = rows.logits, rows.targets, rows.sample_weight
    return grads_of_used(outputs, grad_outputs, inputs, ctx.needs_input_grad[:3])


def grads_of_outputs(grads, options):
    """The gradients of (loss, losses, lse, entropy) from those of `outputs_of`; None for none."""
    if not options.return_stats:
        return grads[0], None, None, None
    loss, *losses, lse, entropy, _ = grads
    return loss, losses[0] if losses else None, lse, entropy


def scaled(ctx, grad_logits, grad_loss, kept):
    """The finished gradient times the upstream one."""
    if grad_loss is None:
        return None
    # In place costs no memory, but a graph that is kept needs this gradient once more.
    out = empty_gradient(grad_logits) if kept else grad_logits
    ctx.implementation.scale(grad_logits, grad_loss, out)
    if not kept:
        increment_version(out)  # for whoever else holds it, a saved-tensor hook say
    return out


def _merged(grad_loss, grad_losses, divisor, options):
    """One upstream gradient of loss and losses together (None if both are), and options with its
    reduction: a divisor of 0 does not matter where only other stats have a gradient."""
    if grad_losses is None and grad_loss is not None:
        return grad_loss, options
    if grad_loss is not None:
        grad_losses = grad_losses + (grad_loss if divisor is None else grad_loss / divisor)
    return grad_losses, options._replace(reduction="none", normalizer=None)


def _second_reading(
    ctx, upstream, rows, finished, saved, options, needs_logits, needs_targets, kept
):
    """The gradients of logits and probabilities, whichever are needed, from one pass over both.

    A finished gradient, which lacks what came through the stats, gives its memory.
    """
    if rows.logits is None:
        raise RuntimeError(
            "a gradient through the stats reads the logits again, but inplace=True has overwritten "
            "them with their gradient: pass inplace=False, or grad_in_forward=False"
        )
    logits = rows.logits.detach()
    grad_logits = None
    if needs_logits and (finished is None or kept):
        grad_logits = gradient_storage(logits, options)
    elif needs_logits:
        grad_logits = finished
        increment_version(finished)
    grad_targets = empty_gradient(rows.targets) if needs_targets else None
    ctx.implementation.backward(
        upstream, rows._replace(logits=logits), saved, options, grad_logits, grad_targets
    )
    if grad_logits is not None and is_over(grad_logits, logits):
        increment_version(logits)
    return grad_logits, grad_targets


def grad_of_sample_weight(grad_loss, grad_losses, rows, loss, unweighted, divisor, options):
    """The gradient of sample_weight: the losses without it, less what moves the mean's divisor."""
    target_weight = _target_weight(rows, unweighted.dtype)
    return sample_weight_gradient(
        grad_loss, grad_losses, rows, loss, unweighted, target_weight, divisor, options
    )


def sample_weight_gradient(
    grad_loss, grad_losses, rows, loss, unweighted, target_weight, divisor, options
):
    """The same, where the class weight of the target is known."""
    grad = torch.zeros_like(unweighted)
    if grad_loss is not None:
        factor = grad_loss if divisor is None else grad_loss / divisor
        moved = 0.0
        if divides_by_weights(rows, options):
            moved = loss * target_weight
        grad = factor * (unweighted - moved)
    if grad_losses is not None:
        grad = grad + grad_losses * unweighted
    if not rows.has_probabilities:
        ignored = rows.targets.reshape(-1).long() == options.ignore_index
        grad = grad.masked_fill(ignored, 0.0)
    return grad.to(rows.sample_weight.dtype)


def divides_by_weights(rows, options):
    """Whether sample_weight moves what the loss is divided by."""
    given = rows.normalizer is not None or options.normalizer is not None
    return options.reduction == "mean" and not given


def _target_weight(rows, dtype):
    """weight[target], or 1; of any class where the target is out of range, its loss is NaN."""
    if rows.weight is None or rows.has_probabilities:
        return 1.0
    targets = rows.targets.reshape(-1).long()
    return rows.weight[targets.clamp(0, rows.weight.shape[0] - 1)].to(dtype)


def gradient_storage(logits: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """Where the gradient of rows goes: over the logits if asked and possible, else a new buffer."""
    if options.inplace and in_memory(logits) is logits and not overlaps(logits):
        return logits.detach()
    return empty_gradient(logits)


def is_over(grad_logits: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether the gradient lies where the logits did."""
    return grad_logits.data_ptr() == logits.data_ptr() and logits.numel() > 0
