"""The torch.autograd.Function of hidden states: what is saved, and when gradients are made.

In forward, a chunk's logits are overwritten by their gradient, which goes into those of hidden
states and head at once. Or in backward, which makes the logits of a chunk once more.
"""

import torch

from fused_ce.autograd import (
    divides_by_weights,
    grad_of_sample_weight,
    grads_of_outputs,
    outputs_of,
)
from fused_ce.backend import implementation
from fused_ce.linear_chunks import Gradients, Plan, Products, cut, merged, placed, without_autocast
from fused_ce.reference import linear_logits, reference
from fused_ce.row_losses import cross_entropy_of_rows, mean_divisor
from fused_ce.rows import Result, Rows, Upstream, compute_dtype, empty_gradient
from fused_ce.tracing import graph_is_kept, is_batched_or_dual


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: Rows,
    plan: Plan,
) -> tuple[torch.Tensor, ...]:
    """(loss,), or (loss, losses, lse, entropy, predictions) with return_stats.

    Of hidden (n_rows, H); rows are (1, n_rows, ...), of their logits only the shape is asked.
    """
    tensors = (hidden, weight, bias, *rows)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        outputs = LinearCrossEntropy.apply(*tensors, plan)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    else:
        rows = Rows(*(None if tensor is None else tensor.detach() for tensor in rows))
        with torch.no_grad():
            result, _, _ = _forward(hidden, weight, bias, rows, plan, (False,) * 3, False)
        outputs = outputs_of(result, plan.options)
    if plan.options.return_stats and plan.options.reduction == "none":
        return outputs[0], *outputs
    return outputs


def _forward(hidden, weight, bias, rows, plan, needs, unweighted):
    """(result, what backward needs of each row, gradients), these where any is needed."""
    of_rows = implementation(plan.backend)
    options = plan.options._replace(normalizer=None)
    if options.reduction == "mean":
        divisor = mean_divisor(rows, plan.options, compute_dtype(rows.logits))
        if not isinstance(divisor, torch.Tensor):
            divisor = rows.logits.new_full((), divisor, dtype=compute_dtype(rows.logits))
        rows = rows._replace(normalizer=divisor)
    pieces = cut(rows, plan, hidden.device)
    grads, results = None, []
    with without_autocast(hidden.device):
        products = Products(hidden, weight, bias, rows, plan, pieces.largest)
        if any(needs):
            grads = Gradients(hidden, weight, bias, needs, len(pieces.parts), pieces.covers_all)
        for part in pieces.parts:
            chunk = products.chunk(part, pieces.ignored)
            if grads is None:
                results.append(of_rows.forward(chunk.rows, options, unweighted))
                continue
            logits = chunk.rows.logits
            results.append(of_rows.forward_with_grad(chunk.rows, options, logits, unweighted))
            grads.add(chunk, logits[0])
        grads = [None] * 3 if grads is None else grads.finished()
    return merged(results, pieces, rows, options), _kept(results, pieces, rows), grads


def _kept(results: list[Result], pieces, rows) -> tuple[torch.Tensor | None, ...]:
    """The maximum, sum and weight of each row, where an implementation keeps them."""
    found = zip(*(result.saved[-3:] or (None,) * 3 for result in results), strict=True)
    dtype, n_rows = compute_dtype(rows.logits), rows.targets.shape[1]
    kept = [
        None
        if of_chunks[0] is None
        else placed(of_chunks, pieces, rows.logits.new_zeros(n_rows, dtype=dtype))
        for of_chunks in found
    ]
    return tuple(kept) or (None,) * 3


