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

from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from fused_ce.backend import implementation
from fused_ce.options import LossOptions
from fused_ce.rows import Direction, Rows, Upstream, empty_gradient


class RowOptions(NamedTuple):
    """What the loss of a row depends on, in the order of the operators' arguments."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    logit_scale: float
    softcap: float | None
    return_stats: bool
    backend: str

    @classmethod
    def of(cls, options: LossOptions, backend: str) -> "RowOptions":
        """Those of a call."""
        return cls(
            options.ignore_index, options.label_smoothing, options.z_loss, options.logit_scale,
            options.softcap, options.return_stats, backend,
        )  # fmt: skip

    @property
    def loss_options(self) -> LossOptions:
        """As the implementations take them."""
        return LossOptions(
            self.ignore_index, "none", self.label_smoothing, z_loss=self.z_loss,
            logit_scale=self.logit_scale, softcap=self.softcap, return_stats=self.return_stats,
        )  # fmt: skip


def is_traced(logits: torch.Tensor) -> bool:
    """Whether a compiler or a dispatch mode wants to see one operator, not what it does."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or is_traceable_subclass(logits)
    )


def is_traceable_subclass(tensor: torch.Tensor) -> bool:
    """Whether it is one of the tensors that compilers compute with, which have no memory."""
    return type(tensor) is not torch.Tensor and type(tensor).__module__.startswith(
        "torch._subclasses."
    )


def is_transformed(rows: Rows) -> bool:
    """Whether torch.func or forward-mode AD differentiates, or maps over, one of the tensors."""
    return torch._C._are_functorch_transforms_active() or (
        forward_ad._current_level >= 0
        and any(
            tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
            for tensor in rows
        )
    )


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
    sample_weight, ignored = rows.sample_weight, None
    if not rows.has_probabilities:
        targets = rows.targets.flatten().long()
        ignored = targets == options.ignore_index
    if sample_weight is not None:
        sample_weight = sample_weight.to(losses.dtype)
        if ignored is not None:  # of an ignored row it may be NaN
            sample_weight = sample_weight.masked_fill(ignored, 0.0)
        losses = losses * sample_weight
    loss = losses
    if options.reduction != "none":
        loss = losses.sum()
    if options.reduction == "mean":
        if rows.normalizer is not None:
            divisor = rows.normalizer.to(losses.dtype)
        elif options.normalizer is not None:
            divisor = options.normalizer
        else:
            divisor = torch.ones_like(losses) if sample_weight is None else sample_weight
            if ignored is not None:
                if rows.weight is not None:
                    safe = targets.clamp(0, rows.weight.shape[0] - 1)
                    divisor = divisor * rows.weight.to(losses.dtype)[safe]
                divisor = divisor.masked_fill(ignored, 0.0)
            divisor = divisor.sum()
        loss = loss / divisor
    return (loss, losses, lse, entropy, predictions) if options.return_stats else (loss,)


def row_losses(logits, targets, weight, *options):
    """(losses, lse, entropy, predictions, row_max, row_sum, row_weight); see `RowLosses`."""
    if is_traced(logits):
        return torch.ops.fused_ce.row_losses(logits, targets, weight, *options)
    return RowLosses.apply(logits, targets, weight, *options)


def row_gradients(*args):
    """(grad_logits, grad_targets); see `RowGradients`."""
    if is_traced(args[3]) or any(map(_is_looped_over, args[:3])):
        return torch.ops.fused_ce.row_gradients(*args)
    return RowGradients.apply(*args)


def row_tangents(*args):
    """(losses, lse, entropy, grad_logits, grad_targets); see `RowTangents`."""
    if is_traced(args[5]) or any(map(_is_looped_over, args[:5])):
        return torch.ops.fused_ce.row_tangents(*args)
    return RowTangents.apply(*args)


