"""Hidden states to loss, differentiable: what is saved, and when gradients are made.

In forward, a chunk's logits are overwritten by their gradient, which goes into those of hidden
states and head at once. Or in backward, which makes the logits of a chunk once more. Either is an
operator of torch.library too, see ops.py: a compiler sees no logits.
"""

import torch
from torch.autograd.graph import increment_version

from fused_ce.arguments import check_targets_on_host
from fused_ce.autograd import grad_of_sample_weight
from fused_ce.backend import implementation
from fused_ce.linear_chunks import Plan, cut, merged, placed, without_autocast
from fused_ce.linear_products import Gradients, Operands, Products
from fused_ce.reference import linear_logits, reference
from fused_ce.row_losses import cross_entropy_of_rows, grads_of_used, mean_divisor
from fused_ce.rows import Result, Rows, Upstream, compute_dtype, empty_gradient
from fused_ce.tracing import graph_is_kept, is_batched_or_dual, is_traced

N_TENSORS = 7  # hidden, weight, bias, targets, class_weight, sample_weight, normalizer


def linear_cross_entropy(head: Operands, rows: Rows, plan: Plan) -> tuple[torch.Tensor, ...]:
    """(loss,), or (loss, losses, lse, entropy, predictions) with return_stats.

    The rows are (1, n_rows, ...); of their logits only the shape is asked.
    """
    tensors, options = (*head, *rows[1:]), plan.options
    is_recorded = torch.is_grad_enabled()
    needs = [is_recorded and tensor is not None and tensor.requires_grad for tensor in tensors]
    *needs_head, needs_targets, _, needs_sample_weight, _ = needs
    # Gradients summed over rows cannot be multiplied by an upstream gradient per row.
    in_forward = not needs_targets and options.reduction != "none"
    if not (in_forward and options.makes_grad_in_forward(head[0].dtype)):
        needs_head = [False, False, False]
    losses_of = torch.ops.fused_ce.linear_losses if is_traced(head[0]) else LinearLosses.apply
    loss, losses, _, lse, entropy, predictions, *_ = losses_of(
        *tensors, *needs_head, needs_sample_weight, *plan.flat()
    )
    if not options.return_stats:
        return (loss,)
    return loss, loss if options.reduction == "none" else losses, lse, entropy, predictions


def kinds_of_linear_results(
    hidden, weight, bias, targets, class_weight, sample_weight, normalizer,
    needs_hidden, needs_weight, needs_bias, unweighted, *plan,
):  # fmt: skip
    """[(shape, dtype)] of the results of `LinearLosses`, whatever the vocabulary's size."""
    options, backend, *_ = Plan.of(*plan)
    of_row, dtype = (hidden.shape[0],), compute_dtype(hidden)
    is_sum, has_stats, none = options.reduction != "none", options.return_stats, (0,)
    asked = of_row if has_stats else none
    read_again = has_stats or not (needs_hidden or needs_weight or needs_bias)
    kept = of_row if backend == "triton" and read_again else none
    has_shares = targets.dim() == 3 or class_weight is not None and options.label_smoothing > 0.0
    return [
        (() if is_sum else of_row, dtype),
        (of_row if is_sum and has_stats else none, dtype),
        (of_row if unweighted else none, dtype),
        (asked, dtype),
        (asked, dtype),
        (asked, torch.int64),
        (() if options.reduction == "mean" else none, dtype),
        (kept, dtype),
        (kept, dtype),
        (kept if has_shares else none, dtype),
        (hidden.shape if needs_hidden else none, hidden.dtype),
        (weight.shape if needs_weight else none, weight.dtype),
        (bias.shape if needs_bias else none, hidden.dtype),
    ]


