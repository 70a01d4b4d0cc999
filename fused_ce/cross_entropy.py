"""Logits to loss: the public function, and which of the paths below computes it."""

from typing import Literal, overload

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fused_ce.arguments import check_memory, check_overwritable, check_targets_on_host, prepare
from fused_ce.autograd import cross_entropy
from fused_ce.backend import choose
from fused_ce.dtensors import cross_entropy_of_dtensors, is_dtensor
from fused_ce.options import LossOptions
from fused_ce.reference import reference
from fused_ce.row_losses import cross_entropy_of_rows
from fused_ce.rows import Rows
from fused_ce.stats import CrossEntropyStats
from fused_ce.tracing import is_traced, is_transformed, saved_tensors_have_hooks


@overload
def fused_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None, *,
    ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    dim: int | None = None, sample_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None, z_loss: float = 0.0, logit_scale: float = 1.0,
    softcap: float | None = None, inplace: bool = False, grad_in_forward: bool | None = None,
    return_stats: Literal[False] = False,
) -> torch.Tensor: ...  # fmt: skip
@overload
def fused_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None, *,
    ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    dim: int | None = None, sample_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None, z_loss: float = 0.0, logit_scale: float = 1.0,
    softcap: float | None = None, inplace: bool = False, grad_in_forward: bool | None = None,
    return_stats: Literal[True],
) -> tuple[torch.Tensor, CrossEntropyStats]: ...  # fmt: skip
@overload
def fused_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None, *,
    ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    dim: int | None = None, sample_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None, z_loss: float = 0.0, logit_scale: float = 1.0,
    softcap: float | None = None, inplace: bool = False, grad_in_forward: bool | None = None,
    return_stats: bool,
) -> torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]: ...  # fmt: skip
def fused_cross_entropy(
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
    """Cross-entropy of classes or probabilities, as `torch.nn.functional.cross_entropy` has it.

    With x = logits * logit_scale, capped, s = label_smoothing, C classes and lse =
    log(sum(exp(x))), a row with target y and sample_weight v costs `v * (weight[y] * (1 - s) *
    (lse - x[y]) + s / C * sum_c weight[c] * (lse - x[c]) + z_loss * lse**2)`. Probabilities p
    stand for `sum_c weight[c] * ((1 - s) * p[c] + s / C) * (lse - x[c])` there.

    Args:
        logits: (C,), (N, C), (N, C, d1, ...) as torch, or (..., V) as language models; float16,
            bfloat16, float32 or float64; any strides. Arithmetic is float32 (float64 for float64).
        targets: the shape of `logits` without its class axis; any integer dtype, each in [0, C)
            or `ignore_index`. Their shape tells where the class axis is; where both readings fit,
            as (N, C, C) with (N, C), pass `dim`. Or probabilities, floating, of the shape of
            `logits` (of three or more axes they need `dim`); they may sum to anything.
        weight: (C,), floating: a factor per class. It receives no gradient.
        ignore_index: rows with this target are 0 in loss and gradient, whatever their logits hold.
        reduction: "mean" (over the class weights of what is not ignored, times sample_weight; of
            probabilities over the rows, or their sample_weight), "sum" or "none".
        label_smoothing: in [0, 1]; how much of the target is spread evenly over the classes.
        dim: the class axis of `logits`; None lets the shape of `targets` decide.
        sample_weight: one factor per target, in the shape that `targets` of classes have;
            floating. It receives a gradient.
        normalizer: what "mean" divides by instead, a positive number or a 0-d tensor on the device
            of `logits`, for which a GPU does not stop: the number of tokens of all micro-batches,
            say. All rows ignored is then 0 (unless a tensor is 0). It receives no gradient.
        z_loss: adds `z_loss * lse**2` to every row that is not ignored, inside sample_weight.
        logit_scale: multiplies the logits first; a number, it cannot be learnt.
        softcap: then takes `softcap * tanh(logits / softcap)` of them; None does not.
        inplace: let the gradient overwrite the storage of `logits`, which saves a buffer of their
            size; where rows share memory, or their batch axes need a copy, under torch.compile, and
            under hooks on saved tensors (those of a checkpoint, say), it does not. Whatever
            reads the logits afterwards reads the gradient. Their version counter is bumped: a
            backward that needs the logits as they were raises.
        grad_in_forward: True computes the gradient together with the loss, and backward only
            multiplies it by the upstream gradient; False reads the logits again in backward. None
            chooses True for "mean" and "sum", except in float16, where a gradient could underflow
            before a GradScaler's factor reaches it, and except for stats with `inplace`. Under
            torch.compile, torch.func and forward-mode AD it is False. Either way the logits live
            until backward, which a second derivative may ask of; not where `inplace` is True.
            Probabilities that need a gradient, and gradients through the stats, come from a second
            reading in any case: False spares the first gradient.
        return_stats: return `(loss, CrossEntropyStats)`, from the same pass over the logits, which
            are then kept until backward: a gradient through the stats reads them again.

    Returns:
        The loss in nats, float32 (float64 for float64): a scalar, or the shape of `targets` for
        "none". All rows ignored: "mean" is NaN with zero gradient, as torch.

    Raises:
        TypeError: an argument has a type or dtype that is not supported.
        ValueError: shapes or devices do not agree, the class axis is ambiguous, or an option is
            out of its range.
        IndexError: a target is out of range, on the CPU. On a GPU, where a check would stop the
            device, loss and gradient of that row are NaN; FUSED_CE_DEBUG=1 checks there too.
        RuntimeError: `inplace` has overwritten the logits that a second derivative
            (`create_graph=True`), torch.func, forward-mode AD or a gradient through the stats
            reads again.
    """
    if has_torch_function_variadic(logits, targets, weight, sample_weight, normalizer):
        return handle_torch_function(
            fused_cross_entropy, (logits, targets, weight, sample_weight, normalizer),
            logits, targets, weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, dim=dim, sample_weight=sample_weight,
            normalizer=normalizer, z_loss=z_loss, logit_scale=logit_scale, softcap=softcap,
            inplace=inplace, grad_in_forward=grad_in_forward, return_stats=return_stats,
        )  # fmt: skip
    if any(map(is_dtensor, (logits, targets, weight, sample_weight, normalizer))):
        return cross_entropy_of_dtensors(
            fused_cross_entropy, logits, targets, weight, ignore_index=ignore_index,
            reduction=reduction, label_smoothing=label_smoothing, dim=dim,
            sample_weight=sample_weight, normalizer=normalizer, z_loss=z_loss,
            logit_scale=logit_scale, softcap=softcap, inplace=inplace,
            grad_in_forward=grad_in_forward, return_stats=return_stats,
        )  # fmt: skip
    options = LossOptions(
        ignore_index, reduction, label_smoothing, inplace, grad_in_forward, normalizer, z_loss,
        logit_scale, softcap, return_stats,
    )  # fmt: skip
    call = prepare(logits, targets, weight, sample_weight, dim, options)
    is_matrix = logits.dim() == 2 and call.dim == 1
    source = logits if is_matrix else call.rows.logits
    return call.returned(_compute(source, call.rows, call.options, choose(logits.device)))


def _compute(
    source: torch.Tensor, rows: Rows, options: LossOptions, backend: str
) -> tuple[torch.Tensor, ...]:
    """(loss,), or (loss, losses, lse, entropy, predictions) with return_stats; see rows.py.

    A loss is (n_rows,) or its scalar reduction, the rest is (n_rows,). `source` is the logits of
    the rows, or these without the axis of groups.
    """
    # A jit trace records what it sees: the implementations read targets, which would be constants.
    if torch.jit.is_tracing():
        return reference(rows, options)
    traced, transformed = is_traced(rows.logits), is_transformed(rows)
    has_values = not traced and not transformed
    if has_values:
        check_targets_on_host(rows, options, backend)
    # Compilers do not differentiate operators inside of torch.func: they get plain PyTorch.
    if backend == "reference" or rows.has_no_classes or traced and transformed:
        return reference(rows, options)
    if has_values:
        check_memory(rows)
        if options.inplace and saved_tensors_have_hooks():
            # Who saves through hooks, a checkpoint say, is not told that a tensor was overwritten.
            options = options._replace(inplace=False)
        if options.inplace:
            check_overwritable(rows.logits)
        return cross_entropy(source, rows, options, backend)
    return cross_entropy_of_rows(rows, options, backend)
