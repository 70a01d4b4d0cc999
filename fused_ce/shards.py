"""What a shard of the classes knows of a row, and what all of them together know.

Numbers a row are all that leaves a device. They are put together in the order of the ranks, by the
same operations everywhere: every rank then has the same bits.
"""

from typing import NamedTuple

import torch

from fused_ce.options import LossOptions


class Shard(NamedTuple):
    """Which classes a rank has the columns of: [first, first + how many it has) of n_classes."""

    first: int
    n_classes: int


class ShardStatistics(NamedTuple):
    """Of the columns of one rank, (n_rows,); of all ranks, (n_ranks, n_rows).

    With x the transformed logits: 0 in ignored rows, but for a sum of 1. A row of -inf alone has
    the lowest finite maximum, and a sum of 0.
    """

    row_max: torch.Tensor  # of x
    row_sum: torch.Tensor  # of exp(x - max)
    dot: torch.Tensor  # of what the target is to each class, weights included, with x - max
    exp_dot: torch.Tensor | None = None  # of exp(x - max) with x - max
    predictions: torch.Tensor | None = None  # the first class that has the maximum; int64


class Targets(NamedTuple):
    """What all ranks know of the targets, (n_rows,)."""

    ignored: torch.Tensor  # bool
    weight: torch.Tensor  # the target's class weight, NaN out of range; 0 in ignored rows
    share: torch.Tensor  # of all classes in the target: what the log-sum-exp is multiplied by
    of_ranks: torch.Tensor  # (n_ranks, n_rows): the classes of each in it


class Combined(NamedTuple):
    """What all ranks know of rows, (n_rows,): 0 in ignored ones, where that can be seen."""

    row_max: torch.Tensor
    row_sum: torch.Tensor
    losses: torch.Tensor  # without sample_weight
    lse: torch.Tensor
    entropy: torch.Tensor | None
    predictions: torch.Tensor | None  # int64


def targets_of(
    targets: torch.Tensor,
    target_weight: torch.Tensor | None,
    weight_sums: torch.Tensor,
    bounds: torch.Tensor,
    options: LossOptions,
) -> Targets:
    """Of class indices (n_rows,) int64 of the whole vocabulary.

    target_weight (n_rows,) is the class weight of the target, None for 1; weight_sums (n_ranks,)
    are sums of all class weights of each rank, or their numbers; bounds (n_ranks + 1,) int64 are
    where the classes of each begin and end.
    """
    dtype, smoothing = weight_sums.dtype, options.label_smoothing
    ignored = targets == options.ignore_index
    in_range = (targets >= 0) & (targets < bounds[-1])
    weight = torch.ones_like(targets, dtype=dtype) if target_weight is None else target_weight
    weight = weight.masked_fill(~in_range, torch.nan).masked_fill(ignored, 0.0)
    is_mine = (targets >= bounds[:-1, None]) & (targets < bounds[1:, None])
    of_ranks = torch.where(is_mine, (1.0 - smoothing) * weight, 0.0)
    share = (1.0 - smoothing) * weight
    if smoothing:
        even = weight_sums * smoothing / bounds[-1]
        of_ranks = of_ranks + even[:, None]
        share = share + even.sum()
    return Targets(ignored, weight, share, of_ranks)


def combined(parts: ShardStatistics, targets: Targets, options: LossOptions) -> Combined:
    """The statistics of all ranks as those of rows."""
    lowest = torch.finfo(parts.row_max.dtype).min
    row_max = parts.row_max.amax(dim=0)
    moved = (parts.row_max - row_max).clamp(min=lowest)  # 0 times this is 0
    scale = moved.exp()
    row_sum = (parts.row_sum * scale).sum(dim=0)
    dot = (parts.dot + targets.of_ranks * moved).sum(dim=0)
    log_sum = row_sum.log()
    lse = torch.where(row_max.isinf(), row_max, row_max + log_sum)
    losses = targets.share * log_sum - dot
    if options.z_loss:
        losses = losses + options.z_loss * lse.square()
    entropy = predictions = None
    if parts.exp_dot is not None:
        exp_dot = (parts.exp_dot * scale + parts.row_sum * (scale * moved)).sum(dim=0)
        entropy = (log_sum - exp_dot / row_sum).masked_fill(targets.ignored, 0.0)
        predictions = _first(parts, row_max).masked_fill(targets.ignored, -1)
    return Combined(
        row_max,
        row_sum,
        losses.masked_fill(targets.ignored, 0.0),
        lse.masked_fill(targets.ignored, 0.0),
        entropy,
        predictions,
    )


def _first(parts, row_max) -> torch.Tensor:
    """The first class that has the maximum of a row; any where it holds NaN, 0 of -inf alone."""
    has_it = (parts.row_max == row_max) & (parts.row_sum != 0.0)
    rank = has_it.int().argmax(dim=0, keepdim=True)
    found = parts.predictions.gather(0, rank).squeeze(0)
    return found.where(has_it.any(dim=0), 0)
