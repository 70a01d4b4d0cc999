"""The order of the launches; policy.py decides what each is.

The five public functions are those of the CPU's implementation too: whoever calls one calls either.
All take rows of logits (n_groups, rows_per_group, vocab_size), see `fused_ce.rows`. Nothing here
waits for the device.
"""

import contextlib
import functools

import torch

from ..options import LossOptions
from ..rows import (
    Direction,
    Result,
    Rows,
    Tangents,
    Upstream,
    compute_dtype,
    empty_gradient,
    in_memory,
    is_dense,
    is_packed,
)
from ..shards import Shard, ShardStatistics
from . import policy
from .arguments import NO_STATISTICS, Outputs, RowStatistics, is_congruent, loads_shares
from .backward import launch_backward, launch_scale
from .forward import launch_forward
from .fused import launch_forward_with_grad
from .policy import row_splits
from .reduce import DIVISOR, prepared_workspace
from .small import launch_small
from .split import launch_split
from .tangents import launch_tangents

HERE = contextlib.nullcontext()
NO_MORE = (None, None, None)  # than logits and targets


def forward(
    rows: Rows, options: LossOptions, unweighted: bool = False, keep: bool = False
) -> Result:
    """The loss, and what else was asked for; `saved` is for `backward`.

    Its last three are the statistics of rows, with `keep` those that `backward` need not read too.
    """
    return _forward(rows, options, unweighted, None, keep)


def forward_with_grad(
    rows: Rows, options: LossOptions, grad_logits: torch.Tensor, unweighted: bool = False
) -> Result:
    """The same; fills grad_logits (laid out as the logits, or they) for an upstream of 1."""
    return _forward(rows, options, unweighted, grad_logits)


def _forward(rows, options, unweighted, grad_logits, keep=False):
    rows = _as_kernels_take_them(rows)
    logits = rows.logits
    with _on_device(logits):
        dtype = compute_dtype(logits)
        splits = _splits(logits)
        workspace = prepared_workspace(rows, options, dtype, splits)
        outputs = _outputs(rows, options, dtype, unweighted)
        statistics = NO_STATISTICS
        if logits.numel() == 0:
            _fill_empty(outputs.loss, rows, options)
        elif policy.is_small(logits):
            if keep:
                statistics = _statistics(rows, options, dtype)
            launch_small(
                rows, options, workspace, policy.small_of(logits), dtype,
                outputs=outputs, statistics=statistics, grad_logits=grad_logits,
            )  # fmt: skip
        else:
            is_read_again = grad_logits is None or options.return_stats or splits > 1
            if is_read_again:
                statistics = _statistics(rows, options, dtype)
            _forward_of_long_rows(
                rows, options, workspace, outputs, statistics, grad_logits, splits
            )
    divisor = None
    is_asked = options.return_stats or unweighted
    if is_asked and options.reduction == "mean" and workspace is not None:
        divisor = workspace[DIVISOR.value]
    losses, loss, *asked = outputs
    entropy = outputs.entropy
    if entropy is not None:
        entropy = entropy.clone()  # the user may change the other
    saved = (workspace, entropy, *statistics)
    return Result(losses if loss is None else loss, losses, *asked, divisor, saved)


def _forward_of_long_rows(rows, options, workspace, outputs, statistics, grad_logits, splits):
    """One program a row, or several; for a gradient each row is held or read again."""
    logits, dense, out = rows.logits, _dense(rows), grad_logits
    if out is not None and dense.logits is not logits:
        out = dense.logits  # one copy is both
    if splits == 1 and out is not None:
        config = policy.held_of(rows, options)
        launch_forward_with_grad(dense, options, workspace, outputs, statistics, out, config)
    elif splits == 1:
        config = policy.stream_of(logits, heavy=policy.is_heavy(rows, options))
        launch_forward(dense, options, workspace, outputs, statistics, config)
    else:
        config = policy.stream_of(logits, splits, policy.is_heavy(rows, options))
        launch_split(dense, options, workspace, outputs, statistics, config, splits)
    if splits > 1 and out is not None:
        launch_backward(
            Upstream(None), dense, options, workspace, statistics, None, out, None,
            policy.stream_of(logits, splits),
        )  # fmt: skip
    _copy_back(out, grad_logits)