def _is_looped_over(grad: torch.Tensor | None) -> bool:
    """Whether it is one of many for `is_grads_batched`, which calls an operator for each."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


class RowLosses(torch.autograd.Function):
    """Rows to their losses and stats, and what the kernels keep for a gradient.

    What was not asked for has no elements; so has what an implementation does not keep.
    """

    weight_at = 2  # its place among the arguments

    @staticmethod
    def forward(logits, targets, weight, *options):
        """(losses, lse, entropy, predictions, row_max, row_sum, row_weight), each (n_rows,)."""
        from fused_ce.cross_entropy import check_targets_on_host  # which imports this file

        options = RowOptions(*options)
        rows = Rows(logits, targets, weight)
        check_targets_on_host(rows, options.loss_options, options.backend)
        result = implementation(options.backend).forward(rows, options.loss_options)
        kept = result.saved[-3:] or (None, None, None)
        nothing = logits.new_empty(0, dtype=result.loss.dtype)
        found = [result.loss, result.lse, result.entropy, result.predictions]
        if not options.return_stats:
            found[1:] = [nothing.clone(), nothing.clone(), nothing.long()]
        if options.backend == "triton":  # a size that does not depend on that of the vocabulary
            nothing = torch.zeros_like(result.loss)
        return *found, *(nothing.clone() if tensor is None else tensor for tensor in kept)

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
        return *_needed(grads, needs), None, *(None for _ in ctx.options)

    @staticmethod
    def jvp(ctx, logits_tangent, targets_tangent, weight_tangent, *_):
        """The first half of `row_tangents`."""
        _refuse_tangent(weight_tangent)
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
        grads = _places(logits, targets, needs_logits, needs_targets)
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
        of_upstream = _needed(found[:3], ctx.needs_input_grad[:3])
        return (
            *of_upstream,
            *_needed(found[3:], needs),
            *(None for _ in range(7 + len(ctx.options))),
        )

    @staticmethod
    def jvp(ctx, *tangents):
        """Along logits and probabilities a product with the Hessian; linear in the rest."""
        upstream, logits_direction, targets_direction = tangents[:3], *tangents[3:5]
        _refuse_tangent(tangents[5])
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


class RowTangents(torch.autograd.Function):
    """Derivatives along tangents of logits and probabilities: of losses, lse and entropy, and of
    the gradients that `RowGradients` makes from three upstream gradients. None stands for 0."""

    weight_at = 7  # its place among the arguments

    @staticmethod
    def forward(
        logits_direction, targets_direction, grad_losses, grad_lse, grad_entropy,
        logits, targets, weight, needs_logits, needs_targets, *options,
    ):  # fmt: skip
        """(losses, lse, entropy, grad_logits, grad_targets); the latter if needed."""
        options = RowOptions(*options)
        grads = _places(logits, targets, needs_logits, needs_targets)
        found = implementation(options.backend).tangents(
            Direction(logits_direction, targets_direction),
            Upstream(grad_losses, grad_lse, grad_entropy),
            Rows(logits, targets, weight), options.loss_options, *grads,
        )  # fmt: skip
        return *found, *(logits.new_empty(0) if grad is None else grad for grad in grads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the inputs."""
        ctx.arguments = inputs[8:]
        ctx.is_class = not inputs[6].is_floating_point()
        ctx.mark_non_differentiable(
            *(grad for grad, needed in zip(output[3:], inputs[8:10], strict=True) if not needed)
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:8])
        ctx.save_for_forward(*inputs[:8])

    @staticmethod
    def backward(ctx, *grads):
        """By differentiating `dense_tangents`."""
        function, primals, places = _dense_function(ctx)
        values, vjp = torch.func.vjp(function, *primals)
        found = dict(zip(places, vjp(_like(values, _made(grads, ctx))), strict=True))
        needed = ctx.needs_input_grad
        return tuple(found.get(i) if needs else None for i, needs in enumerate(needed))

    @staticmethod
    def jvp(ctx, *tangents):
        """By differentiating `dense_tangents`."""
        _refuse_tangent(tangents[7])
        function, primals, places = _dense_function(ctx)
        tangents = _like(primals, [tangents[i] for i in places])
        made = iter(_jvp(function, primals, tangents))
        needs = (True, True, True, *ctx.arguments[:2])
        return tuple(next(made) if needed else None for needed in needs)

    @staticmethod
    def vmap(info, in_dims, *args):
        """The batch becomes more rows."""
        return folded(RowTangents.apply, info, in_dims, args, RowTangents.weight_at)