class LinearLosses(torch.autograd.Function):
    """Hidden states to a loss, its stats, and the gradients that are made at once.

    What was not asked for has no elements; so has what an implementation does not keep.
    """

    @staticmethod
    def forward(hidden, weight, bias, targets, class_weight, sample_weight, normalizer,
                needs_hidden, needs_weight, needs_bias, unweighted, *plan):  # fmt: skip
        """(loss, losses, unweighted, lse, entropy, predictions, divisor, row_max, row_sum,
        row_weight, grad_hidden, grad_weight, grad_bias)."""
        args = (
            hidden, weight, bias, targets, class_weight, sample_weight, normalizer,
            needs_hidden, needs_weight, needs_bias, unweighted, *plan,
        )  # fmt: skip
        plan = Plan.of(*plan)
        rows = _rows(args[:N_TENSORS], plan)
        check_targets_on_host(rows, plan.options, _checked_as(plan.backend))
        needs = needs_hidden, needs_weight, needs_bias
        result, kept, grads = _forward((hidden, weight, bias), rows, plan, needs, unweighted)
        divisor = result.divisor
        if divisor is not None and normalizer is not None and divisor.dtype == normalizer.dtype:
            divisor = divisor.clone()  # it is the normalizer: results may not be arguments
        losses = result.losses if plan.options.reduction != "none" else None
        found = (
            result.loss, losses, result.unweighted, result.lse, result.entropy,
            result.predictions, divisor, *kept, *grads,
        )  # fmt: skip
        # Not what an implementation finds besides, either: a compiler was told the shapes.
        return tuple(
            hidden.new_zeros(shape, dtype=dtype) if tensor is None or shape == (0,) else tensor
            for tensor, (shape, dtype) in zip(found, kinds_of_linear_results(*args), strict=True)
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep inputs and output."""
        loss, losses, unweighted, lse, entropy, predictions, divisor, *kept = output
        ctx.plan = Plan.of(*inputs[N_TENSORS + 4 :])
        ctx.in_forward = any(inputs[N_TENSORS : N_TENSORS + 3])
        not_differentiable = [unweighted, predictions, divisor, *kept]
        if not ctx.plan.options.return_stats:
            not_differentiable += [losses, lse, entropy]
        elif ctx.plan.options.reduction == "none":
            not_differentiable.append(losses)
        ctx.mark_non_differentiable(*not_differentiable)
        ctx.set_materialize_grads(False)
        # Clones of what the user gets, who may change it.
        ctx.save_for_backward(
            *inputs[:N_TENSORS], loss.detach().clone(), unweighted, divisor,
            entropy.detach().clone(), *kept,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, grad_loss, grad_losses, _, grad_lse, grad_entropy, *others):
        """The gradients of hidden, weight, bias, probabilities and sample_weight."""
        saved = ctx.saved_tensors  # a checkpoint unpacks them once
        tensors, saved = saved[:N_TENSORS], saved[N_TENSORS:]
        loss, unweighted, divisor, entropy, *kept, grad_hidden, grad_weight, grad_bias = saved
        grad_outputs = grad_loss, grad_losses, grad_lse, grad_entropy
        none = (None,) * (4 + len(ctx.plan.flat()))
        if torch.is_grad_enabled() or any(map(is_batched_or_dual, grad_outputs)):
            return *_differentiable(ctx, grad_outputs, tensors), *none
        rows, options = _rows(tensors, ctx.plan), ctx.plan.options
        divisor = divisor if options.reduction == "mean" else None
        grad_sample_weight = None
        if ctx.needs_input_grad[5] and not (grad_loss is None and grad_losses is None):
            grad_sample_weight = grad_of_sample_weight(
                grad_loss, grad_losses, rows, loss, unweighted, divisor, options
            )
        if ctx.in_forward and grad_losses is None and grad_lse is None and grad_entropy is None:
            made = grad_hidden, grad_weight, grad_bias
            grads = [
                _scaled(grad, grad_loss, ctx.plan.backend) if needed else None
                for grad, needed in zip(made, ctx.needs_input_grad, strict=False)
            ]
            return *grads, None, None, grad_sample_weight, None, *none
        if grad_loss is not None and options.reduction != "none":
            grad_loss = grad_loss if divisor is None else grad_loss / divisor
            grad_loss = grad_loss.expand(rows.targets.shape[1])
        if grad_losses is not None:
            grad_loss = grad_losses if grad_loss is None else grad_loss + grad_losses
        *grads, grad_targets = _made_again(
            ctx, (grad_loss, grad_lse, grad_entropy), tensors, (entropy, *kept)
        )
        return *grads, grad_targets, None, grad_sample_weight, None, *none


def linear_gradients(
    grad_losses, grad_lse, grad_entropy,
    hidden, weight, bias, targets, class_weight, sample_weight, normalizer,
    entropy, row_max, row_sum, row_weight, needs_hidden, needs_weight, needs_bias, needs_targets,
    *plan,
):  # fmt: skip
    """(grad_hidden, grad_weight, grad_bias, grad_targets) from the logits of a chunk, once more.

    For upstream gradients (n_rows,) of losses, lse and entropy, None for 0; what is not needed has
    no elements.
    """
    plan, head = Plan.of(*plan), (hidden, weight, bias)
    rows = _rows((*head, targets, class_weight, sample_weight, None), plan)
    needs, grad_targets = (needs_hidden, needs_weight, needs_bias), None
    if needs_targets:
        grad_targets = empty_gradient(targets)
    saved = [None if t.numel() == 0 else t for t in (entropy, row_max, row_sum, row_weight)]
    upstream = Upstream(grad_losses, grad_lse, grad_entropy)
    options = plan.options._replace(reduction="none")
    pieces = cut(rows, plan, hidden.device)
    with without_autocast(hidden.device):
        products = Products(*head, rows, plan, pieces.largest)
        grads = Gradients(*head, needs, len(pieces.parts), pieces.covers_all)
        for part in pieces.parts:
            chunk = products.chunk(part, pieces.ignored)
            logits = chunk.rows.logits if any(needs) else None
            implementation(plan.backend).backward(
                Upstream(*_of_rows(upstream, part)), chunk.rows,
                (None, *_of_rows(saved, part)), options, logits,
                None if grad_targets is None else grad_targets[:, part],
            )  # fmt: skip
            if logits is not None:
                grads.add(chunk, logits[0])
    made = *grads.finished(), grad_targets
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in made)


def _rows(tensors, plan: Plan) -> Rows:
    """The rows of (hidden, weight, bias, targets, ...); their logits take no memory."""
    hidden, weight, _, *others = tensors
    shape = 1, hidden.shape[0], weight.shape[0]
    logits = hidden.detach().new_zeros((), dtype=plan.logits_dtype).expand(shape)
    return Rows._make([logits, *(None if t is None else t.detach() for t in others)])


def _checked_as(backend: str) -> str:
    """The implementation whose targets the host may see before the first chunk."""
    return "triton" if backend == "triton" else "reference"


def _forward(head: Operands, rows, plan, needs, unweighted):
    """(result, what backward needs of each row, gradients)."""
    of_rows = implementation(plan.backend)
    options = plan.options
    if options.reduction == "mean":
        divisor = mean_divisor(rows, plan.options, compute_dtype(rows.logits))
        rows = rows._replace(normalizer=divisor)
    pieces = cut(rows, plan, head[0].device)
    grads, results = None, []
    with without_autocast(head[0].device):
        products = Products(*head, rows, plan, pieces.largest)
        if any(needs):
            grads = Gradients(*head, needs, len(pieces.parts), pieces.covers_all)
        for part in pieces.parts:
            chunk = products.chunk(part, pieces.ignored)
            if grads is None:
                results.append(of_rows.forward(chunk.rows, options, unweighted, keep=True))
                continue
            logits = chunk.rows.logits
            results.append(of_rows.forward_with_grad(chunk.rows, options, logits, unweighted))
            grads.add(chunk, logits[0])
        made = [None] * 3 if grads is None else grads.finished()
    return merged(results, pieces, rows, options), _kept(results, pieces, rows), made


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


def _scaled(grad, grad_loss, backend):
    """A finished gradient times the upstream one; in place where nobody needs it again."""
    if grad_loss is None:
        return None
    if is_traced(grad):  # a zero stays zero, as in `scale`
        # A GPU would round a factor without axes to 16 bits first, a large one to inf.
        scaled = grad.to(compute_dtype(grad)) * grad_loss
        return scaled.masked_fill(grad == 0.0, 0.0).to(grad.dtype)
    kept = graph_is_kept()
    out = torch.empty_like(grad) if kept else grad
    of_rows = [of.view(1, of.shape[:-1].numel(), of.shape[-1]) for of in (grad, out)]
    implementation(backend).scale(of_rows[0], grad_loss, of_rows[1])
    if not kept:
        increment_version(out)  # for whoever else holds it, a saved-tensor hook say
    return out


def _made_again(ctx, upstream, tensors, saved):
    """The gradients of hidden, weight, bias and probabilities, None where nobody needs them."""
    *needs, needs_targets = ctx.needs_input_grad[:4]
    needs = *needs, needs_targets and upstream[0] is not None
    if not any(needs):
        return (None,) * 4
    is_seen = is_traced(tensors[0])
    make = torch.ops.fused_ce.linear_gradients if is_seen else linear_gradients
    made = make(*upstream, *tensors, *saved, *needs, *ctx.plan.flat())
    return [grad if needed else None for grad, needed in zip(made, needs, strict=True)]


def _of_rows(tensors, part):
    return [None if tensor is None else tensor[part] for tensor in tensors]


def _differentiable(ctx, grad_outputs, tensors):
    """The gradients as functions of the inputs and of the upstream ones, from whole logits."""
    (hidden, weight, bias, targets, *others), plan = tensors, ctx.plan
    with torch.enable_grad(), without_autocast(hidden.device):
        logits = linear_logits(
            hidden, weight, bias, targets[0], plan.options.ignore_index, plan.logits_dtype
        )
        rows = Rows(logits[None], targets, *others)
        if any(map(is_batched_or_dual, grad_outputs)):  # plain PyTorch takes them as they are
            outputs = reference(rows, plan.options)
        else:
            outputs = cross_entropy_of_rows(rows, plan.options, plan.backend)
    return grads_of_used(outputs, grad_outputs, tensors, ctx.needs_input_grad[:N_TENSORS])
