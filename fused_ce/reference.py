"""The specification: cross-entropy in plain PyTorch, differentiated by autograd alone.

Every test compares with this file, so it is written to be read, not to be fast: it holds several
tensors of the size of the logits.
"""

from typing import Literal, overload

import torch
import torch.nn.functional as F

from fused_ce.arguments import check_targets_on_host, prepare
from fused_ce.linear_arguments import check_cutting, prepare_head
from fused_ce.options import LossOptions
from fused_ce.rows import Rows, compute_dtype
from fused_ce.stats import CrossEntropyStats


@overload
def reference_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None, *,
    ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    dim: int | None = None, sample_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None, z_loss: float = 0.0, logit_scale: float = 1.0,
    softcap: float | None = None, inplace: bool = False, grad_in_forward: bool | None = None,
    return_stats: Literal[False] = False,
) -> torch.Tensor: ...  # fmt: skip
@overload
def reference_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None, *,
    ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    dim: int | None = None, sample_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None, z_loss: float = 0.0, logit_scale: float = 1.0,
    softcap: float | None = None, inplace: bool = False, grad_in_forward: bool | None = None,
    return_stats: Literal[True],
) -> tuple[torch.Tensor, CrossEntropyStats]: ...  # fmt: skip
@overload
def reference_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None, *,
    ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    dim: int | None = None, sample_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None, z_loss: float = 0.0, logit_scale: float = 1.0,
    softcap: float | None = None, inplace: bool = False, grad_in_forward: bool | None = None,
    return_stats: bool,
) -> torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]: ...  # fmt: skip
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