def dense_tangents(
    logits_direction, targets_direction, grad_losses, grad_lse, grad_entropy,
    logits, targets, weight, needs_logits, needs_targets, *options,
):  # fmt: skip
    """What `RowTangents` computes, as derivatives of the reference; without what is not needed."""
    from fused_ce.reference import reference

    options = RowOptions(*options).loss_options
    soft = targets.is_floating_point()

    def rows(*primals):
        loss, _, lse, entropy, _ = reference(
            Rows(primals[0], primals[1] if soft else targets, weight), asked
        )
        return loss, lse, entropy

    def gradients(*primals):
        values, vjp = torch.func.vjp(rows, *primals)
        return vjp(_like(values, (grad_losses, grad_lse, grad_entropy)))

    def both(*primals):
        return *rows(*primals), *gradients(*primals)

    asked = LossOptions(**{**options.__dict__, "return_stats": True})
    primals = (logits, targets) if soft else (logits,)
    directions = (logits_direction, targets_direction)[: len(primals)]
    found = _jvp(both, primals, _like(primals, directions))
    needs = (True, True, True, needs_logits, needs_targets)
    return tuple(tangent for tangent, needed in zip(found, needs, strict=False) if needed)


def _jvp(function, primals, tangents):
    """The derivative along tangents, by differentiating in reverse twice: forward levels neither
    nest everywhere nor take tensors whose elements share memory."""
    values, vjp = torch.func.vjp(function, *primals)
    _, transposed = torch.func.vjp(vjp, tuple(torch.zeros_like(value) for value in values))
    return transposed(tangents)[0]


def _dense_function(ctx):
    """`dense_tangents` of the floating inputs that are there, these, and where they belong."""
    inputs = ctx.saved_tensors
    places = [
        i
        for i, tensor in enumerate(inputs[:7])
        if tensor is not None and (i < 6 or not ctx.is_class)
    ]

    def function(*primals):
        tensors = list(inputs)
        for i, primal in zip(places, primals, strict=True):
            tensors[i] = primal
        return dense_tangents(*tensors, *ctx.arguments)

    return function, tuple(inputs[i] for i in places), places


def _made(grads, ctx):
    """The gradients of what `dense_tangents` returns."""
    needs = (True, True, True, *ctx.arguments[:2])
    return tuple(grad for grad, needed in zip(grads, needs, strict=True) if needed)


def _like(tensors, grads):
    """The gradients, zeros for None."""
    return tuple(
        torch.zeros_like(tensor) if grad is None else grad
        for tensor, grad in zip(tensors, grads, strict=True)
    )


def _needed(grads, needs):
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


def _refuse_tangent(tangent):
    if tangent is not None:
        raise RuntimeError("weight gets no derivative: pass weight.detach()")


def _places(logits, targets, needs_logits, needs_targets):
    return (
        empty_gradient(logits) if needs_logits else None,
        empty_gradient(targets) if needs_targets else None,
    )


def folded(function, info, in_dims, args, weight_at):
    """`function` of batched arguments, their batch folded into the rows: dim 0 of every tensor but
    the class weights. Rows of those need a call each."""
    if info.batch_size == 0:
        one = (
            arg if dim is None else arg.new_zeros(arg.shape[:dim] + arg.shape[dim + 1 :])
            for arg, dim in zip(args, in_dims, strict=True)
        )
        outputs = function(*one)
        return tuple(output.new_empty(0, *output.shape) for output in outputs), (0,) * len(outputs)
    if in_dims[weight_at] is not None:
        calls = [
            function(
                *(
                    arg if dim is None else arg.select(dim, i)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(calls[0])
    folded_args = []
    for i, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
        if isinstance(arg, torch.Tensor) and i != weight_at:
            arg = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            arg = arg.flatten(0, 1)
        folded_args.append(arg)
    outputs = function(*folded_args)
    outputs = tuple(
        output.unflatten(0, (info.batch_size, output.shape[0] // info.batch_size))
        for output in outputs
    )
    return outputs, (0,) * len(outputs)
