"""The loss of a vocabulary that lies on several devices: the public functions."""

from collections.abc import Iterable, Sequence
from typing import Literal, overload

import torch
import torch.distributed as dist

from fused_ce.arguments import check_memory, check_overwritable, prepare
from fused_ce.backend import choose
from fused_ce.exchange import Exchange, check_agreement
from fused_ce.linear_arguments import Head, check_cutting, check_whole, prepare_head
from fused_ce.linear_chunks import Plan
from fused_ce.options import LossOptions
from fused_ce.sharded_autograd import sharded_cross_entropy
from fused_ce.sharded_linear import sharded_linear_cross_entropy
from fused_ce.stats import CrossEntropyStats
from fused_ce.tracing import is_transformed, saved_tensors_have_hooks, uncompiled


@overload
def vocab_parallel_cross_entropy(
    logits_shard: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None, *,
    group: "dist.ProcessGroup | None" = None, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0, dim: int | None = None, sample_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None, z_loss: float = 0.0, logit_scale: float = 1.0,
    softcap: float | None = None, inplace: bool = False, grad_in_forward: bool | None = None,
    return_stats: Literal[False] = False, shard_sizes: Sequence[int] | None = None,
) -> torch.Tensor: ...  # fmt: skip
@overload
def vocab_parallel_cross_entropy(
    logits_shard: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None, *,
    group: "dist.ProcessGroup | None" = None, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0, dim: int | None = None, sample_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None, z_loss: float = 0.0, logit_scale: float = 1.0,
    softcap: float | None = None, inplace: bool = False, grad_in_forward: bool | None = None,
    return_stats: Literal[True], shard_sizes: Sequence[int] | None = None,
) -> tuple[torch.Tensor, CrossEntropyStats]: ...  # fmt: skip
@overload
def vocab_parallel_cross_entropy(
    logits_shard: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None, *,
    group: "dist.ProcessGroup | None" = None, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0, dim: int | None = None, sample_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None, z_loss: float = 0.0, logit_scale: float = 1.0,
    softcap: float | None = None, inplace: bool = False, grad_in_forward: bool | None = None,
    return_stats: bool, shard_sizes: Sequence[int] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]: ...  # fmt: skip
@uncompiled
def vocab_parallel_cross_entropy(
    logits_shard: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    group: "dist.ProcessGroup | None" = None,
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
    shard_sizes: Sequence[int] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]:
    """`fused_cross_entropy` of logits whose classes lie on the ranks of a group, in rank order.

    Every rank calls it, with the same targets and options, and gets the same loss, bit for bit; its
    gradient is that of its own columns. 12 to 24 bytes a row and rank travel, in one all-gather.

    Args:
        logits_shard: this rank's columns of the logits: (N, C_r), (N, C_r, d1, ...) or (..., V_r),
            in the dtypes and layouts of `fused_cross_entropy`. Shards may have any sizes.
        targets: class indices in the whole vocabulary, the same on every rank; see
            `fused_cross_entropy` for shapes and dtypes. Probabilities are refused.
        weight: (C_r,), the factors of this rank's classes.
        group: the process group over whose ranks the vocabulary lies; None is the default group.
        ignore_index: as in `fused_cross_entropy`, as are the next two.
        reduction: "mean", "sum" or "none".
        label_smoothing: over the classes of all ranks.
        dim: the class axis of `logits_shard`; None lets the shape of `targets` decide. Pass it for
            logits of more than two axes: a rank that happens to have as many classes as there are
            tokens cannot tell, and raises while the others wait for it.
        sample_weight: the same on every rank, as are the next six; see `fused_cross_entropy`. Its
            gradient is whole on every rank: it is not to be summed over the group.
        normalizer: what "mean" divides by instead.
        z_loss: adds `z_loss * lse**2`, lse over all classes.
        logit_scale: multiplies the logits first.
        softcap: then takes `softcap * tanh(logits / softcap)` of them.
        inplace: let the gradient overwrite the storage of `logits_shard`.
        grad_in_forward: True makes the gradient in forward, after the exchange, so that the logits
            need not live until backward; None chooses as `fused_cross_entropy` does. Both routes
            read the logits twice.
        return_stats: return `(loss, CrossEntropyStats)` of the whole rows; predictions are class
            indices in the whole vocabulary.
        shard_sizes: how many classes each rank has, in rank order. None learns it from the first
            exchange, and remembers it by the group and the size of the own shard: on GPUs a second
            head whose shard is as large here, and of another size elsewhere, needs it.

    Returns:
        As `fused_cross_entropy`, equal on all ranks. Upstream gradients have to be equal too: they
        are those of one loss.

    Raises:
        TypeError, ValueError: as `fused_cross_entropy`. Under FUSED_CE_DEBUG=1, at the price of one
            more exchange, ValueError on all ranks that do not call alike, and says what differs.
        IndexError: on every rank, for a target that no rank has, on the CPU. On a GPU loss and
            gradient of that row are NaN.
        RuntimeError: torch.distributed is not initialised; ranks disagree on `shard_sizes`; a
            second derivative.

    Under torch.compile it breaks the graph. Ranks that do not call it leave the others waiting for
    as long as the group's own timeout says.
    """
    options = LossOptions(
        ignore_index, reduction, label_smoothing, inplace, grad_in_forward, normalizer, z_loss,
        logit_scale, softcap, return_stats,
    )  # fmt: skip
    call = prepare(logits_shard, targets, weight, sample_weight, dim, options)
    rows, options = call.rows, call.options
    _check(rows, group, rows.has_probabilities)
    check_memory(rows)
    if options.inplace and saved_tensors_have_hooks():
        options = options._replace(inplace=False)
    if options.inplace:
        check_overwritable(rows.logits)
    backend = choose(logits_shard.device)
    exchange = Exchange(group, rows.logits.shape[2], shard_sizes, backend)
    check_agreement(
        exchange.group, options, rows, dtype=str(logits_shard.dtype), shape=call.batch_shape,
        shard_sizes=shard_sizes,
    )  # fmt: skip
    is_matrix = logits_shard.dim() == 2 and call.dim == 1
    source = logits_shard if is_matrix else rows.logits
    return call.returned(sharded_cross_entropy(source, rows, options, backend, exchange))


