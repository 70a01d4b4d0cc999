"""What is known of rows before the pass over them: targets, factors of loss and gradient."""

import math
from typing import NamedTuple

import torch

from fused_ce.arguments import check_in_range
from fused_ce.rows import compute_dtype


class RowTerms(NamedTuple):
    """What is known of the rows before the pass: targets, and factors of the loss without z_loss.

    It is `lse * log_sum_exp - target * x_y - smoothing * sum_c weight[c] * x_c` for classes, and
    `lse * log_sum_exp - target * sum_c soft[c] * x_c` for probabilities; times sample_weight. A
    number where it is the same for all rows, which spares a dozen small operations, else
    (n_rows, 1); weight is (C, 1).
    """

    targets: torch.Tensor | None
    ignored: torch.Tensor | None
    lse: torch.Tensor | float  # of probabilities the sum of soft, which the pass fills in
    target: torch.Tensor | float
    smoothing: float
    weight: torch.Tensor | None
    sample_weight: torch.Tensor | None
    divisor: float


def row_terms(rows, options) -> RowTerms:
    """Those of a call; reads the targets."""
    logits, vocab_size = rows.logits, rows.logits.shape[2]
    dtype, smoothing = compute_dtype(logits), options.label_smoothing
    weight = None if rows.weight is None else rows.weight.to(dtype)[:, None]
    sample_weight = None if rows.sample_weight is None else rows.sample_weight.to(dtype)[:, None]
    if rows.has_probabilities:
        divisor = _divisor(rows, 1.0, sample_weight, None, options)
        lse = logits.new_empty(logits.shape[0] * logits.shape[1], 1, dtype=dtype)
        return RowTerms(None, None, lse, 1.0, 0.0, weight, sample_weight, divisor)
    targets, ignored = _valid_targets(rows.targets, vocab_size, options.ignore_index)
    row_weight, weight_sum = 1.0, vocab_size
    if weight is not None:
        weight_sum = float(weight.sum()) if smoothing else 0.0
        row_weight = weight[targets.squeeze(1)]
    divisor = _divisor(rows, row_weight, sample_weight, ignored, options)
    target = row_weight * (1.0 - smoothing)
    smoothing /= vocab_size
    lse = target + smoothing * weight_sum
    return RowTerms(targets, ignored, lse, target, smoothing, weight, sample_weight, divisor)


def _valid_targets(
    targets: torch.Tensor, vocab_size: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Targets (n_rows, 1), all of them classes, and which rows are ignored, if any is."""
    targets = targets.reshape(-1, 1).long()
    lowest, highest = check_in_range(targets.squeeze(1), vocab_size, ignore_index)
    if not lowest <= ignore_index <= highest:
        return targets, None
    ignored = targets == ignore_index
    return targets.masked_fill(ignored, 0), ignored


def _divisor(rows, row_weight, sample_weight, ignored, options) -> float:
    """What the reduction divides by; 0 where no row counts."""
    if options.reduction != "mean":
        return 1.0
    if options.normalizer is not None:
        return options.normalizer
    if rows.normalizer is not None:
        return float(rows.normalizer)
    if sample_weight is not None:
        row_weight = row_weight * sample_weight
    if isinstance(row_weight, torch.Tensor):
        counted = row_weight if ignored is None else row_weight.masked_fill(ignored, 0.0)
        return float(counted.sum())
    n_rows = rows.targets.shape[0] * rows.targets.shape[1]
    return float(n_rows if ignored is None else n_rows - int(ignored.sum()))


class GradTerms(NamedTuple):
    """Factors of the gradient, 0 in ignored rows: numbers or (n_rows, 1), as in RowTerms.

    They have the upstream gradient, the mean's divisor and sample_weight in them; all but the first
    are of the gradient of logits, and have logit_scale too.
    """

    losses: torch.Tensor | float  # the upstream gradient of a row's loss before sample_weight
    x: torch.Tensor | float  # the same, times logit_scale
    minus_target: torch.Tensor
    smooth: torch.Tensor | float
    lse: torch.Tensor | float | None
    entropy: torch.Tensor | float | None


def grad_terms(terms, upstream, sums, options) -> GradTerms:
    """Those of an upstream gradient, whose loss may be the number 1."""
    like = sums.exp
    losses: torch.Tensor | float = 0.0  # where only stats have a gradient: the divisor may be 0
    if upstream.loss is not None:
        losses = _of_rows(upstream.loss, like)
        # no weight at all, or a normalizer of 0: as a GPU divides
        losses = losses / terms.divisor if terms.divisor else losses * math.inf
        if terms.sample_weight is not None:
            losses = losses * terms.sample_weight
        losses = _counted_factor(losses, terms, like)
    x = losses if options.logit_scale == 1.0 else losses * options.logit_scale
    minus_target = x * -terms.target
    if not isinstance(minus_target, torch.Tensor):
        minus_target = torch.full_like(like, minus_target)
    lse, entropy = upstream.lse, upstream.entropy
    if lse is not None:
        lse = _counted_factor(_of_rows(lse, like) * options.logit_scale, terms, like)
    if entropy is not None:
        entropy = _counted_factor(_of_rows(entropy, like) * options.logit_scale, terms, like)
    return GradTerms(losses, x, minus_target, x * terms.smoothing, lse, entropy)


def _of_rows(grad: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor | float:
    """An upstream gradient as a number, or (n_rows, 1)."""
    if not isinstance(grad, torch.Tensor):
        return grad
    return grad.to(like.dtype).reshape(-1, 1) if grad.dim() else float(grad)


def _counted_factor(factor, terms, like) -> torch.Tensor | float:
    """The factor, 0 in ignored rows even where it is NaN or inf."""
    if terms.ignored is None:
        return factor
    if not isinstance(factor, torch.Tensor):
        factor = torch.full_like(like, factor)
    return factor.masked_fill(terms.ignored, 0.0)
