"""Rows and their gradients differentiated along a direction: a product with the Hessian.

The last link of row_losses.py's chain, in closed form; its own derivative is dense PyTorch, of
every order. What all three links share stands at the end.
"""

import torch

from fused_ce.backend import implementation
from fused_ce.options import RowOptions
from fused_ce.reference import reference
from fused_ce.rows import Direction, Rows, Upstream, empty_gradient
from fused_ce.tracing import is_looped_over, is_traced


def row_tangents(*args):
    """(losses, lse, entropy, grad_logits, grad_targets); see `RowTangents`."""
    if is_traced(args[5]) or any(map(is_looped_over, args[:5])):
        return torch.ops.fused_ce.row_tangents(*args)
    return RowTangents.apply(*args)


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
        grads = places_for(logits, targets, needs_logits, needs_targets)
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
        values, vjp, *_ = torch.func.vjp(function, *primals)
        found = dict(zip(places, vjp(_like(values, _made(grads, ctx))), strict=True))
        needed = ctx.needs_input_grad
        return tuple(found.get(i) if needs else None for i, needs in enumerate(needed))

    @staticmethod
    def jvp(ctx, *tangents):
        """By differentiating `dense_tangents`."""
        refuse_tangent(tangents[7])
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
    options = RowOptions(*options).loss_options
    soft = targets.is_floating_point()

    def rows(*primals):
        loss, _, lse, entropy, _ = reference(
            Rows(primals[0], primals[1] if soft else targets, weight), asked
        )
        return loss, lse, entropy

    def gradients(*primals):
        values, vjp, *_ = torch.func.vjp(rows, *primals)
        return vjp(_like(values, (grad_losses, grad_lse, grad_entropy)))

    def both(*primals):
        return *rows(*primals), *gradients(*primals)

    asked = options._replace(return_stats=True)
    primals = (logits, targets) if soft else (logits,)
    directions = (logits_direction, targets_direction)[: len(primals)]
    found = _jvp(both, primals, _like(primals, directions))
    needs = (True, True, True, needs_logits, needs_targets)
    return tuple(tangent for tangent, needed in zip(found, needs, strict=False) if needed)


def _jvp(function, primals, tangents):
    """The derivative along tangents, by differentiating in reverse twice: forward levels neither
    nest everywhere nor take tensors whose elements share memory."""
    values, vjp, *_ = torch.func.vjp(function, *primals)
    _, transposed, *_ = torch.func.vjp(vjp, tuple(torch.zeros_like(value) for value in values))
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


def needed_of(grads, needs):
    """Those that are needed, None for the others."""
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


def refuse_tangent(tangent):
    """Raise RuntimeError for a tangent of the class weights."""
    if tangent is not None:
        raise RuntimeError("weight gets no derivative: pass weight.detach()")


def places_for(logits, targets, needs_logits, needs_targets):
    """Where gradients of logits and of probabilities go, if needed."""
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