@overload
def vocab_parallel_linear_cross_entropy(
    hidden: torch.Tensor, linear_weight_shard: torch.Tensor, targets: torch.Tensor, *,
    linear_bias_shard: torch.Tensor | None = None, weight: torch.Tensor | None = None,
    group: "dist.ProcessGroup | None" = None, reduce_hidden_grad: bool = True,
    ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    sample_weight: torch.Tensor | None = None, normalizer: float | torch.Tensor | None = None,
    z_loss: float = 0.0, logit_scale: float = 1.0, softcap: float | None = None,
    grad_in_forward: bool | None = None, return_stats: Literal[False] = False,
    logits_dtype: torch.dtype | None = None, skip_ignored: bool | None = None,
    chunk_size: int | None = None, shard_sizes: Sequence[int] | None = None,
) -> torch.Tensor: ...  # fmt: skip
@overload
def vocab_parallel_linear_cross_entropy(
    hidden: torch.Tensor, linear_weight_shard: torch.Tensor, targets: torch.Tensor, *,
    linear_bias_shard: torch.Tensor | None = None, weight: torch.Tensor | None = None,
    group: "dist.ProcessGroup | None" = None, reduce_hidden_grad: bool = True,
    ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    sample_weight: torch.Tensor | None = None, normalizer: float | torch.Tensor | None = None,
    z_loss: float = 0.0, logit_scale: float = 1.0, softcap: float | None = None,
    grad_in_forward: bool | None = None, return_stats: Literal[True],
    logits_dtype: torch.dtype | None = None, skip_ignored: bool | None = None,
    chunk_size: int | None = None, shard_sizes: Sequence[int] | None = None,
) -> tuple[torch.Tensor, CrossEntropyStats]: ...  # fmt: skip
@overload
def vocab_parallel_linear_cross_entropy(
    hidden: torch.Tensor, linear_weight_shard: torch.Tensor, targets: torch.Tensor, *,
    linear_bias_shard: torch.Tensor | None = None, weight: torch.Tensor | None = None,
    group: "dist.ProcessGroup | None" = None, reduce_hidden_grad: bool = True,
    ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    sample_weight: torch.Tensor | None = None, normalizer: float | torch.Tensor | None = None,
    z_loss: float = 0.0, logit_scale: float = 1.0, softcap: float | None = None,
    grad_in_forward: bool | None = None, return_stats: bool,
    logits_dtype: torch.dtype | None = None, skip_ignored: bool | None = None,
    chunk_size: int | None = None, shard_sizes: Sequence[int] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]: ...  # fmt: skip
