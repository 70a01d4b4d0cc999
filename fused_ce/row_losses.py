"""The loss of each row, differentiable as often as you like: for torch.compile, torch.func,
forward-mode AD and `create_graph=True`.

autograd.py's Function is faster, but can be differentiated once, and only by autograd. Here three
functions carry the calculus of a row, and reduction, sample_weight and normalizer, a number a row,
are left to PyTorch's own operators:

    row_losses     logits and targets to losses, lse and entropy
    row_gradients  its derivative: gradients of logits and of probabilities
    row_tangents   the derivative of both along a direction: a product with the Hessian

Each is a torch.autograd.Function whose derivative is the next, and an operator of torch.library
(see ops.py) with the same derivative. That of the last is dense PyTorch, of every order.
"""

import torch

from fused_ce.arguments import check_targets_on_host
from fused_ce.backend import implementation
from fused_ce.options import LossOptions, RowOptions
from fused_ce.row_tangents import folded, needed_of, places_for, refuse_tangent, row_tangents
from fused_ce.rows import Rows, Upstream, compute_dtype
from fused_ce.tracing import is_looped_over, is_traced


def cross_entropy_of_rows(
    rows: Rows, options: LossOptions, backend: str
) -> tuple[torch.Tensor, ...]:
    """(loss,), or (loss, losses, lse, entropy, predictions) with return_stats; see rows.py."""
    if options.inplace and not is_traced(rows.logits):
        raise RuntimeError(
            "inplace=True overwrites the logits, which torch.func and forward-mode AD read again: "
            "pass inplace=False"
        )
    row_options = RowOptions.of(options, backend)
    losses, lse, entropy, predictions, *_ = row_losses(*rows[:3], *row_options)
    if rows.sample_weight is not None:
        # Converted once: its gradient is a difference, of which both parts would be rounded.
        rows = rows._replace(sample_weight=rows.sample_weight.to(losses.dtype))
        losses = losses * _counted_weight(rows.sample_weight, rows, options)
    loss = losses
    if options.reduction != "none":
        loss = losses.sum()
    if options.reduction == "mean":
        loss = loss / mean_divisor(rows, options, losses.dtype)
    return (loss, losses, lse, entropy, predictions) if options.return_stats else (loss,)


def mean_divisor(rows: Rows, options: LossOptions, dtype: torch.dtype) -> torch.Tensor | float:
    """What "mean" divides by, from the targets alone: the logits are not looked at."""
    if rows.normalizer is not None:
        return rows.normalizer.to(dtype)
    if options.normalizer is not None:
        return options.normalizer
    if rows.sample_weight is not None:
        divisor = rows.sample_weight.to(dtype)
    else:
        n_rows = rows.targets.shape[0] * rows.targets.shape[1]
        divisor = rows.targets.new_ones(n_rows, dtype=dtype)
    if rows.weight is not None and not rows.has_probabilities:
        safe = rows.targets.flatten().long().clamp(0, rows.weight.shape[0] - 1)
        divisor = divisor * rows.weight.to(dtype)[safe]
    return _counted_weight(divisor, rows, options).sum()


def _counted_weight(of_rows, rows, options):
    """0 in ignored rows, where it may be NaN."""
    if rows.has_probabilities:
        return of_rows
    return of_rows.masked_fill(rows.targets.flatten().long() == options.ignore_index, 0.0)


def grads_of_used(outputs, grad_outputs, inputs, needs) -> list[torch.Tensor | None]:
    """The gradients of inputs, where needed, for those outputs that have an upstream gradient."""
    used = [
        (output, grad)
        for output, grad in zip(outputs, grad_outputs, strict=False)
        if grad is not None and output.requires_grad
    ]
    if not used:
        return [None] * len(inputs)
    grads = iter(
        torch.autograd.grad(
            [output for output, _ in used],
            [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed],
            [grad for _, grad in used],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )  # fmt: skip
    )
    return [next(grads) if needed else None for needed in needs]


def row_losses(logits, targets, weight, *options):
    """(losses, lse, entropy, predictions, row_max, row_sum, row_weight); see `RowLosses`."""
    if is_traced(logits):
        return torch.ops.fused_ce.row_losses(logits, targets, weight, *options)
    return RowLosses.apply(logits, targets, weight, *options)


def row_gradients(*args):
    """(grad_logits, grad_targets); see `RowGradients`."""
    if is_traced(args[3]) or any(map(is_looped_over, args[:3])):
        return torch.ops.fused_ce.row_gradients(*args)
    return RowGradients.apply(*args)


def kinds_of_results(logits, targets, weight, options):
    """[(size, dtype)] of the results of `row_losses`, whatever the vocabulary's size: a compiled
    graph should not depend on it. The kernels never read row_max and row_sum of short rows."""
    n_rows, dtype = logits.shape[0] * logits.shape[1], compute_dtype(logits)
    asked = n_rows if options.return_stats else 0
    kept = n_rows if options.backend == "triton" else 0
    has_shares = targets.dim() == 3 or weight is not None and options.label_smoothing > 0.0
    sizes = n_rows, asked, asked, asked, kept, kept, kept if has_shares else 0
    return [(size, torch.int64 if at == 3 else dtype) for at, size in enumerate(sizes)]


