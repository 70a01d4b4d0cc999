"""The specification: cross-entropy in plain PyTorch, differentiated by autograd alone.

Every test compares with this file, so it is written to be read, not to be fast: it holds several
tensors of the size of the logits.
"""

import torch

from fused_ce.arguments import CrossEntropyStats, check_targets_on_host, prepare
from fused_ce.options import LossOptions
from fused_ce.rows import Rows


def reference_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    dim: int | None = None,
    sample_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace: bool = False,
    grad_in_forward: bool | None = None,
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]:
    """The oracle of `fused_cross_entropy`: same arguments, same result, no kernel.

    `inplace` and `grad_in_forward` say how to compute, not what, and change nothing here. Autograd
    differentiates it as often as you like. Arguments, result and errors are those of
    `fused_cross_entropy`.
    """
    options = LossOptions(
        ignore_index, reduction, label_smoothing, inplace, grad_in_forward, normalizer, z_loss,
        logit_scale, softcap, return_stats,
    )  # fmt: skip
    call = prepare(logits, targets, weight, sample_weight, dim, options)
    check_targets_on_host(call.rows, call.options, "reference")
    return call.returned(reference(call.rows, call.options))


def reference(rows: Rows, options: LossOptions) -> tuple[torch.Tensor, ...]:
    """(loss,), or (loss, losses, lse, entropy, predictions) with return_stats; see rows.py.

    A loss is (n_rows,) or its scalar reduction, the rest is (n_rows,).
    """
    dtype = torch.float64 if rows.logits.dtype == torch.float64 else torch.float32
    vocab_size = rows.logits.shape[-1]
    logits = rows.logits.flatten(0, 1).to(dtype)
    n_rows = logits.shape[0]
    weight = logits.new_ones(vocab_size) if rows.weight is None else rows.weight.to(dtype)
    sample_weight = logits.new_ones(n_rows)
    if rows.sample_weight is not None:
        sample_weight = rows.sample_weight.to(dtype)
    smoothing = options.label_smoothing

    if rows.has_probabilities:
        ignored = torch.zeros(n_rows, dtype=torch.bool, device=logits.device)
        in_range = ~ignored
    else:
        targets = rows.targets.flatten().long()
        ignored = targets == options.ignore_index
        in_range = (targets >= 0) & (targets < vocab_size)
        safe_targets = targets.where(in_range, 0)

    # An ignored row may hold anything: it leaves before the arithmetic, or its NaN would come
    # back through 0 * NaN in the gradient.
    logits = logits.masked_fill(ignored[:, None], 0.0)
    if options.logit_scale != 1.0:
        logits = logits * options.logit_scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    log_probs = logits.log_softmax(dim=-1)
    # Not logsumexp, whose gradient exp(logits - lse) has lost its digits at a common offset.
    largest = logits.detach().amax(dim=-1)
    largest = largest.masked_fill(largest.isinf(), 0.0)
    lse = largest + (logits - largest[:, None]).exp().sum(dim=-1).log()

    if rows.has_probabilities:
        probabilities = rows.targets.flatten(0, 1).to(dtype)
        target_weight = logits.new_ones(n_rows)  # "mean" does not look at the classes, as torch
        soft = (1.0 - smoothing) * probabilities + smoothing / vocab_size
        losses = -(weight * soft * log_probs).sum(dim=-1)
    else:
        target_log_probs = log_probs.gather(1, safe_targets[:, None]).squeeze(1)
        target_weight = weight[safe_targets]
        losses = -(1.0 - smoothing) * target_weight * target_log_probs
        if smoothing > 0.0:
            losses = losses - smoothing / vocab_size * (weight * log_probs).sum(dim=-1)
    if options.z_loss != 0.0:
        losses = losses + options.z_loss * lse.square()
    losses = losses * sample_weight

    # Out of range: NaN in loss and gradient (multiplied, so that the gradient is NaN too).
    losses = losses * torch.where(in_range | ignored, 1.0, torch.nan).to(dtype)
    losses = losses.masked_fill(ignored, 0.0)

    if options.reduction == "none":
        loss = losses
    elif options.reduction == "sum":
        loss = losses.sum()
    elif rows.normalizer is not None:
        loss = losses.sum() / rows.normalizer.to(dtype)
    elif options.normalizer is not None:
        loss = losses.sum() / options.normalizer
    else:
        loss = losses.sum() / (sample_weight * target_weight).masked_fill(ignored, 0.0).sum()
    if not options.return_stats:
        return (loss,)

    # 0 * log(0) is 0 in an entropy, and so is its gradient.
    log_probs = log_probs.masked_fill(log_probs == -torch.inf, 0.0)
    entropy = -(log_probs.exp() * (logits != -torch.inf) * log_probs).sum(dim=-1)
    predictions = logits.argmax(dim=-1).masked_fill(ignored, -1)
    return (
        loss, losses, lse.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0), predictions
    )  # fmt: skip
