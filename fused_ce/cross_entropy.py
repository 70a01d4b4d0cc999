"""The loss: check the arguments, see them as rows, choose who computes, hand back the result."""

import numbers
import operator
import os
from dataclasses import replace
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
            size; where rows share memory, or their batch axes need a copy, it cannot. Whatever
            reads the logits afterwards reads the gradient. Their version counter is bumped: a
            backward that needs the logits as they were raises.
        grad_in_forward: True computes the gradient together with the loss, and backward only
            multiplies it by the upstream gradient; False reads the logits again in backward. None
            chooses True for "mean" and "sum" except in float16, where a gradient could underflow
            before a GradScaler's factor reaches it.

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
    options = LossOptions(ignore_index, reduction, label_smoothing, inplace, grad_in_forward)
    call = prepare(logits, targets, weight, dim, options)
    name = choose(logits.device)
    if host_may_read(logits.device, name):
        check_targets_in_range(targets, call.logits.shape[-1], ignore_index)
    if name == "reference":
        from fused_ce.reference import reference

        loss = reference(*call)
    else:
        loss = cross_entropy(*call, implementation(name))
    return loss.view(targets.shape) if reduction == "none" else loss


def host_may_read(device: torch.device, name: str) -> bool:
    """Whether looking at the targets costs nothing, or was asked for at any cost."""
    return device.type == "cpu" and name != "triton" or os.environ.get("FUSED_CE_DEBUG") == "1"


class Call(NamedTuple):
    """Checked arguments: rows of logits and targets (see rows.py), weight and options."""

    logits: torch.Tensor
    targets: torch.Tensor
    weight: torch.Tensor | None
    options: LossOptions


def prepare(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    dim: int | None,
    options: LossOptions,
) -> Call:
    """Check everything that the host can see without reading a tensor, and make rows of it."""
    _check_tensors(logits, targets, weight)
    check_options(options)
    dim = class_axis(logits.shape, targets.shape, dim)
    vocab_size = logits.shape[dim]
    if vocab_size == 0:
        raise ValueError(f"logits need at least one class, got {tuple(logits.shape)}")
    _check_weight_and_devices(logits, targets, weight, vocab_size)
    if type(options.ignore_index) is not int or type(options.label_smoothing) is not float:
        options = replace(  # NumPy's, say, which a kernel cannot take
            options,
            ignore_index=operator.index(options.ignore_index),
            label_smoothing=float(options.label_smoothing),
        )
    return Call(*as_rows(logits, targets, dim), weight, options)


def check_options(options: LossOptions) -> None:
    """Raise TypeError or ValueError for what no logits could make right."""
    if options.reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {options.reduction!r}')
    smoothing = options.label_smoothing
    if isinstance(smoothing, bool) or not isinstance(smoothing, numbers.Real):
        raise TypeError(f"label_smoothing must be a number, got {smoothing!r}")
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {smoothing}")
    ignore_index = options.ignore_index
    if isinstance(ignore_index, bool) or not hasattr(ignore_index, "__index__"):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits, got {ignore_index}")
    if not isinstance(options.inplace, bool):
        raise TypeError(f"inplace must be True or False, got {options.inplace!r}")
    if not (options.grad_in_forward is None or isinstance(options.grad_in_forward, bool)):
        raise TypeError(
            f"grad_in_forward must be None, True or False, got {options.grad_in_forward!r}"
        )


def class_axis(logits_shape: torch.Size, targets_shape: torch.Size, dim: int | None) -> int:
    """The class axis of the logits: `dim` if given, else the one that the targets' shape leaves."""
    shape, got = tuple(logits_shape), tuple(targets_shape)
    if len(shape) == 0:
        raise ValueError("logits need a class axis, got a 0-d tensor")
    if dim is not None:
        if isinstance(dim, bool) or not hasattr(dim, "__index__"):
            raise TypeError(f"dim must be an int or None, got {dim!r}")
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


def _check_tensors(logits, targets, weight) -> None:
    for name, value in (("logits", logits), ("targets", targets)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {value.layout}")
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if targets.dtype not in TARGET_DTYPES:
        hint = "; probabilities are not supported yet" if targets.shape == logits.shape else ""
        raise TypeError(
            f"targets must be class indices of an integer dtype, got {targets.dtype}{hint}"
        )
    if weight is not None and not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a torch.Tensor or None, got {type(weight).__name__}")
    if weight is not None and not weight.is_floating_point():
        raise TypeError(f"weight must be floating, got {weight.dtype}")


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