@uncompiled
def vocab_parallel_linear_cross_entropy(
    hidden: torch.Tensor,
    linear_weight_shard: torch.Tensor,
    targets: torch.Tensor,
    *,
    linear_bias_shard: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    group: "dist.ProcessGroup | None" = None,
    reduce_hidden_grad: bool = True,
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
    shard_sizes: Sequence[int] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]:
    """`fused_linear_cross_entropy` of a head whose classes lie on the ranks of a group.

    Every rank has the same hidden states and its own rows of the head, and gets the same loss. Each
    holds the logits of a chunk of tokens for its classes, no more.

    Args:
        hidden: (..., H), the same on every rank.
        linear_weight_shard: (V_r, H), this rank's rows of the head's weight, in rank order.
        targets: (...), class indices in the whole vocabulary, the same on every rank.
        linear_bias_shard: (V_r,), this rank's part of the head's bias.
        weight: (V_r,), the factors of this rank's classes.
        group: the process group over whose ranks the vocabulary lies; None is the default group.
        reduce_hidden_grad: sum the gradient of `hidden` over the ranks, by one all-reduce in
            float32; False leaves this rank's part, which sequence parallelism scatters.
        ignore_index: see `fused_linear_cross_entropy`, as for all that follow.
        reduction: "mean", "sum" or "none".
        label_smoothing: over the classes of all ranks.
        sample_weight: one factor per target, the same on every rank.
        normalizer: what "mean" divides by instead.
        z_loss: adds `z_loss * lse**2`, lse over all classes.
        logit_scale: multiplies the logits first.
        softcap: then takes `softcap * tanh(logits / softcap)` of them.
        grad_in_forward: whether the gradients are made in forward, from the same logits.
        return_stats: return `(loss, CrossEntropyStats)` of the whole rows.
        logits_dtype: of the logits of a chunk; float32 for 16-bit operands keeps all digits.
        skip_ignored: leave ignored rows out of the products; on a GPU the host waits for their
            number.
        chunk_size: rows whose logits are held at once, the same on every rank.
        shard_sizes: see `vocab_parallel_cross_entropy`.

    Returns:
        As `vocab_parallel_cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `vocab_parallel_cross_entropy`.
    """
    check_cutting(skip_ignored, chunk_size)
    options = LossOptions(
        ignore_index, reduction, label_smoothing, False, grad_in_forward, normalizer, z_loss,
        logit_scale, softcap, return_stats,
    )  # fmt: skip
    head = prepare_head(
        hidden, linear_weight_shard, linear_bias_shard, targets, logits_dtype, is_shard=True
    )
    call = prepare(head.stand_in(), targets, weight, sample_weight, -1, options)
    check_whole(head)
    check_memory(call.rows)
    _check((*head[:3], *call.rows), group, call.rows.has_probabilities)
    backend = choose(hidden.device)
    exchange = Exchange(group, head.weight.shape[0], shard_sizes, backend)
    skips = hidden.device.type == "cpu" if skip_ignored is None else skip_ignored
    check_agreement(
        exchange.group, call.options, call.rows, dtype=str(hidden.dtype),
        shape=call.batch_shape, shard_sizes=shard_sizes,
        logits_dtype=str(head.logits_dtype), skip_ignored=skips, chunk_size=chunk_size,
        reduce_hidden_grad=reduce_hidden_grad, needs_grad=_needs(head),
    )  # fmt: skip
    plan = Plan(call.options, backend, head.logits_dtype, skips, chunk_size)
    results = sharded_linear_cross_entropy(head, call.rows, plan, exchange, reduce_hidden_grad)
    return call.returned(results)


def _check(
    tensors: Iterable[torch.Tensor | None],
    group: "dist.ProcessGroup | None",
    has_probabilities: bool,
) -> None:
    """What a shard cannot do."""
    if has_probabilities:
        raise TypeError(
            "targets must be class indices where the vocabulary is sharded, got probabilities"
        )
    if torch.jit.is_tracing() or is_transformed(tensors):
        raise RuntimeError(
            "a sharded vocabulary is differentiated by autograd alone, once: not by torch.func, "
            "forward-mode AD or a jit trace"
        )
    if not (group is None or isinstance(group, dist.ProcessGroup)):
        hint = ": pass mesh.get_group()" if hasattr(group, "get_group") else ""
        raise TypeError(f"group must be a ProcessGroup or None, got {type(group).__name__}{hint}")


def _needs(head: Head) -> bool:
    return torch.is_grad_enabled() and head.hidden.requires_grad