@overload
def reference_linear_cross_entropy(
    hidden: torch.Tensor, linear_weight: torch.Tensor, targets: torch.Tensor, *,
    linear_bias: torch.Tensor | None = None, weight: torch.Tensor | None = None,
    ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    sample_weight: torch.Tensor | None = None, normalizer: float | torch.Tensor | None = None,
    z_loss: float = 0.0, logit_scale: float = 1.0, softcap: float | None = None,
    grad_in_forward: bool | None = None, return_stats: Literal[False] = False,
    logits_dtype: torch.dtype | None = None, skip_ignored: bool | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor: ...  # fmt: skip
@overload
def reference_linear_cross_entropy(
    hidden: torch.Tensor, linear_weight: torch.Tensor, targets: torch.Tensor, *,
    linear_bias: torch.Tensor | None = None, weight: torch.Tensor | None = None,
    ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    sample_weight: torch.Tensor | None = None, normalizer: float | torch.Tensor | None = None,
    z_loss: float = 0.0, logit_scale: float = 1.0, softcap: float | None = None,
    grad_in_forward: bool | None = None, return_stats: Literal[True],
    logits_dtype: torch.dtype | None = None, skip_ignored: bool | None = None,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, CrossEntropyStats]: ...  # fmt: skip
@overload
def reference_linear_cross_entropy(
    hidden: torch.Tensor, linear_weight: torch.Tensor, targets: torch.Tensor, *,
    linear_bias: torch.Tensor | None = None, weight: torch.Tensor | None = None,
    ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    sample_weight: torch.Tensor | None = None, normalizer: float | torch.Tensor | None = None,
    z_loss: float = 0.0, logit_scale: float = 1.0, softcap: float | None = None,
    grad_in_forward: bool | None = None, return_stats: bool,
    logits_dtype: torch.dtype | None = None, skip_ignored: bool | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]: ...  # fmt: skip
def reference_linear_cross_entropy(
    hidden: torch.Tensor,
    linear_weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    grad_in_forward: bool | None = None,
    return_stats: bool = False,
    logits_dtype: torch.dtype | None = None,
    skip_ignored: bool | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]:
    """The oracle of `fused_linear_cross_entropy`: `reference_cross_entropy` of whole logits.

    `grad_in_forward`, `skip_ignored` and `chunk_size` say how to compute and change nothing here.
    """
    check_cutting(skip_ignored, chunk_size)
    head = prepare_head(hidden, linear_weight, linear_bias, targets, logits_dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = linear_logits(*head[:3], targets, ignore_index, head.logits_dtype)
    return reference_cross_entropy(
        logits, targets, weight, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing, dim=-1, sample_weight=sample_weight,
        normalizer=normalizer, z_loss=z_loss, logit_scale=logit_scale, softcap=softcap,
        grad_in_forward=grad_in_forward, return_stats=return_stats,
    )  # fmt: skip


def linear_logits(
    hidden: torch.Tensor,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    logits_dtype: torch.dtype,
) -> torch.Tensor:
    """Whole logits (..., V), of hidden states (..., H) that are cleared in ignored rows."""
    if not targets.is_floating_point():
        hidden = hidden.masked_fill((targets.long() == ignore_index)[..., None], 0.0)
    bias = None if linear_bias is None else linear_bias.to(logits_dtype)
    return F.linear(hidden.to(logits_dtype), linear_weight.to(logits_dtype), bias)


def reference(rows: Rows, options: LossOptions) -> tuple[torch.Tensor, ...]:
    """(loss,), or (loss, losses, lse, entropy, predictions) with return_stats; see rows.py.

    A loss is (n_rows,) or its scalar reduction, the rest is (n_rows,).
    """
    if rows.has_no_classes:
        return without_classes(rows, options)
    # No number is read from a tensor, its length neither: a jit trace would take it for a constant.
    dtype, vocab_size = compute_dtype(rows.logits), rows.logits.shape[-1]
    logits = rows.logits.flatten(0, 1).to(dtype)
    weight = logits.new_ones(vocab_size) if rows.weight is None else rows.weight.to(dtype)
    sample_weight = torch.ones_like(logits[:, 0])
    if rows.sample_weight is not None:
        sample_weight = rows.sample_weight.to(dtype)
    ignored = torch.zeros_like(sample_weight, dtype=torch.bool)
    in_range = ~ignored
    if not rows.has_probabilities:
        targets = rows.targets.flatten().long()
        ignored = targets == options.ignore_index
        in_range = (targets >= 0) & (targets < vocab_size)

    # An ignored row may hold anything: it leaves before the arithmetic, or its NaN would come
    # back through 0 * NaN in the gradient.
    logits = logits.masked_fill(ignored[:, None], 0.0)
    logits = transformed(logits, options)
    log_probs, lse = log_softmax_and_lse(logits)

    if rows.has_probabilities:
        losses = losses_of_probabilities(log_probs, rows.targets, weight, options)
        target_weight = torch.ones_like(losses)  # "mean" does not look at the classes, as torch
    else:
        safe_targets = targets.where(in_range, 0)
        losses = losses_of_classes(log_probs, safe_targets, weight, options)
        target_weight = weight[safe_targets]
    if options.z_loss != 0.0:
        losses = losses + options.z_loss * lse.square()
    losses = losses * sample_weight
    # Out of range: NaN in loss and gradient (multiplied, so that the gradient is NaN too).
    losses = losses * torch.where(in_range | ignored, 1.0, torch.nan).to(dtype)
    losses = losses.masked_fill(ignored, 0.0)

    divisor = (sample_weight * target_weight).masked_fill(ignored, 0.0)
    loss = reduced(losses, divisor, rows.normalizer, options)
    if not options.return_stats:
        return (loss,)
    entropy, predictions = entropy_of(logits, log_probs), logits.argmax(dim=-1)
    return (
        loss, losses, lse.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0),
        predictions.masked_fill(ignored, -1),
    )  # fmt: skip


def transformed(logits: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """The logits scaled, then capped."""
    if options.logit_scale != 1.0:
        logits = logits * options.logit_scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    return logits


def log_softmax_and_lse(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row, by torch's plain sums.

    Not log_softmax, whose gradient adds a row up in the lanes of a vector: of 9,001 classes it is
    90 eps off on a CPU with AVX2. Not logsumexp, whose gradient exp(logits - lse) has lost its
    digits at a common offset.
    """
    largest = logits.detach().amax(dim=-1, keepdim=True)
    shifted = logits - largest
    log_sum = shifted.exp().sum(dim=-1, keepdim=True).log()
    lse = torch.where(largest.isinf(), largest, largest + log_sum)
    return shifted - log_sum, lse.squeeze(-1)


def losses_of_classes(
    log_probs: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, options: LossOptions
) -> torch.Tensor:
    """weight[y] * (1 - s) * -log p[y] + s / C * sum_c weight[c] * -log p[c], for targets y."""
    smoothing, vocab_size = options.label_smoothing, log_probs.shape[-1]
    target_log_probs = log_probs.gather(1, targets[:, None]).squeeze(1)
    losses = -(1.0 - smoothing) * weight[targets] * target_log_probs
    if smoothing > 0.0:
        losses = losses - smoothing * (weight * log_probs).sum(dim=-1) / vocab_size
    return losses


def losses_of_probabilities(
    log_probs: torch.Tensor, probabilities: torch.Tensor, weight: torch.Tensor, options: LossOptions
) -> torch.Tensor:
    """sum_c weight[c] * ((1 - s) * p[c] + s / C) * -log softmax[c]."""
    smoothing, vocab_size = options.label_smoothing, log_probs.shape[-1]
    probabilities = probabilities.flatten(0, 1).to(log_probs.dtype)
    soft = (1.0 - smoothing) * probabilities
    soft = soft + torch.full_like(soft, smoothing) / vocab_size
    return -(weight * soft * log_probs).sum(dim=-1)


def reduced(
    losses: torch.Tensor,
    divisor: torch.Tensor,
    normalizer: torch.Tensor | None,
    options: LossOptions,
) -> torch.Tensor:
    """The losses, their sum, or their mean: over the sum of divisor (n_rows,), or normalizer."""
    if options.reduction == "none":
        return losses
    if options.reduction == "sum":
        return losses.sum()
    if normalizer is not None:
        return losses.sum() / normalizer.to(losses.dtype)
    if options.normalizer is not None:
        return losses.sum() / options.normalizer
    return losses.sum() / divisor.sum()


def entropy_of(logits: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """In nats, of each row: 0 * log(0) is 0 in it, and so is its gradient."""
    log_probs = log_probs.masked_fill(log_probs == -torch.inf, 0.0)
    return -(log_probs.exp() * (logits != -torch.inf) * log_probs).sum(dim=-1)


def without_classes(rows: Rows, options: LossOptions) -> tuple[torch.Tensor, ...]:
    """(N, 0) logits, as torch: a row costs 0, nothing divides a mean, and every index is wrong."""
    losses = rows.logits.flatten(0, 1).to(compute_dtype(rows.logits)).sum(dim=-1)
    if not rows.has_probabilities:
        wrong = rows.targets.flatten().long() != options.ignore_index
        losses = losses.masked_fill(wrong, torch.nan)
    loss = reduced(losses, torch.zeros_like(losses), rows.normalizer, options)
    if not options.return_stats:
        return (loss,)
    nothing = torch.zeros_like(losses)
    return loss, losses, nothing, nothing.clone(), torch.full_like(nothing, -1, dtype=torch.int64)
