"""The torch.autograd.Function: what is saved, and which of the two gradient routes runs.

`implementation` is cpu.py or kernels/launch.py; both offer the same four functions.
"""

from types import ModuleType

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from fused_ce.options import LossOptions
from fused_ce.rows import empty_gradient, overlaps


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    options: LossOptions,
    implementation: ModuleType,
) -> torch.Tensor:
    """The loss of rows (see rows.py), a scalar or (n_rows,)."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(logits).tangent is not None:
        raise RuntimeError(
            "fused_cross_entropy has no forward-mode derivative: compute the loss with "
            "reference_cross_entropy, or inside `with backend('reference')`"
        )
    if torch.is_grad_enabled() and logits.requires_grad:
        return FusedCrossEntropy.apply(logits, targets, weight, options, implementation)
    return implementation.forward(logits.detach(), targets, weight, options)[0]


class FusedCrossEntropy(torch.autograd.Function):
    """Loss whose gradient is made in forward, or in backward from the saved row statistics."""

    @staticmethod
    def forward(ctx, logits, targets, weight, options, implementation):
        """Rows to loss; saves the finished gradient, or what backward needs to make it."""
        ctx.options, ctx.implementation = options, implementation
        if options.makes_grad_in_forward(logits.dtype):
            grad_logits = _gradient_storage(logits, options)
            loss = implementation.forward_with_grad(logits, targets, weight, options, grad_logits)
            if grad_logits.data_ptr() == logits.data_ptr():
                increment_version(logits)
            ctx.save_for_backward(grad_logits)
            return loss
        loss, *stats = implementation.forward(logits, targets, weight, options)
        ctx.save_for_backward(logits, targets, weight, *stats)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        """The gradient of the rows; every other argument has none."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_cross_entropy cannot be differentiated twice (create_graph=True): compute "
                "the loss with reference_cross_entropy, or inside `with backend('reference')`"
            )
        saved = ctx.saved_tensors
        if len(saved) == 1:  # the finished gradient
            (grad_logits,) = saved
            # In place costs no memory, but a graph that is kept needs this gradient once more.
            kept = _graph_is_kept()
            out = empty_gradient(grad_logits) if kept else grad_logits
            ctx.implementation.scale(grad_logits, grad_loss, out)
            if not kept:
                increment_version(out)  # for whoever else holds it, a saved-tensor hook say
            return out, None, None, None, None
        logits, targets, weight, *stats = saved
        logits = logits.detach()
        out = _gradient_storage(logits, ctx.options)
        ctx.implementation.backward(
            grad_loss, logits, targets, weight, tuple(stats), ctx.options, out
        )
        if out.data_ptr() == logits.data_ptr():
            increment_version(logits)
        return out, None, None, None, None


def _graph_is_kept() -> bool:
    """Whether the running backward was asked to retain its graph; True if PyTorch does not say."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keeps is None else keeps()


def _gradient_storage(logits: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """Where the gradient of rows goes: over the logits if asked and possible, else a new buffer."""
    if options.inplace and not overlaps(logits):
        return logits.detach()
    return empty_gradient(logits)
