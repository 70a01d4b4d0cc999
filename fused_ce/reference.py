"""The specification: cross-entropy in plain PyTorch, differentiated by autograd alone.

Every test compares with this file, so it is written to be read, not to be fast: it holds several
tensors of the size of the logits.
"""

import torch

from fused_ce.cross_entropy import check_targets_in_range, host_may_read, prepare
from fused_ce.options import LossOptions


def reference_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    dim: int | None = None,
    inplace: bool = False,
    grad_in_forward: bool | None = None,
) -> torch.Tensor:
    """The oracle of `fused_cross_entropy`: same arguments, same result, no kernel.

    `inplace` and `grad_in_forward` say how to compute, not what, and change nothing here. Autograd
    differentiates it as often as you like. Arguments, result and errors are those of
    `fused_cross_entropy`.
    """
    options = LossOptions(ignore_index, reduction, label_smoothing, inplace, grad_in_forward)
    call = prepare(logits, targets, weight, dim, options)
    if host_may_read(logits.device, "reference"):
        check_targets_in_range(targets, call.logits.shape[-1], ignore_index)
    loss = reference(*call)
    return loss.view(targets.shape) if reduction == "none" else loss


def reference(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None, options: LossOptions
) -> torch.Tensor:
    """Losses (n_rows,) or their scalar reduction, of rows of logits and targets (see rows.py)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    vocab_size = logits.shape[-1]
    logits = logits.reshape(-1, vocab_size).to(dtype)
    targets = targets.reshape(-1).long()
    weight = logits.new_ones(vocab_size) if weight is None else weight.to(dtype)

    ignored = targets == options.ignore_index
    in_range = (targets >= 0) & (targets < vocab_size)
    safe_targets = targets.where(in_range, 0)

    # An ignored row may hold anything: it leaves before the arithmetic, or its NaN would come
    # back through 0 * NaN in the gradient.
    logits = logits.masked_fill(ignored[:, None], 0.0)
    log_probs = logits.log_softmax(dim=-1)

    target_log_probs = log_probs.gather(1, safe_targets[:, None]).squeeze(1)
    target_weight = weight[safe_targets]
    smoothing = options.label_smoothing
    losses = -(1.0 - smoothing) * target_weight * target_log_probs
    if smoothing > 0.0:
        losses = losses - smoothing / vocab_size * (weight * log_probs).sum(dim=-1)

    # Out of range: NaN in loss and gradient (multiplied, so that the gradient is NaN too).
    losses = losses * torch.where(in_range | ignored, 1.0, torch.nan).to(dtype)
    losses = losses.masked_fill(ignored, 0.0)

    if options.reduction == "none":
        return losses
    if options.reduction == "sum":
        return losses.sum()
    return losses.sum() / target_weight.masked_fill(ignored, 0.0).sum()
