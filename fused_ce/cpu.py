"""The loss on the CPU: the rows of the reference, a block at a time, so that it stays in cache.

Eager `F.cross_entropy` streams tensors of the size of the logits through memory several times and
holds three of them at its peak. Here every pass over a block but the first runs in cache, and the
only tensor of the size of the logits is the gradient. The arithmetic is that of the kernels:
subtract the row's maximum first (exact at any offset of the logits), then powers of two, which
PyTorch computes four times as fast as those of e.

The four public functions are those of kernels/launch.py; autograd.py calls either.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fused_ce.options import LossOptions
from fused_ce.rows import is_dense

LOG2E = math.log2(math.e)
BLOCK_ELEMENTS_PER_THREAD = 1 << 19  # 2 MiB of float32


def block_rows(vocab_size: int, n_threads: int, in_scratch: bool) -> int:
    """How many rows to work on at once: the one place that decides.

    Measured with two threads, V = 65 to 128,256, float32 and bfloat16: smaller blocks lose up to a
    fifth in the start of their operations, larger ones win nothing. Where a block needs scratch
    memory (16-bit logits) it is half as large: 1 MiB a thread, or four rows.
    """
    elements = BLOCK_ELEMENTS_PER_THREAD // (2 if in_scratch else 1)
    return max(4 * n_threads, elements * n_threads // vocab_size)


def forward(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None, options: LossOptions
) -> tuple[torch.Tensor]:
    """The loss, a scalar or (n_rows,), of rows of logits and targets (see rows.py)."""
    return (_pass_over_rows(logits, targets, weight, options),)


def forward_with_grad(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    options: LossOptions,
    grad_logits: torch.Tensor,
) -> torch.Tensor:
    """The loss; fills grad_logits (like the rows, or the rows themselves) for an upstream of 1."""
    return _pass_over_rows(logits, targets, weight, options, 1.0, grad_logits)


def backward(
    grad_losses: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    stats: tuple[()],
    options: LossOptions,
    grad_logits: torch.Tensor,
) -> None:
    """Fills grad_logits (like the rows, or the rows themselves); grad_losses: () or (n_rows,)."""
    _pass_over_rows(logits, targets, weight, options, grad_losses, grad_logits)


def scale(grad_logits: torch.Tensor, grad_losses: torch.Tensor, out: torch.Tensor) -> None:
    """out = grad_logits * grad_losses, () or (n_rows,); out may be grad_logits.

    A zero stays zero: an upstream gradient of inf or NaN does not reach the ignored rows.
    """
    if grad_losses.dim() == 0 and grad_losses == 1.0 and out is grad_logits:
        return
    dtype = _compute_dtype(grad_logits)
    all_finite = bool(grad_losses.isfinite().all())
    factors = grad_losses.to(dtype).expand(grad_logits.shape[:2].numel())
    for rows, groups, columns in _blocks(grad_logits, _rows_at_once(grad_logits, True)):
        block = grad_logits[groups, columns]
        scaled = block.to(dtype) * factors[rows].view(*block.shape[:2], 1)
        if not all_finite:
            scaled.masked_fill_(block == 0.0, 0.0)
        out[groups, columns] = scaled


def _pass_over_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    options: LossOptions,
    grad_losses: torch.Tensor | float = 0.0,
    grad_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss; where grad_logits is given, fills it."""
    dtype = _compute_dtype(logits)
    n_rows, vocab_size = logits.shape[:2].numel(), logits.shape[2]
    targets, ignored = _valid_targets(targets, options.ignore_index)
    terms = _row_terms(targets, ignored, weight, grad_losses, vocab_size, dtype, options)

    # new_empty, not torch.empty: that would follow torch.set_default_device
    row_sum = logits.new_empty(n_rows, 1, dtype=dtype)
    x_target = torch.empty_like(row_sum)  # less the row's maximum, as all x below
    x_smooth = torch.empty_like(row_sum) if terms.smoothing else None
    in_scratch = grad_logits is None or not _can_hold_work(grad_logits, dtype)
    at_once = _rows_at_once(logits, in_scratch)
    if in_scratch:
        scratch = logits.new_empty(min(n_rows, at_once), vocab_size, dtype=dtype)
    for rows, groups, columns in _blocks(logits, at_once):
        x = logits[groups, columns]
        shape, n = x.shape, rows.stop - rows.start
        work = scratch[:n] if in_scratch else grad_logits[groups, columns].view(n, vocab_size)
        x = x.view(n, vocab_size) if shape[0] == 1 else x
        if x.dim() == 3 or x.dtype != dtype or ignored is not None:
            work.view(x.shape).copy_(x)
            x = work
        if ignored is not None:  # may hold anything, and 0 * NaN would come back in its gradient
            x.masked_fill_(ignored[rows], 0.0)
        target, block_sum = targets[rows], row_sum[rows]

        torch.sub(x, x.amax(dim=1, keepdim=True), out=work)
        torch.gather(work, 1, target, out=x_target[rows])
        if terms.smoothing:
            # Not a matrix product: autocast would run it in bfloat16.
            weighted = work if weight is None else work * terms.weight.T
            torch.sum(weighted, dim=1, keepdim=True, out=x_smooth[rows])
        torch.sum(work.mul_(LOG2E).exp2_(), dim=1, keepdim=True, out=block_sum)

        if grad_logits is None:
            continue
        work.mul_(_at(terms.grad_lse, rows) / block_sum)
        if terms.smoothing:
            even = _at(terms.grad_smooth, rows)
            work.sub_(even if weight is None else even * terms.weight.T)
        work.scatter_add_(1, target, terms.minus_grad_target[rows])
        if in_scratch:
            grad_logits[groups, columns] = work.view(shape)

    losses = row_sum.log_().mul_(terms.lse).sub_(x_target.mul_(terms.target))
    if terms.smoothing:
        losses -= terms.smoothing * x_smooth
    if ignored is not None:
        losses.masked_fill_(ignored, 0.0)
    if options.reduction == "none":
        return losses.squeeze_(1)  # no view, which autograd would not let the user change in place
    return losses.sum().div_(terms.divisor)


