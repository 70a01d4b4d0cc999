"""Hidden states to loss: the public function, and which of the paths below computes it."""

import math
from typing import Literal, overload

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fused_ce.arguments import check_memory, prepare
from fused_ce.backend import choose
from fused_ce.cross_entropy import fused_cross_entropy
from fused_ce.dtensors import is_dtensor, linear_cross_entropy_of_dtensors
from fused_ce.linear_arguments import Head, check_cutting, check_whole, prepare_head
from fused_ce.linear_autograd import linear_cross_entropy
from fused_ce.linear_chunks import Plan, without_autocast
from fused_ce.options import LossOptions
from fused_ce.reference import linear_logits
from fused_ce.rows import compute_dtype
from fused_ce.stats import CrossEntropyStats
from fused_ce.tracing import is_traced, is_transformed


@overload
def fused_linear_cross_entropy(
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
def fused_linear_cross_entropy(
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
def fused_linear_cross_entropy(
    hidden: torch.Tensor, linear_weight: torch.Tensor, targets: torch.Tensor, *,
    linear_bias: torch.Tensor | None = None, weight: torch.Tensor | None = None,
    ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    sample_weight: torch.Tensor | None = None, normalizer: float | torch.Tensor | None = None,
    z_loss: float = 0.0, logit_scale: float = 1.0, softcap: float | None = None,
    grad_in_forward: bool | None = None, return_stats: bool,
    logits_dtype: torch.dtype | None = None, skip_ignored: bool | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]: ...  # fmt: skip
def fused_linear_cross_entropy(
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
    """`fused_cross_entropy(F.linear(hidden, linear_weight, linear_bias), targets)`, without logits.

    They are made a chunk of rows at a time, in one buffer, which their gradient overwrites before
    it goes into those of `hidden`, `linear_weight` and `linear_bias`. Three matrix products in all,
    four where gradients are made in backward; none of those that nobody needs. Whole logits are
    made for derivatives beyond the first, torch.func, vmap, forward-mode AD, torch.jit.trace and
    backend("reference"). Compilers and dispatch modes see one operator and no logits.

    Args:
        hidden: (..., H); float16, bfloat16, float32 or float64. Rows with the target
            `ignore_index` may hold anything, NaN too. Under autocast it is cast as by `F.linear`,
            and so are the next two.
        linear_weight: (V, H) of the dtype of `hidden`, whole: where FSDP or ZeRO-3 hold shards of
            it, call the loss inside the module's forward or under `unshard()`. The gradient of 16
            bits is summed over the chunks in float32 and rounded once.
        targets: (...) of any integer dtype, or probabilities (..., V).
        linear_bias: (V,), or None.
        weight: (V,), floating: a factor per class. It receives no gradient.
        ignore_index: rows with this target are 0 in loss and gradient.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        sample_weight: (...), floating: one factor per target. It receives a gradient.
        normalizer: what "mean" divides by instead, a positive number or a 0-d tensor.
        z_loss: adds `z_loss * lse**2` to every row that is not ignored.
        logit_scale: multiplies the logits first.
        softcap: then takes `softcap * tanh(logits / softcap)` of them.
        grad_in_forward: True makes the gradients together with the loss, and backward only
            multiplies them; False makes the logits again in backward, as always for "none",
            probabilities that need a gradient, and gradients through the stats. None chooses True,
            except for float16.
        return_stats: return `(loss, CrossEntropyStats)`; gradients flow through the stats.
        logits_dtype: None, the dtype of the operands, or torch.float32: products of 16-bit
            operands are then summed and kept in float32, and the gradient of the logits is rounded
            once, to the dtype of the operands. On a CPU that takes a copy of the weight in float32.
        skip_ignored: True leaves the rows of `ignore_index` out of the matrix products. None does
            so on a CPU; on a GPU, where it stops the host once to learn how many there are, it
            does not.
        chunk_size: rows of logits held at once; None chooses, see `linear_chunks.rows_at_once`: on
            a CPU 512 to 1,024 (half in 16 bits, or 2,048 where it multiplies them), on a GPU 2,048
            or as many as a GiB has room for.

    Returns:
        The loss in nats, float32 (float64 for float64): a scalar, or the shape of `targets` for
        "none". What is not said here is as in `fused_cross_entropy`.

    Raises:
        TypeError: an argument has a type or dtype that is not supported.
        ValueError: shapes or devices do not agree, or an option is out of its range.
        IndexError: a target is out of range, as in `fused_cross_entropy`.
    """
    tensors = (hidden, linear_weight, targets, linear_bias, weight, sample_weight, normalizer)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            fused_linear_cross_entropy, tensors, hidden, linear_weight, targets,
            linear_bias=linear_bias, weight=weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, sample_weight=sample_weight, normalizer=normalizer,
            z_loss=z_loss, logit_scale=logit_scale, softcap=softcap,
            grad_in_forward=grad_in_forward, return_stats=return_stats, logits_dtype=logits_dtype,
            skip_ignored=skip_ignored, chunk_size=chunk_size,
        )  # fmt: skip
    check_cutting(skip_ignored, chunk_size)
    if any(map(is_dtensor, tensors)):
        return linear_cross_entropy_of_dtensors(
            fused_linear_cross_entropy, hidden, linear_weight, targets, linear_bias=linear_bias,
            weight=weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, sample_weight=sample_weight, normalizer=normalizer,
            z_loss=z_loss, logit_scale=logit_scale, softcap=softcap,
            grad_in_forward=grad_in_forward, return_stats=return_stats, logits_dtype=logits_dtype,
            skip_ignored=skip_ignored, chunk_size=chunk_size,
        )  # fmt: skip
    head = prepare_head(hidden, linear_weight, linear_bias, targets, logits_dtype)
    backend = choose(hidden.device)
    operands = (head.hidden, head.weight, head.bias, targets, sample_weight)
    if backend == "reference" or torch.jit.is_tracing() or is_transformed(operands):
        with without_autocast(hidden.device):
            logits = linear_logits(*head[:3], targets, ignore_index, head.logits_dtype)
        return fused_cross_entropy(
            logits, targets, weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, dim=-1, sample_weight=sample_weight,
            normalizer=normalizer, z_loss=z_loss, logit_scale=logit_scale, softcap=softcap,
            grad_in_forward=grad_in_forward, return_stats=return_stats,
        )  # fmt: skip
    options = LossOptions(
        ignore_index, reduction, label_smoothing, False, grad_in_forward, normalizer, z_loss,
        logit_scale, softcap, return_stats,
    )  # fmt: skip
    cutting = skip_ignored, chunk_size
    return _in_chunks(head, targets, weight, sample_weight, options, backend, cutting)


def _in_chunks(
    head: Head,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    sample_weight: torch.Tensor | None,
    options: LossOptions,
    backend: str,
    cutting: tuple[bool | None, int | None],
) -> torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]:
    """The loss without whole logits; cutting is (skip_ignored, chunk_size)."""
    call = prepare(head.stand_in(), targets, weight, sample_weight, -1, options)
    if not is_traced(head.hidden):
        check_whole(head)
        check_memory(call.rows)
    n_rows, vocab_size = math.prod(head.hidden.shape[:-1]), head.weight.shape[0]
    flat = call.rows.targets.reshape(1, n_rows, *call.rows.targets.shape[2:])
    rows = call.rows._replace(
        logits=call.rows.logits.reshape(1, n_rows, vocab_size),
        targets=flat if call.rows.has_probabilities else flat.long(),
    )
    options = call.options
    if options.normalizer is not None:  # a number of an operator would be a constant of a graph
        ones = rows.logits.new_ones((), dtype=compute_dtype(rows.logits))
        rows = rows._replace(normalizer=ones * options.normalizer)
        options = options._replace(normalizer=None)
    skips, chunk_size = cutting
    skips = head.hidden.device.type == "cpu" if skips is None else skips
    plan = Plan(options, backend, head.logits_dtype, skips, chunk_size)
    states = head.hidden.reshape(n_rows, head.hidden.shape[-1])
    return call.returned(linear_cross_entropy((states, head.weight, head.bias), rows, plan))