class LinearCrossEntropy(torch.autograd.Function):
    """Loss whose gradients are made in forward, or in backward from logits made once more."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, logits, targets, class_weight, sample_weight,
                normalizer, plan):  # fmt: skip
        """Hidden states to loss, and stats if asked for; saves what backward needs."""
        needs, needs_targets = ctx.needs_input_grad[:3], ctx.needs_input_grad[4]
        needs_sample_weight, options = ctx.needs_input_grad[6], plan.options
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        rows = Rows(logits, targets, class_weight, sample_weight, normalizer)
        # Gradients summed over rows cannot be multiplied by an upstream gradient per row.
        ctx.in_forward = (
            any(needs) and not needs_targets and options.reduction != "none"
            and options.makes_grad_in_forward(hidden.dtype)
        )  # fmt: skip
        made = needs if ctx.in_forward else (False,) * 3
        result, kept, grads = _forward(hidden, weight, bias, rows, plan, made, needs_sample_weight)
        loss = None
        if needs_sample_weight and divides_by_weights(rows, options):
            loss = result.loss.clone()  # the user may change the other
        entropy = None if result.entropy is None else result.entropy.clone()
        ctx.save_for_backward(
            *grads, hidden, weight, bias, *rows, loss, result.unweighted, result.divisor, entropy,
            *kept,
        )  # fmt: skip
        outputs = outputs_of(result, options)
        if not options.return_stats:
            return outputs[0]
        ctx.mark_non_differentiable(result.predictions)
        return outputs

    @staticmethod
    def backward(ctx, *grad_outputs):
        """The gradients of hidden, weight, bias, probabilities and sample_weight."""
        saved, options = ctx.saved_tensors, ctx.plan.options
        finished, head, rows = saved[:3], saved[3:6], Rows(*saved[6:11])
        loss, unweighted, divisor, *saved = saved[11:]
        if torch.is_grad_enabled() or any(map(is_batched_or_dual, grad_outputs)):
            return *_differentiable(ctx, grad_outputs, head, rows), None
        grad_loss, grad_losses, grad_lse, grad_entropy = grads_of_outputs(grad_outputs, options)
        grad_sample_weight = None
        if ctx.needs_input_grad[6] and not (grad_loss is None and grad_losses is None):
            grad_sample_weight = grad_of_sample_weight(
                grad_loss, grad_losses, rows, loss, unweighted, divisor, options
            )
        if ctx.in_forward and grad_losses is None and grad_lse is None and grad_entropy is None:
            grads = _scaled(ctx, finished, grad_loss)
            return *grads, None, None, None, grad_sample_weight, None, None
        if grad_loss is not None:
            grad_loss = grad_loss if divisor is None else grad_loss / divisor
            n_rows = rows.targets.shape[1]
            grad_losses = grad_loss.expand(n_rows) + (0.0 if grad_losses is None else grad_losses)
        upstream = Upstream(grad_losses, grad_lse, grad_entropy)
        grads, grad_targets = _second_making(ctx, upstream, head, rows, tuple(saved))
        return *grads, None, grad_targets, None, grad_sample_weight, None, None


def _scaled(ctx, finished, grad_loss):
    """The finished gradients times the upstream one; in place where nobody needs them again."""
    if grad_loss is None:
        return [None] * 3
    kept, scaled = graph_is_kept(), []
    for grad in finished:
        if grad is None:
            scaled.append(None)
            continue
        out = torch.empty_like(grad) if kept else grad
        of_rows = [of.view(1, -1, of.shape[-1]) for of in (grad, out)]
        implementation(ctx.plan.backend).scale(of_rows[0], grad_loss, of_rows[1])
        scaled.append(out)
    return scaled


def _second_making(ctx, upstream, head, rows, saved):
    """([hidden, weight, bias], probabilities): gradients from the logits of a chunk, once more."""
    plan, needs = ctx.plan, ctx.needs_input_grad[:3]
    grad_targets = None
    if ctx.needs_input_grad[4] and upstream.loss is not None:
        grad_targets = empty_gradient(rows.targets)
    if not any(needs) and grad_targets is None:
        return [None] * 3, None
    options = plan.options._replace(reduction="none", normalizer=None)
    rows = rows._replace(normalizer=None)
    hidden, weight, bias = head
    pieces = cut(rows, plan, hidden.device)
    with without_autocast(hidden.device):
        products = Products(hidden, weight, bias, rows, plan, pieces.largest)
        grads = Gradients(hidden, weight, bias, needs, len(pieces.parts), pieces.covers_all)
        for part in pieces.parts:
            chunk = products.chunk(part, pieces.ignored)
            logits = chunk.rows.logits if any(needs) else None
            of_chunk = Upstream(*_of_rows(upstream, part))
            implementation(plan.backend).backward(
                of_chunk, chunk.rows, (None, *_of_rows(saved, part)), options, logits,
                None if grad_targets is None else grad_targets[:, part],
            )  # fmt: skip
            if logits is not None:
                grads.add(chunk, logits[0])
    return grads.finished(), grad_targets


def _of_rows(tensors, part):
    return [None if tensor is None else tensor[part] for tensor in tensors]


def _differentiable(ctx, grad_outputs, head, rows):
    """The gradients as functions of the inputs and of the upstream ones, from whole logits."""
    plan, tensors = ctx.plan, (*head, *rows)
    with torch.enable_grad(), without_autocast(head[0].device):
        logits = linear_logits(*head, rows.targets[0], plan.options.ignore_index, plan.logits_dtype)
        rows = rows._replace(logits=logits[None])
        if any(map(is_batched_or_dual, grad_outputs)):  # plain PyTorch takes them as they are
            outputs = reference(rows, plan.options)
        else:
            outputs = cross_entropy_of_rows(rows, plan.options, plan.backend)
    if plan.options.return_stats and plan.options.reduction == "none":
        outputs = outputs[1:]  # the loss is the losses
    used = [
        (output, grad)
        for output, grad in zip(outputs, grad_outputs, strict=True)
        if grad is not None and output.requires_grad
    ]
    if not used:
        return (None,) * 8
    needs = ctx.needs_input_grad[:8]
    grads = iter(
        torch.autograd.grad(
            [output for output, _ in used],
            [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed],
            [grad for _, grad in used],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )  # fmt: skip
    )
    return [next(grads) if needed else None for needed in needs]