def _valid_targets(
    targets: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Targets (n_rows, 1), all of them classes, and which rows are ignored, if any is."""
    targets = targets.reshape(-1, 1).long()
    if targets.numel() == 0:
        return targets, None
    lowest, highest = (int(bound) for bound in torch.aminmax(targets))
    if not lowest <= ignore_index <= highest:
        return targets, None
    ignored = targets == ignore_index
    return targets.masked_fill(ignored, 0), ignored


class _RowTerms(NamedTuple):
    """Factors of the loss `lse * log_sum_exp - target * x_y - smoothing * sum_c weight[c] * x_c`.

    Those of its gradient have the upstream gradient and the mean in them. A number where it is the
    same for all rows, which spares a dozen small operations, else (n_rows, 1); weight is (C, 1).
    """

    lse: torch.Tensor | float
    target: torch.Tensor | float
    smoothing: float
    weight: torch.Tensor | None
    divisor: torch.Tensor | float
    grad_lse: torch.Tensor | float
    minus_grad_target: torch.Tensor
    grad_smooth: torch.Tensor | float


def _row_terms(targets, ignored, weight, grad_losses, vocab_size, dtype, options) -> _RowTerms:
    smoothing = options.label_smoothing / vocab_size
    row_weight, weight_sum, divisor = 1.0, vocab_size, float(targets.numel())
    if weight is not None:
        weight = weight.to(dtype)[:, None]
        weight_sum = float(weight.sum())
        row_weight = weight[targets.squeeze(1)]
        if ignored is not None:
            row_weight.masked_fill_(ignored, 0.0)
        divisor = float(row_weight.sum())
    elif ignored is not None:
        divisor -= float(ignored.sum())
    if options.reduction != "mean":
        divisor = 1.0
    target = row_weight * (1.0 - options.label_smoothing)
    lse = target + smoothing * weight_sum

    if isinstance(grad_losses, torch.Tensor):
        grad_losses = (
            grad_losses.to(dtype).reshape(-1, 1) if grad_losses.dim() else float(grad_losses)
        )
    upstream = grad_losses / divisor if divisor else math.nan  # no row counts: no gradient is used
    if ignored is not None:
        if not isinstance(upstream, torch.Tensor):
            upstream = torch.full_like(ignored, upstream, dtype=dtype)
        upstream = upstream.masked_fill(ignored, 0.0)
    minus_target = upstream * -target
    if not isinstance(minus_target, torch.Tensor):
        minus_target = torch.full_like(targets, minus_target, dtype=dtype)
    return _RowTerms(
        lse, target, smoothing, weight, divisor, upstream * lse, minus_target, upstream * smoothing
    )


def _at(value: torch.Tensor | float, rows: slice) -> torch.Tensor | float:
    """The value of these rows: of a number for all, or of a (n_rows, 1) tensor."""
    return value[rows] if isinstance(value, torch.Tensor) else value


def _can_hold_work(grad_logits: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a block of the gradient is itself a place to compute in: no scratch, no copy back."""
    one_level = grad_logits.shape[0] == 1 and is_dense(grad_logits)
    return grad_logits.dtype == dtype and (one_level or grad_logits.is_contiguous())


def _compute_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _rows_at_once(logits: torch.Tensor, in_scratch: bool) -> int:
    """`block_rows`, in whole groups where a group is smaller than a block."""
    rows_per_group = max(logits.shape[1], 1)
    rows = block_rows(logits.shape[2], torch.get_num_threads(), in_scratch)
    return rows if rows <= rows_per_group else rows // rows_per_group * rows_per_group


def _blocks(logits: torch.Tensor, rows: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of flat rows, groups and rows within a group that cover (n_groups, rows_per_group)."""
    n_groups, rows_per_group, _ = logits.shape
    if n_groups * rows_per_group == 0:
        return
    groups = max(1, rows // rows_per_group)
    rows = min(rows, rows_per_group)
    for group in range(0, n_groups, groups):
        group_stop = min(group + groups, n_groups)
        for row in range(0, rows_per_group, rows):
            row_stop = min(row + rows, rows_per_group)
            first = group * rows_per_group + row
            count = (group_stop - group) * (row_stop - row)
            yield slice(first, first + count), slice(group, group_stop), slice(row, row_stop)
