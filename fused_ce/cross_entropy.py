"""The loss: check the arguments, see them as rows, choose who computes, hand back the result."""

import os
from typing import NamedTuple

import torch

from fused_ce.autograd import cross_entropy
from fused_ce.backend import choose, implementation
from fused_ce.options import LossOptions
from fused_ce.rows import as_rows

LOGITS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TARGET_DTYPES = (
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
REDUCTIONS = ("mean", "sum", "none")


def fused_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    dim: int | None = None,
    inplace: bool = False,
    grad_in_forward: bool | None = None,
) -> torch.Tensor:
    """Cross-entropy of class indices, as `torch.nn.functional.cross_entropy` computes it.

    With s = label_smoothing, C classes and lse = log(sum(exp(logits))) of a row with target y:
    `loss = weight[y] * (1 - s) * (lse - logits[y]) + s / C * sum_c weight[c] * (lse - logits[c])`.

    Args:
        logits: (C,), (N, C), (N, C, d1, ...) as torch, or (..., V) as language models; float16,
            bfloat16, float32 or float64; any strides. Arithmetic is float32 (float64 for float64).
        targets: the shape of `logits` without its class axis; any integer dtype, each in [0, C)
            or `ignore_index`. Their shape tells where the class axis is; where both readings fit,
            as (N, C, C) with (N, C), pass `dim`.
        weight: (C,), floating: a factor per class. It receives no gradient.
        ignore_index: rows with this target are 0 in loss and gradient, whatever their logits hold.
        reduction: "mean" (over the class weights of what is not ignored), "sum" or "none".
        label_smoothing: in [0, 1]; how much of the target is spread evenly over the classes.
        dim: the class axis of `logits`; None lets the shape of `targets` decide.
        inplace: let the gradient overwrite the storage of `logits`, which saves a buffer of their
            size. Their version counter is bumped, so that autograd refuses a later use of them.
        grad_in_forward: True computes the gradient together with the loss, in one pass over the
            logits, and backward only multiplies it by the upstream gradient; False reads the
            logits again in backward. None chooses True for "mean" and "sum" except in float16,
            where a gradient could underflow before a GradScaler's factor reaches it.

    Returns:
        The loss in nats, float32 (float64 for float64): a scalar, or the shape of `targets` for
        "none". All rows ignored: "mean" is NaN with zero gradient, as torch.

    Raises:
        TypeError: an argument has a type or dtype that is not supported.
        ValueError: shapes or devices do not agree, the class axis is ambiguous, or an option is
            out of its range.
        IndexError: a target is out of range, on the CPU. On a GPU, where a check would stop the
            device, loss and gradient of that row are NaN; FUSED_CE_DEBUG=1 checks there too.
        RuntimeError: backward under `create_graph=True`: not differentiable twice yet.
    """
    call = prepare(
        logits, targets, weight, ignore_index, reduction, label_smoothing, dim, inplace,
        grad_in_forward,
    )  # fmt: skip
    name = choose(logits.device)
    if _host_may_read(logits.device, name):
        check_targets_in_range(targets, call.logits.shape[-1], ignore_index)
    if name == "reference":
        from fused_ce.reference import reference

        loss = reference(*call)
    else:
        loss = cross_entropy(*call, implementation(name))
    return loss.view(targets.shape) if reduction == "none" else loss


def _host_may_read(device: torch.device, name: str) -> bool:
    """Whether looking at the targets costs nothing, or was asked for at any cost."""
    return device.type == "cpu" and name != "triton" or os.environ.get("FUSED_CE_DEBUG") == "1"


class Call(NamedTuple):
    """Checked arguments: rows of logits and targets (see rows.py), weight and options."""

    logits: torch.Tensor
    targets: torch.Tensor
    weight: torch.Tensor | None
    options: LossOptions


