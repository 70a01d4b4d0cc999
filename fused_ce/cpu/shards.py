"""Rows of which other processes have the other columns: what is known of ours, and their gradient
from what all of them know."""

import torch

from fused_ce.cpu.blocks import at
from fused_ce.cpu.machine import exponential
from fused_ce.cpu.passes import pass_over_blocks
from fused_ce.cpu.statistics import RowStats, RowSums, counted, empty_sums, sum_up
from fused_ce.cpu.terms import RowTerms, grad_terms
from fused_ce.options import LossOptions
from fused_ce.rows import Rows, Upstream, compute_dtype
from fused_ce.shards import Shard, ShardStatistics


def shard_statistics(rows: Rows, options: LossOptions, shard: Shard) -> ShardStatistics:
    """Of our columns of the logits; see shards.py."""
    dtype, vocab_size = compute_dtype(rows.logits), rows.logits.shape[2]
    n_rows = rows.logits.shape[0] * rows.logits.shape[1]
    if vocab_size == 0:
        zeros = rows.logits.new_zeros(n_rows, dtype=dtype)
        nothing = zeros, torch.full_like(zeros, -1, dtype=torch.int64)
        return ShardStatistics(
            torch.full_like(zeros, torch.finfo(dtype).min), zeros, zeros,
            *(nothing if options.return_stats else ()),
        )  # fmt: skip
    options = options._replace(reduction="none")
    terms, is_mine = _terms(rows, options, shard)
    sums = empty_sums(rows, options)
    maximum = sums.maximum
    if maximum is None:
        maximum = torch.empty_like(sums.exp)
        sums = sums._replace(maximum=maximum)
    lowest = torch.finfo(dtype).min

    def sum_block(x, block, sums):
        return sum_up(x, block, terms, sums, lowest)

    pass_over_blocks(rows, options, terms, sums, None, None, None, sum_block)
    of_target = sums.x_target * terms.target  # type: ignore[operator]  # `empty_sums` has a place
    dot = torch.where(is_mine, of_target, 0.0)
    if sums.x_smooth is not None:
        dot += terms.smoothing * sums.x_smooth
    exp_dot = None
    if sums.mean is not None:
        exp_dot = torch.where(sums.exp == 0.0, 0.0, sums.mean * sums.exp)
        exp_dot = counted(exp_dot, terms.ignored)
    return ShardStatistics(
        counted(maximum, terms.ignored),
        (sums.exp if terms.ignored is None else sums.exp.masked_fill(terms.ignored, 1.0))[:, 0],
        counted(dot, terms.ignored),
        exp_dot,
        None if sums.predictions is None else sums.predictions + shard.first,
    )


def shard_gradient(
    upstream: Upstream,
    rows: Rows,
    statistics: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    options: LossOptions,
    shard: Shard,
    grad_logits: torch.Tensor,
) -> None:
    """Fills the gradient of our columns, laid out as the logits, or over them.

    For upstream gradients (n_rows,), and (row_max, row_sum, share, entropy) of all columns.
    """
    if grad_logits.numel() == 0:
        return
    options = options._replace(reduction="none")
    row_max, row_sum, share = (of_row[:, None] for of_row in statistics[:3])
    entropy = None if statistics[3] is None else statistics[3][:, None]
    terms, _ = _terms(rows, options, shard)
    terms = terms._replace(lse=share)
    sums = RowSums(row_sum)
    grads = grad_terms(terms, upstream, sums, options)
    mean = None if entropy is None else row_sum.log() - entropy  # of x - max

    def sum_block(x, block, sums):
        power, unit = exponential(block.work.numel())
        torch.sub(x, at(row_max, block.rows), out=block.work)
        if unit != 1.0:
            block.work.mul_(unit)
        power(block.work, out=block.exp)
        of_block = None if mean is None else at(mean, block.rows)
        return RowStats(at(row_max, block.rows), at(row_sum, block.rows), unit, of_block)

    pass_over_blocks(rows, options, terms, sums, grads, grad_logits, None, sum_block)


def _terms(rows, options, shard) -> tuple[RowTerms, torch.Tensor]:
    """`row_terms` of our columns, and which targets are among them, (n_rows, 1)."""
    dtype, vocab_size = compute_dtype(rows.logits), rows.logits.shape[2]
    targets = rows.targets.reshape(-1, 1).long()
    ignored = targets == options.ignore_index
    targets = targets - shard.first
    is_mine = ~ignored & (targets >= 0) & (targets < vocab_size)
    targets = targets.where(is_mine, 0)
    weight = None if rows.weight is None else rows.weight.to(dtype)[:, None]
    target = is_mine.to(dtype) if weight is None else weight[targets[:, 0]] * is_mine
    target = target * (1.0 - options.label_smoothing)
    smoothing = options.label_smoothing / shard.n_classes
    ignored = ignored if ignored.any() else None
    return RowTerms(targets, ignored, 0.0, target, smoothing, weight, None, 1.0), is_mine
