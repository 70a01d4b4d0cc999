"""The loss on the CPU: the rows of the reference, a block at a time, so that it stays in cache.

Eager `F.cross_entropy` streams tensors of the size of the logits through memory several times and
keeps two of them. Here every pass over a block but the first runs in cache, and the only tensor of
the size of the logits is the gradient. The arithmetic is that of the kernels: subtract the row's
maximum first (exact at any offset of the logits), then powers of two.

The four public functions are those of kernels/launch.py; autograd.py calls either.
"""

import math
from collections.abc import Iterator

import torch

from fused_ce.options import LossOptions
from fused_ce.rows import is_dense

LOG2E = math.log2(math.e)
BLOCK_ELEMENTS_PER_THREAD = 1 << 18  # 1 MiB of float32, about one core's second-level cache


def block_rows(vocab_size: int, n_threads: int) -> int:
    """How many rows to work on at once: the one place that decides.

    Measured with two threads, V = 65 to 128,256, float32 and bfloat16: below four rows a thread
    the start of each operation costs more than its work; beyond the cache every pass costs memory.
    """
    return max(4 * n_threads, BLOCK_ELEMENTS_PER_THREAD * n_threads // vocab_size)


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
    one = torch.ones((), dtype=_compute_dtype(logits))
    return _pass_over_rows(logits, targets, weight, options, one, grad_logits)


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
    """out = grad_logits * grad_losses, () or (n_rows,); out may be grad_logits."""
    if grad_losses.dim() == 0 and grad_losses == 1.0 and out is grad_logits:
        return
    dtype = _compute_dtype(grad_logits)
    factors = grad_losses.to(dtype).expand(grad_logits.shape[:2].numel())
    for rows, groups, columns in _blocks(grad_logits):
        block = grad_logits[groups, columns]
        factor = factors[rows].view(*block.shape[:2], 1)
        out[groups, columns] = block.to(dtype) * factor


def _pass_over_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    options: LossOptions,
    grad_losses: torch.Tensor | None = None,
    grad_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss; where grad_logits is given, fills it."""
    dtype = _compute_dtype(logits)
    n_rows, vocab_size = logits.shape[:2].numel(), logits.shape[2]
    targets = targets.reshape(-1).long()
    ignored = targets == options.ignore_index
    targets = targets.masked_fill(ignored, 0)
    if weight is None:
        row_weight = torch.ones(n_rows, dtype=dtype)
        weight_sum = vocab_size
    else:
        weight = weight.to(dtype)
        row_weight = weight[targets]
        weight_sum = weight.sum()
    row_weight = row_weight.masked_fill_(ignored, 0.0)
    divisor = row_weight.sum() if options.reduction == "mean" else 1.0

    smoothing = options.label_smoothing / vocab_size
    target_factor = row_weight * (1.0 - options.label_smoothing)  # of lse - x_y
    lse_factor = (target_factor + smoothing * weight_sum).masked_fill_(ignored, 0.0)
    if grad_losses is not None:
        upstream = (grad_losses.to(dtype) / divisor).expand(n_rows).masked_fill(ignored, 0.0)

    losses = torch.empty(n_rows, dtype=dtype)
    scratch = None
    if grad_logits is None or not _can_hold_work(grad_logits, dtype):
        scratch = torch.empty(min(n_rows, _rows_at_once(logits)), vocab_size, dtype=dtype)
    for rows, groups, columns in _blocks(logits):
        source = logits[groups, columns]
        n = rows.stop - rows.start
        work = grad_logits[groups, columns].view(n, vocab_size) if scratch is None else scratch[:n]
        if work.data_ptr() != source.data_ptr():
            work.view(source.shape).copy_(source)
        # An ignored row may hold anything: 0 * NaN would come back in its gradient.
        work[ignored[rows]] = 0.0
        target = targets[rows, None]

        row_max = work.amax(dim=1, keepdim=True)
        work.sub_(row_max)
        target_logits = work.gather(1, target).squeeze(1)
        if smoothing:
            smoothed = work.sum(dim=1) if weight is None else work @ weight
        row_sum = work.mul_(LOG2E).exp2_().sum(dim=1)
        log_sum = row_sum.log()
        losses[rows] = lse_factor[rows] * log_sum - target_factor[rows] * target_logits
        if smoothing:
            losses[rows] -= smoothing * smoothed

        if grad_logits is None:
            continue
        work.mul_((upstream[rows] * lse_factor[rows] / row_sum)[:, None])
        if smoothing and weight is None:
            work.sub_((upstream[rows] * smoothing)[:, None])
        elif smoothing:
            work.addcmul_(upstream[rows, None], weight, value=-smoothing)
        work.scatter_add_(1, target, -(upstream * target_factor)[rows, None])
        if scratch is not None:
            grad_logits[groups, columns] = work.view(source.shape)

    losses.masked_fill_(ignored, 0.0)
    return losses if options.reduction == "none" else losses.sum() / divisor


def _can_hold_work(grad_logits: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a block of the gradient is itself a place to compute in: no scratch, no copy back."""
    one_level = grad_logits.shape[0] == 1 and is_dense(grad_logits)
    return grad_logits.dtype == dtype and (one_level or grad_logits.is_contiguous())


def _compute_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _rows_at_once(logits: torch.Tensor) -> int:
    """`block_rows`, in whole groups where a group is smaller than a block."""
    rows_per_group = max(logits.shape[1], 1)
    rows = block_rows(logits.shape[2], torch.get_num_threads())
    return rows if rows <= rows_per_group else rows // rows_per_group * rows_per_group


def _blocks(logits: torch.Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of flat rows, groups and rows within a group that cover (n_groups, rows_per_group)."""
    n_groups, rows_per_group, _ = logits.shape
    if n_groups * rows_per_group == 0:
        return
    rows = _rows_at_once(logits)
    groups = max(1, rows // rows_per_group)
    rows = min(rows, rows_per_group)
    for group in range(0, n_groups, groups):
        group_stop = min(group + groups, n_groups)
        for row in range(0, rows_per_group, rows):
            row_stop = min(row + rows, rows_per_group)
            first = group * rows_per_group + row
            count = (group_stop - group) * (row_stop - row)
            yield slice(first, first + count), slice(group, group_stop), slice(row, row_stop)