def backward(
    upstream: Upstream,
    rows: Rows,
    saved: tuple[torch.Tensor | None, ...],
    options: LossOptions,
    grad_logits: torch.Tensor | None,
    grad_targets: torch.Tensor | None = None,
) -> None:
    """Fills grad_logits (laid out as the logits, or they) and grad_targets, whichever is given."""
    rows = _as_kernels_take_them(rows)
    logits = rows.logits
    if logits.numel() == 0:
        return
    workspace, entropy, *statistics = saved
    with _on_device(logits):
        upstream = _dense_upstream(upstream, logits)
        if policy.is_small(logits):
            launch_small(
                rows, options, workspace, policy.small_of(logits), compute_dtype(logits),
                upstream=upstream, grad_logits=grad_logits, grad_targets=grad_targets,
            )  # fmt: skip
            return
        dense = _dense(rows)
        out, out_targets = grad_logits, grad_targets
        if grad_logits is not None and dense.logits is not logits:
            out = dense.logits
        if grad_targets is not None and not is_dense(grad_targets):
            out_targets = torch.empty_like(dense.targets)
        launch_backward(
            upstream, dense, options, workspace, statistics, entropy, out, out_targets,
            policy.stream_of(logits, _splits(logits)),
        )  # fmt: skip
        _copy_back(out, grad_logits)
        _copy_back(out_targets, grad_targets)


def scale(grad_logits: torch.Tensor, grad_losses: torch.Tensor, out: torch.Tensor) -> None:
    """out = grad_logits * grad_losses, () or (n_rows,); out may be grad_logits."""
    if grad_logits.numel() == 0:
        return
    grad_losses = in_memory(grad_losses)
    with _on_device(grad_logits):
        config = policy.stream_of(grad_logits)
        if (
            grad_losses.dim() == 0
            and is_packed(grad_logits)
            and (out is grad_logits or out.stride() == grad_logits.stride())
        ):
            launch_scale(grad_logits, grad_losses, out, config, any_order=True)
            return
        source, dense_out = _dense_pair(grad_logits, out)
        launch_scale(source, grad_losses, dense_out, config)
        _copy_back(dense_out, out)


def tangents(
    direction: Direction,
    upstream: Upstream,
    rows: Rows,
    options: LossOptions,
    grad_logits: torch.Tensor | None = None,
    grad_targets: torch.Tensor | None = None,
) -> Tangents:
    """Derivatives of rows along a direction, without sample_weight and reduction.

    Fills grad_logits and grad_targets, where given, with those of what `backward` would write for
    this upstream gradient, (n_rows,) each: a product with the Hessian.
    """
    rows = _as_kernels_take_them(rows)
    logits = rows.logits
    with _on_device(logits):
        results = Tangents(*(_per_row(logits, compute_dtype(logits)) for _ in range(3)))
        if logits.numel() == 0:
            return results
        dense = _dense(rows)
        out, out_targets = grad_logits, grad_targets
        if grad_logits is not None and dense.logits is not logits:
            out = dense.logits
        if grad_targets is not None and not is_dense(grad_targets):
            out_targets = torch.empty_like(dense.targets)
        if out is not None or out_targets is not None:
            upstream = _dense_upstream(upstream, logits)
        direction = Direction(
            _beside(direction.logits, dense.logits), _beside(direction.targets, dense.targets)
        )
        config = policy.tangents_of(rows, options)
        launch_tangents(direction, upstream, dense, options, results, out, out_targets, config)
        _copy_back(out, grad_logits)
        _copy_back(out_targets, grad_targets)
    return results


def shard_statistics(rows: Rows, options: LossOptions, shard: Shard) -> ShardStatistics:
    """Of our columns of the logits; see shards.py. Ignored rows are not read."""
    rows, options = _as_kernels_take_them(rows), options._replace(reduction="none")
    logits = rows.logits
    with _on_device(logits):
        n_rows, dtype = logits.shape[0] * logits.shape[1], compute_dtype(logits)
        numbers = [logits.new_zeros(n_rows, dtype=dtype) for _ in range(3)]
        stats = ()
        if options.return_stats:
            predictions = torch.full((n_rows,), -1, dtype=torch.int64, device=logits.device)
            stats = logits.new_zeros(n_rows, dtype=dtype), predictions
        found = ShardStatistics(*numbers, *stats)
        if logits.shape[2] == 0:
            found.row_max.fill_(torch.finfo(dtype).min)
            return found
        found.row_sum.fill_(1.0)
        if n_rows == 0:
            return found
        outputs = Outputs(found.dot, entropy=found.exp_dot, predictions=found.predictions)
        statistics, splits = RowStatistics(found.row_max, found.row_sum), _splits(logits)
        config = policy.stream_of(logits, splits, policy.is_heavy(rows, options))
        call = _dense(rows), options, prepared_workspace(rows, options, dtype, splits)
        call = *call, outputs, statistics, config
        if splits > 1:
            launch_split(*call, splits, _on_device_of(logits, shard))
        else:
            launch_forward(*call, _on_device_of(logits, shard))
    return found