def prepare(
    logits, targets, weight, ignore_index, reduction, label_smoothing, dim, inplace, grad_in_forward
) -> Call:
    """Check everything that the host can see without reading a tensor, and make rows of it."""
    _check_types(logits, targets, weight, ignore_index)
    check_options(reduction, label_smoothing)
    dim = class_axis(logits.shape, targets.shape, dim)
    vocab_size = logits.shape[dim]
    if vocab_size == 0:
        raise ValueError(f"logits {tuple(logits.shape)} have no class: axis {dim} is empty")
    _check_weight_and_devices(logits, targets, weight, vocab_size)
    if grad_in_forward is None:
        grad_in_forward = reduction != "none" and logits.dtype != torch.float16
    rows, row_targets = as_rows(logits, targets, dim)
    options = LossOptions(
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=float(label_smoothing),
        inplace=inplace,
        grad_in_forward=grad_in_forward,
    )
    return Call(rows, row_targets, weight, options)


def check_options(reduction: str, label_smoothing: float) -> None:
    """Raise ValueError for what no logits could make right."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def class_axis(logits_shape: torch.Size, targets_shape: torch.Size, dim: int | None) -> int:
    """The class axis of the logits: `dim` if given, else the one that the targets' shape leaves."""
    shape, got = tuple(logits_shape), tuple(targets_shape)
    if len(shape) == 0:
        raise ValueError("logits need a class axis, got a 0-d tensor")
    if dim is not None:
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"dim={dim} is out of range for logits {shape}")
        dim %= len(shape)
        need = shape[:dim] + shape[dim + 1 :]
        if got != need:
            raise ValueError(f"logits {shape} with dim={dim} need targets {need}, got {got}")
        return dim
    last, second = shape[:-1], shape[:1] + shape[2:]  # what (..., V) and (N, C, d1, ...) leave
    if len(shape) <= 2:
        second = last
    if got == last == second and len(shape) > 2:
        raise ValueError(
            f"logits {shape} with targets {got} could have their classes on axis 1, as torch reads "
            "them, or on the last axis, as language models do: pass dim=1 or dim=-1"
        )
    if got == last:
        return len(shape) - 1
    if got == second:
        return 1
    need = f"{last}" if last == second else f"{last} (classes last) or {second} (classes on axis 1)"
    raise ValueError(f"logits {shape} need targets {need}, got {got}")


def _check_types(logits, targets, weight, ignore_index) -> None:
    for name, value in (("logits", logits), ("targets", targets)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if targets.dtype not in TARGET_DTYPES:
        raise TypeError(f"targets must be class indices of an integer dtype, got {targets.dtype}")
    if weight is not None and not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a torch.Tensor or None, got {type(weight).__name__}")
    if weight is not None and not weight.is_floating_point():
        raise TypeError(f"weight must be floating, got {weight.dtype}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")


def _check_weight_and_devices(logits, targets, weight, vocab_size) -> None:
    if weight is not None and tuple(weight.shape) != (vocab_size,):
        raise ValueError(
            f"{vocab_size} classes need weight ({vocab_size},), got {tuple(weight.shape)}"
        )
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight gets no gradient: pass weight.detach()")
    for name, tensor in (("targets", targets), ("weight", weight)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"logits on {logits.device} need {name} there, got {tensor.device}")


def check_targets_in_range(targets: torch.Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise IndexError with row and value of the first target that is no class and not ignored.

    Reads the targets on the host: never on a GPU unless FUSED_CE_DEBUG asks for it.
    """
    if targets.numel() == 0:
        return
    flat = targets.reshape(-1).long()
    lowest, highest = (int(bound) for bound in torch.aminmax(flat))
    if lowest < 0 or highest >= vocab_size:
        wrong = ((flat < 0) | (flat >= vocab_size)) & (flat != ignore_index)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise IndexError(
                f"target {int(flat[row])} of row {row} is out of range: need 0 <= target < "
                f"{vocab_size}, or ignore_index ({ignore_index})"
            )