class RowLosses(torch.autograd.Function):
    """Rows to their losses and stats, and what the kernels keep for a gradient.

    What was not asked for has no elements; so has what an implementation does not keep.
    """

    weight_at = 2  # its place among the arguments

    @staticmethod
    def forward(logits, targets, weight, *options):
        """(losses, lse, entropy, predictions, row_max, row_sum, row_weight), each (n_rows,)."""
        options = RowOptions(*options)
        rows = Rows(logits, targets, weight)
        check_targets_on_host(rows, options.loss_options, options.backend)
        result = implementation(options.backend).forward(rows, options.loss_options, keep=True)
        found = [result.loss, result.lse, result.entropy, result.predictions]
        found += result.saved[-3:] or (None, None, None)
        kinds = kinds_of_results(*rows[:3], options)
        return tuple(
            logits.new_empty(size, dtype=dtype) if tensor is None else tensor
            for tensor, (size, dtype) in zip(found, kinds, strict=True)
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the rows and the output."""
        logits, targets, weight, *ctx.options = inputs
        losses, lse, entropy, *not_differentiable = output
        if not RowOptions(*ctx.options).return_stats:
            not_differentiable += [lse, entropy]
        ctx.mark_non_differentiable(*not_differentiable)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets, weight, *output[4:], entropy)
        ctx.save_for_forward(logits, targets, weight)

    @staticmethod
    def backward(ctx, grad_losses, grad_lse, grad_entropy, *_):
        """`row_gradients` of the rows."""
        needs = ctx.needs_input_grad[:2]
        grads = (None, None)
        if any(grad is not None for grad in (grad_losses, grad_lse, grad_entropy)):
            grads = row_gradients(
                grad_losses, grad_lse, grad_entropy, *ctx.saved_tensors, *needs, *ctx.options
            )
        return *needed_of(grads, needs), None, *(None for _ in ctx.options)

    @staticmethod
    def jvp(ctx, logits_tangent, targets_tangent, weight_tangent, *_):
        """The first half of `row_tangents`."""
        refuse_tangent(weight_tangent)
        losses, lse, entropy, *_ = row_tangents(
            logits_tangent, targets_tangent, None, None, None, *ctx.saved_tensors, False, False,
            *ctx.options,
        )  # fmt: skip
        if not RowOptions(*ctx.options).return_stats:
            lse = entropy = None
        return losses, lse, entropy, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        """The batch becomes more rows."""
        return folded(RowLosses.apply, info, in_dims, args, RowLosses.weight_at)


class RowGradients(torch.autograd.Function):
    """The gradients of rows for upstream gradients of losses, lse and entropy, None for 0."""

    weight_at = 5  # its place among the arguments

    @staticmethod
    def forward(
        grad_losses, grad_lse, grad_entropy, logits, targets, weight,
        row_max, row_sum, row_weight, entropy, needs_logits, needs_targets, *options,
    ):  # fmt: skip
        """(grad_logits, grad_targets), like logits and targets; without elements if not needed."""
        options = RowOptions(*options)
        grads = places_for(logits, targets, needs_logits, needs_targets)
        kept = [
            None if of_row.numel() == 0 else of_row for of_row in (row_max, row_sum, row_weight)
        ]
        implementation(options.backend).backward(
            Upstream(grad_losses, grad_lse, grad_entropy),
            Rows(logits, targets, weight), (None, entropy, *kept), options.loss_options, *grads,
        )  # fmt: skip
        return tuple(logits.new_empty(0) if grad is None else grad for grad in grads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the inputs."""
        *tensors, ctx.needs_logits, ctx.needs_targets = inputs[:12]
        ctx.options = inputs[12:]
        not_needed = [
            grad for grad, needed in zip(output, inputs[10:12], strict=True) if not needed
        ]
        ctx.mark_non_differentiable(*not_needed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, logits_direction, targets_direction):
        """Each input's gradient is a derivative of the rows along the gradients that come."""
        upstream, rows = ctx.saved_tensors[:3], ctx.saved_tensors[3:6]
        needs = ctx.needs_input_grad[3:5]
        found = (None,) * 5
        if logits_direction is not None or targets_direction is not None:
            found = row_tangents(
                logits_direction, targets_direction, *upstream, *rows, *needs, *ctx.options
            )
        of_upstream = needed_of(found[:3], ctx.needs_input_grad[:3])
        return (
            *of_upstream,
            *needed_of(found[3:], needs),
            *(None for _ in range(7 + len(ctx.options))),
        )

    @staticmethod
    def jvp(ctx, *tangents):
        """Along logits and probabilities a product with the Hessian; linear in the rest."""
        upstream, logits_direction, targets_direction = tangents[:3], *tangents[3:5]
        refuse_tangent(tangents[5])
        needs = ctx.needs_logits, ctx.needs_targets
        found = []
        if logits_direction is not None or targets_direction is not None:
            *_, grad_logits, grad_targets = row_tangents(
                logits_direction, targets_direction, *ctx.saved_tensors[:6], *needs, *ctx.options
            )
            found.append((grad_logits, grad_targets))
        if any(tangent is not None for tangent in upstream):
            found.append(row_gradients(*upstream, *ctx.saved_tensors[3:], *needs, *ctx.options))
        return tuple(
            sum(parts[1:], parts[0]) if needed else None
            for parts, needed in zip(zip(*found, strict=True), needs, strict=True)
        )

    @staticmethod
    def vmap(info, in_dims, *args):
        """The batch becomes more rows."""
        return folded(RowGradients.apply, info, in_dims, args, RowGradients.weight_at)