def shard_gradient(
    upstream: Upstream,
    rows: Rows,
    statistics: tuple[torch.Tensor, ...],
    options: LossOptions,
    shard: Shard,
    grad_logits: torch.Tensor,
) -> None:
    """Fills the gradient of our columns, laid out as the logits, or over them.

    For upstream gradients (n_rows,), and (row_max, row_sum, share, entropy) of all columns.
    """
    rows = _as_kernels_take_them(rows._replace(sample_weight=None))  # upstream has it
    logits, options = rows.logits, options._replace(reduction="none")
    if logits.numel() == 0:
        return
    *statistics, entropy = statistics
    with _on_device(logits):
        dense, out = _dense(rows), grad_logits
        if dense.logits is not logits:
            out = dense.logits
        launch_backward(
            _dense_upstream(upstream, logits), dense, options, None, statistics, entropy, out,
            None, policy.stream_of(logits, _splits(logits)), _on_device_of(logits, shard),
        )  # fmt: skip
        _copy_back(out, grad_logits)


@functools.lru_cache(maxsize=64)
def _shard_on(device: torch.device, shard: Shard) -> torch.Tensor:
    return torch.tensor(shard, dtype=torch.int64, device=device)


def _on_device_of(logits, shard):
    """(first, n_classes) where a kernel reads them; a copy to the device only the first time."""
    return _shard_on(logits.device, shard)


def _beside(tangent, rows):
    """A tangent of dense rows that begins where they do, counted from a 16-byte boundary."""
    tangent = in_memory(tangent)
    if tangent is None or is_dense(tangent) and is_congruent(rows, tangent):
        return tangent
    return empty_gradient(rows).copy_(tangent)


def _splits(logits):
    return row_splits(logits.shape[:2].numel(), logits.shape[2], logits.element_size())


def _on_device(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    device = tensor.device
    if device.type == "cpu":
        return HERE
    module = getattr(torch, device.type)
    return HERE if module.current_device() == device.index else module.device(device)


def _as_kernels_take_them(rows):
    """In memory; class and sample weights contiguous, a few bytes a class or row."""
    if rows[2:] == NO_MORE and not any([t.is_neg() or t._is_zerotensor() for t in rows[:2]]):
        return rows  # as nearly always
    logits, targets, weight, sample_weight, normalizer = map(in_memory, rows)
    return Rows(
        logits,
        targets,
        None if weight is None else weight.contiguous(),
        None if sample_weight is None else sample_weight.contiguous(),
        normalizer,
    )


def _per_row(logits, dtype):
    n_groups, rows_per_group, _ = logits.shape
    return torch.empty(n_groups * rows_per_group, dtype=dtype, device=logits.device)


def _outputs(rows, options, dtype, unweighted):
    """Places for what was asked for; no loss without a reduction."""
    logits, loss, stats = rows.logits, None, ()
    if options.reduction != "none":
        loss = torch.empty((), dtype=dtype, device=logits.device)
    if options.return_stats:
        stats = [_per_row(logits, kind) for kind in (dtype, dtype, torch.int64)]
    return Outputs(
        _per_row(logits, dtype), loss, _per_row(logits, dtype) if unweighted else None, *stats
    )


def _statistics(rows, options, dtype):
    return RowStatistics(
        _per_row(rows.logits, dtype),
        _per_row(rows.logits, dtype),
        _per_row(rows.logits, dtype) if loads_shares(rows, options) else None,
    )


def _fill_empty(loss, rows, options):
    if loss is not None:
        divides = rows.normalizer is not None or options.normalizer is not None
        loss.fill_(torch.nan if options.reduction == "mean" and not divides else 0.0)


def _dense_upstream(upstream, logits):
    """Gradients of stats contiguous, n_rows numbers each; of the loss 0 where it has none, for
    which a kernel would take 1."""
    loss, lse, entropy = map(in_memory, upstream)
    return Upstream(
        logits.new_zeros(()) if loss is None else loss,
        None if lse is None else lse.contiguous(),
        None if entropy is None else entropy.contiguous(),
    )


def _dense(rows):
    """The rows with their vocabulary contiguous: a copy only of long rows that are not."""
    logits, targets = rows.logits, rows.targets
    if rows.has_probabilities and not is_dense(targets):
        rows = rows._replace(targets=targets.contiguous())
    return rows if is_dense(logits) else rows._replace(logits=logits.contiguous())


def _dense_pair(rows, out):
    """Dense rows and a dense place for their gradient: one copy is both."""
    if is_dense(rows):
        return rows, out
    copy = rows.contiguous()
    return copy, copy


def _copy_back(dense_out, out):
    if dense_out is not out:
        out.copy_(dense_out)
